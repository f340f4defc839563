//! Guest data in another file (incompatible bit 2).
//!
//! The place of a guest cluster in the data file is its own offset, always; an entry that says
//! something else is damage. Nothing there is counted: allocation is the identity, what loses its
//! mapping goes back to nobody. Because offset 0 is a place of that file, entries are decoded with
//! places one cluster higher ([`Geometry::bias`]), so that 0 goes on to mean "none"; [`State`] and
//! its plans compute with those, and [`Geometry::place`] is the way back.
//!
//! A raw data file (autoclear bit 1) is an image of the disk without its metadata at any time:
//! zeroing and discarding of mapped data happen in the file, the mapping stays. Without that bit
//! metadata says what reads as zeroes, unless space is to be given back.
//!
//! Order: the data file is durable before any metadata that refers to it (`flush`, step 3).

use std::path::Path;

use liveblk_engine::address::{GuestRange, HostOffset};
use liveblk_engine::format::{BackingRef, DataSource, ZeroMode};
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::entry::Entry;
use super::extensions::DATA_FILE;
use super::header::Header;
use super::image::Image;
use super::layout::HostCluster;
use super::layout::{AUTOCLEAR_DATA_FILE_RAW, Geometry, GuestCluster, INCOMPATIBLE_DATA_FILE, Run};
use super::state::{Lookup, State, Table};
use super::subcluster::Kind;
use super::zero::Plan;
use crate::reason::Reason;

/// Where guest data goes, as far as plans depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataPlace {
    /// Into the image's own clusters.
    Own,
    /// Into the data file; zeroes are a matter of metadata.
    External,
    /// Into the data file, which zeroes reach when their space may go.
    Punched,
    /// Into the data file, which zeroes reach always.
    Raw,
}

impl DataPlace {
    pub(super) fn of(header: &Header, discard_unmap: bool) -> Self {
        match (header.has_data_file(), header.data_file_raw(), discard_unmap) {
            (false, ..) => Self::Own,
            (true, true, _) => Self::Raw,
            (true, false, true) => Self::Punched,
            (true, false, false) => Self::External,
        }
    }

    /// Whether zeroing in this mode is done in the data file.
    fn takes_zeroes(self, mode: ZeroMode) -> bool {
        self == Self::Raw || (self == Self::Punched && mode != ZeroMode::Keep)
    }
}

impl Header {
    /// Whether guest data is in another file.
    pub(super) fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether the data file is a raw image of the disk.
    pub(super) fn data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// The data file's name, if the header has one.
    pub(super) fn data_file(&self) -> Option<String> {
        self.extensions.find(DATA_FILE).map(|name| String::from_utf8_lossy(name).into_owned())
    }
}

impl Geometry {
    /// What decoded places are higher than those in the data file.
    pub(super) const fn bias(self) -> u64 {
        if self.external { self.cluster() } else { 0 }
    }

    /// Where the byte at a decoded place lies in the data's file.
    pub(super) const fn place(self, host: u64) -> HostOffset {
        HostOffset::new(host.saturating_sub(self.bias()))
    }

    /// The clusters of the data file for guest clusters from `first` on, as a decoded run.
    pub(super) const fn identity(self, first: GuestCluster, count: u64) -> Run {
        Run { start: HostCluster(first.0 + 1), count }
    }
}

/// Opens the data file that the header asks for.
pub(super) async fn open(
    header: &Header,
    source: &DataSource,
    filename: &Path,
) -> Result<Option<Storage>> {
    let refuse = |reason: Reason| Err(reason.error("open").on(&filename.to_string_lossy()));
    let storage = match (source, header.has_data_file()) {
        (DataSource::None | DataSource::FromHeader(_), false) => return Ok(None),
        (DataSource::Given(_), false) => return refuse(Reason::DataFileUnexpected),
        (DataSource::None, true) => return refuse(Reason::DataFile),
        (DataSource::Given(storage), true) => storage.clone(),
        (DataSource::FromHeader(opener), true) => match header.data_file() {
            Some(file) => opener(BackingRef { file, format: Some("raw".to_owned()) }).await?,
            None => return refuse(Reason::DataFile),
        },
    };
    Ok(Some(storage))
}

