//! A server in this process, for tests: an engine of one core that exports a file over NBD.

#![allow(unreachable_pub, dead_code, missing_docs, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use liveblk_engine::executor::{Core, CoreId, Engine, EngineConfig};
use liveblk_engine::graph::{Graph, OpenNode};
use liveblk_engine::node::{Disk, User};
use liveblk_exports::nbd::{Address, ExportSpec, ServerConfig};
use liveblk_exports::{ExportError, Exports, RemoveMode};

/// How long a real process may take for anything here.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A running server with one disk, exported writable as "disk" and read-only as "ro".
pub struct Server {
    pub engine: Engine,
    pub folder: tempfile::TempDir,
    gone: mpsc::Receiver<String>,
    /// One server at a time: descriptors are counted for the whole process.
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

/// The exports of the core, found again by later calls.
struct Here(Exports);

/// What must be back at its start level when clients are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    pub connections: u32,
    pub buffer_bytes: usize,
    pub operations: usize,
    pub descriptors: usize,
}

impl Server {
    /// Serves a disk of `size` bytes.
    pub fn start(size: u64) -> Self {
        Self::start_with(size, |_| {})
    }

    /// The same with another configuration.
    pub fn start_with(size: u64, adapt: impl FnOnce(&mut ServerConfig)) -> Self {
        Self::start_in(&std::env::temp_dir(), size, adapt)
    }

    /// The same with the disk's file and the socket below `parent`.
    pub fn start_in(parent: &Path, size: u64, adapt: impl FnOnce(&mut ServerConfig)) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir_in(parent).unwrap();
        let image = folder.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        let engine = Engine::start(&EngineConfig::default()).unwrap();
        let mut config = ServerConfig::new(Address::Unix(folder.path().join("nbd.sock")));
        adapt(&mut config);
        let (tell, gone) = mpsc::channel();
        let started = engine.handle().run(CoreId(0), move |core| async move {
            let exports = Exports::new(&core, move |id| {
                let _ = tell.send(id.to_owned());
            });
            core.extension(|| Here(exports.clone()));
            exports.start_nbd(config).map_err(|error| error.to_string())?;
            let node = Graph::of(&core)
                .open(OpenNode::new("file", image).named("node"))
                .await
                .map_err(|error| error.to_string())?;
            for (id, name, writable) in [("e", "disk", true), ("r", "ro", false)] {
                let disk = Disk::attach(&node, User::Guest { name: id.into() }, writable)
                    .map_err(|error| error.to_string())?;
                exports.add_nbd(spec(id, name, disk, writable)).map_err(|e| e.to_string())?;
            }
            Ok::<(), String>(())
        });
        started.wait().unwrap().unwrap();
        Self { engine, folder, gone, _turn: turn }
    }

    /// Runs `f` with the exports on their core.
    pub fn with<R: Send + 'static, Fut: Future<Output = R> + 'static>(
        &self,
        f: impl FnOnce(Core, Exports) -> Fut + Send + 'static,
    ) -> R {
        let call = self.engine.handle().run(CoreId(0), |core| {
            let exports = here(&core);
            f(core, exports)
        });
        call.wait().unwrap()
    }

    pub fn remove(&self, id: &'static str, mode: RemoveMode) -> Result<(), ExportError> {
        self.with(move |_, exports| async move { exports.remove(id, mode) })
    }

    /// The next export that is gone.
    pub fn gone(&self) -> String {
        self.gone.recv_timeout(PATIENCE).expect("an export goes within the time")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    pub fn image(&self) -> PathBuf {
        self.folder.path().join("disk.raw")
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// What is in use now.
    pub fn level(&self) -> Level {
        let (connections, buffer_bytes, operations) = self.with(|core, exports| async move {
            (exports.nbd_connections(), core.pool().in_use(), core.operations_in_flight())
        });
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        Level { connections, buffer_bytes, operations, descriptors }
    }

    /// The level without any connection.
    pub fn settled(&self) -> Level {
        let until = Instant::now() + PATIENCE;
        loop {
            let level = self.level();
            if level.connections == 0 && level.buffer_bytes == 0 {
                return level;
            }
            assert!(Instant::now() < until, "connections end: {level:?}");
            std::thread::yield_now();
        }
    }

    /// Waits until everything is back at `level`.
    pub fn returns_to(&self, level: Level) {
        let until = Instant::now() + PATIENCE;
        loop {
            let now = self.level();
            if now == level {
                return;
            }
            assert!(Instant::now() < until, "{now:?} does not return to {level:?}");
            std::thread::yield_now();
        }
    }
}

pub fn spec(id: &str, name: &str, disk: Disk, writable: bool) -> ExportSpec {
    ExportSpec {
        contexts: Default::default(),
        id: id.into(),
        name: name.into(),
        description: None,
        disk,
        writable,
        writethrough: false,
    }
}

fn here(core: &Core) -> Exports {
    let here: Rc<Here> = core.extension(|| unreachable!("set at the start"));
    here.0.clone()
}

/// Runs a client tool; its output if it went well.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().expect("the client tool is installed");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A client spoken byte by byte.
pub struct Bare {
    pub stream: UnixStream,
}

impl Bare {
    /// Connects and takes the greeting.
    pub fn greeted(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { stream };
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client
    }

    /// Connects and goes straight to requests on `name`, with simple or structured replies.
    pub fn ready(socket: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::greeted(socket);
        client.send(&[0, 0, 0, 3]);
        if structured {
            client.option(8, b"");
            assert_eq!(client.option_reply().0, 1);
            client.option(10, &meta(name, &["base:allocation"]));
            while client.option_reply().0 != 1 {}
        }
        client.option(7, &info(name));
        while client.option_reply().0 != 1 {}
        client
    }

    /// Sends bytes; a server that has hung up is no failure here.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Everything until the server hangs up.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        bytes
    }

    pub fn option(&mut self, number: u32, data: &[u8]) {
        self.send(&option(number, data));
    }

    /// Type and data of the next reply to an option.
    pub fn option_reply(&mut self) -> (u32, Vec<u8>) {
        let head = self.take(20);
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        (number(12), self.take(number(16) as usize))
    }

    /// Error and cookie of the next simple reply.
    pub fn simple(&mut self) -> (u32, u64) {
        let head = self.take(16);
        assert_eq!(head[..4], [0x67, 0x44, 0x66, 0x98]);
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(head[8..].try_into().unwrap()))
    }

    /// Flags, type, cookie and payload of the next chunk.
    pub fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        let head = self.take(20);
        assert_eq!(head[..4], [0x66, 0x8e, 0x33, 0xef]);
        let flags = u16::from_be_bytes(head[4..6].try_into().unwrap());
        let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let length = u32::from_be_bytes(head[16..].try_into().unwrap());
        (flags, kind, cookie, self.take(length as usize))
    }
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub fn info(name: &str) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend_from_slice(&[0, 0]);
    bytes
}

pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        bytes.extend_from_slice(&text(query));
    }
    bytes
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Numbers of commands.
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}
