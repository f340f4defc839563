//! `liveblk demo`: the main job on real images, with a guest that writes and verifies all the time.
//!
//! The scenario runs on an engine core and reports through a channel; the main thread draws. The
//! images are made in a temporary folder that is removed at the end, also after a failure, unless
//! `--keep` names one.

mod guest;
mod images;
mod scenario;
mod show;

use std::error::Error;
use std::path::{Path, PathBuf};

use crate::cli::DemoOptions;

/// Runs the demo.
pub(crate) fn run(options: &DemoOptions) -> Result<(), Box<dyn Error>> {
    let temporary = match &options.keep {
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("cannot make folder {}: {error}", folder.display()))?;
            refuse_leftovers(folder)?;
            None
        }
        None => Some(tempfile::Builder::new().prefix("liveblk-demo-").tempdir()?),
    };
    let folder = options.keep.as_deref().or(temporary.as_ref().map(tempfile::TempDir::path));
    let folder: PathBuf = folder.map(Path::to_path_buf).ok_or("no folder")?;
    show::run(&folder, options.size << 20)?;
    match &options.keep {
        Some(folder) => println!("The images are in {}.", folder.display()),
        None => println!("The images were in a temporary folder; --keep DIR keeps them."),
    }
    Ok(())
}

/// The demo never overwrites: says which image of an earlier run is in the way.
fn refuse_leftovers(folder: &Path) -> Result<(), String> {
    for name in images::ALL {
        let path = folder.join(name);
        if path.exists() {
            let path = path.display();
            return Err(format!("{path} exists already: name an empty folder with --keep"));
        }
    }
    Ok(())
}
