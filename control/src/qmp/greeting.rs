//! Who we are on the wire.
//!
//! Owns: version and greeting. Promises: the version is the one of the peer whose command set this
//! is, our own name and version stand in `package`.

use serde_json::{Value, json};

/// The version of the peer that clients may assume.
pub const COMPATIBLE_VERSION: (u32, u32, u32) = (10, 0, 2);

/// Our own name and version.
pub const PACKAGE: &str = concat!("liveblk ", env!("CARGO_PKG_VERSION"));

/// Answer of `query-version`, also part of the greeting.
pub fn version_info() -> Value {
    let (major, minor, micro) = COMPATIBLE_VERSION;
    json!({"qemu": {"micro": micro, "minor": minor, "major": major}, "package": PACKAGE})
}

/// The first message of a connection.
pub fn greeting() -> Value {
    json!({"QMP": {"version": version_info(), "capabilities": ["oob"]}})
}
