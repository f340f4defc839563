//! One client's session: what a message means.
//!
//! Owns: negotiation state, the form of requests, the check of arguments. Promises: every message
//! yields exactly one reply or one request to execute, whose reply the caller owes; `id` is echoed
//! whenever it could be read; nothing has an effect outside. Order rules: the caller gives messages
//! in the order received and finishes one request before it gives the next.

use serde_json::{Map, Value};

use super::error::{ErrorClass, QmpError};
use crate::json::JsonError;
use crate::schema::{Command, Run, Source, command_entry, validate};

/// ```text
/// Negotiating --qmp_capabilities--> Ready
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Negotiating,
    Ready { out_of_band: bool },
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    state: State,
}

/// A command to execute, and the `id` its reply carries.
#[derive(Debug)]
pub struct Request {
    /// The client's mark, any value.
    pub id: Option<Value>,
    /// The command.
    pub command: Command,
}

/// What a message leads to.
#[derive(Debug)]
pub enum Step {
    /// This is sent.
    Reply(Value),
    /// This is executed.
    Execute(Request),
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A session before negotiation.
    pub fn new() -> Self {
        Self { state: State::Negotiating }
    }

    /// Whether events are delivered.
    pub fn is_negotiated(&self) -> bool {
        self.state != State::Negotiating
    }

    /// Takes one message.
    pub fn receive(&mut self, message: Result<Value, JsonError>) -> Step {
        let value = match message {
            Ok(Value::Object(members)) => members,
            Ok(_) => return refuse(None, "QMP input must be a JSON object"),
            Err(error) => return refuse(None, &error.to_string()),
        };
        let id = value.get("id").cloned();
        match self.dispatch(value) {
            Ok(Outcome::Done(value)) => Step::Reply(reply(id, Ok(value))),
            Ok(Outcome::Execute(command)) => Step::Execute(Request { id, command }),
            Err(error) => Step::Reply(reply(id, Err(error))),
        }
    }

    fn dispatch(&mut self, members: Map<String, Value>) -> Result<Outcome, QmpError> {
        let Form { name, arguments, out_of_band } = self.form(members)?;
        let negotiates = name == "qmp_capabilities";
        let entry = match command_entry(&name) {
            Some(entry) if self.is_negotiated() || negotiates => entry,
            _ if !self.is_negotiated() => {
                let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
            }
            _ => {
                let desc = format!("The command {name} has not been found");
                return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
            }
        };
        if out_of_band {
            let desc = format!("The command {name} does not support OOB");
            return Err(QmpError::generic(desc));
        }
        if negotiates && self.is_negotiated() {
            let desc = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
        }
        let arguments = validate(entry.arguments, Value::Object(arguments), Source::Json)
            .map_err(|error| QmpError::generic(error.to_string()))?;
        match entry.run {
            Run::Negotiate => {
                let enabled = arguments.get("enable").and_then(Value::as_array);
                let out_of_band = enabled.is_some_and(|names| names.iter().any(|n| n == "oob"));
                self.state = State::Ready { out_of_band };
                Ok(Outcome::Done(Value::Object(Map::new())))
            }
            Run::Answer(answer) => Ok(Outcome::Done(answer())),
            Run::Execute(build) => build(arguments)
                .map(Outcome::Execute)
                .map_err(|error| QmpError::generic(error.to_string())),
        }
    }

    /// Checks the form of a request.
    fn form(&self, members: Map<String, Value>) -> Result<Form, QmpError> {
        let takes_out_of_band = self.state == State::Ready { out_of_band: true };
        let mut name = None;
        let mut out_of_band = None;
        let mut arguments = Map::new();
        let must = |key: &str, what: &str| {
            Err(QmpError::generic(format!("QMP input member '{key}' must be {what}")))
        };
        for (key, value) in members {
            match (key.as_str(), value) {
                ("execute", Value::String(text)) => name = Some(text),
                ("exec-oob", Value::String(text)) if takes_out_of_band => out_of_band = Some(text),
                ("execute", _) => return must("execute", "a string"),
                ("exec-oob", _) if takes_out_of_band => return must("exec-oob", "a string"),
                ("arguments", Value::Object(given)) => arguments = given,
                ("arguments", _) => return must("arguments", "an object"),
                ("id", _) => {}
                _ => {
                    let desc = format!("QMP input member '{key}' is unexpected");
                    return Err(QmpError::generic(desc));
                }
            }
        }
        match (name, out_of_band) {
            (Some(_), Some(_)) => {
                Err(QmpError::generic("QMP input member 'execute' clashes with 'exec-oob'"))
            }
            (Some(name), None) => Ok(Form { name, arguments, out_of_band: false }),
            (None, Some(name)) => Ok(Form { name, arguments, out_of_band: true }),
            (None, None) => Err(QmpError::generic("QMP input lacks member 'execute'")),
        }
    }
}

/// A well-formed request.
struct Form {
    name: String,
    arguments: Map<String, Value>,
    out_of_band: bool,
}

enum Outcome {
    Done(Value),
    Execute(Command),
}

fn refuse(id: Option<Value>, desc: &str) -> Step {
    Step::Reply(reply(id, Err(QmpError::generic(desc))))
}

/// The message that answers a request.
pub fn reply(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut members = Map::new();
    match result {
        Ok(value) => {
            members.insert("return".to_owned(), value);
            members.extend(id.map(|id| ("id".to_owned(), id)));
        }
        Err(error) => {
            members.extend(id.map(|id| ("id".to_owned(), id)));
            members.insert("error".to_owned(), error.to_value());
        }
    }
    Value::Object(members)
}
