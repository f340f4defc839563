//! The older `name=value,flag,noflag` syntax of `--chardev` and `--trace`.
//!
//! Owns: its parsing; later values replace earlier ones, a lone name is `on`, a lone `noNAME` is
//! `off`. Promises: only known names pass. Does not: convert; the user of an option does.

use crate::schema::ArgumentError;

/// Options in the order given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OptionList {
    entries: Vec<(String, String)>,
    /// Names that stood without value, with what should be written instead.
    pub deprecated: Vec<(String, String)>,
}

impl OptionList {
    /// The last value of an option.
    pub fn last(&self, name: &str) -> Option<&str> {
        self.entries.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The last value of a switch.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, ArgumentError> {
        match self.last(name) {
            None => Ok(None),
            Some(text) => match crate::schema::parse_switch(text) {
                Some(value) => Ok(Some(value)),
                None => Err(ArgumentError::Expects(name.to_owned(), "'on' or 'off'")),
            },
        }
    }
}

/// Parses `text`; the error is the name that is not known. `implied` is the name of a first value
/// that stands alone.
pub fn parse_options(text: &str, implied: &str, known: &[&str]) -> Result<OptionList, String> {
    let mut list = OptionList::default();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (name, tail) = rest.split_at(end);
        let (name, value) = if let Some(tail) = tail.strip_prefix('=') {
            let (value, after) = take_value(tail);
            rest = after;
            (name.to_owned(), value)
        } else if first {
            let (value, after) = take_value(rest);
            rest = after;
            (implied.to_owned(), value)
        } else {
            rest = tail.strip_prefix(',').unwrap_or(tail);
            let (written, value) = match name.strip_prefix("no") {
                Some(positive) if !known.contains(&name) => (positive, "off"),
                _ => (name, "on"),
            };
            list.deprecated.push((name.to_owned(), format!("{written}={value}")));
            (written.to_owned(), value.to_owned())
        };
        if !known.contains(&name.as_str()) {
            return Err(name);
        }
        list.entries.push((name, value));
        first = false;
    }
    Ok(list)
}

fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some((piece, after)) = rest.split_once(',') {
        value.push_str(piece);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
    value.push_str(rest);
    (value, "")
}
