//! `liveblkd` as a process: start, QMP on real sockets, a node, the end.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Longest time that anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);

struct Daemon(Child);

impl Daemon {
    fn start(args: &[String]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_liveblkd"));
        Self(command.args(args).stdin(Stdio::null()).spawn().unwrap())
    }

    fn ends(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the daemon does not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already when the test went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Client {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Client {
    /// Connects as soon as the daemon listens, and negotiates.
    fn connect(path: &Path) -> Self {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "no monitor: {error}"),
            }
            std::thread::yield_now();
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { reader: BufReader::new(stream), events: Vec::new() };
        assert!(client.message().get("QMP").is_some());
        assert_eq!(client.ask("qmp_capabilities", json!({})), json!({}));
        client
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The answer; what an error says instead if the command fails.
    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}").unwrap();
        loop {
            let message = self.message();
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            return match message.get("return") {
                Some(value) => value.clone(),
                None => message["error"]["desc"].clone(),
            };
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn a_node_is_added_exported_and_gone_after_quit() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    File::create(path("disk")).unwrap().set_len(1 << 20).unwrap();
    let (qmp, nbd, pid) = (path("qmp"), path("nbd"), path("pid"));
    let text = format!(
        "--chardev socket,id=m,path={},server=on,wait=off --monitor m --pidfile {} \
         --nbd-server addr.type=unix,addr.path={}",
        qmp.display(),
        pid.display(),
        nbd.display()
    );
    let mut daemon = Daemon::start(&words(&text));
    let mut client = Client::connect(&qmp);
    let file = json!({"driver": "file", "filename": path("disk")});
    let node = json!({"driver": "raw", "node-name": "d", "file": file});
    assert_eq!(client.ask("blockdev-add", node.clone()), json!({}));
    assert_eq!(client.ask("blockdev-add", node), "Duplicate nodes with node-name='d'");
    let export = json!({"type": "nbd", "id": "e", "node-name": "d", "writable": true});
    assert_eq!(client.ask("block-export-add", export), json!({}));
    let nodes = client.ask("query-named-block-nodes", json!({"flat": true}));
    let named: Vec<_> = nodes.as_array().unwrap().iter().map(|node| &node["drv"]).collect();
    assert_eq!(named, ["raw", "file"]);
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "d"})), "Node d is in use");
    assert_eq!(client.ask("quit", json!({})), json!({}));
    assert_eq!(client.events.len(), 1);
    assert_eq!(client.events[0]["data"], json!({"id": "e"}));
    assert!(daemon.ends().success());
    for left in [qmp, nbd, pid] {
        assert!(!left.exists(), "{} is left behind", left.display());
    }
}

#[test]
fn a_monitor_listens_on_an_inherited_socket_until_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let text =
        format!("--chardev socket,id=m,fd={},server=on,wait=off --monitor m", listener.as_raw_fd());
    let mut daemon = Daemon::start(&words(&text));
    drop(listener);
    let mut client = Client::connect(&path);
    assert_eq!(client.ask("object-add", json!({"qom-type": "iothread", "id": "io"})), json!({}));
    assert_eq!(client.ask("object-del", json!({"id": "nope"})), "object 'nope' not found");
    kill(Pid::from_raw(daemon.0.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(daemon.ends().success());
}

#[test]
fn a_start_that_fails_names_option_and_reason_and_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let text = format!(
        "--chardev socket,id=m,path={},server=on,wait=off --blockdev driver=file,node-name=x,\
         filename=/nowhere/image",
        path.display()
    );
    let ended = Command::new(env!("CARGO_BIN_EXE_liveblkd")).args(words(&text)).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let want = "liveblkd: --blockdev driver=file,node-name=x,filename=/nowhere/image: \
                Could not open '/nowhere/image': No such file or directory\n";
    assert_eq!(String::from_utf8(ended.stderr).unwrap(), want);
    assert!(!path.exists());
}
