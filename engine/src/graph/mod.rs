//! The graph: nodes by name, how they are opened and removed, who may use them, and cuts.
//!
//! One [`Graph`] per core holds the nodes whose home that core is. It is control-plane data:
//! requests use the compiled path of their node. Changes run one at a time ([`cut`] takes the
//! graphs' change permits in ascending order of cores).

mod active;
mod cut;
mod data;
mod error;
mod open;
mod registry;
mod relink;
mod reopen;
mod views;

pub use cut::{BeforeSwap, CutPart, Swap, cut};
pub use data::DataFileSource;
pub use error::GraphError;
pub use open::{BackingSource, FileSource, FileSpec, OpenNode};
pub use registry::{Graph, GraphConfig};
pub use relink::Retired;
pub use reopen::{NewBacking, Reopen};
pub use views::NewView;
