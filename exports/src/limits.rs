//! Every bound of the front doors, by name: full means back-pressure or an error, never growth.
//!
//! Memory of an NBD server with its default 100 connections: 100 receive windows, 100 times
//! [`CONNECTION_BYTES`] and once [`SERVER_BYTES`] are about 120 MiB, whatever clients do.

/// Connections that an NBD server takes unless told otherwise.
pub const CONNECTIONS: u32 = 100;

/// Seconds that a client has for its handshake unless the server was told otherwise.
pub const HANDSHAKE_SECONDS: u32 = 10;

/// Requests in flight per connection, replies that are not sent yet included.
pub const REQUESTS: u64 = 128;

/// Bytes of request memory that every connection has for itself.
pub const CONNECTION_BYTES: u64 = 512 << 10;

/// Bytes of request memory that the connections of a server share beyond that.
pub const SERVER_BYTES: u64 = 64 << 20;

/// Bytes of the receive buffer of a connection whose handshake is done.
pub const RECEIVE_WINDOW: usize = 64 << 10;

/// Bytes received at once during a handshake, and after a payload that was received directly.
pub const RECEIVE_SMALL: usize = 4 << 10;

/// Payloads of which this many bytes are still to come are received straight into their request;
/// smaller ones come through the window, with the requests that follow them.
pub const DIRECT_PAYLOAD: usize = 16 << 10;

/// The longest data of an option that is looked at; longer ones are skipped and refused.
pub const OPTION_BYTES: u32 = 64 << 10;

/// Replies that one send gathers.
pub const BATCH_REPLIES: usize = 64;

/// Bytes after which a send takes no further reply.
pub const BATCH_BYTES: usize = 1 << 20;

/// Reads of at most this many bytes find holes by looking at the data, longer ones by asking for
/// the block status first.
pub const SMALL_READ: u32 = 64 << 10;

/// Chunks that one sparse read is cut into; the rest is one piece of data.
pub const READ_CHUNKS: usize = 32;

/// Bitmaps that one export shows.
pub const EXPORT_BITMAPS: usize = 1024;

/// Runs in one reply to a block status, over all its contexts (the protocol allows 131,072 each).
pub const STATUS_RUNS: usize = 8192;

/// Bytes of disk that one look-up for a block status covers.
pub const STATUS_STEP: u64 = 64 << 20;

/// Bytes that one step of a prefetch reads.
pub const CACHE_STEP: u64 = 256 << 10;

/// Nanoseconds after which a client that neither reads replies nor sends what it announced may lose
/// its connection, if others wait for the memory that it holds.
pub const STALL_NS: u64 = 3_000_000_000;

/// Nanoseconds that a client has to read the last replies after it ended the connection.
pub const LINGER_NS: u64 = 5_000_000_000;

/// Nanoseconds to wait after a failed accept (out of descriptors, for example).
pub const ACCEPT_RETRY_NS: u64 = 100_000_000;
