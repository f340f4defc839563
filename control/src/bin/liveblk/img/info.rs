//! `liveblk img info`: what an image is, from its header.

use std::path::Path;
use std::rc::Rc;

use clap::Args;
use liveblk::engine::format::{ImageInfo, InfoValue, SnapshotInfo};
use liveblk::engine::storage::stat;
use liveblk::{Host, Node};
use serde_json::{Map, Value, json};

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::size;
use super::snapshot;
use super::source::{self, Wanted};

/// Show what an image is
#[derive(Args, Debug)]
pub(crate) struct InfoOptions {
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    /// Also show the images below
    #[arg(short, long)]
    backing_chain: bool,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
}

/// What is shown of one image.
struct Facts {
    filename: String,
    driver: &'static str,
    info: ImageInfo,
    virtual_size: u64,
    snapshots: Vec<SnapshotInfo>,
    file: FileFacts,
    /// Where the backing reference leads, as a path.
    full_backing: Option<String>,
}

/// What is shown of the file that holds it.
struct FileFacts {
    size: u64,
    allocated: u64,
}

/// Shows it.
pub(crate) async fn run(host: &Host, options: InfoOptions) -> Answer {
    let wanted = Wanted {
        format: options.format.as_deref(),
        by_options: options.image_opts,
        shared: options.force_share,
        alone: !options.backing_chain,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    let name = if options.image_opts { node.filename() } else { options.filename.clone() };
    let mut images = vec![facts(host, &node, &name).await?];
    let mut below = node.backing();
    while let Some(node) = below {
        let name = source::shown(&node.filename());
        images.push(facts(host, &node, &name).await?);
        below = node.backing();
    }
    if options.output.is_json() {
        let mut all: Vec<Value> = images.iter().map(Facts::json).collect();
        let answer = match options.backing_chain {
            true => Value::Array(all),
            false => all.pop().unwrap_or(Value::Null),
        };
        println!("{answer:#}");
    } else {
        let texts: Vec<String> = images.iter().map(Facts::text).collect();
        print!("{}", texts.join("\n"));
    }
    Ok(0)
}

async fn facts(host: &Host, node: &Rc<Node>, filename: &str) -> Result<Facts, Failure> {
    let info = node.info();
    let file = stat(host.core(), Path::new(filename)).await;
    let file = file.map_err(|error| Failure::open(filename, &error.kind()))?;
    let full_backing = info.backing.as_ref().map(|backing| {
        let folder = Path::new(filename).parent().unwrap_or(Path::new(""));
        folder.join(&backing.file).display().to_string()
    });
    let snapshots = node.format().abilities().snapshots.map(|held| held.list());
    Ok(Facts {
        filename: filename.to_owned(),
        driver: node.driver(),
        virtual_size: source::sectors(node.size()),
        info,
        snapshots: snapshots.unwrap_or_default(),
        file: FileFacts { size: source::sectors(file.size), allocated: file.allocated },
        full_backing,
    })
}

impl Facts {
    fn json(&self) -> Value {
        let file = json!({
            "children": [],
            "virtual-size": self.file.size,
            "filename": self.filename,
            "format": "file",
            "actual-size": self.file.allocated,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false,
        });
        let mut out = Map::new();
        let mut put = |name: &str, value: Value| {
            out.insert(name.to_owned(), value);
        };
        put("children", json!([{"name": "file", "info": file}]));
        if !self.snapshots.is_empty() {
            put("snapshots", self.snapshots.iter().map(snapshot::json).collect());
        }
        let backing = self.info.backing.as_ref();
        if let Some(format) = backing.and_then(|backing| backing.format.as_ref()) {
            put("backing-filename-format", json!(format));
        }
        put("virtual-size", json!(self.virtual_size));
        put("filename", json!(self.filename));
        if let Some(bytes) = self.info.cluster_size {
            put("cluster-size", json!(bytes));
        }
        put("format", json!(self.driver));
        put("actual-size", json!(self.file.allocated));
        if self.driver == "qcow2" {
            let data: Map<String, Value> = self
                .info
                .specific
                .iter()
                .map(|(name, value)| (name.to_string(), plain(value)))
                .collect();
            put("format-specific", json!({"type": self.driver, "data": data}));
        }
        if let (Some(backing), Some(full)) = (backing, &self.full_backing) {
            put("full-backing-filename", json!(full));
            put("backing-filename", json!(backing.file));
        }
        put("dirty-flag", json!(self.info.dirty));
        Value::Object(out)
    }

    fn text(&self) -> String {
        let both = |bytes: u64| format!("{} ({bytes} bytes)", size::shown(bytes));
        let mut lines = vec![
            format!("image: {}", self.filename),
            format!("file format: {}", self.driver),
            format!("virtual size: {}", both(self.virtual_size)),
            format!("disk size: {}", size::shown(self.file.allocated)),
        ];
        if let Some(bytes) = self.info.cluster_size {
            lines.push(format!("cluster_size: {bytes}"));
        }
        if self.info.dirty {
            lines.push("cleanly shut down: no".to_owned());
        }
        if let Some(backing) = &self.info.backing {
            let full = self.full_backing.as_deref().filter(|full| *full != backing.file);
            let full = full.map_or(String::new(), |full| format!(" (actual path: {full})"));
            lines.push(format!("backing file: {}{full}", backing.file));
            if let Some(format) = &backing.format {
                lines.push(format!("backing file format: {format}"));
            }
        }
        if !self.snapshots.is_empty() {
            lines.push(snapshot::table(&self.snapshots));
        }
        if !self.info.specific.is_empty() {
            lines.push("Format specific information:".to_owned());
            for (name, value) in &self.info.specific {
                lines.push(told(1, name, value));
            }
        }
        lines.push("Child node '/file':".to_owned());
        lines.push(format!("    filename: {}", self.filename));
        lines.push("    protocol type: file".to_owned());
        lines.push(format!("    file length: {}", both(self.file.size)));
        lines.push(format!("    disk size: {}", size::shown(self.file.allocated)));
        lines.join("\n") + "\n"
    }
}

fn plain(value: &InfoValue) -> Value {
    match value {
        InfoValue::Text(text) => json!(text),
        InfoValue::Number(number) => json!(number),
        InfoValue::Flag(flag) => json!(flag),
        InfoValue::List(values) => values.iter().map(plain).collect(),
        InfoValue::Record(facts) => {
            let facts = facts.iter().map(|(name, value)| ((*name).to_owned(), plain(value)));
            Value::Object(facts.collect())
        }
    }
}

/// A format-specific fact as lines, `depth` steps to the right.
fn told(depth: usize, name: &str, value: &InfoValue) -> String {
    let start = format!("{}{}:", "    ".repeat(depth), name.replace('-', " "));
    let inner: Vec<String> = match value {
        InfoValue::Text(text) => return format!("{start} {text}"),
        InfoValue::Number(number) => return format!("{start} {number}"),
        InfoValue::Flag(flag) => return format!("{start} {flag}"),
        InfoValue::List(values) => (0..)
            .zip(values)
            .map(|(index, value): (usize, _)| told(depth + 1, &format!("[{index}]"), value))
            .collect(),
        InfoValue::Record(facts) => {
            facts.iter().map(|(name, value)| told(depth + 1, name, value)).collect()
        }
    };
    [vec![start], inner].concat().join("\n")
}