impl Image {
    /// The storage of guest data.
    pub(super) fn data_storage(&self) -> &Storage {
        self.data.as_ref().unwrap_or(&self.storage)
    }

    /// Makes guest data and metadata durable; a failure poisons the image.
    pub(super) async fn data_barrier(&self) -> Result<()> {
        if let Some(data) = &self.data
            && let Err(error) = data.flush().await
        {
            self.state.borrow_mut().poison(&error);
            return Err(error);
        }
        self.barrier().await
    }

    /// Before the disk grows, and after it shrank: a data file is as long as the disk at least, a
    /// raw one exactly as long.
    pub(super) async fn fit_data_file(&self, size: u64) -> Result<()> {
        let Some(data) = &self.data else { return Ok(()) };
        let raw = self.state.borrow().data_place == DataPlace::Raw;
        if data.size() < size || (raw && data.size() > size) {
            data.truncate(size).await?;
        }
        Ok(())
    }
}

/// How a zeroing begins where the data file takes zeroes.
pub(super) enum ZeroData {
    /// Like this.
    Plan(Plan),
    /// This part of it has no data: as in other images.
    Metadata(GuestRange),
}

impl State {
    /// Refuses a decoded place that cannot be the one of `cluster`.
    pub(super) fn check_place(&self, cluster: GuestCluster, host: u64) -> Result<(), Reason> {
        if self.geometry.external {
            let guest = cluster.0 << self.geometry.cluster_bits;
            let place = self.geometry.place(host).bytes();
            return match place == guest {
                true => Ok(()),
                false => Err(Reason::DataFilePlace { place, guest }),
            };
        }
        if self.is_metadata(host) { Err(Reason::Overlap(host)) } else { Ok(()) }
    }

    /// Plans the start of a zeroing in the data file; `None`: it is a matter of metadata.
    pub(super) fn plan_zero_data(
        &self,
        range: GuestRange,
        mode: ZeroMode,
    ) -> Result<Option<ZeroData>, Reason> {
        if !self.data_place.takes_zeroes(mode) {
            return Ok(None);
        }
        let geometry = self.geometry;
        let (cluster, start) = (geometry.cluster(), range.start.bytes());
        let head = start & (cluster - 1);
        let first = GuestCluster(start >> geometry.cluster_bits);
        let count = ((range.end().bytes() - 1) >> geometry.cluster_bits) - first.0 + 1;
        let metadata =
            |bytes: u64| Ok(Some(ZeroData::Metadata(GuestRange::new(start, range.len.min(bytes)))));
        let slice = geometry.slice_of(first);
        if self.l2_table(geometry.l1_of_slice(slice))? == Table::None {
            return metadata(self.unmapped_from(first).min(count).max(1) * cluster - head);
        }
        let entry = match self.lookup(first)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Some(ZeroData::Plan(Plan::Miss(miss)))),
            Lookup::Wait => return Ok(Some(ZeroData::Plan(Plan::Wait(first)))),
        };
        let (bytes, host) = match entry {
            Entry::Sub(parts) => {
                let (bytes, kind) = parts.run(head, geometry);
                (bytes, (kind == Kind::Data).then_some(parts.host))
            }
            Entry::Data { host, .. } => {
                (self.run_of(first, count, entry) * cluster - head, Some(host))
            }
            _ => (self.run_of(first, count, entry) * cluster - head, None),
        };
        match host {
            None => metadata(bytes),
            Some(host) => {
                let plan = Plan::Storage { len: range.len.min(bytes), host: host + head };
                Ok(Some(ZeroData::Plan(plan)))
            }
        }
    }
}

impl Image {
    /// Refuses a backing file for a disk whose raw data file has to show all of it.
    pub(super) fn check_backing_allowed(&self) -> Result<()> {
        if self.state.borrow().data_place == DataPlace::Raw {
            let reason = Reason::Create(crate::create_reason::CreateReason::RawOverBacking);
            return Err(self.error(reason, "change the backing reference"));
        }
        Ok(())
    }

    /// Refuses what images with a data file cannot do.
    pub(super) fn writable_data(&self) -> Result<()> {
        match &self.data {
            Some(Storage::File(file)) if !file.is_writable() => {
                Err(Error::new(ErrorKind::ReadOnly, "open").on(file.name()))
            }
            _ => Ok(()),
        }
    }
}
