//! `x-debug-query-block-graph`: nodes and edges with permissions.
//!
//! Promises: every use of a node is one edge, named as the peer names it. Ids are good within one
//! answer only. Jobs have no filter nodes here: their edges lead to the nodes that they work on.

use std::collections::BTreeMap;

use liveblk_engine::node::{Node, Permissions, Role, User};
use serde_json::{Value, json};

use super::control::Control;

/// Ids of one answer.
#[derive(Default)]
struct Ids {
    /// The next id.
    next: u64,
    /// Nodes, jobs and front doors by kind and name.
    known: BTreeMap<(&'static str, String), u64>,
    rows: Vec<Value>,
}

const NODE: &str = "block-driver";
const JOB: &str = "block-job";
const FRONT: &str = "block-backend";

impl Ids {
    fn of(&mut self, kind: &'static str, name: &str) -> u64 {
        if let Some(id) = self.known.get(&(kind, name.to_owned())) {
            return *id;
        }
        self.next += 1;
        let id = self.next;
        self.known.insert((kind, name.to_owned()), id);
        // Front doors have no names in the peer.
        let shown = if kind == FRONT { "" } else { name };
        self.rows.push(json!({"name": shown, "type": kind, "id": id}));
        id
    }
}

impl Control {
    /// `x-debug-query-block-graph`.
    pub(super) fn block_graph(&self) -> Value {
        let nodes = self.graph.nodes();
        let mut ids = Ids::default();
        for node in &nodes {
            ids.of(NODE, &node.name());
        }
        let mut edges = Vec::new();
        for node in &nodes {
            edges.extend(edges_to(node, &mut ids));
        }
        json!({"nodes": ids.rows, "edges": edges})
    }
}

fn edges_to(node: &Node, ids: &mut Ids) -> Vec<Value> {
    let child = ids.of(NODE, &node.name());
    let mut edges = Vec::new();
    for (user, permissions) in node.uses() {
        let (parent, name) = match &user {
            User::Overlay { node } => (ids.of(NODE, node), "backing"),
            User::Format { node } => (ids.of(NODE, node), "file"),
            User::Data { node } => (ids.of(NODE, node), "data-file"),
            User::Filter { node, role: Role::Target } => (ids.of(NODE, node), "target"),
            User::Filter { node, .. } => (ids.of(NODE, node), "file"),
            User::Guest { name } => (ids.of(FRONT, name), "root"),
            User::Job { id, role: Role::Source, .. } => (ids.of(JOB, id), "main node"),
            User::Job { id, role: Role::Target, .. } => (ids.of(JOB, id), "target"),
            User::Job { id, role: Role::Between, .. } => (ids.of(JOB, id), "intermediate node"),
        };
        edges.push(json!({
            "name": name,
            "parent": parent,
            "shared-perm": names(permissions.shared),
            "perm": names(permissions.perm),
            "child": child,
        }));
    }
    edges
}

/// The names of permissions, in the peer's order.
fn names(bits: u8) -> Vec<&'static str> {
    let all = [
        (Permissions::RESIZE, "resize"),
        (Permissions::WRITE_UNCHANGED, "write-unchanged"),
        (Permissions::WRITE, "write"),
        (Permissions::CONSISTENT_READ, "consistent-read"),
    ];
    all.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}
