//! The demo from its options to its last line: folder, leftovers, what is kept.

use std::error::Error;
use std::path::{Path, PathBuf};

use super::{images, show};
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
