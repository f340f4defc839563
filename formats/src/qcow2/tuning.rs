//! Options that change while the image is open.
//!
//! All options are checked as at opening. What takes effect at once: which metadata is guarded
//! against overlaps. The sizes of caches stay those that the image was opened with.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::format::{Applied, FormatOptions, RuntimeOptions};

use super::image::Image;
use super::options::{OptionFault, Options};
use crate::reason::Reason;

/// See the module.
pub(super) struct Tuning(pub(super) Rc<Image>);

impl RuntimeOptions for Tuning {
    fn prepare(&self, given: &FormatOptions, discard_unmap: bool) -> Result<Applied> {
        let image = Rc::clone(&self.0);
        let name = image.filename.to_string_lossy().into_owned();
        let refuse = |fault: OptionFault| Reason::Option(fault).error("change options").on(&name);
        let options = Options { discard_unmap, ..Options::default() };
        let options = options.with(given).map_err(refuse)?;
        options.check(image.geometry.version, image.geometry.cluster()).map_err(refuse)?;
        Ok(Box::new(move || image.state.borrow_mut().overlap = options.overlap))
    }
}
