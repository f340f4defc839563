//! Reads, writes and syncs of files whose answer may take as long as it likes, for threads of the
//! blocking pool.
//!
//! Rule: the slot of the operation keeps descriptor and buffers alive until the result was
//! delivered, also when nobody waits for it any more.

use std::os::fd::RawFd;

use crate::buf::Buf;

/// A read or write that can travel to a thread.
pub(super) struct BlockingIo {
    fd: RawFd,
    offset: u64,
    write: bool,
    fua: bool,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into a buffer that the operation's slot owns until its completion,
// which the thread delivers; nobody else touches the buffer meanwhile.
unsafe impl Send for BlockingIo {}

impl BlockingIo {
    pub(super) fn new(fd: RawFd, buf: &Buf, offset: u64, write: bool, fua: bool) -> Self {
        let iovec =
            |(ptr, len): (*mut u8, usize)| libc::iovec { iov_base: ptr.cast(), iov_len: len };
        Self { fd, offset, write, fua, iovecs: buf.raw_segments().map(iovec).collect() }
    }

    /// Bytes moved, or a negative errno. A short transfer is continued by the caller.
    pub(super) fn run(self) -> i32 {
        let at = i64::try_from(self.offset).unwrap_or(i64::MAX);
        let most = usize::try_from(libc::UIO_MAXIOV).unwrap_or(1024);
        let count = i32::try_from(self.iovecs.len().min(most)).unwrap_or(libc::UIO_MAXIOV);
        let flags = if self.fua { libc::RWF_DSYNC } else { 0 };
        loop {
            // SAFETY: see `Send` above; fd is open for as long.
            let moved = unsafe {
                if self.write {
                    libc::pwritev2(self.fd, self.iovecs.as_ptr(), count, at, flags)
                } else {
                    libc::preadv2(self.fd, self.iovecs.as_ptr(), count, at, 0)
                }
            };
            if moved >= 0 {
                return i32::try_from(moved).unwrap_or(i32::MAX);
            }
            let errno = nix::errno::Errno::last_raw();
            if errno != libc::EINTR {
                return -errno;
            }
        }
    }
}

/// fdatasync: 0, or a negative errno.
pub(super) fn sync_data(fd: RawFd) -> i32 {
    // SAFETY: the operation's slot keeps the descriptor open.
    if unsafe { libc::fdatasync(fd) } == 0 { 0 } else { -nix::errno::Errno::last_raw() }
}
