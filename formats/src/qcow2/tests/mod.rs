//! Tests of whole images: a small mover of data, then models, peers, damage and failures on it.

mod created;
mod cuts;
mod damage;
mod dirty;
mod external;
mod failures;
mod model;
mod mover;
mod mutations;
mod packing;
mod packing_faults;
mod packing_peer;
mod peer;
mod repair;
mod specimen;
mod steps;
mod subclusters;
