//! qcow2 by name, for the engine's registry.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::format::{CreateImage, Driver, Format, LocalFuture, OpenImage};
use liveblk_engine::storage::Storage;

use super::create::create_with_data;
use super::create_options::CreateOptions;
use super::image::Qcow2;
use super::layout::MAGIC;
use super::open;
use super::options::Options;

/// Opens and creates qcow2 images.
#[derive(Clone, Debug, Default)]
pub struct Qcow2Driver {
    options: Options,
}

impl Qcow2Driver {
    /// A driver that opens images with these options.
    pub fn with_options(options: Options) -> Self {
        Self { options }
    }
}

impl Driver for Qcow2Driver {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn recognises(&self, head: &[u8]) -> bool {
        head.starts_with(&MAGIC.to_be_bytes())
    }

    fn open(&self, open: OpenImage) -> LocalFuture<'static, Result<Rc<dyn Format>>> {
        let options = self.options.clone();
        Box::pin(async move {
            let image = open::open(open, options).await?;
            let format: Rc<dyn Format> = Rc::new(Qcow2(image));
            Ok(format)
        })
    }

    fn create(
        &self,
        core: Core,
        storage: Storage,
        image: CreateImage,
    ) -> LocalFuture<'static, Result<()>> {
        Box::pin(async move {
            let options = CreateOptions::parse(&image);
            let options = options.map_err(|reason| reason.error("create").on(storage.name()))?;
            create_with_data(&core, &storage, image.data.as_ref(), options).await
        })
    }
}
