//! Files that existed before a job was to copy into them: what a start that fails leaves, and what
//! is refused. Nothing that held bytes of somebody is ever changed.

use std::path::PathBuf;

use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::storage::{File, FileOptions, stat};
use serde_json::{Value, json};

use crate::world::{create, images, on, qmp};

const MIB: u64 = 1 << 20;

async fn make(core: &Core, name: &str) {
    let path = PathBuf::from(format!("/{name}"));
    let options = FileOptions { path, writable: true, create_new: true, ..FileOptions::default() };
    File::open(core, options).await.expect("a new file");
}

async fn bytes(core: &Core, name: &str) -> Option<Vec<u8>> {
    let path = PathBuf::from(format!("/{name}"));
    let facts = stat(core, &path).await.ok()?;
    let file = File::open(core, FileOptions { path, ..FileOptions::default() }).await;
    let buf = core.pool().alloc(usize::try_from(facts.size).expect("small"));
    file.expect("it opens").read(0, buf.clone()).await.expect("it can be read");
    Some(buf.to_vec())
}

fn into(file: &str) -> Value {
    json!({"job-id": "j", "device": "d", "target": format!("/{file}"), "sync": "full",
           "format": "qcow2"})
}

/// A start can fail after its file was made: for its `replaces`, by another action, by a bitmap.
async fn start_and_fail(core: &Core, verb: &str, file: &str) {
    let mut arguments = into(file);
    if verb == "drive-mirror" {
        arguments["node-name"] = json!("m");
        arguments["replaces"] = json!("nothing");
        qmp(core, verb, arguments.clone()).await.expect_err("there is nothing to replace");
        arguments.as_object_mut().expect("an object").remove("replaces");
    }
    let group = json!({"actions": [{"type": verb, "data": arguments},
                                   {"type": "abort", "data": {}}]});
    qmp(core, "transaction", group).await.expect_err("it is called off");
}

#[test]
fn a_start_that_fails_leaves_files_as_they_were() {
    on(&images(), 3, |world| async move {
        let core = &world.core;
        make(core, "empty").await;
        for verb in ["drive-backup", "drive-mirror"] {
            start_and_fail(core, verb, "new").await;
            assert_eq!(bytes(core, "new").await, None, "{verb}: a new file is left");
            start_and_fail(core, verb, "empty").await;
            assert_eq!(bytes(core, "empty").await, Some(Vec::new()), "{verb}: it was empty");
        }
        assert!(Graph::of(core).find("m").is_err(), "a node is left");
    });
}

#[test]
fn a_file_with_content_is_never_taken_for_a_new_target() {
    on(&images(), 3, |world| async move {
        let core = &world.core;
        create(core, "old", MIB, None).await;
        let before = bytes(core, "old").await.expect("it is there");
        for verb in ["drive-backup", "drive-mirror"] {
            let (class, desc) = qmp(core, verb, into("old")).await.expect_err("it holds something");
            assert_eq!(class, "GenericError");
            assert!(desc.starts_with("Could not create '/old': the file exists"), "{desc}");
            // The source, a layer below it, and a node that others have: the peer's own text.
            for used in ["d", "a", "t"] {
                let kept = bytes(core, used).await;
                let (_, desc) = qmp(core, verb, into(used)).await.expect_err("it is in use");
                assert_eq!(desc, "Failed to get \"write\" lock", "{verb} over {used}");
                assert_eq!(bytes(core, used).await, kept, "{verb} over {used}");
            }
        }
        assert_eq!(bytes(core, "old").await.expect("it is there"), before);
    });
}
