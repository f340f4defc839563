//! The formats of this crate, by name.

use std::sync::Arc;

use liveblk_engine::format::Registry;

use crate::qcow2::Qcow2Driver;
use crate::raw::RawDriver;

/// A registry with raw and qcow2.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(Arc::new(RawDriver));
    registry.register(Arc::new(Qcow2Driver::default()));
    registry
}
