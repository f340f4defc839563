//! Monitors on real sockets, with a backend that only plays.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use liveblk_control::cli::parse_chardev;
use liveblk_control::json::Layout;
use liveblk_control::limits::MONITOR_STACK_BYTES;
use liveblk_control::monitor::{Backend, Chardevs, EventSink, MonitorSetup, ReplySink, serve};
use liveblk_control::qmp::{ErrorClass, Event, QmpError};
use liveblk_control::schema::Command;
use serde_json::{Value, json};

/// Answers every command, sends an event before the answer to `query-jobs`.
#[derive(Default)]
struct Fake {
    sinks: Mutex<Vec<EventSink>>,
    stopped: Mutex<bool>,
}

impl Fake {
    fn event(&self, id: &str) {
        for sink in self.sinks.lock().unwrap().iter() {
            sink(Event::now("BLOCK_EXPORT_DELETED", json!({"id": id})));
        }
    }
}

impl Backend for Fake {
    fn execute(&self, command: Command, reply: ReplySink) {
        match command {
            Command::QueryJobs => {
                self.event("e");
                reply.send(Ok(json!([])));
            }
            Command::JobCancel { id } => {
                let desc = format!("Block job '{id}' not found");
                // Answered later, from another thread.
                std::thread::spawn(move || {
                    reply.send(Err(QmpError::new(ErrorClass::DeviceNotActive, desc)));
                });
            }
            Command::QueryBlock => drop(reply),
            _ => reply.send(Ok(json!({}))),
        }
    }

    fn subscribe(&self, sink: EventSink) {
        self.sinks.lock().unwrap().push(sink);
    }

    fn shutdown(&self, done: ReplySink) {
        *self.stopped.lock().unwrap() = true;
        self.event("last");
        done.send(Ok(json!({})));
    }
}

struct Daemon {
    backend: Arc<Fake>,
    path: PathBuf,
    thread: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

fn daemon(layout: Layout) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let text = format!("socket,id=m,path={},server=on,wait=off", path.display());
    let mut chardevs = Chardevs::default();
    chardevs.open(parse_chardev(&text).unwrap().0, &mut |_| {}).unwrap();
    let chardev = chardevs.claim("m").unwrap();
    let backend = Arc::new(Fake::default());
    let shared: Arc<dyn Backend> = Arc::clone(&backend) as _;
    let thread = std::thread::Builder::new()
        .stack_size(MONITOR_STACK_BYTES)
        .spawn(move || serve(shared, vec![MonitorSetup { chardev, layout }], || Ok(())).unwrap())
        .unwrap();
    Daemon { backend, path, thread, _dir: dir }
}

struct Client {
    lines: BufReader<UnixStream>,
}

impl Client {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        let mut client = Self { lines: BufReader::new(stream) };
        assert!(client.line().starts_with("{\"QMP\": "));
        client
    }

    fn negotiated(path: &Path) -> Self {
        let mut client = Self::new(path);
        client.send("{'execute': 'qmp_capabilities'}");
        assert_eq!(client.line(), "{\"return\": {}}\r\n");
        client
    }

    fn send(&mut self, text: &str) {
        self.lines.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    fn value(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }
}

#[test]
fn replies_and_events_keep_their_order_and_quit_ends_the_process() {
    let daemon = daemon(Layout::Compact);
    let mut client = Client::negotiated(&daemon.path);
    client.send("{'execute':'query-jobs','id':1} {'execute':'job-cancel','arguments':{'id':'j'}}");
    assert_eq!(client.value()["event"], "BLOCK_EXPORT_DELETED");
    assert_eq!(client.value(), json!({"return": [], "id": 1}));
    assert_eq!(client.value()["error"]["class"], "DeviceNotActive");
    client.send("{'execute':'query-block'}");
    assert_eq!(client.value()["error"]["desc"], "The command ended without an answer");
    client.send("{'execute':'quit'}");
    assert_eq!(client.value(), json!({"return": {}}));
    assert_eq!(client.value()["data"]["id"], "last");
    assert_eq!(client.line(), "");
    daemon.thread.join().unwrap();
    assert!(*daemon.backend.stopped.lock().unwrap());
    assert!(!daemon.path.exists(), "the socket file is removed");
}

#[test]
fn events_reach_only_negotiated_clients_and_the_next_client_is_served() {
    let daemon = daemon(Layout::Compact);
    let mut first = Client::new(&daemon.path);
    daemon.backend.event("early");
    first.send("{'execute':'query-version'}");
    assert_eq!(first.value()["error"]["class"], "CommandNotFound");
    drop(first);
    let mut second = Client::negotiated(&daemon.path);
    // The connection is told of events once its negotiation was answered and the next is taken up.
    second.send("{'execute':'query-version'}");
    assert!(second.value()["return"]["package"].as_str().unwrap().starts_with("liveblk "));
    daemon.backend.event("now");
    assert_eq!(second.value()["data"]["id"], "now");
    second.send("{'execute':'quit'}");
    daemon.thread.join().unwrap();
}

#[test]
fn a_client_that_floods_without_reading_is_held_back_and_served_in_order() {
    let daemon = daemon(Layout::Compact);
    let client = Client::negotiated(&daemon.path);
    let mut sender = client.lines.get_ref().try_clone().unwrap();
    const COUNT: usize = 20_000;
    let flood = std::thread::spawn(move || {
        for id in 0..COUNT {
            let text = format!("{{\"execute\":\"query-version\",\"id\":{id}}}\n");
            sender.write_all(text.as_bytes()).unwrap();
        }
    });
    let mut client = client;
    for id in 0..COUNT {
        assert_eq!(client.value()["id"], id);
    }
    flood.join().unwrap();
    client.send("{'execute':'quit'}");
    assert_eq!(client.value(), json!({"return": {}}));
    daemon.thread.join().unwrap();
}

#[test]
fn a_request_that_is_nested_to_the_limit_does_not_overflow_the_stack() {
    let daemon = daemon(Layout::Pretty);
    let stream = UnixStream::connect(&daemon.path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
    let mut lines = BufReader::new(stream);
    let deep = |depth: usize| {
        let open = r#"{"driver":"raw","file":"#.repeat(depth);
        format!("{open}\"x\"{}", "}".repeat(depth))
    };
    let text = format!(
        "{{'execute':'qmp_capabilities'}} {{'execute':'blockdev-add','arguments':{}}} \
         {{'execute':'quit'}}",
        deep(1000)
    );
    lines.get_mut().write_all(text.as_bytes()).unwrap();
    let mut all = String::new();
    while lines.read_line(&mut all).unwrap() > 0 {}
    assert_eq!(all.matches("\"return\"").count(), 3, "{all}");
    daemon.thread.join().unwrap();
}
