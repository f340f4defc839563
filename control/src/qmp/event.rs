//! Events as clients see them.
//!
//! Owns: their form on the wire. Promises: the time is taken when the event is made, so the order
//! of times is the order of making.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: Value,
    /// When it happened.
    pub time: SystemTime,
}

impl Event {
    /// An event that happens now.
    pub fn now(name: &'static str, data: Value) -> Self {
        Self { name, data, time: SystemTime::now() }
    }

    /// The message.
    pub fn to_value(&self) -> Value {
        let since = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        json!({
            "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
            "event": self.name,
            "data": self.data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_carries_seconds_and_microseconds() {
        let mut event = Event::now("BLOCK_EXPORT_DELETED", json!({"id": "e"}));
        event.time = UNIX_EPOCH + std::time::Duration::from_nanos(7_000_042_999);
        let text = crate::json::encode(&event.to_value(), crate::json::Layout::Compact);
        let stamp = r#"{"timestamp": {"seconds": 7, "microseconds": 42}, "#;
        let rest = r#""event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}"#;
        assert_eq!(text, format!("{stamp}{rest}"));
    }
}
