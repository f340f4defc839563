//! A chain a <- b <- c <- d with a guest at d on the simulator, steered by QMP commands.
//!
//! Owns: how a job of each kind is started and led into a state, and what must hold of images and
//! nodes when all is over. The guest's disk is compared with a model of bytes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_control::backend::execute_on;
use liveblk_control::schema::{Run, Source, command_entry, validate};
use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::executor::{Class, Core, JoinHandle};
use liveblk_engine::format::{BackingRef, CreateImage, ReferencePolicy};
use liveblk_engine::graph::{Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Disk, Node, Origin, User, WriteFlags, ZeroFlags};
use liveblk_engine::storage::{File, FileOptions, Storage, sync_folder_of};
use liveblk_formats::qcow2::check;
use liveblk_jobs::{JobManager, Status};
use serde_json::{Value, json};

use crate::rig::{self, Events, Log, SECTOR, content, first_difference};

/// Bytes of the disks at first.
pub(crate) const SIZE: u64 = 1 << 20;

/// A speed at which no job of these disks ends while a test looks at it.
const SLOW: u64 = 64 << 10;

/// What can be done to the node d.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// d gets an overlay.
    Snapshot,
    /// d gets all that lies below it.
    Stream,
    /// c and b go into a.
    Commit,
    /// d, c and b go into a, and the guest with them.
    Active,
    /// The guest moves to a copy of d.
    Mirror,
    /// A copy of d as it is now.
    Backup,
    /// d becomes larger.
    Resize,
    /// Other options for d.
    Reopen,
    /// Another node below d.
    Relink,
}

impl Op {
    pub(crate) const JOBS: [Self; 5] =
        [Self::Stream, Self::Commit, Self::Active, Self::Mirror, Self::Backup];

    /// Whether its job becomes ready and waits to be completed.
    pub(crate) const fn follows(self) -> bool {
        matches!(self, Self::Active | Self::Mirror)
    }

    /// The command and its arguments; `id` is the job's, `target` the node that a copy goes to.
    pub(crate) fn command(self, id: &str, target: &str) -> (&'static str, Value) {
        match self {
            Self::Snapshot => (
                "blockdev-snapshot-sync",
                json!({"node-name": "d", "snapshot-node-name": format!("s{id}"),
                       "snapshot-file": format!("/s{id}")}),
            ),
            Self::Stream => ("block-stream", json!({"job-id": id, "device": "d"})),
            Self::Commit => (
                "block-commit",
                json!({"job-id": id, "device": "d", "top-node": "c", "base-node": "a"}),
            ),
            Self::Active => ("block-commit", json!({"job-id": id, "device": "d"})),
            Self::Mirror => (
                "blockdev-mirror",
                json!({"job-id": id, "device": "d", "target": target, "sync": "full"}),
            ),
            Self::Backup => (
                "blockdev-backup",
                json!({"job-id": id, "device": "d", "target": target, "sync": "full"}),
            ),
            Self::Resize => ("block_resize", json!({"node-name": "d", "size": 2 * SIZE})),
            Self::Reopen => ("blockdev-reopen", json!({"options": [options_of_d("c")]})),
            Self::Relink => ("blockdev-reopen", json!({"options": [options_of_d("a")]})),
        }
    }
}

fn options_of_d(backing: &str) -> Value {
    json!({"driver": "qcow2", "node-name": "d", "discard": "unmap", "backing": backing,
           "detect-zeroes": "on", "file": {"driver": "file", "filename": "/d"}})
}

/// A refused command: class and text.
pub(crate) type Refusal = (String, String);

/// Executes a command as a monitor does.
pub(crate) async fn qmp(core: &Core, name: &str, arguments: Value) -> Result<Value, Refusal> {
    let entry = command_entry(name).expect("a command");
    let arguments = validate(entry.arguments, arguments, Source::Json)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let Run::Execute(build) = entry.run else { panic!("{name} is none of the engine's") };
    let command = build(arguments).expect("checked");
    let answer = execute_on(core, command).await;
    answer.map_err(|failure| (failure.class.word().to_owned(), failure.desc))
}

