//! Exports that come and go, clients that stay, servers that stop.
use std::time::Instant;

use crate::rig::cmd::{FLUSH, READ};
use crate::rig::{Bare, PATIENCE, Server, info, request, spec};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Disk, User};
use liveblk_exports::nbd::{Address, ServerConfig};
use liveblk_exports::{ExportError, RemoveMode};

const SIZE: u64 = 16 << 20;

#[test]
fn a_used_export_is_removed_only_the_hard_way_and_then_its_clients_are_gone() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", false);
    let mut other = Bare::ready(&server.socket(), "ro", false);
    let refused = server.remove("e", RemoveMode::Safe).unwrap_err();
    assert_eq!(refused.to_string(), "export 'e' still in use");
    server.remove("e", RemoveMode::Hard).unwrap();
    assert_eq!(server.gone(), "e");
    assert_eq!(client.rest(), b"");
    let missing = server.remove("e", RemoveMode::Hard).unwrap_err();
    assert_eq!(missing.to_string(), "Export 'e' is not found");
    other.send(&request(FLUSH, 0, 5, 0, 0));
    assert_eq!(other.simple(), (0, 5), "the other export goes on");
    let mut late = Bare::greeted(&server.socket());
    late.send(&[0, 0, 0, 3]);
    late.option(7, &info("disk"));
    assert_eq!(late.option_reply().0, 0x8000_0006);
}

#[test]
fn an_unused_export_goes_the_safe_way_and_its_node_is_free() {
    let server = Server::start(SIZE);
    drop(Bare::ready(&server.socket(), "disk", false));
    let until = Instant::now() + PATIENCE;
    while server.remove("e", RemoveMode::Safe).is_err() {
        assert!(Instant::now() < until, "the client's end is noticed");
    }
    assert_eq!(server.gone(), "e");
    server.remove("r", RemoveMode::Safe).unwrap();
    assert_eq!(server.gone(), "r");
    let users =
        server.with(|core, _| async move { Graph::of(&core).find("node").unwrap().users().len() });
    assert_eq!(users, 0);
}

#[test]
fn wrong_additions_are_refused_in_the_words_that_clients_know() {
    let server = Server::start(SIZE);
    let texts = server.with(|core, exports| async move {
        let node = Graph::of(&core).find("node").unwrap();
        let disk = Disk::attach(&node, User::Guest { name: "t".into() }, false).unwrap();
        let long = "n".repeat(5000);
        let mut described = spec("x", "y", disk.clone(), false);
        described.description = Some(long.clone());
        let path = std::path::PathBuf::from("/nowhere/nbd.sock");
        let second = exports.start_nbd(ServerConfig::new(Address::Unix(path)));
        let mut results = vec![
            exports.add_nbd(spec("e", "new", disk.clone(), false)),
            exports.add_nbd(spec("-x", "new", disk.clone(), false)),
            exports.add_nbd(spec("", "new", disk.clone(), false)),
            exports.add_nbd(spec("x", "disk", disk.clone(), false)),
            exports.add_nbd(spec("x", &long, disk.clone(), false)),
            exports.add_nbd(described),
            exports.add_nbd(spec("x", "new", disk.clone(), true)),
            exports.remove("zz", RemoveMode::Safe),
            second,
        ];
        exports.stop_nbd().await.unwrap();
        results.push(exports.stop_nbd().await);
        results.push(exports.add_nbd(spec("x", "new", disk, false)));
        let path = std::path::PathBuf::from("/nowhere/nbd.sock");
        results.push(exports.start_nbd(ServerConfig::new(Address::Unix(path.clone()))));
        let mut secure = ServerConfig::new(Address::Unix(path));
        secure.tls = true;
        results.push(exports.start_nbd(secure));
        results.into_iter().map(|result| result.unwrap_err().to_string()).collect::<Vec<_>>()
    });
    let long = "n".repeat(5000);
    let expected = [
        "Block export id 'e' is already in use",
        "Invalid block export id",
        "Invalid block export id",
        "NBD server already has export named 'disk'",
        &format!("export name '{long}' too long"),
        &format!("description '{long}' too long"),
        "Cannot export read-only node as writable",
        "Export 'zz' is not found",
        "NBD server already running",
        "NBD server not running",
        "NBD server not running",
        "Failed to bind socket to /nowhere/nbd.sock: No such file or directory",
        "TLS is not supported by this NBD server",
    ];
    assert_eq!(texts, expected);
}

