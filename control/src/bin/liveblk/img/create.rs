//! `liveblk img create`: a new image, under its name only when it is complete.

use std::path::Path;

use clap::Args;
use liveblk::Host;
use liveblk::engine::format::{BackingRef, CreateImage, InfoValue};
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::reference::resolve_reference;
use serde_json::json;

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::keys::{self, Keys, Value};
use super::newfile::{NewFile, SideFile};
use super::size::{self, SIZE_MAX};
use super::source::{self, Wanted};

/// Make a new image
///
/// An overlay (-b) in qcow2 gets subclusters of 4 KiB (extended_l2=on, cluster_size=128k), so
/// that a small first write moves no more than it must; -o extended_l2=off, or compat=v2, gives
/// the plain layout. Everything else is as qemu-img makes it. A file that exists is replaced, but
/// only when the new image is complete.
#[derive(Args, Debug)]
pub(crate) struct CreateOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Options of the format: key=value,... (`-o help` lists them)
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// The image below the new one
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// The format of the image below
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not open the image below
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    #[command(flatten)]
    output: Output,
    /// The file
    #[arg(required_unless_present = "options")]
    filename: Option<String>,
    /// Size of the disk, with suffix k, M, G, T, P or E; by default that of the image below
    size: Option<String>,
}

/// A new image, ready to be made.
#[derive(Clone, Debug)]
pub(crate) struct Design {
    pub(crate) format: String,
    pub(crate) keys: Keys,
    pub(crate) size: u64,
    pub(crate) backing: Option<BackingRef>,
}

/// Makes the image.
pub(crate) async fn run(host: &Host, options: CreateOptions) -> Answer {
    if keys::wants_help(&options.options) {
        print!("{}", keys::help(&options.format));
        return Ok(0);
    }
    let Some(file) = options.filename.clone() else {
        return Err(Failure::new("Expecting image file name"));
    };
    let size = options.size.as_deref().map(image_size).transpose()?;
    let design = design(host, &file, &options, size).await.map_err(|f| f.during(&file))?;
    if !options.quiet && !options.output.is_json() {
        println!("{}", design.announcement(&file));
    }
    let new = NewFile::reserve(host, &file).await?;
    let side = design.write(host, &new, &file).await?;
    new.finish(host).await?;
    side.keep_all();
    if options.output.is_json() {
        let shown = design.shown().into_iter();
        let shown: serde_json::Map<String, serde_json::Value> =
            shown.map(|(name, value)| (name.to_owned(), json!(value))).collect();
        let answer = json!({
            "filename": file,
            "format": design.format,
            "virtual-size": design.size,
            "backing-filename": design.backing.as_ref().map(|backing| &backing.file),
            "options": shown,
        });
        println!("{answer:#}");
    }
    Ok(0)
}

/// Reads a size of an image.
pub(crate) fn image_size(text: &str) -> Result<u64, Failure> {
    if text.starts_with('-') {
        let range = format!("Must be between 0 and {SIZE_MAX}.");
        return Err(Failure::new(format!("Invalid image size specified. {range}")));
    }
    match size::parse(text) {
        Some(bytes) if bytes <= SIZE_MAX => Ok(bytes),
        Some(_) => Err(Failure::new(format!(
            "Invalid image size specified. Must be between 0 and {SIZE_MAX}."
        ))),
        None => Err(Failure::new(format!(
            "Invalid image size specified: '{text}' (a number with suffix k, M, G, T, P or E)."
        ))),
    }
}

async fn design(
    host: &Host,
    file: &str,
    options: &CreateOptions,
    size: Option<u64>,
) -> Result<Design, Failure> {
    let mut keys = new_keys(host, &options.format, &options.options)?;
    if let Some(backing) = &options.backing {
        keys.set("backing_file", Value::Text(backing.clone()));
    }
    if let Some(format) = &options.backing_format {
        keys.set("backing_fmt", Value::Text(format.clone()));
    }
    let (backing, base) = backing(host, file, options, &mut keys).await?;
    let given = keys.take_number("size");
    let size = match (given, size, base) {
        (Some(_), Some(_), _) => {
            return Err(Failure::new("The image size must be specified only once"));
        }
        (Some(size), None, _) | (None, Some(size), _) | (None, None, Some(size)) => size,
        (None, None, None) => return Err(Failure::new("Image creation needs a size parameter")),
    };
    let size = size.checked_next_multiple_of(512).filter(|size| *size <= SIZE_MAX);
    let Some(size) = size else {
        return Err(Failure::new(format!(
            "The image size is too large for file format '{}'",
            options.format
        )));
    };
    Ok(Design { format: options.format.clone(), keys, size, backing })
}