/// Makes an image of `size` bytes, durable with its name.
pub(crate) async fn create(core: &Core, name: &str, size: u64, below: Option<&str>) {
    let options = FileOptions {
        path: format!("/{name}").into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let file = File::open(core, options).await.expect("a new file");
    let backing =
        below.map(|name| BackingRef { file: format!("/{name}"), format: Some("qcow2".into()) });
    let driver = liveblk_formats::registry().find("qcow2").expect("known");
    let create = CreateImage { size, backing, ..CreateImage::default() };
    driver.create(core.clone(), Storage::File(file), create).await.expect("an image");
    sync_folder_of(core, format!("/{name}").as_ref()).await.expect("a durable name");
}

/// Opens an image as a node of the same name.
pub(crate) async fn add(core: &Core, name: &str, below: Option<&str>) {
    let options = json!({"driver": "qcow2", "node-name": name, "discard": "unmap",
                         "backing": below,
                         "file": {"driver": "file", "filename": format!("/{name}")}});
    qmp(core, "blockdev-add", options).await.expect("it opens");
}

pub(crate) fn configure(core: &Core) {
    Graph::of(core).configure(GraphConfig {
        formats: liveblk_formats::registry(),
        policy: ReferencePolicy::Any,
        resolve: liveblk_formats::reference::resolve_reference,
    });
}

pub(crate) fn find(core: &Core, name: &str) -> Rc<Node> {
    Graph::of(core).find(name).expect("the node is there")
}

/// All of the node `name`.
pub(crate) async fn content_of(world: &World, name: &str) -> Vec<u8> {
    content(&find(&world.core, name)).await
}

pub(crate) async fn fill(node: &Rc<Node>, offset: u64, len: u64, byte: u8) {
    let buf = node.core().pool().alloc(usize::try_from(len).expect("small"));
    buf.fill(byte);
    node.write(offset, buf, WriteFlags::default(), Origin::External).await.expect("written");
}

pub(crate) fn attach(node: &Rc<Node>) -> Disk {
    Disk::attach(node, User::Guest { name: "guest".into() }, true).expect("the guest attaches")
}

/// The images on disk: the chain, two targets t and w, and a pair x -> y for a slow partner.
pub(crate) fn images() -> SimFs {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, |core| async move {
        configure(&core);
        let mut below = None;
        for (index, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let at = index as u64 * (64 << 10);
            create(&core, name, SIZE, below).await;
            add(&core, name, below).await;
            let node = find(&core, name);
            fill(&node, at, 320 << 10, 0x11 * (index as u8 + 1)).await;
            fill(&node, (640 << 10) + at + 512, 1024, 0x80 + index as u8).await;
            if index > 0 {
                let flags = ZeroFlags::default();
                node.write_zeroes(at + 4096, 70_000, flags, Origin::External)
                    .await
                    .expect("zeroed");
            }
            below = Some(name);
        }
        for name in ["t", "w", "x", "y"] {
            create(&core, name, SIZE, None).await;
        }
        add(&core, "x", None).await;
        fill(&find(&core, "x"), 0, SIZE, 0x99).await;
        Graph::of(&core).close_all().await.expect("it closes");
    });
    sim.kill()
}

/// An open world with its guest.
pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) disk: Disk,
    pub(crate) log: Rc<Log>,
    pub(crate) events: Rc<Events>,
    first: Vec<u8>,
    /// What the targets of backups must hold.
    instants: RefCell<BTreeMap<String, Vec<u8>>>,
}

impl World {
    /// Opens the images of [`images`].
    pub(crate) async fn open(core: &Core) -> Rc<Self> {
        configure(core);
        for (name, below) in [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", Some("c"))] {
            add(core, name, below).await;
        }
        add(core, "t", None).await;
        add(core, "w", None).await;
        let disk = attach(&find(core, "d"));
        let first = content(&find(core, "d")).await;
        // The control object is there by now; the test listens in its place.
        let events = Events::of(core);
        let (core, log) = (core.clone(), Log::new());
        let world = Rc::new(Self { core, disk, log, events, first, instants: RefCell::default() });
        world.work(3).await;
        world
    }

    /// What the guest's disk must hold now.
    pub(crate) fn model(&self) -> Vec<u8> {
        self.log.model(0, &self.first)
    }

    /// The guest writes `count` times.
    pub(crate) async fn work(&self, count: u64) {
        for _ in 0..count {
            self.log.write_one(&self.core, 0, &self.disk, 0, SIZE / SECTOR).await;
        }
    }

    /// The guest writes until told to stop.
    pub(crate) fn works(self: &Rc<Self>) -> JoinHandle<()> {
        let world = Rc::clone(self);
        self.core.spawn(Class::Guest, async move {
            while !world.log.stop.get() {
                world.work(1).await;
                world.core.sleep(world.core.random() % 3_000_000).await;
            }
        })
    }

