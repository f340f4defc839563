//! Writes the seed corpus of every target below a folder: `seeds FOLDER` makes
//! `FOLDER/TARGET/NUMBER`. Without a folder the names of the targets are printed.

use std::path::PathBuf;

use liveblk_formats::qcow2::fuzzing::TARGETS;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    for target in TARGETS {
        let Some(folder) = &folder else {
            println!("{}", target.name);
            continue;
        };
        let folder = folder.join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (number, input) in (target.corpus)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number:04}")), input)?;
        }
    }
    Ok(())
}