/// The options of a new image of `format`, if there is such a format.
pub(crate) fn new_keys(host: &Host, format: &str, given: &[String]) -> Result<Keys, Failure> {
    let formats = host.graph().config().formats;
    if formats.find(format).is_none() {
        let known: Vec<&str> = formats.names().collect();
        let known = known.join(", ");
        return Err(Failure::new(format!("Unknown file format '{format}' (there are: {known})")));
    }
    Keys::parse(format, given)
}

/// The image below, checked unless told otherwise, and its size.
async fn backing(
    host: &Host,
    file: &str,
    options: &CreateOptions,
    keys: &mut Keys,
) -> Result<(Option<BackingRef>, Option<u64>), Failure> {
    let format = keys.take_text("backing_fmt");
    let name = keys.take_text("backing_file");
    let empty = name.as_ref().is_some_and(String::is_empty);
    let Some(name) = name.filter(|_| !empty) else {
        return match format {
            _ if empty => Err(Failure::new("Expected backing file name, got empty string")),
            Some(_) => Err(Failure::new("Backing format cannot be used without backing file")),
            None => Ok((None, None)),
        };
    };
    if name == file {
        return Err(Failure::new(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    let driver = host.graph().config().formats.find(&options.format);
    if !driver.is_some_and(|driver| driver.supports_backing()) {
        let format = &options.format;
        let text = format!("Backing file not supported for file format '{format}'");
        return Err(Failure::new(text));
    }
    overlay_defaults(keys);
    let reference = BackingRef { file: name, format };
    let size = match options.backing_unsafe {
        true => None,
        false => Some(backing_size(host, file, &reference).await?),
    };
    let policy = host.graph().config().policy;
    if let Err(refused) = resolve_reference(Path::new(file), &reference, &policy)
        && !options.quiet
    {
        eprintln!("liveblk img: warning: {refused}");
    }
    Ok((Some(reference), size))
}

/// What an overlay gets where nothing is said.
pub(crate) fn overlay_defaults(keys: &mut Keys) {
    let old = is_v2_wanted(keys);
    let small = matches!(keys.get("cluster_size"), Some(Value::Number(bytes)) if *bytes < 16 << 10);
    if !old && !small && keys.get("extended_l2").is_none() {
        keys.set("extended_l2", Value::Switch(true));
        keys.or_set("cluster_size", Value::Number(128 << 10));
    }
}

/// Whether the options ask for a version 2 image.
pub(crate) fn is_v2_wanted(keys: &Keys) -> bool {
    matches!(keys.get("compat"), Some(Value::Text(compat)) if is_v2(compat))
}

fn is_v2(compat: &str) -> bool {
    matches!(compat, "0.10" | "v2")
}

/// Opens the image below as it will be found from `file`; its size in bytes.
pub(crate) async fn backing_size(
    host: &Host,
    file: &str,
    reference: &BackingRef,
) -> Result<u64, Failure> {
    let folder = Path::new(file).parent().unwrap_or(Path::new(""));
    let path = folder.join(&reference.file).display().to_string();
    if reference.format.is_none() {
        let found = source::format_of(host, &path, None).await;
        let hint = match found {
            Ok(format) => format!("Detected format of {format}."),
            Err(failure) if failure.text.contains("raw is never") => {
                "It is in no format that can be recognised; say raw if that is what it is."
                    .to_owned()
            }
            Err(failure) => {
                return Err(Failure::new(format!(
                    "{}\nCould not open backing image.",
                    failure.text
                )));
            }
        };
        let text = format!("Backing file specified without backing format (-F)\n{hint}");
        return Err(Failure::new(text));
    }
    let wanted = Wanted { format: reference.format.as_deref(), ..Wanted::default() };
    let opened = source::open(host, &path, wanted).await;
    let node = opened.map_err(|failure| {
        Failure::new(format!("{}\nCould not open backing image.", failure.text))
    })?;
    let size = node.size();
    host.graph().remove(&node).await?;
    Ok(source::sectors(size))
}

/// Files beside the image that were made for it.
#[must_use = "what is not kept is removed"]
pub(crate) struct Sides(Vec<SideFile>);

impl Sides {
    /// The image is complete: they stay.
    pub(crate) fn keep_all(self) {
        for side in self.0 {
            side.keep();
        }
    }
}

impl Design {
    /// Writes the image into `new`; `file` is the name it will have.
    pub(crate) async fn write(
        &self,
        host: &Host,
        new: &NewFile,
        file: &str,
    ) -> Result<Sides, Failure> {
        let formats = host.graph().config().formats;
        let Some(driver) = formats.find(&self.format) else {
            return Err(Failure::new(format!("Unknown file format '{}'", self.format)));
        };
        let mut create = self.image()?;
        let mut sides = Sides(Vec::new());
        if let Some(Value::Text(name)) = self.keys.get("data_file") {
            let folder = Path::new(file).parent().unwrap_or(Path::new(""));
            let path = folder.join(name);
            let options = FileOptions {
                path: path.clone(),
                writable: true,
                create_new: true,
                ..FileOptions::default()
            };
            let opened = File::open(host.core(), options).await.map_err(|error| {
                let shown = path.display();
                Failure::new(format!("{file}: Could not create '{shown}': {}", error.kind()))
            })?;
            sides.0.push(SideFile::new(path));
            create.data = Some(Storage::File(opened));
        }
        let storage = new.make(host).await?;
        let made = driver.create(host.core().clone(), storage, create).await;
        made.map_err(|error| new.renamed(self.failed(&error).during(file)))?;
        Ok(sides)
    }

    /// Why the image could not be made.
    fn failed(&self, error: &liveblk::Error) -> Failure {
        // The file system has no such large files, however much space it has.
        if self.format == "raw" && error.op() == "truncate" && self.size > 1 << 50 {
            let format = &self.format;
            let text = format!("The image size is too large for file format '{format}'");
            return Failure::new(text);
        }
        if error.errno() == libc::EFBIG {
            let text = "The image size is too large for file format 'qcow2' (try using a larger \
                        cluster size)";
            return Failure::new(text);
        }
        Failure::from(error.clone())
    }

    /// What the driver is asked for: the options under their QMP names.
    fn image(&self) -> Result<CreateImage, Failure> {
        let mut image = CreateImage {
            size: self.size,
            backing: self.backing.clone(),
            ..CreateImage::default()
        };
        for (name, value) in self.keys.iter().filter(|(name, _)| !keys::HINTS.contains(name)) {
            let typed = match value {
                Value::Text(text) => InfoValue::Text(text.clone()),
                Value::Number(number) => InfoValue::Number(*number),
                Value::Switch(on) => InfoValue::Flag(*on),
            };
            match (name, value) {
                ("cluster_size", Value::Number(bytes)) => image.cluster_size = Some(*bytes),
                ("compat", Value::Text(compat)) => {
                    let version = match compat.as_str() {
                        "1.1" | "v3" => "v3",
                        compat if is_v2(compat) => "v2",
                        other => {
                            return Err(Failure::new(format!(
                                "Parameter 'version' does not accept value '{other}' (v2 or v3)"
                            )));
                        }
                    };
                    let version = InfoValue::Text(version.to_owned());
                    image.options.insert("version".to_owned(), version);
                }
                _ => {
                    image.options.insert(name.replace('_', "-"), typed);
                }
            }
        }
        Ok(image)
    }

    /// The options that are shown, defaults included, in the peer's order.
    fn shown(&self) -> Vec<(&'static str, String)> {
        let text = |name: &str| self.keys.get(name).map(ToString::to_string);
        let backing = self.backing.clone();
        let (backing_file, backing_fmt) =
            backing.map_or((None, None), |backing| (Some(backing.file), backing.format));
        let or = |name: &str, default: &str| Some(text(name).unwrap_or_else(|| default.to_owned()));
        let all = if self.format == "qcow2" {
            vec![
                ("cluster_size", or("cluster_size", "65536")),
                ("extended_l2", or("extended_l2", "off")),
                ("preallocation", text("preallocation")),
                ("compression_type", or("compression_type", "zlib")),
                ("size", Some(self.size.to_string())),
                ("backing_file", backing_file),
                ("backing_fmt", backing_fmt),
                ("compat", text("compat")),
                ("data_file", text("data_file")),
                ("data_file_raw", text("data_file_raw")),
                ("lazy_refcounts", or("lazy_refcounts", "off")),
                ("refcount_bits", or("refcount_bits", "16")),
            ]
        } else {
            vec![("size", Some(self.size.to_string())), ("preallocation", text("preallocation"))]
        };
        let hints = keys::HINTS.map(|name| (name, text(name)));
        let all = all.into_iter().chain(hints);
        all.filter_map(|(name, value)| value.map(|value| (name, value))).collect()
    }

    fn announcement(&self, file: &str) -> String {
        let mut line = format!("Formatting '{file}', fmt={}", self.format);
        for (name, value) in self.shown() {
            line.push_str(&format!(" {name}={value}"));
        }
        line
    }
}
