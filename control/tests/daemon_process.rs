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
const PATIENCE: Duration = Duration::from_secs(90);

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

/// An image of the peer's with an external data file that its header calls `name`.
fn image_with_data_file(path: &Path, name: &str) {
    let folder = path.parent().unwrap();
    let made = Command::new("qemu-img")
        .current_dir(folder)
        .args(["create", "-q", "-f", "qcow2", "-o", "data_file=made.data"])
        .args([path.to_str().unwrap(), "1M"])
        .status();
    assert!(made.expect("qemu-img is needed").success());
    let _ = std::fs::remove_file(folder.join("made.data"));
    let mut bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[112..116], b"DATA", "the first header extension names the data file");
    bytes[116..1024].fill(0);
    bytes[116..120].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes[120..120 + name.len()].copy_from_slice(name.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// Rows Q16 (`datafile-json`, `datafile-nbd`), FIFO and missing data file of the daemon.
#[test]
fn a_data_file_of_a_header_is_opened_within_the_policy_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("in")).unwrap();
    nix::unistd::mkfifo(&path("in/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    File::create(path("out.data")).unwrap().set_len(1 << 20).unwrap();
    File::create(path("in/near.data")).unwrap().set_len(1 << 20).unwrap();
    std::os::unix::fs::symlink(path("out.data"), path("in/link.data")).unwrap();
    let qmp = path("qmp");
    let text =
        format!("--chardev socket,id=m,path={},server=on,wait=off --monitor m", qmp.display());
    let mut daemon = Daemon::start(&words(&text));
    let mut client = Client::connect(&qmp);
    let image = path("in/image.qcow2");
    let node = || {
        let file = json!({"driver": "file", "filename": image});
        json!({"driver": "qcow2", "node-name": "q", "file": file})
    };
    let outside = path("out.data").display().to_string();
    let json_name = json!({"driver": "file", "filename": outside}).to_string();
    for (name, expected) in [
        (format!("json:{json_name}"), "'data-file'"),
        ("nbd://127.0.0.1:1/x".to_owned(), "'data-file'"),
        (outside.clone(), "'data-file'"),
        ("../out.data".to_owned(), "'data-file'"),
        ("/dev/zero".to_owned(), "'data-file'"),
        ("link.data".to_owned(), "Could not open"),
        ("fifo".to_owned(), "regular file"),
        ("image.qcow2".to_owned(), "is the image itself"),
        ("missing.data".to_owned(), "No such file or directory"),
    ] {
        image_with_data_file(&image, &name);
        let answer = client.ask("blockdev-add", node());
        let refusal = answer.as_str().unwrap_or_else(|| panic!("{name} is opened"));
        assert!(refusal.contains(expected), "{name}: {refusal}");
        assert_eq!(client.ask("query-named-block-nodes", json!({})), json!([]), "{name}");
    }
    // What the caller names is no header reference.
    let mut named = node();
    named["data-file"] = json!({"driver": "file", "filename": outside});
    assert_eq!(client.ask("blockdev-add", named), json!({}));
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "q"})), json!({}));
    image_with_data_file(&image, "near.data");
    assert_eq!(client.ask("blockdev-add", node()), json!({}));
    let nodes = client.ask("query-named-block-nodes", json!({"flat": true}));
    let drivers: Vec<_> = nodes.as_array().unwrap().iter().map(|node| &node["drv"]).collect();
    assert_eq!(drivers.iter().filter(|driver| **driver == "file").count(), 2, "{nodes}");
    let facts = nodes.as_array().unwrap().iter().find(|node| node["drv"] == "qcow2").unwrap();
    let specific = &facts["image"]["format-specific"]["data"];
    assert_eq!(
        (&specific["data-file"], &specific["data-file-raw"]),
        (&json!("near.data"), &json!(false))
    );
    client.ask("quit", json!({}));
    assert!(daemon.ends().success());
}

/// A data file by node: who uses it, locks, the order of closing; also from the command line.
#[test]
fn a_data_file_is_a_node_with_locks_and_users() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    File::create(path("a.data")).unwrap().set_len(1 << 20).unwrap();
    let (image, other, qmp) = (path("image.qcow2"), path("other.qcow2"), path("qmp"));
    image_with_data_file(&image, "gone.data");
    image_with_data_file(&other, "gone.data");
    let text = format!(
        "--blockdev driver=qcow2,node-name=q,file.driver=file,file.filename={},\
         data-file.driver=file,data-file.filename={},data-file.node-name=d \
         --chardev socket,id=m,path={},server=on,wait=off --monitor m",
        image.display(),
        path("a.data").display(),
        qmp.display()
    );
    let mut daemon = Daemon::start(&words(&text));
    let mut client = Client::connect(&qmp);
    let second = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(path("a.data"))
        .output()
        .expect("qemu-io is needed");
    assert!(!second.status.success(), "the data file is locked");
    let file = json!({"driver": "file", "filename": other});
    let share = json!({"driver": "qcow2", "node-name": "r", "file": file, "data-file": "d"});
    let text = client.ask("blockdev-add", share);
    assert!(text.as_str().is_some_and(|text| text.contains("data-file")), "{text}");
    let busy = client.ask("blockdev-del", json!({"node-name": "d"}));
    assert!(busy.as_str().is_some(), "{busy}");
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "q"})), json!({}));
    assert_eq!(client.ask("query-named-block-nodes", json!({})), json!([]));
    let by_name = |data: &str| {
        let file = json!({"driver": "file", "filename": image});
        json!({"driver": "qcow2", "node-name": "q", "file": file, "data-file": data})
    };
    assert_eq!(
        client.ask("blockdev-add", by_name("nope")),
        "Cannot find device='nope' nor node-name='nope'"
    );
    let file = json!({"driver": "file", "node-name": "d", "filename": path("a.data")});
    assert_eq!(client.ask("blockdev-add", file), json!({}));
    assert_eq!(client.ask("blockdev-add", by_name("d")), json!({}));
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "d"})), "Block device d is in use");
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "q"})), json!({}));
    assert_eq!(client.ask("blockdev-del", json!({"node-name": "d"})), json!({}));
    client.ask("quit", json!({}));
    assert!(daemon.ends().success());
}
