//! Which files a header may make the engine open.
//!
//! Pure: decides by text. The storage layer opens the result with `beneath` set to the folder named
//! here, so that a symbolic link does not lead out of it, and refuses what is not a file. Never
//! followed, whatever the policy: protocols, `json:`. raw is never guessed: without a format in the
//! header the file must say by its magic number what it is.

use std::path::{Component, Path, PathBuf};

use liveblk_engine::Result;
use liveblk_engine::format::{BackingRef, ReferencePolicy, ResolvedReference};

use crate::reason::Reason;

/// Decides whether the reference in the header of `image` may be followed, and where it leads.
/// Relative names are relative to the folder of `image`.
///
/// # Errors
/// `PolicyRefused` with the option that would allow it and the path.
pub fn resolve_reference(
    image: &Path,
    reference: &BackingRef,
    policy: &ReferencePolicy,
) -> Result<ResolvedReference> {
    let refuse = |reason: Reason| Err(reason.error("follow a header reference"));
    let name = reference.file.as_str();
    if has_protocol(name) || name.is_empty() || name.contains('\0') {
        return refuse(Reason::ReferenceProtocol(name.to_owned()));
    }
    let folder = folder_of(image);
    let path = lexical(&folder.join(name));
    let driver = reference.format.as_deref().map(|format| match format {
        // Names of the peer's protocol layer mean: the bytes of the file.
        "file" | "host_device" => "raw".to_owned(),
        other => other.to_owned(),
    });
    match policy {
        ReferencePolicy::Explicit => {
            refuse(Reason::ReferenceExplicit { image: image.to_owned(), path })
        }
        ReferencePolicy::Any => Ok(ResolvedReference { path, beneath: None, driver }),
        ReferencePolicy::SameDir { allow } => {
            let own = lexical(folder);
            let mut folders = std::iter::once(own).chain(allow.iter().map(|dir| lexical(dir)));
            match folders.find(|dir| lies_below(&path, dir)) {
                Some(dir) => {
                    // A relative path keeps its folder in front, so that the one is a prefix of
                    // the other.
                    let path = if dir == Path::new(".") { dir.join(path) } else { path };
                    Ok(ResolvedReference { path, beneath: Some(dir), driver })
                }
                None => refuse(Reason::ReferenceOutside { image: image.to_owned(), path }),
            }
        }
    }
}

/// Whether a name starts with a protocol: a colon before the first slash (as the peer decides).
pub fn has_protocol(name: &str) -> bool {
    let end = name.find([':', '/']);
    end.is_some_and(|at| name.as_bytes().get(at) == Some(&b':'))
}

/// Whether `path` lies below `folder`; both are without `.` and inner `..`.
fn lies_below(path: &Path, folder: &Path) -> bool {
    if folder == Path::new(".") {
        return path.is_relative()
            && matches!(path.components().next(), Some(Component::Normal(_)));
    }
    let climbs = path.strip_prefix(folder).is_ok_and(|rest| rest.starts_with(".."));
    path.starts_with(folder) && path != folder && !climbs
}

fn folder_of(image: &Path) -> &Path {
    match image.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The path without `.` and with `..` resolved by text; a relative one stays relative.
fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                let parent = matches!(out.components().next_back(), Some(Component::Normal(_)));
                if parent {
                    out.pop();
                } else if !out.has_root() {
                    out.push("..");
                }
            }
            other => out.push(other),
        }
    }
    if out.as_os_str().is_empty() { PathBuf::from(".") } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(file: &str, policy: &ReferencePolicy) -> Result<ResolvedReference> {
        let reference = BackingRef { file: file.to_owned(), format: None };
        resolve_reference(Path::new("/images/vm/top.qcow2"), &reference, policy)
    }

    #[test]
    fn protocols_and_json_are_never_followed() {
        for name in
            ["json:{}", "nbd://host/x", "nbd:unix:/x", "a:b", "fat:/etc", "host_device:/dev/x"]
        {
            let error = resolve(name, &ReferencePolicy::Any).expect_err(name);
            assert_eq!(error.errno(), 13, "{name}");
        }
        assert!(resolve("./a:b", &ReferencePolicy::Any).is_ok());
        assert!(resolve("/dir/a:b", &ReferencePolicy::Any).is_ok());
    }

    #[test]
    fn same_dir_allows_the_folder_below_it_and_named_folders() {
        let none = ReferencePolicy::SameDir { allow: Vec::new() };
        let some = ReferencePolicy::SameDir { allow: vec!["/templates/".into()] };
        for name in ["base.qcow2", "sub/base.qcow2", "/images/vm/base.qcow2", "x/../base.qcow2"] {
            let found = resolve(name, &none).expect(name);
            assert_eq!(found.beneath.as_deref(), Some(Path::new("/images/vm")));
        }
        for name in ["../base.qcow2", "/etc/passwd", "sub/../../x", "/images/vm2/x", "/dev/sda"] {
            let text = resolve(name, &none).expect_err(name).to_string();
            assert!(text.contains("--header-refs=any") && text.contains("--allow-dir DIR"));
            assert!(text.contains("/images/vm/top.qcow2"), "{text}");
        }
        assert!(resolve("/templates/x/base.raw", &some).is_ok());
        assert!(resolve("/templates", &some).is_err());
        assert!(resolve("base.qcow2", &ReferencePolicy::Explicit).is_err());
    }

    #[test]
    fn relative_images_resolve_to_their_own_folder() {
        let reference = BackingRef { file: "base.qcow2".to_owned(), format: None };
        let policy = ReferencePolicy::SameDir { allow: Vec::new() };
        let found = resolve_reference(Path::new("top.qcow2"), &reference, &policy).expect("ok");
        assert_eq!(found.path, Path::new("./base.qcow2"));
        assert_eq!(found.beneath.as_deref(), Some(Path::new(".")));
        let up = BackingRef { file: "../x".to_owned(), format: None };
        assert!(resolve_reference(Path::new("top.qcow2"), &up, &policy).is_err());
        let found = resolve_reference(Path::new("dir/top.qcow2"), &reference, &policy).expect("ok");
        assert_eq!(found.path, Path::new("dir/base.qcow2"));
    }

    #[test]
    fn the_driver_is_what_the_header_names_and_never_guessed() {
        let driver = |format: Option<&str>| {
            let format = format.map(str::to_owned);
            let reference = BackingRef { file: "base".to_owned(), format };
            let policy = ReferencePolicy::Any;
            resolve_reference(Path::new("/x/top"), &reference, &policy).expect("ok").driver
        };
        assert_eq!(driver(None), None);
        assert_eq!(driver(Some("raw")).as_deref(), Some("raw"));
        assert_eq!(driver(Some("file")).as_deref(), Some("raw"));
        assert_eq!(driver(Some("vmdk")).as_deref(), Some("vmdk"));
    }
}
