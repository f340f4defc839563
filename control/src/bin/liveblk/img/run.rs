//! From the command line to the exit code: one engine per call, errors to stderr.

use std::process::ExitCode;

use liveblk::{CoreId, Engine, EngineConfig, Host, ReferencePolicy};

use super::arguments::{HeaderRefs, ImgOptions, ImgVerb};
use super::failure::{Answer, Failure};
use super::{bitmap, check, compare, convert, create, info, io, map, newfile, resize, snapshot};

/// Runs one verb.
pub(crate) fn run(options: ImgOptions) -> ExitCode {
    let policy = match options.header_refs {
        HeaderRefs::Any => ReferencePolicy::Any,
        HeaderRefs::SameDir => ReferencePolicy::SameDir { allow: options.allow_dir },
        HeaderRefs::Explicit => ReferencePolicy::Explicit,
    };
    let error_code = if matches!(options.verb, ImgVerb::Compare(_)) { 2 } else { 1 };
    if matches!(options.verb, ImgVerb::Create(_) | ImgVerb::Convert(_)) {
        newfile::watch_signals();
    }
    let answer = match options.object.is_empty() {
        true => on_engine(policy, options.verb),
        false => Err(Failure::new(
            "--object has no use here: objects hold the secrets of encrypted images, and \
             encrypted images are not supported",
        )),
    };
    match answer {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("liveblk img: {}", failure.text);
            ExitCode::from(failure.code.max(error_code))
        }
    }
}

fn on_engine(policy: ReferencePolicy, verb: ImgVerb) -> Answer {
    let engine = Engine::start(&EngineConfig::default())?;
    let answer = engine.handle().run(CoreId(0), move |core| async move {
        let host = Host::on(&core, policy);
        let result = dispatch(&host, verb).await;
        // What is open is closed also after a failure; errors of deferred writes come out here.
        let closed = host.close().await;
        result.and_then(|code| closed.map(|()| code).map_err(Failure::from))
    });
    answer.wait().unwrap_or_else(|| Err(Failure::new("the engine stopped")))
}

async fn dispatch(host: &Host, verb: ImgVerb) -> Answer {
    match verb {
        ImgVerb::Create(options) => create::run(host, options).await,
        ImgVerb::Info(options) => info::run(host, options).await,
        ImgVerb::Check(options) => check::run(host, options).await,
        ImgVerb::Compare(options) => compare::run(host, options).await,
        ImgVerb::Convert(options) => convert::run(host, options).await,
        ImgVerb::Map(options) => map::run(host, options).await,
        ImgVerb::Resize(options) => resize::run(host, options).await,
        ImgVerb::Snapshot(options) => snapshot::run(host, options).await,
        ImgVerb::Bitmap(options) => bitmap::run(host, options).await,
        ImgVerb::Io(options) => io::run(host, options).await,
    }
}