#[test]
fn stopping_ends_idle_half_open_and_busy_clients_and_removes_the_socket() {
    let server = Server::start(SIZE);
    let level = server.level();
    let mut half_open: Vec<_> = (0..30).map(|_| Bare::greeted(&server.socket())).collect();
    for (index, client) in half_open.iter_mut().enumerate() {
        client.send(&[0, 0, 0, 3][..index % 5]);
        if index % 5 == 4 {
            client.send(&crate::rig::option(7, &info("disk"))[..index % 26]);
        }
    }
    let mut idle: Vec<_> = (0..10).map(|_| Bare::ready(&server.socket(), "disk", true)).collect();
    let mut unread = Bare::ready(&server.socket(), "ro", false);
    for cookie in 0..32 {
        unread.send(&request(READ, 0, cookie, 0, 4 << 20));
    }
    let stopped = server.with(|_, exports| async move { exports.stop_nbd().await });
    assert!(stopped.is_ok());
    assert_eq!([server.gone(), server.gone()].concat().len(), 2);
    assert!(!server.socket().exists(), "the socket's file is gone");
    for client in half_open.iter_mut().chain(&mut idle) {
        client.rest();
    }
    drop((half_open, idle, unread));
    let after = server.level();
    assert_eq!((after.connections, after.buffer_bytes), (0, 0));
    assert!(after.operations < level.operations && after.descriptors < level.descriptors);
}

#[test]
fn an_engine_that_stops_with_clients_connected_ends() {
    let server = Server::start(SIZE);
    let _half_open = Bare::greeted(&server.socket());
    let mut busy = Bare::ready(&server.socket(), "disk", false);
    for cookie in 0..100 {
        busy.send(&request(READ, 0, cookie, 0, 1 << 20));
    }
    let socket = server.socket();
    drop(server.engine);
    assert!(!socket.exists());
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_and_an_idle_client_is_not() {
    let server = Server::start_with(SIZE, |config| config.handshake_seconds = 1);
    let mut ready = Bare::ready(&server.socket(), "disk", false);
    let mut slow = Bare::greeted(&server.socket());
    slow.send(&[0, 0, 0, 3]);
    let start = Instant::now();
    assert_eq!(slow.rest(), b"");
    let took = start.elapsed();
    assert!(took.as_millis() > 500 && took.as_secs() < 5, "{took:?}");
    ready.send(&request(FLUSH, 0, 1, 0, 0));
    assert_eq!(ready.simple(), (0, 1));
}

#[test]
fn connections_beyond_the_maximum_wait_for_their_turn() {
    let server = Server::start_with(SIZE, |config| config.max_connections = 2);
    let first = Bare::ready(&server.socket(), "disk", false);
    let second = Bare::greeted(&server.socket());
    let waiting = std::thread::spawn({
        let socket = server.socket();
        move || drop(Bare::ready(&socket, "disk", false))
    });
    assert_eq!(server.level().connections, 2);
    assert!(!waiting.is_finished());
    drop(first);
    waiting.join().unwrap();
    drop(second);
}

#[test]
fn one_connection_at_a_time_means_no_multi_conn() {
    let server = Server::start_with(SIZE, |config| config.max_connections = 1);
    let mut client = Bare::greeted(&server.socket());
    client.send(&[0, 0, 0, 3]);
    client.option(7, &info("disk"));
    assert_eq!(client.option_reply().0, 3);
    let (_, export) = client.option_reply();
    let flags = u16::from_be_bytes(export[10..].try_into().unwrap());
    assert_eq!(flags & (1 << 8), 0);
    assert_eq!(flags & 1, 1);
}

#[test]
fn a_server_listens_on_tcp_and_takes_a_listening_socket() {
    let server = Server::start(SIZE);
    let text = server.with(|_, exports| async move {
        exports.stop_nbd().await?;
        let config = ServerConfig::new(Address::Inet(([127, 0, 0, 1], 0).into()));
        exports.start_nbd(config)?;
        let address = exports.nbd_tcp_address().expect("a TCP server has an address");
        let taken = exports.start_nbd(ServerConfig::new(Address::Inet(address)));
        assert!(matches!(taken, Err(ExportError::ServerRunning)));
        Ok::<_, ExportError>(address.to_string())
    });
    let address = text.unwrap();
    let mut stream = std::net::TcpStream::connect(&address).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut stream, &mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    server.with(|_, exports| async move { exports.stop_nbd().await }).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(server.socket()).unwrap();
    let config = ServerConfig::new(Address::Listening(socket.into()));
    server.with(|_, exports| async move { exports.start_nbd(config) }).unwrap();
    drop(Bare::greeted(&server.socket()));
}
