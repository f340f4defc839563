//! Events of jobs and exports as clients see them, and who gets them.

use std::sync::{Arc, Mutex, PoisonError};

use liveblk_jobs::{BlockJobFacts, Event as JobEvent};
use serde_json::{Value, json};

use crate::monitor::EventSink;
use crate::qmp::Event;

/// Who gets the events; clones share the list.
#[derive(Clone, Default)]
pub(super) struct Sinks(Arc<Mutex<Vec<EventSink>>>);

impl Sinks {
    /// Delivers all later events to `sink`.
    pub(super) fn add(&self, sink: EventSink) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sink);
    }

    /// Delivers `event`, which happens now.
    pub(super) fn emit(&self, event: &Event) {
        for sink in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            sink(event.clone());
        }
    }
}

/// What a job tells.
pub(super) fn of_job(event: &JobEvent) -> Event {
    match event {
        JobEvent::StatusChange { id, status } => {
            Event::now("JOB_STATUS_CHANGE", json!({"id": &**id, "status": status.name()}))
        }
        JobEvent::Ready(facts) => Event::now("BLOCK_JOB_READY", of_facts(facts)),
        JobEvent::Pending { kind, id } => {
            Event::now("BLOCK_JOB_PENDING", json!({"type": kind.name(), "id": &**id}))
        }
        JobEvent::Completed { facts, error } => {
            let mut data = of_facts(facts);
            if let (Some(error), Some(members)) = (error, data.as_object_mut()) {
                members.insert("error".to_owned(), Value::from(error.as_str()));
            }
            Event::now("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Cancelled(facts) => Event::now("BLOCK_JOB_CANCELLED", of_facts(facts)),
        JobEvent::Error { id, operation, action } => Event::now(
            "BLOCK_JOB_ERROR",
            json!({"device": &**id, "operation": operation.name(), "action": action.name()}),
        ),
    }
}

/// An export is gone.
pub(super) fn of_export_gone(id: &str) -> Event {
    Event::now("BLOCK_EXPORT_DELETED", json!({"id": id}))
}

fn of_facts(facts: &BlockJobFacts) -> Value {
    json!({
        "type": facts.kind.name(),
        "device": &*facts.id,
        "len": facts.len,
        "offset": facts.offset,
        "speed": facts.speed,
    })
}
