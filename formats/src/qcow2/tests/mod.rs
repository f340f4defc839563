//! Tests of whole images: a small mover of data, then models, peers, damage and failures on it.

mod corpus;
mod created;
mod cuts;
mod damage;
mod external;
mod failures;
pub mod fuzzing;
mod ledger;
mod matrix;
mod model;
mod mover;
mod packing;
mod peer;
mod play;
mod steps;
mod subclusters;
mod sweep;
mod worlds;
