//! Every bound of the control plane, in one place.
//!
//! Owns: the named limits of input, queues and files of this crate. Promises: nothing outside this
//! file invents a bound of its own. Does not: enforce them; each user of a limit says what happens
//! when it is reached.

/// Bytes of token text one QMP message may hold (the peer: 64 MiB).
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Tokens one QMP message may hold (the peer: 2 Mi).
pub const MESSAGE_TOKENS_MAX: usize = 1 << 20;

/// Depth of nested objects and arrays in one message, equal to the peer's.
pub const NESTING_MAX: usize = 1024;

/// Parsed requests that wait per monitor before its input is no longer read.
pub const REQUEST_QUEUE_LEN_MAX: usize = 8;

/// Messages (replies and events) that wait per monitor for a client that does not read.
pub const OUTPUT_QUEUE_LEN_MAX: usize = 4096;

/// Bytes read from a monitor's input in one operation.
pub const INPUT_CHUNK_BYTES: usize = 16 << 10;

/// Bytes written to a pipe in one operation; a pipe that polls writable takes this many at once.
pub const PIPE_WRITE_BYTES_MAX: usize = 4096;

/// Stack of threads that walk values nested up to [`NESTING_MAX`].
pub const MONITOR_STACK_BYTES: usize = 16 << 20;

/// Longest `name=value` list on the command line, in parameters.
pub const OPTION_PARAMETERS_MAX: usize = 4096;

/// Longest path of a unix socket, without its terminator.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Objects that may exist at a time.
pub const OBJECTS_MAX: usize = 1024;

/// Time that exports have at the end to go before the jobs, in nanoseconds.
pub const EXPORTS_FIRST_NS: u64 = 200_000_000;
