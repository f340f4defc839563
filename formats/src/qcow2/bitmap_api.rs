//! The bitmaps of an image as the engine sees them. Every change runs as a task of the image.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::format::{BitmapInfo, InfoValue, KeptBitmap, LocalFuture, StoredBitmaps};

use super::image::Image;

/// The handle that [`liveblk_engine::format::Abilities`] holds.
pub(super) struct Handle(pub(super) Rc<Image>);

impl Handle {
    fn run<T: 'static>(
        &self,
        change: impl FnOnce(Rc<Image>) -> LocalFuture<'static, Result<T>>,
    ) -> LocalFuture<'static, Result<T>> {
        self.0.run(change(Rc::clone(&self.0)))
    }
}

impl StoredBitmaps for Handle {
    fn list(&self) -> Vec<BitmapInfo> {
        self.0.bitmaps.borrow().infos()
    }

    fn default_granularity(&self) -> u64 {
        self.0.geometry.cluster().clamp(4 << 10, 64 << 10)
    }

    fn load(&self, name: &str) -> LocalFuture<'static, Result<DirtyBitmap>> {
        let name = name.to_owned();
        self.run(|image| Box::pin(image.load_bitmap(name)))
    }

    fn add(&self, name: &str, granularity: u64, enabled: bool) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(move |image| Box::pin(image.put_bitmap(name, None, granularity, enabled, None)))
    }

    fn store(
        &self,
        name: &str,
        bits: DirtyBitmap,
        enabled: bool,
    ) -> LocalFuture<'static, Result<()>> {
        let (name, granularity) = (name.to_owned(), bits.granularity());
        self.run(move |image| {
            Box::pin(image.put_bitmap(name, Some(bits), granularity, enabled, None))
        })
    }

    fn remove(&self, name: &str) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(|image| Box::pin(image.remove_bitmap(name)))
    }

    fn clear(&self, name: &str) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(|image| Box::pin(image.clear_bitmap(name)))
    }

    fn set_enabled(&self, name: &str, enabled: bool) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(move |image| Box::pin(image.enable_bitmap(name, enabled)))
    }

    fn merge(&self, name: &str, source: DirtyBitmap) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(|image| Box::pin(image.merge_bitmap(name, source)))
    }

    fn keep(&self, name: &str, kept: Rc<dyn KeptBitmap>) {
        self.0.keep_bitmap(name, kept);
    }

    fn add_kept(
        &self,
        name: &str,
        granularity: u64,
        kept: Rc<dyn KeptBitmap>,
    ) -> LocalFuture<'static, Result<()>> {
        let (name, enabled) = (name.to_owned(), kept.is_enabled());
        self.run(move |image| {
            Box::pin(image.put_bitmap(name, None, granularity, enabled, Some(kept)))
        })
    }

    fn mark(&self, name: &str) -> LocalFuture<'static, Result<()>> {
        let name = name.to_owned();
        self.run(|image| {
            Box::pin(async move { image.mark_those(|bitmap| bitmap.is_called(&name)).await })
        })
    }
}

impl Image {
    /// The list that queries show (QMP `Qcow2BitmapInfo`), if there is a bitmap.
    pub(super) fn bitmap_facts(&self) -> Option<InfoValue> {
        let infos = self.bitmaps.borrow().infos();
        if infos.is_empty() {
            return None;
        }
        let fact = |info: BitmapInfo| {
            let flags = [("in-use", info.in_use), ("auto", info.enabled)];
            let flags = flags.into_iter().filter(|(_, set)| *set);
            let flags = flags.map(|(flag, _)| InfoValue::Text(flag.to_owned())).collect();
            InfoValue::Record(vec![
                ("flags", InfoValue::List(flags)),
                ("name", InfoValue::Text(info.name)),
                ("granularity", InfoValue::Number(info.granularity)),
            ])
        };
        Some(InfoValue::List(infos.into_iter().map(fact).collect()))
    }
}
