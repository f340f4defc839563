//! The NBD protocol as bytes, for both sides of a connection.
//!
//! Owns constants, layouts, and encoding and decoding of options, requests and replies, after
//! `doc/proto.md` of the NetworkBlockDevice project. Does no I/O, keeps no state, knows no export.
//! No function here panics or allocates in proportion to a number that the other side claims.

mod chunk;
mod codes;
mod error;
mod layout;
mod option;

pub(crate) use self::chunk::prefix;
pub use self::chunk::{
    ChunkHead, decode_status, encode_error_payload, encode_status, encode_status_context,
};
pub use self::codes::{
    BlockSize, Command, CommandFlags, ErrorCode, InfoType, OptionCode, OptionReply, Transmission,
    chunk_type, handshake, magic, state,
};
pub use self::error::WireError;
pub use self::layout::{
    ChunkHeader, ExportNameReply, Greeting, InfoBlockSize, InfoExport, OptionHeader,
    OptionReplyHeader, RequestHeader, SimpleReplyHeader, StatusDescriptor,
};
pub use self::option::{
    InfoQuery, MetaQuery, OptionReplyWriter, decode_meta_context, decode_server_entry,
    encode_info_query, encode_meta_query, encode_option,
};

#[cfg(test)]
mod tests;

/// The longest string (export name, description, context name) in bytes.
pub const STRING_MAX: usize = 4096;

/// The longest payload of a request, of a read, and of an option, in bytes.
pub const PAYLOAD_MAX: u32 = 32 << 20;
