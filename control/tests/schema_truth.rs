//! `query-qmp-schema` against the peer's, path by path.
//!
//! The record lists, for the commands and events that both have, every path through the peer's
//! schema with its type and features (`command</argument?/+case`). Everything ours shows must be in
//! it, but for additions that are listed here: so a client that probes the schema finds nothing
//! that means something else.

use std::collections::{BTreeSet, HashMap, HashSet};

use liveblk_control::schema::{COMMANDS, EVENTS, query_commands, query_qmp_schema};
use serde_json::Value;

/// Additions of ours.
static ADDITIONS: &[&str] = &[
    // An active commit can copy writes before they are answered, and change its mode.
    "block-commit</copy-mode? enum",
    "block-commit</copy-mode? =background",
    "block-commit</copy-mode? =write-blocking",
    "block-job-change</+commit/copy-mode? enum",
    "block-job-change</+commit/copy-mode? =background",
    "block-job-change</+commit/copy-mode? =write-blocking",
    "block-dirty-bitmap-add</follow? bool",
    "block-export-add</+nbd/bitmap? str",
    "query-block>[]/inserted?/dirty-bitmaps?[]/follow? bool",
    "query-named-block-nodes>[]/dirty-bitmaps?[]/follow? bool",
    "transaction</actions[]/+block-dirty-bitmap-add/data/follow? bool",
    "blockdev-backup</allow-larger-target? bool",
    "blockdev-mirror</allow-larger-target? bool",
    "transaction</actions[]/+blockdev-backup/data/allow-larger-target? bool",
    "blockdev-mirror</bitmap-mode? =always",
    "blockdev-mirror</bitmap-mode? =never",
    "blockdev-mirror</bitmap-mode? =on-success",
    "blockdev-mirror</bitmap-mode? enum",
    "blockdev-mirror</bitmap? str",
    "blockdev-mirror</target-is-zero? bool",
    "blockdev-backup</on-cbw-error? =break-guest-write",
    "blockdev-backup</on-cbw-error? =break-snapshot",
    "blockdev-backup</on-cbw-error? enum",
    "drive-mirror</bitmap-mode? =always",
    "drive-mirror</bitmap-mode? =never",
    "drive-mirror</bitmap-mode? =on-success",
    "drive-mirror</bitmap-mode? enum",
    "drive-mirror</bitmap? str",
    "transaction</actions[]/+blockdev-backup/data/on-cbw-error? =break-guest-write",
    "transaction</actions[]/+blockdev-backup/data/on-cbw-error? =break-snapshot",
    "transaction</actions[]/+blockdev-backup/data/on-cbw-error? enum",
    "transaction</actions[]/type =block-commit",
    "transaction</actions[]/type =block-stream",
    "transaction</actions[]/type =blockdev-mirror",
    "transaction</actions[]/type =drive-mirror",
];

/// Branches that the peer does not have: all that begins so.
static ADDED_BRANCHES: &[&str] = &[
    "BLOCK_JOB_CONVERGE",
    "blockdev-create</options/+raw/",
    "block-commit</converge?",
    "blockdev-mirror</converge?",
    "blockdev-backup</spill-",
    "drive-mirror</converge?",
    "drive-backup</spill-",
    "transaction</actions[]/+drive-backup/data/spill-",
    "query-block-jobs>[]/converge?",
    "query-block-jobs>[]/spill?",
    "query-jobs>[]/converge?",
    "transaction</actions[]/+block-commit",
    "transaction</actions[]/+block-stream",
    "transaction</actions[]/+blockdev-backup/data/spill-",
    "transaction</actions[]/+blockdev-mirror",
    "transaction</actions[]/+drive-mirror",
];

struct Walk<'a> {
    entities: HashMap<&'a str, &'a Value>,
    paths: BTreeSet<String>,
}

