//! The daemon `liveblkd`: from its command line to its end.
//!
//! Owns: the order of start-up and end. Order rules: 1. the first pass over the command line;
//! 2. the way to the background, before any thread exists; 3. the engine; 4. the options in their
//! order; 5. signals are caught, the pid file is written, the starter is told; 6. requests are
//! read. At the end: exports and jobs, nodes, connections and socket files, the pid file.

mod run;
mod startup;

pub use run::main;
