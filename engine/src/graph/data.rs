//! External data files: opening the file that holds the guest data of an image.
//!
//! A file named in options is opened as it is named; one that only the header names goes through
//! the reference policy like every reference of a header. Either way it is a node of its own with
//! its own locks, and it is never the image itself or another file of the chain.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use super::error::GraphError;
use super::open::{FileSpec, OpenNode, Seen, check_active};
use super::registry::{Graph, GraphConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BackingRef, DataSource};
use crate::node::Node;
use crate::storage::Storage;

/// Where the guest data of an image lies that does not hold it itself.
#[derive(Clone, Debug, Default)]
pub enum DataFileSource {
    /// Where the header says, within the reference policy.
    #[default]
    FromHeader,
    /// In a node by name.
    Node(String),
    /// In a file that is opened for the image.
    Open(FileSpec),
}

/// The node of a data file, once it is open.
pub(super) type Held = Rc<RefCell<Option<Rc<Node>>>>;

impl Graph {
    /// What the format is told about the data file of `spec`; its node is put into `held`.
    pub(super) async fn data_source(
        self: &Rc<Self>,
        config: &GraphConfig,
        spec: &mut OpenNode,
        filename: &Path,
        seen: &Seen,
        held: &Held,
    ) -> Result<DataSource> {
        match spec.data_file.clone() {
            DataFileSource::FromHeader => {
                Ok(self.data_from_header(config, spec, filename, seen, held))
            }
            DataFileSource::Node(name) => {
                let node = self.referenced(&name)?;
                if node.driver() != "file" {
                    return Err(GraphError::NotAFile(name).into());
                }
                check_active(&node, "data-file", spec)?;
                if spec.writable && !node.is_writable() {
                    return Err(GraphError::ReadOnly.into());
                }
                let storage = node.format().data_storage().clone();
                check_apart(&storage, seen)?;
                self.lock_data(&storage, spec).await?;
                *held.borrow_mut() = Some(node);
                Ok(DataSource::Given(storage))
            }
            DataFileSource::Open(file) => {
                let storage = self.open_data(&file, spec, seen, held).await?;
                Ok(DataSource::Given(storage))
            }
        }
    }

    fn data_from_header(
        self: &Rc<Self>,
        config: &GraphConfig,
        spec: &OpenNode,
        filename: &Path,
        seen: &Seen,
        held: &Held,
    ) -> DataSource {
        let (graph, config, spec) = (Rc::clone(self), config.clone(), spec.clone());
        let (image, seen, held) = (filename.to_path_buf(), seen.clone(), Rc::clone(held));
        DataSource::FromHeader(Rc::new(move |reference: BackingRef| {
            let (graph, config, mut spec) = (Rc::clone(&graph), config.clone(), spec.clone());
            let (image, seen, held) = (image.clone(), seen.clone(), Rc::clone(&held));
            Box::pin(async move {
                let found = match graph.known_reference(&image, &reference) {
                    Some(found) => found,
                    None => (config.resolve)(&image, &reference, &config.policy)
                        .map_err(|error| refused(&error))?,
                };
                let file = FileSpec {
                    path: found.path,
                    beneath: found.beneath,
                    no_locking: spec.has_no_locks(),
                    ..FileSpec::default()
                };
                // The image is open for writing already, so its data has to be, too.
                spec.auto_read_only = false;
                graph.open_data(&file, &mut spec, &seen, &held).await
            })
        }))
    }

    async fn open_data(
        self: &Rc<Self>,
        file: &FileSpec,
        spec: &mut OpenNode,
        seen: &Seen,
        held: &Held,
    ) -> Result<Storage> {
        let storage = Storage::File(self.open_file(file, spec).await?);
        check_apart(&storage, seen)?;
        self.lock_data(&storage, spec).await?;
        let node = self.protocol_node(file, &storage, &file.path, spec)?;
        *held.borrow_mut() = Some(node);
        Ok(storage)
    }

    /// The locks are those of the image: data that others change is not the image's any more.
    async fn lock_data(&self, storage: &Storage, spec: &OpenNode) -> Result<()> {
        self.lock_for(storage, spec).await
    }
}

fn check_apart(storage: &Storage, seen: &Seen) -> Result<()> {
    match storage {
        Storage::File(file) if seen.contains(&file.identity()) => {
            Err(GraphError::DataFileLoop(file.name().into()).into())
        }
        _ => Ok(()),
    }
}

/// A refusal of the policy, with the option that names the file instead.
fn refused(error: &Error) -> Error {
    if error.kind() != ErrorKind::PolicyRefused {
        return error.clone();
    }
    let source = GraphError::DataFileRefused(error.to_string().into());
    Error::new(ErrorKind::PolicyRefused, "open the data file").with_source(source)
}