impl<'a> Walk<'a> {
    fn walk(&mut self, path: &str, name: &'a str, above: &HashSet<&'a str>, features: &str) {
        let entity = self.entities[name];
        let own = format!("{features}{}", features_of(entity));
        match entity["meta-type"].as_str().unwrap() {
            "builtin" => self.add(format!("{path} {name}{own}")),
            "array" => {
                let element = entity["element-type"].as_str().unwrap();
                self.walk(&format!("{path}[]"), element, above, &own);
            }
            "enum" => {
                self.add(format!("{path} enum{own}"));
                for member in members(entity) {
                    self.add(format!("{path} ={}", member["name"].as_str().unwrap()));
                }
            }
            _ if above.contains(name) => self.add(format!("{path} again{own}")),
            kind => {
                self.add(format!("{path} {kind}{own}"));
                let mut above = above.clone();
                above.insert(name);
                self.inside(path, entity, &above);
            }
        }
    }

    fn inside(&mut self, path: &str, entity: &'a Value, above: &HashSet<&'a str>) {
        for member in members(entity) {
            let ty = member["type"].as_str().unwrap();
            let Some(name) = member.get("name").and_then(Value::as_str) else {
                self.walk(&format!("{path}|"), ty, above, "");
                continue;
            };
            let mark = if member.get("default").is_some() { "?" } else { "" };
            self.walk(&format!("{path}/{name}{mark}"), ty, above, &features_of(member));
        }
        for variant in entity.get("variants").and_then(Value::as_array).into_iter().flatten() {
            let case = variant["case"].as_str().unwrap();
            self.walk(&format!("{path}/+{case}"), variant["type"].as_str().unwrap(), above, "");
        }
    }

    fn add(&mut self, path: String) {
        self.paths.insert(path);
    }
}

fn members(entity: &Value) -> &[Value] {
    entity["members"].as_array().unwrap()
}

fn features_of(entity: &Value) -> String {
    let features = entity.get("features").and_then(Value::as_array);
    features.into_iter().flatten().map(|word| format!(" {}", word.as_str().unwrap())).collect()
}

#[test]
fn every_path_of_our_schema_is_one_of_the_peers_or_a_named_addition() {
    let schema = query_qmp_schema();
    let entities: HashMap<&str, &Value> = schema
        .as_array()
        .unwrap()
        .iter()
        .map(|entity| (entity["name"].as_str().unwrap(), entity))
        .collect();
    assert_eq!(entities.len(), schema.as_array().unwrap().len(), "names are unique");
    let mut walk = Walk { entities, paths: BTreeSet::new() };
    for event in EVENTS {
        let entity = walk.entities[event.name];
        walk.walk(event.name, entity["arg-type"].as_str().unwrap(), &HashSet::new(), "");
    }
    for command in COMMANDS {
        let entity = walk.entities[command.name];
        let (arguments, answer) = (&entity["arg-type"], &entity["ret-type"]);
        walk.add(format!("{}{}", command.name, features_of(entity)));
        let none = HashSet::new();
        walk.walk(&format!("{}<", command.name), arguments.as_str().unwrap(), &none, "");
        walk.walk(&format!("{}>", command.name), answer.as_str().unwrap(), &none, "");
    }
    let peer: BTreeSet<&str> = include_str!("golden/schema_paths.txt").lines().collect();
    let odd: Vec<&str> = walk
        .paths
        .iter()
        .map(String::as_str)
        .filter(|path| !peer.contains(path) && !ADDITIONS.contains(path))
        .filter(|path| !ADDED_BRANCHES.iter().any(|branch| path.starts_with(branch)))
        .collect();
    assert!(odd.is_empty(), "{odd:#?}");
    for addition in ADDITIONS {
        assert!(walk.paths.contains(*addition), "{addition}");
    }
}

#[test]
fn query_commands_names_the_table() {
    let names = query_commands();
    let names: Vec<&str> =
        names.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), COMMANDS.len());
    assert!(names.contains(&"blockdev-mirror"));
}
