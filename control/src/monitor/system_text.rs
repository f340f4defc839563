//! System errors as the peer words them.

/// The text of a system error, without the number that Rust appends.
pub(crate) fn system_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