    pub(crate) async fn qmp(&self, name: &str, arguments: Value) -> Result<Value, Refusal> {
        qmp(&self.core, name, arguments).await
    }

    /// Tries `op` while nobody writes.
    pub(crate) async fn try_op(&self, op: Op, id: &str, target: &str) -> Result<(), Refusal> {
        self.try_with(op, id, target, json!({})).await
    }

    /// As [`World::try_op`], with `more` members.
    pub(crate) async fn try_with(
        &self,
        op: Op,
        id: &str,
        target: &str,
        more: Value,
    ) -> Result<(), Refusal> {
        let (name, mut arguments) = op.command(id, target);
        let members = arguments.as_object_mut().expect("an object");
        members.extend(more.as_object().cloned().unwrap_or_default());
        let now = content(&find(&self.core, "d")).await;
        self.qmp(name, arguments).await?;
        if op == Op::Backup {
            self.instants.borrow_mut().insert(target.to_owned(), now);
        }
        Ok(())
    }

    /// Starts a job and leads it into `state`. `manual` keeps it when it is concluded.
    pub(crate) async fn lead(self: &Rc<Self>, op: Op, state: Status, manual: bool) {
        let manager = JobManager::of(&self.core);
        let until = async |status| manager.until("j", |now| now == status).await;
        let mut more = json!({"auto-dismiss": !manual});
        if matches!(state, Status::Running | Status::Paused) {
            more["speed"] = SLOW.into();
        }
        more["auto-finalize"] = (state != Status::Pending).into();
        if matches!(state, Status::Waiting | Status::Aborting) {
            self.lead_in_group(op, more).await;
        } else {
            self.try_with(op, "j", "t", more).await.expect("it starts");
        }
        if op.follows() && !matches!(state, Status::Running | Status::Paused) {
            until(Status::Ready).await;
            self.work(2).await;
            if matches!(state, Status::Waiting | Status::Pending | Status::Concluded) {
                self.qmp("block-job-complete", json!({"device": "j"})).await.expect("completes");
            }
        }
        match state {
            Status::Paused | Status::Standby => {
                until(if state == Status::Paused { Status::Running } else { Status::Ready }).await;
                self.core.sleep(20_000_000).await;
                self.qmp("block-job-pause", json!({"device": "j"})).await.expect("pauses");
            }
            Status::Aborting => {
                self.qmp("job-cancel", json!({"id": "j"})).await.expect("cancels");
            }
            _ => {}
        }
        until(state).await;
        if state == Status::Running {
            self.core.sleep(20_000_000).await;
        }
    }

