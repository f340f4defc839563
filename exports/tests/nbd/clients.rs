//! Real clients: libnbd's tools and library against a server in this process.
use crate::rig::{Server, tool};

const SIZE: u64 = 64 << 20;
/// The Python that libnbd's bindings are installed for.
const PYTHON: &str = "/usr/bin/python3";

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn nbdinfo_sees_the_flags_block_sizes_and_contexts() {
    let server = Server::start(SIZE);
    let out = text(&tool("nbdinfo", &["--json", &server.uri("disk")]).stdout);
    for line in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 67108864",
        "\"base:allocation\"",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(out.contains(line), "{line} is not in {out}");
    }
    let out = text(&tool("nbdinfo", &["--json", &server.uri("ro")]).stdout);
    for line in ["\"is_read_only\": true", "\"can_trim\": false", "\"can_multi_conn\": true"] {
        assert!(out.contains(line), "{line} is not in {out}");
    }
    let out = text(&tool("nbdinfo", &["--list", &server.uri("")]).stdout);
    assert!(out.contains("export=\"disk\"") && out.contains("export=\"ro\""), "{out}");
    let out = text(&tool("nbdinfo", &["--map", &server.uri("disk")]).stdout);
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "67108864", "3", "hole,zero"]);
}

#[test]
fn nbdcopy_in_and_out_gives_the_same_bytes() {
    // In memory: truncating and removing such files on a busy disk takes many seconds.
    let server = Server::start_in(std::path::Path::new("/dev/shm"), SIZE, |_| {});
    let source = server.folder.path().join("source");
    let copy = server.folder.path().join("copy");
    let mut bytes = vec![0_u8; SIZE as usize];
    let mut state = 0x9e37_79b9_u32;
    for block in bytes.chunks_mut(8192).step_by(3) {
        for byte in block {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
    }
    std::fs::write(&source, &bytes).unwrap();
    tool("nbdcopy", &["--flush", source.to_str().unwrap(), &server.uri("disk")]);
    assert!(std::fs::read(server.image()).unwrap() == bytes);
    tool("nbdcopy", &[&server.uri("ro"), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    tool(
        "nbdcopy",
        &["--connections=1", "--requests=64", &server.uri("ro"), copy.to_str().unwrap()],
    );
    assert!(std::fs::read(&copy).unwrap() == bytes);
}

#[test]
fn nbdsh_drives_every_call_on_several_connections() {
    let server = Server::start(SIZE);
    let script = r#"
import nbd, sys
uri = sys.argv[1]
a, b = nbd.NBD(), nbd.NBD()
for h in (a, b):
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
assert a.get_structured_replies_negotiated() and a.can_meta_context("base:allocation")
data = bytearray(bytes(range(256)) * 64)
a.pwrite(data, 777, nbd.CMD_FLAG_FUA)
assert b.pread(len(data), 777) == data
b.zero(4096, 1000, nbd.CMD_FLAG_NO_HOLE)
assert a.pread(4096, 1000) == bytes(4096)
a.zero(65536, 0, nbd.CMD_FLAG_FUA)
a.trim(65536, 65536)
a.cache(1 << 20, 0)
b.flush()
runs = []
a.block_status(1 << 20, 0, lambda c, o, e, err: runs.append((c, o, e)) or 0)
assert runs and runs[0][0] == "base:allocation", runs
cookies = [a.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i % 255 + 1]) * 4096), i * 4096)
           for i in range(1000)]
for cookie in cookies:
    while not a.aio_command_completed(cookie):
        a.poll(-1)
for i in range(1000):
    assert b.pread(4096, i * 4096) == bytes([i % 255 + 1]) * 4096, i
for h in (a, b):
    h.shutdown()
"#;
    tool(PYTHON, &["-c", script, &server.uri("disk")]);
    // Read as a name without structured replies, too.
    let plain = r#"
import nbd, sys
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(sys.argv[1])
assert not h.get_structured_replies_negotiated() and not h.can_df()
assert h.pread(1 << 20, 32 << 20) == bytes(1 << 20)
h.shutdown()
"#;
    tool(PYTHON, &["-c", plain, &server.uri("ro")]);
}

#[test]
fn qemu_io_writes_and_reads_back() {
    let server = Server::start(SIZE);
    let verbs = [
        "write -P 7 0 1M",
        "write -f -P 8 1M 64k",
        "read -P 7 0 1M",
        "write -z -u 512k 256k",
        "read -P 0 512k 256k",
        "discard 0 64k",
        "flush",
        "read -P 8 1M 64k",
    ];
    let mut args = vec!["-f", "raw"];
    for verb in verbs {
        args.extend(["-c", verb]);
    }
    let uri = server.uri("disk");
    args.push(&uri);
    let out = text(&tool("qemu-io", &args).stdout);
    assert!(!out.contains("verification failed"), "{out}");
}
