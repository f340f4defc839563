//! The life of the process.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use liveblk_engine::format::ReferencePolicy;

use super::startup::{Started, perform, print};
use crate::backend::{EngineBackend, Settings};
use crate::cli::{HeaderRefs, Launch, PidFile, Plan, Readiness, launch, plan};
use crate::limits::MONITOR_STACK_BYTES;
use crate::monitor::{Backend, MonitorSetup, serve, system_text};

/// Runs the daemon with the process's arguments.
pub fn main() -> ExitCode {
    let mut words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let program = if words.is_empty() { "liveblkd".to_owned() } else { words.remove(0) };
    let plan = match plan(&program, &words) {
        Ok(plan) => plan,
        Err(early) => {
            print(&early.output);
            eprint!("{}", early.error);
            return ExitCode::from(early.status);
        }
    };
    log_to_stderr();
    let readiness = match launch(plan.daemonize, &program, &words) {
        Ok(Launch::Daemon(readiness)) => readiness,
        Ok(Launch::Parent(status)) => return ExitCode::from(status),
        Err(error) => {
            eprintln!("{}: could not go to the background: {}", plan.program, system_text(&error));
            return ExitCode::FAILURE;
        }
    };
    let name = plan.program.clone();
    match on_a_thread(move || live(&plan, readiness)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{name}: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Values may nest deeply, so the thread that walks them has a stack of its own size.
fn on_a_thread(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Result<(), String> {
    let thread = std::thread::Builder::new()
        .name("liveblk-monitor".to_owned())
        .stack_size(MONITOR_STACK_BYTES)
        .spawn(work)
        .map_err(|error| system_text(&error))?;
    thread.join().unwrap_or_else(|_| Err("the monitor's thread panicked".to_owned()))
}

fn live(plan: &Plan, readiness: Readiness) -> Result<(), String> {
    let settings = Settings { policy: policy(plan) };
    let backend = EngineBackend::start(settings).map_err(|failure| failure.full_text())?;
    let backend = Arc::new(backend);
    let served = match perform(plan, &backend) {
        Ok(Started::Serve(monitors)) => serve_all(plan, readiness, &backend, monitors),
        Ok(Started::Printed) => Ok(()),
        Err(text) => Err(text),
    };
    // After a served life everything is closed already.
    let closed = backend.close().map_err(|failure| failure.full_text());
    served.and(closed)
}

fn serve_all(
    plan: &Plan,
    readiness: Readiness,
    backend: &Arc<EngineBackend>,
    monitors: Vec<MonitorSetup>,
) -> Result<(), String> {
    let mut pid_file = None;
    let mut refusal = None;
    let ready = || {
        if let Some(path) = &plan.pidfile {
            match PidFile::create(path) {
                Ok(file) => pid_file = Some(file),
                Err(text) => {
                    refusal = Some(text);
                    return Err(io::ErrorKind::Other.into());
                }
            }
        }
        readiness.report()
    };
    let shared: Arc<dyn Backend> = Arc::clone(backend) as _;
    let served = serve(shared, monitors, ready);
    drop(pid_file);
    match (refusal, served) {
        (Some(text), _) => Err(text),
        (None, Err(error)) => Err(system_text(&error)),
        (None, Ok(())) => Ok(()),
    }
}

fn policy(plan: &Plan) -> ReferencePolicy {
    match plan.header_refs {
        HeaderRefs::Any => ReferencePolicy::Any,
        HeaderRefs::SameDir => ReferencePolicy::SameDir { allow: plan.allowed_dirs.clone() },
        HeaderRefs::Explicit => ReferencePolicy::Explicit,
    }
}

/// Messages for people go to standard error; `RUST_LOG` says how many.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter);
    // A second subscriber cannot exist this early.
    let _ = log.try_init();
}
