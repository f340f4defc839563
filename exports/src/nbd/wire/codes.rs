//! Numbers of the protocol and their names.

/// Magic numbers.
pub mod magic {
    /// Start of the server's greeting: "NBDMAGIC".
    pub const NBD: u64 = 0x4e42_444d_4147_4943;
    /// Second half of a newstyle greeting, and start of each option: "IHAVEOPT".
    pub const OPTION: u64 = 0x4948_4156_454f_5054;
    /// Start of a reply to an option.
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    /// Start of a request.
    pub const REQUEST: u32 = 0x2560_9513;
    /// Start of a simple reply.
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    /// Start of a chunk of a structured reply.
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
}

/// Flags of the handshake; the client answers with the same bits.
pub mod handshake {
    /// The server (client) speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after the reply to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Types of chunks of a structured reply, and the flag of the last one.
pub mod chunk_type {
    /// Flag: no further chunk follows for this request.
    pub const DONE: u16 = 1;
    /// No payload.
    pub const NONE: u16 = 0;
    /// An offset (u64) and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset (u64) and a length (u32) of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context id (u32) and status descriptors.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error code (u32), a message length (u16) and a message.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// As `ERROR`, and an offset (u64).
    pub const ERROR_OFFSET: u16 = (1 << 15) | 2;
}

/// Flags of the context `base:allocation`.
pub mod state {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 2;
    /// `qemu:dirty-bitmap:`: changed.
    pub const DIRTY: u32 = 1;
}

/// Transmission flags of an export, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transmission(pub u16);

impl Transmission {
    /// The other bits mean something.
    pub const HAS_FLAGS: Self = Self(1);
    /// Writes fail.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// FLUSH works.
    pub const FLUSH: Self = Self(1 << 2);
    /// The FUA flag works.
    pub const FUA: Self = Self(1 << 3);
    /// TRIM works.
    pub const TRIM: Self = Self(1 << 5);
    /// WRITE_ZEROES works.
    pub const WRITE_ZEROES: Self = Self(1 << 6);
    /// The DF flag of READ works.
    pub const DF: Self = Self(1 << 7);
    /// Several connections see each other's writes and flushes.
    pub const MULTI_CONN: Self = Self(1 << 8);
    /// CACHE works.
    pub const CACHE: Self = Self(1 << 10);
    /// The FAST_ZERO flag of WRITE_ZEROES works.
    pub const FAST_ZERO: Self = Self(1 << 11);

    /// Both sets of bits.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a client asks for during the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionCode {
    /// Pick an export and start, the old way.
    ExportName,
    /// End the connection.
    Abort,
    /// Name the exports.
    List,
    /// Switch to TLS.
    StartTls,
    /// Facts of an export.
    Info,
    /// Facts of an export, then start.
    Go,
    /// Use structured replies.
    StructuredReply,
    /// Name metadata contexts.
    ListMetaContext,
    /// Select metadata contexts.
    SetMetaContext,
    /// Use extended headers.
    ExtendedHeaders,
    /// Any other number.
    Unknown(u32),
}

impl OptionCode {
    const KNOWN: [(u32, Self, &'static str); 10] = [
        (1, Self::ExportName, "export name"),
        (2, Self::Abort, "abort"),
        (3, Self::List, "list"),
        (5, Self::StartTls, "starttls"),
        (6, Self::Info, "info"),
        (7, Self::Go, "go"),
        (8, Self::StructuredReply, "structured reply"),
        (9, Self::ListMetaContext, "list meta context"),
        (10, Self::SetMetaContext, "set meta context"),
        (11, Self::ExtendedHeaders, "extended headers"),
    ];

    /// The option with this number.
    pub fn from_number(number: u32) -> Self {
        let known = Self::KNOWN.iter().find(|(code, ..)| *code == number);
        known.map_or(Self::Unknown(number), |(_, option, _)| *option)
    }

    /// The option's number.
    pub fn number(self) -> u32 {
        if let Self::Unknown(number) = self {
            return number;
        }
        Self::KNOWN.iter().find(|(_, option, _)| *option == self).map_or(0, |(code, ..)| *code)
    }

    /// The option's name in messages.
    pub fn name(self) -> &'static str {
        let known = Self::KNOWN.iter().find(|(_, option, _)| *option == self);
        known.map_or("<unknown>", |(.., name)| name)
    }
}

/// Types of replies to options; errors have the top bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionReply {
    /// Done.
    Ack = 1,
    /// One export of a list.
    Server = 2,
    /// One fact of an export.
    Info = 3,
    /// One metadata context.
    MetaContext = 4,
    /// The option is not known or not supported.
    ErrUnsupported = 1 << 31 | 1,
    /// Forbidden by the server's configuration.
    ErrPolicy = 1 << 31 | 2,
    /// The option's data is malformed, or the option makes no sense now.
    ErrInvalid = 1 << 31 | 3,
    /// No such export.
    ErrUnknown = 1 << 31 | 6,
    /// The export needs a client that knows block sizes.
    ErrBlockSizeRequired = 1 << 31 | 8,
    /// The option's data is too long.
    ErrTooBig = 1 << 31 | 9,
}

/// Kinds of facts in INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum InfoType {
    /// Size and transmission flags.
    Export = 0,
    /// The export's canonical name.
    Name = 1,
    /// The export's description.
    Description = 2,
    /// Minimum, preferred and maximum block size.
    BlockSize = 3,
}

/// Block sizes that a server announces, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Smaller requests fail.
    pub minimum: u32,
    /// Smaller requests are slow.
    pub preferred: u32,
    /// Longer reads and writes fail.
    pub maximum: u32,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read data.
    Read,
    /// Write the payload.
    Write,
    /// End the connection.
    Disconnect,
    /// Make ended writes durable.
    Flush,
    /// The data is not needed any more.
    Trim,
    /// Load the range into caches.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Status of the range in the selected contexts.
    BlockStatus,
    /// Any other number.
    Unknown(u16),
}

impl Command {
    /// The command with this number.
    pub const fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    /// The command's number.
    pub const fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }

    /// The command's name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write zeroes",
            Self::BlockStatus => "block status",
            Self::Unknown(_) => "<unknown>",
        }
    }
}

/// Flags of a request, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandFlags(pub u16);

impl CommandFlags {
    /// The effect is durable before the reply.
    pub const FUA: Self = Self(1);
    /// WRITE_ZEROES: keep the range allocated.
    pub const NO_HOLE: Self = Self(1 << 1);
    /// READ: one chunk of data.
    pub const DF: Self = Self(1 << 2);
    /// BLOCK_STATUS: one descriptor.
    pub const REQ_ONE: Self = Self(1 << 3);
    /// WRITE_ZEROES: fail rather than be slow.
    pub const FAST_ZERO: Self = Self(1 << 4);

    /// Both sets of bits.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are bits outside of `valid`.
    pub const fn exceed(self, valid: Self) -> bool {
        self.0 & !valid.0 != 0
    }
}

/// Error numbers on the wire (a fixed subset of errno).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// Not permitted (a write to a read-only export).
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// No memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left, also for writes beyond the end.
    NoSpace = 28,
    /// Too large for the flags given.
    Overflow = 75,
    /// Not supported (FAST_ZERO that would be slow).
    NotSup = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

impl ErrorCode {
    /// The wire's number for a (positive, Linux) errno; what has none becomes EINVAL.
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            1 | 30 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            27 | 28 | 122 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }

    /// The code with this number; unknown ones become EINVAL, as the specification asks.
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}
