//! The way to the control object from other threads.
//!
//! Owns: the engine. Promises: nothing here blocks, except what start-up calls on purpose.

use liveblk_engine::executor::{Core, CoreId, Engine, EngineConfig, Handle};
use liveblk_engine::format::ReferencePolicy;
use liveblk_engine::graph::{Graph, GraphConfig};
use liveblk_formats::reference::resolve_reference;
use serde_json::Value;

use super::control::Control;
use super::errors::Failure;
use super::events::Sinks;
use crate::monitor::{Backend, EventSink, ReplySink};
use crate::qmp::QmpError;
use crate::schema::Command;

/// Where the graph, the jobs and the exports live.
const HOME: CoreId = CoreId(0);

/// What the command line says about the whole daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Which files a header may name.
    pub policy: ReferencePolicy,
}

/// A running engine that executes commands; stops when dropped.
pub struct EngineBackend {
    handle: Handle,
    sinks: Sinks,
    /// Keeps the cores running.
    _engine: Engine,
}

impl EngineBackend {
    /// Starts an engine.
    ///
    /// # Errors
    /// If the system refuses threads or rings.
    pub fn start(settings: Settings) -> Result<Self, Failure> {
        let engine = Engine::start(&EngineConfig::default())?;
        let handle = engine.handle();
        let sinks = Sinks::default();
        let shared = sinks.clone();
        let made = handle.run(HOME, move |core| async move {
            Graph::of(&core).configure(GraphConfig {
                formats: liveblk_formats::registry(),
                policy: settings.policy,
                resolve: resolve_reference,
            });
            core.extension(move || shared);
            drop(Control::of(&core));
        });
        made.wait().ok_or_else(gone)?;
        Ok(Self { handle, sinks, _engine: engine })
    }

    /// Executes a command of the command line and waits for it. Never on a core or a monitor.
    ///
    /// # Errors
    /// Why it failed, with the hint for people.
    pub fn run(&self, command: Command) -> Result<Value, Failure> {
        let answer = self
            .handle
            .run(HOME, move |core| async move { Control::of(&core).execute(command).await });
        answer.wait().unwrap_or_else(|| Err(gone()))
    }

    /// Ends everything and waits for it, when no monitor ever ran.
    ///
    /// # Errors
    /// The first failure of a deferred write.
    pub fn close(&self) -> Result<(), Failure> {
        let answer =
            self.handle.run(HOME, |core| async move { Control::of(&core).shut_down().await });
        answer.wait().unwrap_or_else(|| Err(gone())).map(|_| ())
    }
}

/// Executes a command on the core of the caller, on the graph and the jobs of that core: for hosts
/// that run the engine themselves.
///
/// # Errors
/// Why it failed, with its class.
pub async fn execute_on(core: &Core, command: Command) -> Result<Value, Failure> {
    Control::of(core).execute(command).await
}

impl Backend for EngineBackend {
    fn execute(&self, command: Command, reply: ReplySink) {
        drop(self.handle.run(HOME, move |core| async move {
            let answer = Control::of(&core).execute(command).await;
            reply.send(answer.map_err(QmpError::from));
        }));
    }

    fn subscribe(&self, sink: EventSink) {
        self.sinks.add(sink);
    }

    fn shutdown(&self, done: ReplySink) {
        drop(self.handle.run(HOME, |core| async move {
            let answer = Control::of(&core).shut_down().await;
            done.send(answer.map_err(QmpError::from));
        }));
    }
}

fn gone() -> Failure {
    Failure::generic("The engine has stopped")
}

impl std::fmt::Debug for EngineBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineBackend")
    }
}
