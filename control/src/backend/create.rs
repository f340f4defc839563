//! `blockdev-create`: the translation of what is to be made.
//!
//! Does not: check what goes together; the format does, inside the job.

use liveblk_engine::format::{BackingRef, CreateImage, FormatOptions, InfoValue, Preallocation};
use liveblk_jobs::{Creation, NewPlace, start_create};

use super::control::{Control, Result};
use super::errors::Failure;
use super::nodes::child_image;
use crate::schema::{
    BlockdevCreate, BlockdevRef, CreateOptions, CreateQcow2, CreateRaw, PreallocMode,
};

impl Control {
    /// `blockdev-create`.
    pub(super) fn create(&self, create: BlockdevCreate) -> Result<()> {
        self.jobs.check_new(&create.job_id)?;
        let creation = match create.options {
            CreateOptions::File(file) => Creation::File {
                path: file.filename.into(),
                size: file.size,
                preallocation: preallocation(file.preallocation),
            },
            CreateOptions::Qcow2(qcow2) => qcow2_image(*qcow2)?,
            CreateOptions::Raw(raw) => raw_image(raw)?,
            CreateOptions::Other => {
                return Err(Failure::generic("Driver does not support blockdev-create"));
            }
        };
        start_create(&self.core, &create.job_id, creation)?;
        Ok(())
    }
}

fn qcow2_image(create: CreateQcow2) -> Result<Creation> {
    let mut options = FormatOptions::new();
    let mut add = |name: &str, value: Option<InfoValue>| {
        options.extend(value.map(|value| (name.to_owned(), value)));
    };
    let word = |mode: PreallocMode| InfoValue::Text(mode.name().to_owned());
    add("version", create.version.map(InfoValue::Text));
    add("preallocation", create.preallocation.map(word));
    add("compression-type", create.compression_type.map(InfoValue::Text));
    add("data-file-raw", create.data_file_raw.map(InfoValue::Flag));
    add("extended-l2", create.extended_l2.map(InfoValue::Flag));
    add("lazy-refcounts", create.lazy_refcounts.map(InfoValue::Flag));
    // A negative width is as impossible as 0.
    let bits = create.refcount_bits.map(|bits| u64::try_from(bits).unwrap_or(0));
    add("refcount-bits", bits.map(InfoValue::Number));
    let (name, format) = (create.backing_file, create.backing_fmt);
    let backing = match (name, format) {
        (None, None) => None,
        (file, format) => Some(BackingRef { file: file.unwrap_or_default(), format }),
    };
    let image = CreateImage {
        size: create.size,
        backing,
        cluster_size: create.cluster_size,
        options,
        data: None,
    };
    Ok(Creation::Image {
        driver: "qcow2".to_owned(),
        file: place(create.file)?,
        data: create.data_file.map(place).transpose()?,
        image,
    })
}

fn raw_image(create: CreateRaw) -> Result<Creation> {
    let mut options = FormatOptions::new();
    if create.preallocation != PreallocMode::Off {
        let mode = InfoValue::Text(create.preallocation.name().to_owned());
        options.insert("preallocation".to_owned(), mode);
    }
    let image = CreateImage { size: create.size, options, ..CreateImage::default() };
    let file = place(create.file)?;
    Ok(Creation::Image { driver: "raw".to_owned(), file, data: None, image })
}

fn place(reference: BlockdevRef) -> Result<NewPlace> {
    Ok(match reference {
        BlockdevRef::Name(name) => NewPlace::Node(name),
        BlockdevRef::Definition(options) => NewPlace::Open(Box::new(child_image(*options)?)),
        // The schema takes no null here.
        BlockdevRef::Null => NewPlace::Node(String::new()),
    })
}

fn preallocation(mode: PreallocMode) -> Preallocation {
    match mode {
        PreallocMode::Off => Preallocation::Off,
        PreallocMode::Metadata => Preallocation::Metadata,
        PreallocMode::Falloc => Preallocation::Falloc,
        PreallocMode::Full => Preallocation::Full,
    }
}
