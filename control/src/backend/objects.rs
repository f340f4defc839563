//! Objects: iothreads by id.
//!
//! Owns: their ids and who uses them. All of them are the one core that serves everything for now;
//! an id only has to be known.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::control::{Control, Result};
use super::errors::Failure;
use crate::cli::is_identifier;
use crate::limits::OBJECTS_MAX;
use crate::schema::ObjectAdd;

/// The objects of the daemon.
#[derive(Debug, Default)]
pub(super) struct Objects {
    known: RefCell<BTreeSet<String>>,
    /// Exports and the iothread that each was given.
    uses: RefCell<BTreeMap<String, String>>,
}

impl Objects {
    /// `object-add`.
    pub(super) fn add(&self, object: &ObjectAdd) -> Result<()> {
        let id = &object.id;
        if !is_identifier(id) {
            return Err(Failure::generic("Parameter 'id' expects an identifier").hinted(
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        let iothread = &object.iothread;
        for (name, value) in [
            ("aio-max-batch", iothread.aio_max_batch),
            ("poll-max-ns", iothread.poll_max_ns),
            ("poll-grow", iothread.poll_grow),
            ("poll-shrink", iothread.poll_shrink),
            ("thread-pool-min", iothread.thread_pool_min),
            ("thread-pool-max", iothread.thread_pool_max),
        ] {
            if value.is_some_and(|value| value < 0) {
                let max = i64::MAX;
                let desc = format!("{name} value must be in range [0, {max}]");
                return Err(Failure::generic(desc));
            }
        }
        let mut known = self.known.borrow_mut();
        if known.contains(id) {
            let kind = "to object (type 'container')";
            let desc = format!("attempt to add duplicate property '{id}' {kind}");
            return Err(Failure::generic(desc));
        }
        if known.len() >= OBJECTS_MAX {
            return Err(Failure::generic(format!("Too many objects (at most {OBJECTS_MAX})")));
        }
        known.insert(id.clone());
        Ok(())
    }

    /// Checks that an export may name the iothread `id`.
    pub(super) fn find(&self, id: &str) -> Result<()> {
        if self.known.borrow().contains(id) {
            return Ok(());
        }
        Err(Failure::generic(format!("iothread \"{id}\" not found")))
    }

    /// Export `export` uses iothread `id` as long as it exists.
    pub(super) fn used_by(&self, id: &str, export: &str) {
        self.uses.borrow_mut().insert(export.to_owned(), id.to_owned());
    }
}

impl Control {
    /// `object-del`.
    pub(super) fn remove_object(&self, id: &str) -> Result<()> {
        if !self.objects.known.borrow().contains(id) {
            return Err(Failure::generic(format!("object '{id}' not found")));
        }
        let exports = self.exports.list();
        let mut uses = self.objects.uses.borrow_mut();
        uses.retain(|export, _| exports.iter().any(|info| info.id == *export));
        if uses.values().any(|used| used == id) {
            return Err(Failure::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        self.objects.known.borrow_mut().remove(id);
        Ok(())
    }
}