    /// Starts the job in a group with one that takes long.
    async fn lead_in_group(&self, op: Op, more: Value) {
        add(&self.core, "x", None).await;
        add(&self.core, "y", None).await;
        let (name, mut data) = op.command("j", "t");
        data.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("one"));
        let partner = json!({"type": "blockdev-backup", "data": {
            "job-id": "z", "device": "x", "target": "y", "sync": "full", "speed": SLOW}});
        let actions = json!([{"type": name, "data": data}, partner]);
        let now = self.model();
        let group = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
        self.qmp("transaction", group).await.expect("they start");
        if op == Op::Backup {
            self.instants.borrow_mut().insert("t".into(), now);
        }
    }

    /// Lets all jobs come to their good ends while the guest writes.
    pub(crate) async fn finish(self: &Rc<Self>) {
        let guest = self.works();
        let manager = JobManager::of(&self.core);
        for round in 0.. {
            let jobs = manager.query();
            if jobs.is_empty() {
                break;
            }
            assert!(round < 4000, "the jobs never end: {jobs:?}");
            for job in jobs {
                let id = json!({"id": &*job.id});
                // The state may be another one by the time of the verb.
                let _ = match job.status {
                    Status::Paused | Status::Standby => self.qmp("job-resume", id).await,
                    Status::Ready => self.qmp("job-complete", id).await,
                    Status::Pending => self.qmp("job-finalize", id).await,
                    Status::Concluded => self.qmp("job-dismiss", id).await,
                    _ => {
                        let speed = json!({"device": &*job.id, "speed": 0});
                        self.qmp("block-job-set-speed", speed).await
                    }
                };
            }
            self.core.sleep(5_000_000).await;
        }
        self.rest(guest).await;
    }

    /// Lets the guest end its last write.
    pub(crate) async fn rest(&self, guest: JoinHandle<()>) {
        self.log.stop.set(true);
        guest.await;
        self.log.stop.set(false);
    }

    /// Nothing failed, the guest's disk and all copies are exact, nothing is left in use, and the
    /// files alone show the same.
    pub(crate) async fn prove(self: Rc<Self>, what: &str) {
        let bad: Vec<_> = self.events.words().into_iter().filter(|word| is_bad(word)).collect();
        assert!(bad.is_empty(), "{what}: {bad:?}");
        self.prove_images(what).await;
    }

    /// The same, whatever became of the jobs; copies of jobs that did not complete are not looked
    /// at.
    pub(crate) async fn prove_images(self: Rc<Self>, what: &str) {
        assert_eq!(self.log.failures.get(), 0, "{what}: the guest sees no failure");
        let now = self.model();
        let node = self.disk.node();
        same(&content(&node).await, &now, &format!("{what}: the guest's disk"));
        for (target, wanted) in &self.instants.take() {
            same(&content(&find(&self.core, target)).await, wanted, &format!("{what}: {target}"));
        }
        let graph = Graph::of(&self.core);
        let used: Vec<_> = graph
            .nodes()
            .iter()
            .flat_map(|node| node.users())
            .filter(|user| matches!(user, User::Job { .. }))
            .collect();
        assert!(used.is_empty(), "{what}: {used:?}");
        let (core, file) = (self.core.clone(), node.filename());
        drop((node, self));
        graph.close_all().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(graph.nodes().is_empty(), "{what}: {:?}", graph.nodes());
        let mut spec = OpenNode::new("qcow2", &file);
        spec.writable = false;
        let node = graph.open(spec).await.expect("it opens as its header says");
        same(&content(&node).await, &now, &format!("{what}: {file} by itself"));
        drop(node);
        graph.close_all().await.expect("it closes");
        for name in ["a", "b", "c", "d", "t", "w", "sj", "sk"] {
            let options = FileOptions { path: format!("/{name}").into(), ..FileOptions::default() };
            let Ok(file) = File::open(&core, options).await else { continue };
            let report = check(&core, &Storage::File(file)).await.expect("it can be checked");
            assert_eq!(report.corruptions, 0, "{what}: {name}: {:?}", report.problems);
        }
    }

    /// Copies that were begun and not ended are nothing.
    pub(crate) fn forget_copies(&self) {
        self.instants.borrow_mut().clear();
    }

    pub(crate) fn status(&self) -> Option<Status> {
        JobManager::of(&self.core).find("j").map(|job| job.status())
    }

    pub(crate) fn guest_is_at(&self) -> String {
        self.disk.node_name().to_string()
    }
}

fn is_bad(word: &str) -> bool {
    word.starts_with("COMPLETED ") || word.starts_with("CANCELLED") || word.starts_with("ERROR")
}

/// `found` must begin with `wanted`, and read as zeroes beyond it.
pub(crate) fn same(found: &[u8], wanted: &[u8], what: &str) {
    assert!(found.len() >= wanted.len(), "{what}: {} bytes", found.len());
    let (head, tail) = found.split_at(wanted.len());
    assert_eq!(first_difference(head, wanted), None, "{what}");
    assert!(tail.iter().all(|byte| *byte == 0), "{what}: the tail");
}

/// Runs `test` on a copy of the images.
pub(crate) fn on<R: 'static, F: Future<Output = R> + 'static>(
    images: &SimFs,
    seed: u64,
    test: impl FnOnce(Rc<World>) -> F + 'static,
) -> R {
    let mut config = SimConfig::new(seed);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images.after_power_cut(0));
    sim.block_on(0, |core| async move {
        let world = World::open(&core).await;
        test(world).await
    })
}

/// Nothing takes long, but things take differently long.
pub(crate) fn rig_latency() -> liveblk_engine::driver::sim::Latency {
    liveblk_engine::driver::sim::Latency { sync: 1_000..5_000, ..Default::default() }
}

/// Runs all of `cells`, then tells of all that failed.
#[derive(Default)]
pub(crate) struct Cells {
    count: usize,
    failed: Vec<String>,
}

impl Cells {
    pub(crate) fn run(&mut self, what: &str, cell: impl FnOnce()) {
        self.count += 1;
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(cell)).is_err() {
            self.failed.push(what.to_owned());
        }
    }

    pub(crate) fn demand(self) {
        let Self { count, failed } = self;
        assert!(failed.is_empty(), "{} of {count} cells are wrong: {failed:#?}", failed.len());
    }
}

/// Waits until job j is gone.
pub(crate) async fn gone(core: &Core) {
    rig::gone(core, "j").await;
}
