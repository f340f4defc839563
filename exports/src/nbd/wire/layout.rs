//! Fixed-size structures of the protocol, all big-endian and unaligned.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::codes::magic;
use super::error::WireError;

/// Declares a wire structure with its size checked at compile time.
macro_rules! wire_struct {
    (
        $(#[$meta:meta])*
        $name:ident, $size:literal { $($(#[$doc:meta])* $field:ident: $kind:ty,)* }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$doc])* pub $field: $kind,)* }

        impl $name {
            /// Size on the wire in bytes.
            pub const SIZE: usize = $size;

            /// The structure at the start of `bytes`.
            ///
            /// # Errors
            /// If there are too few bytes.
            pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
                Self::read_from_prefix(bytes)
                    .map(|(value, _)| value)
                    .map_err(|_| WireError::Inconsistent)
            }
        }

        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire_struct! {
    /// The server's first words.
    Greeting, 18 {
        /// [`magic::NBD`].
        magic: U64,
        /// [`magic::OPTION`].
        option_magic: U64,
        /// Handshake flags.
        flags: U16,
    }
}

wire_struct! {
    /// Head of an option.
    OptionHeader, 16 {
        /// [`magic::OPTION`].
        magic: U64,
        /// Number of the option.
        option: U32,
        /// Bytes that follow.
        length: U32,
    }
}

wire_struct! {
    /// Head of a reply to an option.
    OptionReplyHeader, 20 {
        /// [`magic::OPTION_REPLY`].
        magic: U64,
        /// Number of the option.
        option: U32,
        /// What kind of reply.
        reply: U32,
        /// Bytes that follow.
        length: U32,
    }
}

wire_struct! {
    /// The answer to EXPORT_NAME, without the padding.
    ExportNameReply, 10 {
        /// Size of the export in bytes.
        size: U64,
        /// Transmission flags.
        flags: U16,
    }
}

wire_struct! {
    /// INFO fact: size and flags.
    InfoExport, 12 {
        /// `InfoType::Export`.
        info: U16,
        /// Size of the export in bytes.
        size: U64,
        /// Transmission flags.
        flags: U16,
    }
}

wire_struct! {
    /// INFO fact: block sizes.
    InfoBlockSize, 14 {
        /// `InfoType::BlockSize`.
        info: U16,
        /// Minimum in bytes.
        minimum: U32,
        /// Preferred in bytes.
        preferred: U32,
        /// Maximum in bytes.
        maximum: U32,
    }
}

wire_struct! {
    /// Head of a request.
    RequestHeader, 28 {
        /// [`magic::REQUEST`].
        magic: U32,
        /// Command flags.
        flags: U16,
        /// Command number.
        command: U16,
        /// Chosen by the client, repeated in the reply.
        cookie: U64,
        /// Where, in bytes.
        offset: U64,
        /// How much, in bytes.
        length: U32,
    }
}

wire_struct! {
    /// Head of a simple reply; a successful READ's data follows.
    SimpleReplyHeader, 16 {
        /// [`magic::SIMPLE_REPLY`].
        magic: U32,
        /// 0 or an error code.
        error: U32,
        /// The request's cookie.
        cookie: U64,
    }
}

wire_struct! {
    /// Head of a chunk of a structured reply.
    ChunkHeader, 20 {
        /// [`magic::STRUCTURED_REPLY`].
        magic: U32,
        /// Whether it is the last chunk.
        flags: U16,
        /// What kind of chunk.
        kind: U16,
        /// The request's cookie.
        cookie: U64,
        /// Bytes that follow.
        length: U32,
    }
}

wire_struct! {
    /// One run of a block status.
    StatusDescriptor, 8 {
        /// Bytes.
        length: U32,
        /// Flags of the context.
        flags: U32,
    }
}

impl Greeting {
    /// A fixed-newstyle greeting.
    pub fn new(flags: u16) -> Self {
        Self { magic: magic::NBD.into(), option_magic: magic::OPTION.into(), flags: flags.into() }
    }
}

impl OptionHeader {
    /// The head of an option with `length` bytes of data.
    pub fn new(option: u32, length: u32) -> Self {
        Self { magic: magic::OPTION.into(), option: option.into(), length: length.into() }
    }
}

impl SimpleReplyHeader {
    /// The head of a simple reply; `error` 0 means success.
    pub fn new(cookie: u64, error: u32) -> Self {
        Self { magic: magic::SIMPLE_REPLY.into(), error: error.into(), cookie: cookie.into() }
    }
}

impl ChunkHeader {
    /// The head of a chunk with `length` bytes of payload.
    pub fn new(cookie: u64, kind: u16, flags: u16, length: u32) -> Self {
        Self {
            magic: magic::STRUCTURED_REPLY.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            length: length.into(),
        }
    }
}

impl RequestHeader {
    /// The head of a request.
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Self {
        Self {
            magic: magic::REQUEST.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        }
    }
}
