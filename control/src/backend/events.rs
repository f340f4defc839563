//! Events of jobs and exports as clients see them, and who gets them.

use std::sync::{Arc, Mutex, PoisonError};

use liveblk_jobs::{BlockJobFacts, ConvergeInfo, Event as JobEvent};
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
        JobEvent::Converge { id, info } => {
            let mut data = of_convergence(info);
            if let Some(members) = data.as_object_mut() {
                members.insert("id".to_owned(), Value::from(&**id));
            }
            Event::now("BLOCK_JOB_CONVERGE", data)
        }
    }
}

/// Where a job is that is to be ready in time.
pub(super) fn of_convergence(info: &ConvergeInfo) -> Value {
    let mut data = json!({
        "phase": info.phase.name(),
        "dirty-rate": info.dirty_rate,
        "remaining": info.remaining,
        "delay-us": info.delay_us,
        "deadline-missed": info.missed,
    });
    if let (Some(eta), Some(members)) = (info.eta_ms, data.as_object_mut()) {
        members.insert("eta-ms".to_owned(), Value::from(eta));
    }
    data
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

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use liveblk_jobs::Phase;

    use super::*;

    #[test]
    fn a_convergence_is_told_with_all_it_knows() {
        let info = ConvergeInfo {
            phase: Phase::Throttling,
            dirty_rate: 5,
            remaining: 6,
            delay_us: 7,
            eta_ms: None,
            missed: true,
        };
        let mut wanted = json!({
            "id": "j", "phase": "throttling", "dirty-rate": 5, "remaining": 6, "delay-us": 7,
            "deadline-missed": true,
        });
        let event = |info| of_job(&JobEvent::Converge { id: Rc::from("j"), info });
        let told = event(info);
        assert_eq!((told.name, &told.data), ("BLOCK_JOB_CONVERGE", &wanted));
        wanted["eta-ms"] = 8.into();
        assert_eq!(event(ConvergeInfo { eta_ms: Some(8), ..info }).data, wanted);
    }
}
