//! Tests of whole images: a small mover of data, then models, peers, damage and failures on it.

mod bitmaps;
mod bitmaps_cuts;
mod bitmaps_peer;
mod created;
mod cuts;
mod damage;
mod external;
mod failures;
mod header_cuts;
mod model;
mod mover;
mod packing;
mod peer;
mod steps;
mod subclusters;
