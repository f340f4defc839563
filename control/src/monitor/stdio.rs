//! A monitor on standard input and output.
//!
//! Owns: the two descriptors while it runs. Promises: nothing blocks the thread: pipes and
//! terminals are used when they are ready and in pieces they can take; the end of input ends
//! neither the monitor nor the process. Readiness is polled again before each call, because the
//! descriptors stay in blocking mode (other processes may share them).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::connection::{Intake, Shared, execute, next_output};
use super::output::Output;
use crate::json::Layout;
use crate::limits::{INPUT_CHUNK_BYTES, PIPE_WRITE_BYTES_MAX};

/// A descriptor that is polled, or a file that is always ready.
enum Ready {
    Polled(AsyncFd<OwnedFd>, Interest),
    Always(OwnedFd),
}

impl Ready {
    fn new(stream: impl AsFd, interest: Interest) -> io::Result<Self> {
        let fd = stream.as_fd();
        #[expect(deprecated, reason = "its successor is unsafe; an OwnedFd keeps what it asks")]
        let polled = AsyncFd::with_interest(fd.try_clone_to_owned()?, interest);
        match polled {
            Ok(polled) => Ok(Self::Polled(polled, interest)),
            // Regular files cannot be polled; they never block for long.
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
                Ok(Self::Always(fd.try_clone_to_owned()?))
            }
            Err(error) => Err(error),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Polled(polled, _) => polled.get_ref().as_fd(),
            Self::Always(file) => file.as_fd(),
        }
    }

    /// Waits until a call of this direction will not block.
    async fn ready(&self) -> io::Result<()> {
        let Self::Polled(polled, interest) = self else {
            return Ok(());
        };
        let flags = if interest.is_readable() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
        loop {
            let mut guard = polled.ready(*interest).await?;
            let mut entries = [PollFd::new(self.fd(), flags)];
            if poll(&mut entries, PollTimeout::ZERO)? > 0 {
                return Ok(());
            }
            guard.clear_ready();
        }
    }
}

/// Serves the monitor until the process stops.
pub(super) async fn serve_stdio(shared: Rc<Shared>, layout: Layout) -> io::Result<()> {
    let output = Arc::new(Output::default());
    let (intake, requests) = Intake::new();
    let reader = tokio_uring::spawn(feed(intake));
    let executor = tokio_uring::spawn(execute(Rc::clone(&shared), Arc::clone(&output), requests));
    let drained = Arc::clone(&output);
    let writer = tokio_uring::spawn(async move { drain(&drained, layout).await });
    shared.stop.closing().await;
    // Nothing of these two is in flight in the ring, they may be dropped where they wait.
    reader.abort();
    executor.abort();
    output.close();
    let flushed = tokio::time::timeout(super::serve::FLUSH_TIME, writer).await;
    match flushed {
        Ok(Ok(result)) => result,
        _ => Ok(()),
    }
}

async fn feed(mut intake: Intake) {
    let Ok(input) = Ready::new(std::io::stdin(), Interest::READABLE) else {
        return;
    };
    let mut buffer = vec![0; INPUT_CHUNK_BYTES];
    loop {
        if input.ready().await.is_err() {
            break;
        }
        match read(input.fd(), &mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if !intake.take(buffer.get(..count).unwrap_or_default()).await {
                    break;
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => break,
        }
    }
    // The monitor stays for events: keep the request queue open.
    std::future::pending::<()>().await;
    drop(intake);
}

async fn drain(output: &Output, layout: Layout) -> io::Result<()> {
    let pipe = Ready::new(std::io::stdout(), Interest::WRITABLE)?;
    while let Some(bytes) = next_output(output, layout).await {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            pipe.ready().await?;
            let piece = rest.get(..PIPE_WRITE_BYTES_MAX).unwrap_or(rest);
            match write(pipe.fd(), piece) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => {
                    output.abandon();
                    return Err(error.into());
                }
            }
        }
    }
    Ok(())
}
