//! Every command over a real connection, with the answers byte by byte.
use crate::rig::cmd::{BLOCK_STATUS, CACHE, DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
use crate::rig::{Bare, Server, request};

const SIZE: u64 = 64 << 20;
const EINVAL: u32 = 22;

fn write(client: &mut Bare, offset: u64, data: &[u8]) -> u32 {
    client.send(&request(WRITE, 0, 1, offset, data.len() as u32));
    client.send(data);
    client.simple().0
}

fn read(client: &mut Bare, offset: u64, length: u32) -> Vec<u8> {
    client.send(&request(READ, 0, 2, offset, length));
    assert_eq!(client.simple(), (0, 2));
    client.take(length as usize)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

#[test]
fn writes_of_every_size_read_back_and_reach_the_file() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", false);
    let sizes = [1, 511, 4096, 16 << 10, 65_500, (64 << 10) + 3, 1 << 20, (3 << 20) + 5, 32 << 20];
    let mut offset = 7;
    for (seed, size) in sizes.into_iter().enumerate() {
        let data = pattern(size, seed as u8);
        assert_eq!(write(&mut client, offset, &data), 0, "{size} bytes");
        assert!(read(&mut client, offset, size as u32) == data, "{size} bytes at {offset}");
        let file = std::fs::read(server.image()).unwrap();
        assert!(file[offset as usize..offset as usize + size] == data, "{size} in the file");
        offset = (offset + size as u64 + 1) % (SIZE - (32 << 20) - 1);
    }
}

#[test]
fn a_pipeline_of_requests_in_one_send_is_answered_completely() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", false);
    let mut bytes = Vec::new();
    for cookie in 0..500_u64 {
        bytes.extend(request(WRITE, 0, cookie, cookie * 4096, 4096));
        bytes.extend(vec![cookie as u8 | 1; 4096]);
    }
    let mut stream = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || std::io::Write::write_all(&mut stream, &bytes));
    let mut cookies: Vec<u64> = (0..500)
        .map(|_| client.simple())
        .map(|(error, cookie)| {
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..500).collect::<Vec<_>>());
    sender.join().unwrap().unwrap();
    let all: Vec<u8> =
        (0..500).flat_map(|cookie| request(READ, 0, cookie, cookie * 4096, 4096)).collect();
    client.send(&all);
    for _ in 0..500 {
        let (error, cookie) = client.simple();
        assert_eq!((error, client.take(4096)), (0, vec![cookie as u8 | 1; 4096]));
    }
}

#[test]
fn structured_reads_cut_holes_out_and_df_gives_one_piece() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", true);
    assert_eq!(write(&mut client, 1 << 20, &pattern(64 << 10, 1)), 0);
    client.send(&request(READ, 0, 5, 0, 4 << 20));
    let (mut at, mut data, mut holes) = (0_u64, 0_u64, 0_u64);
    loop {
        let (flags, kind, cookie, payload) = client.chunk();
        assert_eq!(cookie, 5);
        assert_eq!(u64::from_be_bytes(payload[..8].try_into().unwrap()), at, "in order");
        let length = if kind == 2 {
            let length = u64::from(u32::from_be_bytes(payload[8..12].try_into().unwrap()));
            holes += length;
            length
        } else {
            assert_eq!(kind, 1);
            data += payload.len() as u64 - 8;
            payload.len() as u64 - 8
        };
        at += length;
        if flags == 1 {
            break;
        }
    }
    assert_eq!((at, data, holes), (4 << 20, 64 << 10, (4 << 20) - (64 << 10)));
    client.send(&request(READ, 4, 6, 0, 4 << 20));
    let (flags, kind, _, payload) = client.chunk();
    assert_eq!((flags, kind, payload.len()), (1, 1, (4 << 20) + 8));
    client.send(&request(READ, 0, 7, 0, 4096));
    assert_eq!(client.chunk(), (1, 2, 7, [&[0; 8][..], &4096_u32.to_be_bytes()].concat()));
    client.send(&request(READ, 0, 8, 0, 0));
    assert_eq!(client.chunk(), (1, 0, 8, Vec::new()));
}

