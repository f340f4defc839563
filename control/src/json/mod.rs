//! JSON as the monitor speaks it.
//!
//! Owns: turning a byte stream into [`serde_json::Value`]s message by message, and values into the
//! monitor's output form. Promises: the peer's dialect (single quotes, several messages per line),
//! its error texts, its way to find the next message after an error; linear time; bounds from
//! [`crate::limits`]. Does not: know commands.

mod encode;
mod lexer;
mod number;
mod parse;
mod stream;

pub use encode::{Layout, encode, encode_line};
pub use stream::{JsonError, MessageStream, parse_one};
