//! The engine on the real ring and real files: plain nodes, gates, cuts, alignment.

use std::path::PathBuf;
use std::rc::Rc;

use liveblk_engine::executor::{Core, CoreId, Engine, EngineConfig};
use liveblk_engine::graph::{CutPart, Graph, OpenNode, Swap, cut};
use liveblk_engine::node::{Disk, Origin, User, WriteFlags, ZeroFlags};
use liveblk_engine::storage::{File, FileOptions};

fn run<R, Fut>(f: impl FnOnce(Core) -> Fut + Send + 'static) -> R
where
    R: Send + 'static,
    Fut: Future<Output = R> + 'static,
{
    let engine = Engine::start(&EngineConfig::default()).unwrap();
    engine.handle().run(CoreId(0), f).wait().unwrap()
}

fn file(dir: &tempfile::TempDir, name: &str, size: u64) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn guest() -> User {
    User::Guest { name: "test".into() }
}

#[test]
fn written_bytes_come_back_and_reach_the_file() {
    for folder in ["/dev/shm", "."] {
        let dir = tempfile::tempdir_in(folder).unwrap();
        let path = file(&dir, "disk", 1 << 20);
        let opened = path.clone();
        run(move |core| async move {
            let graph = Graph::of(&core);
            let node = graph.open(OpenNode::new("file", opened).named("disk")).await.unwrap();
            let disk = Disk::attach(&node, guest(), true).unwrap();
            let buf = core.pool().alloc(300_000);
            buf.fill(7);
            disk.write(1234, buf, WriteFlags { fua: true, ..WriteFlags::default() }).await.unwrap();
            disk.write_zeroes(5000, 5000, ZeroFlags::default()).await.unwrap();
            disk.flush().await.unwrap();
            let back = core.pool().alloc(400_000);
            disk.read(0, back.clone()).await.unwrap();
            let bytes = back.to_vec();
            assert!(bytes[..1234].iter().all(|b| *b == 0));
            assert!(bytes[1234..5000].iter().all(|b| *b == 7));
            assert!(bytes[5000..10_000].iter().all(|b| *b == 0));
            assert!(bytes[10_000..301_234].iter().all(|b| *b == 7));
            let error = disk.read((1 << 20) - 1, core.pool().alloc(2)).await.unwrap_err();
            assert_eq!(error.errno(), 22);
            drop(disk);
            graph.remove(&node).await.unwrap();
        });
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert_eq!((bytes[1233], bytes[1234], bytes[6000], bytes[301_233]), (0, 7, 0, 7));
    }
}

#[test]
fn unaligned_direct_writes_keep_their_neighbours() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = file(&dir, "disk", 0);
    let opened = path.clone();
    run(move |core| async move {
        let options =
            FileOptions { path: opened, writable: true, direct: true, ..FileOptions::default() };
        let file = File::open(&core, options).await.unwrap();
        let mut writes = Vec::new();
        for index in 0..64_u8 {
            let buf = core.pool().alloc(100);
            buf.fill(index + 1);
            writes.push(file.write(u64::from(index) * 100, buf, false));
        }
        for write in writes {
            write.await.unwrap();
        }
        assert_eq!(file.size(), 6400);
    });
    let bytes = std::fs::read(&path).unwrap();
    let expected: Vec<u8> = (0..6400).map(|at| u8::try_from(at / 100 + 1).unwrap()).collect();
    assert_eq!(bytes, expected);
}

#[test]
fn a_cut_moves_a_disk_between_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (file(&dir, "a", 1 << 16), file(&dir, "b", 1 << 16));
    run(move |core| async move {
        let graph = Graph::of(&core);
        let a = graph.open(OpenNode::new("file", first).named("a")).await.unwrap();
        let b = graph.open(OpenNode::new("file", second).named("b")).await.unwrap();
        let disk = Disk::attach(&a, guest(), true).unwrap();
        let write = |byte: u8| {
            let buf = core.pool().alloc(4096);
            buf.fill(byte);
            disk.write(0, buf, WriteFlags::default())
        };
        write(1).await.unwrap();
        let (from, to) = (a.id(), b.id());
        let part = CutPart {
            core: core.id(),
            nodes: vec![from, to],
            flush: false,
            before_swap: None,
            swap: Swap::Local(Box::new(move |graph: &Rc<Graph>| graph.repoint(from, to))),
        };
        let running = cut(&core, vec![part], 1_000_000_000);
        let waiting = write(2);
        running.await.unwrap();
        waiting.await.unwrap();
        assert_eq!(&*disk.node_name(), "b");
        let read = |node: &Rc<liveblk_engine::node::Node>| {
            let buf = core.pool().alloc(1);
            let done = node.read(0, buf.clone(), Origin::External);
            async move {
                done.await.unwrap();
                buf.to_vec()[0]
            }
        };
        assert_eq!((read(&a).await, read(&b).await), (1, 2));
    });
}

#[test]
fn a_second_writer_of_a_file_is_refused_by_name() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = file(&dir, "disk", 4096);
    run(move |core| async move {
        let graph = Graph::of(&core);
        graph.open(OpenNode::new("file", path.clone()).named("one")).await.unwrap();
        let error = graph.open(OpenNode::new("file", path).named("two")).await.unwrap_err();
        assert!(error.to_string().starts_with("Failed to get \"write\" lock"), "{error}");
        assert_eq!(graph.nodes().len(), 1);
    });
}

#[test]
fn a_removed_node_gives_up_its_locks_at_once() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = file(&dir, "disk", 4096);
    run(move |core| async move {
        let graph = Graph::of(&core);
        let first = graph.open(OpenNode::new("file", path.clone()).named("one")).await.unwrap();
        graph.remove(&first).await.unwrap();
        let second = graph.open(OpenNode::new("file", path).named("two")).await;
        assert!(second.is_ok(), "{second:?}");
        drop(first);
    });
}