#[test]
fn block_status_merges_neighbours_and_req_one_gives_the_first_run() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", true);
    assert_eq!(write(&mut client, 1 << 20, &pattern(64 << 10, 1)), 0);
    client.send(&request(BLOCK_STATUS, 0, 1, 0, SIZE as u32));
    let (flags, kind, cookie, payload) = client.chunk();
    assert_eq!((flags, kind, cookie), (1, 5, 1));
    let words: Vec<u32> =
        payload.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
    let tail = (63 << 20) - (64 << 10);
    assert_eq!(words, [0, 1 << 20, 3, 64 << 10, 0, tail, 3]);
    client.send(&request(BLOCK_STATUS, 8, 2, 4096, SIZE as u32 - 4096));
    assert_eq!(client.chunk().3.len(), 12);
    client.send(&request(BLOCK_STATUS, 0, 3, 0, 0));
    let (_, kind, _, payload) = client.chunk();
    assert_eq!((kind, &payload[..4]), (0x8001, &EINVAL.to_be_bytes()[..]));
}

#[test]
fn zeroes_trims_caches_and_flushes_with_all_their_flags_succeed() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "disk", false);
    for (index, (command, flags)) in [
        (WRITE_ZEROES, 0),
        (WRITE_ZEROES, 1),
        (WRITE_ZEROES, 2),
        (TRIM, 0),
        (TRIM, 1),
        (CACHE, 0),
        (FLUSH, 0),
        (FLUSH, 1),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(write(&mut client, 0, &pattern(256 << 10, 3)), 0);
        let length = if command == FLUSH { 0 } else { 128 << 10 };
        client.send(&request(command, flags, index as u64, 0, length));
        assert_eq!(client.simple(), (0, index as u64), "command {command} flags {flags}");
        let back = read(&mut client, 0, 256 << 10);
        assert!(back[128 << 10..] == pattern(256 << 10, 3)[128 << 10..]);
        if command == WRITE_ZEROES {
            assert!(back[..128 << 10].iter().all(|byte| *byte == 0));
        }
    }
    client.send(&request(DISC, 0, 0, 0, 0));
    assert_eq!(client.rest(), b"");
}

#[test]
fn bad_requests_are_refused_and_the_connection_goes_on() {
    let server = Server::start(SIZE);
    for structured in [false, true] {
        let mut client = Bare::ready(&server.socket(), "disk", structured);
        let cases = [
            ("read past the end", request(READ, 0, 9, SIZE, 512)),
            ("read across the end", request(READ, 0, 9, SIZE - 1, 2)),
            ("read that overflows", request(READ, 0, 9, u64::MAX - 15, 512)),
            ("read of 33 MiB", request(READ, 0, 9, 0, 33 << 20)),
            ("read with an unknown flag", request(READ, 0x8000, 9, 0, 4)),
            ("write past the end", [request(WRITE, 0, 9, SIZE, 4), b"abcd".to_vec()].concat()),
            ("write with flags", [request(WRITE, 0x20, 9, 0, 4), b"abcd".to_vec()].concat()),
            ("flush past the end", request(FLUSH, 0, 9, SIZE + 5, 5)),
            ("trim past the end", request(TRIM, 0, 9, SIZE, 4096)),
            ("zeroes past the end", request(WRITE_ZEROES, 0, 9, 0, u32::MAX)),
            ("cache of 33 MiB", request(CACHE, 0, 9, 0, 33 << 20)),
            ("resize", request(8, 0, 9, 0, 4096)),
            ("unknown command", request(55, 0, 9, 0, 4096)),
            ("status past the end", request(BLOCK_STATUS, 0, 9, 0, 2 * SIZE as u32)),
        ];
        for (case, bytes) in cases {
            client.send(&bytes);
            if structured {
                let (flags, kind, cookie, payload) = client.chunk();
                assert_eq!((flags, kind, cookie), (1, 0x8001, 9), "{case}");
                assert_eq!(payload[..4], EINVAL.to_be_bytes(), "{case}");
            } else {
                assert_eq!(client.simple(), (EINVAL, 9), "{case}");
            }
        }
        client.send(&request(FLUSH, 0, 10, 0, 0));
        assert_eq!(client.simple(), (0, 10));
    }
    let file = std::fs::read(server.image()).unwrap();
    assert!(file.len() as u64 == SIZE && file.iter().all(|byte| *byte == 0), "nothing was written");
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let server = Server::start(SIZE);
    let mut client = Bare::ready(&server.socket(), "ro", false);
    for command in [WRITE, TRIM, WRITE_ZEROES] {
        client.send(&request(command, 0, 3, 0, 4));
        if command == WRITE {
            client.send(b"abcd");
        }
        assert_eq!(client.simple(), (EINVAL, 3));
    }
    client.send(&request(READ, 0, 4, 0, 4));
    assert_eq!((client.simple(), client.take(4)), ((0, 4), vec![0; 4]));
}
