//! `liveblk img resize`: another virtual size.

use clap::Args;
use liveblk::Host;
use liveblk::engine::format::Preallocation;
use liveblk::engine::node::Origin;
use serde_json::json;

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::size::{self, SIZE_MAX};
use super::source::{self, Wanted};

/// Change the size of an image
///
/// To say a smaller size by a difference, put `--` before it: `resize --shrink FILE -- -1G`.
#[derive(Args, Debug)]
pub(crate) struct ResizeOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    /// Allow the image to become smaller; what lies behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// Preallocation of what is added: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
    /// The new size, or with a sign the difference
    size: String,
}

/// The size that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    To(u64),
    By(u64),
    Less(u64),
}

/// Resizes.
pub(crate) async fn run(host: &Host, options: ResizeOptions) -> Answer {
    let wish = wish(&options.size)?;
    let preallocation = match options.preallocation.as_str() {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        other => {
            return Err(Failure::new(format!(
                "Invalid preallocation mode '{other}' (there are off, metadata, falloc and full)"
            )));
        }
    };
    let wanted = Wanted {
        format: options.format.as_deref(),
        by_options: options.image_opts,
        writable: true,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    let old = node.size();
    let new = match wish {
        Wish::To(bytes) => Some(bytes),
        Wish::By(bytes) => source::sectors(old).checked_add(bytes),
        Wish::Less(bytes) => source::sectors(old).checked_sub(bytes),
    };
    let Some(new) = new.filter(|bytes| *bytes > 0 && *bytes <= SIZE_MAX) else {
        return Err(Failure::new("New image size must be positive"));
    };
    if new < old && !options.shrink {
        return Err(Failure::new(
            "Use the --shrink option to perform a shrink operation.\nliveblk img: warning: \
             Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        ));
    }
    let failed = |error: liveblk::Error| {
        Failure::new(format!("{}: Could not resize file: {error}", options.filename))
    };
    if new <= old && preallocation != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if new != old {
        node.resize(new, preallocation).await.map_err(failed)?;
    }
    node.flush(Origin::External).await.map_err(failed)?;
    host.graph().remove(&node).await.map_err(failed)?;
    if options.output.is_json() {
        let answer = json!({"filename": options.filename, "old-size": old, "virtual-size": new});
        println!("{answer:#}");
    } else if !options.quiet {
        println!("Image resized.");
    }
    Ok(0)
}

fn wish(text: &str) -> Result<Wish, Failure> {
    let bytes = |text: &str| {
        size::parse(text).filter(|bytes| *bytes <= SIZE_MAX).ok_or_else(|| {
            Failure::new(format!(
                "Parameter 'size' expects a non-negative number below 2^63, not '{text}'\nOptional \
                 suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, \
                 respectively."
            ))
        })
    };
    Ok(match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => Wish::By(bytes(more)?),
        (_, Some(less)) => Wish::Less(bytes(less)?),
        _ => Wish::To(bytes(text)?),
    })
}
