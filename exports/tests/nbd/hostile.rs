//! Clients that break the rules, stand still, or vanish: resources return, others are served.
use std::time::Instant;

use crate::rig::cmd::{DISC, FLUSH, READ, WRITE};
use crate::rig::{Bare, PATIENCE, Server, info, meta, option, request};
use liveblk_exports::limits::{CONNECTION_BYTES, RECEIVE_WINDOW, SERVER_BYTES};

const SIZE: u64 = 64 << 20;

/// A client of good manners gets an answer in time.
fn is_served(server: &Server) {
    let start = Instant::now();
    let mut client = Bare::ready(&server.socket(), "disk", false);
    client.send(&request(READ, 0, 1, 0, 4096));
    assert_eq!(client.simple(), (0, 1));
    client.take(4096);
    client.send(&request(DISC, 0, 0, 0, 0));
    assert!(start.elapsed().as_secs() < 5, "served in {:?}", start.elapsed());
}

#[test]
fn malformed_handshakes_end_or_are_refused_and_leave_nothing_behind() {
    let server = Server::start(SIZE);
    is_served(&server);
    let level = server.settled();
    let flags = [0, 0, 0, 3];
    let long = [b'n'; 5000];
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("half the flags", vec![0, 0]),
        ("unknown flags", vec![0xff; 4]),
        ("flags of no bits, then list", [vec![0; 4], option(3, b"")].concat()),
        ("half an option", [&flags[..], b"IHAVE"].concat()),
        ("bad option magic", [&flags[..], &[b'X'; 16]].concat()),
        ("export name of 5000", [&flags[..], &option(1, &long)].concat()),
        ("unknown export name", [&flags[..], &option(1, b"x")].concat()),
        ("half a payload", [&flags[..], &option(7, &info("disk"))[..20]].concat()),
        ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("tls hello", vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]),
        ("zeroes", vec![0; 100_000]),
    ];
    let mut huge = [&flags[..], b"IHAVEOPT\0\0\0\x63\x02\x10\0\0"].concat();
    huge.extend(vec![0; 1000]);
    cases.push(("an option of 33 MiB", huge));
    let queries: Vec<&str> = std::iter::repeat_n("base:allocation", 3000).collect();
    let contexts = [option(8, b""), option(10, &meta("disk", &queries))].concat();
    cases.push(("3000 contexts", [&flags[..], &contexts].concat()));
    cases.push(("80 KiB of option", [&flags[..], &option(99, &vec![1; 80_000])].concat()));
    for (case, bytes) in &cases {
        let mut client = Bare::greeted(&server.socket());
        client.send(bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        client.rest();
        assert!(Instant::now().elapsed() < PATIENCE, "{case}");
    }
    is_served(&server);
    server.returns_to(level);
}

#[test]
fn long_names_are_refused_and_the_handshake_goes_on() {
    let server = Server::start(SIZE);
    for len in [3000, 4096, 4097, 5000, 60_000] {
        let mut client = Bare::greeted(&server.socket());
        client.send(&[0, 0, 0, 3]);
        client.option(7, &info(&"n".repeat(len)));
        let (reply, message) = client.option_reply();
        assert!(reply == 0x8000_0006 || reply == 0x8000_0003, "{len}: {reply:#x}");
        assert!(!message.is_empty() && message.len() < 200);
        client.option(99, &vec![1; 80_000]);
        assert_eq!(client.option_reply().0, 0x8000_0009);
        client.option(7, &info("disk"));
        assert_eq!(client.option_reply().0, 3);
    }
}

#[test]
fn malformed_requests_end_the_connection_or_are_refused() {
    let server = Server::start(SIZE);
    is_served(&server);
    let level = server.settled();
    let mut bad_magic = request(READ, 0, 1, 0, 512);
    bad_magic[0] = 0;
    let cases: [(&str, Vec<u8>); 5] = [
        ("bad magic", bad_magic),
        ("half a request", request(READ, 0, 1, 0, 512)[..27].to_vec()),
        ("write of 33 MiB", request(WRITE, 0, 1, 0, 33 << 20)),
        ("half a payload", [request(WRITE, 0, 1, 0, 1 << 20), vec![7; 1000]].concat()),
        ("garbage", vec![0xaa; 10_000]),
    ];
    for (case, bytes) in cases {
        for structured in [false, true] {
            let mut client = Bare::ready(&server.socket(), "disk", structured);
            client.send(&bytes);
            let _ = client.stream.shutdown(std::net::Shutdown::Write);
            assert!(client.rest().len() < 200, "{case}");
        }
    }
    server.returns_to(level);
    let file = std::fs::read(server.image()).unwrap();
    assert!(file.iter().all(|byte| *byte == 0), "half a write is no write");
}

#[test]
fn a_client_that_vanishes_mid_request_costs_nothing() {
    let server = Server::start(SIZE);
    is_served(&server);
    let level = server.settled();
    for round in 0..20_u64 {
        let mut client = Bare::ready(&server.socket(), "disk", round % 2 == 0);
        for cookie in 0..64 {
            client.send(&request(WRITE, 0, cookie, cookie * (64 << 10), 64 << 10));
            client.send(&vec![1; 64 << 10]);
            client.send(&request(READ, 0, cookie, 0, 128 << 10));
        }
        client.send(&request(WRITE, 0, 99, 0, 1 << 20));
        client.send(&[2; 500]);
        drop(client);
    }
    server.returns_to(level);
    is_served(&server);
}

#[test]
fn clients_that_do_not_read_cost_bounded_memory_and_others_are_served() {
    let server = Server::start(SIZE);
    is_served(&server);
    let level = server.settled();
    let bytes: Vec<u8> = (0..16).flat_map(|cookie| request(READ, 4, cookie, 0, 1 << 20)).collect();
    let greedy: Vec<_> = (0..64)
        .map(|index| {
            let mut client = Bare::ready(&server.socket(), "disk", index % 2 == 0);
            client.send(&bytes);
            client
        })
        .collect();
    let bound = SERVER_BYTES as usize + 65 * (CONNECTION_BYTES as usize + RECEIVE_WINDOW + 8192);
    for _ in 0..20 {
        is_served(&server);
        let held = server.level().buffer_bytes;
        assert!(held <= bound, "{held} bytes of at most {bound}");
    }
    // A large request waits for memory, gets it from a client that stands still, and is served.
    let mut client = Bare::ready(&server.socket(), "disk", false);
    client.send(&request(READ, 0, 1, 0, 32 << 20));
    assert_eq!(client.simple(), (0, 1));
    client.take(32 << 20);
    drop((client, greedy));
    server.returns_to(level);
}

#[test]
fn a_deep_pipeline_waits_in_its_socket_and_is_answered_in_the_end() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", false);
    let mut stream = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let all: Vec<u8> = (0..20_000).flat_map(|cookie| request(FLUSH, 0, cookie, 0, 0)).collect();
        std::io::Write::write_all(&mut stream, &all)
    });
    let mut seen = vec![false; 20_000];
    for _ in 0..20_000 {
        let (error, cookie) = client.simple();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true), "answered once");
    }
    sender.join().unwrap().unwrap();
}
