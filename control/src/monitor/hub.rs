//! Events to every negotiated connection.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::output::Output;
use crate::qmp::Event;

/// The connections that get events.
#[derive(Debug, Default)]
pub(super) struct Hub {
    outputs: Mutex<Vec<Weak<Output>>>,
}

impl Hub {
    /// Delivers all later events to `output`, as long as it lives.
    pub(super) fn add(&self, output: &Arc<Output>) {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        outputs.retain(|output| output.strong_count() > 0);
        outputs.push(Arc::downgrade(output));
    }

    /// Delivers `event`.
    pub(super) fn publish(&self, event: &Event) {
        let message = Arc::new(event.to_value());
        let outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        for output in outputs.iter().filter_map(Weak::upgrade) {
            output.push(Arc::clone(&message));
        }
    }
}
