//! `key=value,nested.key=value,list.0=value` to a tree.
//!
//! Owns: the syntax (`,,` for a comma, an implied first key, `help`) and the texts of its errors.
//! Promises: leaves are texts, later values replace earlier ones, a group of keys `0`, `1`, … is a
//! list. Does not: know types; [`crate::schema::validate`] does.

use std::fmt;

use serde_json::{Map, Value};

use crate::limits::{NESTING_MAX, OPTION_PARAMETERS_MAX};

/// Longest part of a dotted key.
const FRAGMENT_BYTES_MAX: usize = 127;

/// Why a text is no list of keys and values; displays as the peer words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyvalError {
    /// A key that cannot be one.
    Invalid(String),
    /// A part of a key beyond 127 bytes.
    TooLong(String),
    /// A key nested deeper than values may be.
    TooDeep(String),
    /// More parameters than anyone needs.
    TooMany,
    /// A key without value.
    NoValue(String),
    /// A key used as value and as group, or a list with names.
    Inconsistent(String),
    /// A list with a gap.
    Gap(String),
}

impl fmt::Display for KeyvalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(key) => write!(f, "Invalid parameter '{key}'"),
            Self::TooLong(key) => write!(f, "Parameter '{key}' is too long"),
            Self::TooDeep(key) => {
                let start: String = key.chars().take(64).collect();
                write!(f, "Parameter '{start}…' is nested too deep")
            }
            Self::TooMany => write!(f, "More than {OPTION_PARAMETERS_MAX} parameters"),
            Self::NoValue(key) => write!(f, "Expected '=' after parameter '{key}'"),
            Self::Inconsistent(key) => write!(f, "Parameters '{key}.*' used inconsistently"),
            Self::Gap(key) => write!(f, "Parameter '{key}' missing"),
        }
    }
}

impl std::error::Error for KeyvalError {}

/// What a text holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// The tree.
    pub value: Value,
    /// Whether `help` or `?` stood among the parameters.
    pub help: bool,
}

/// Parses `text`. `implied` is the key of a first value that stands alone.
pub fn parse_keyval(text: &str, implied: Option<&str>) -> Result<Parsed, KeyvalError> {
    let mut root = Map::new();
    let mut help = false;
    let mut rest = text;
    let mut count = 0;
    while !rest.is_empty() {
        count += 1;
        if count > OPTION_PARAMETERS_MAX {
            return Err(KeyvalError::TooMany);
        }
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, tail) = rest.split_at(end);
        if let Some(value) = tail.strip_prefix('=') {
            let (value, after) = take_value(value);
            put(&mut root, key, value)?;
            rest = after;
        } else if key == "help" || key == "?" {
            help = true;
            rest = tail.strip_prefix(',').unwrap_or(tail);
        } else if let (1, Some(implied), false) = (count, implied, key.is_empty()) {
            let (value, after) = take_value(rest);
            put(&mut root, implied, value)?;
            rest = after;
        } else {
            check_key(key)?;
            return Err(KeyvalError::NoValue(key.to_owned()));
        }
    }
    let value = with_lists(Value::Object(root), "")?;
    Ok(Parsed { value, help })
}

/// The value at the start of `text`, and what follows its comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some((piece, after)) = rest.split_once(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(piece);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
}

fn check_key(key: &str) -> Result<(), KeyvalError> {
    for (index, fragment) in key.split('.').enumerate() {
        let number = index > 0 && is_index(fragment);
        let name = fragment.starts_with(|c: char| c.is_ascii_alphabetic())
            && fragment.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_');
        if !number && !name {
            return Err(KeyvalError::Invalid(key.to_owned()));
        }
        if fragment.len() > FRAGMENT_BYTES_MAX {
            return Err(KeyvalError::TooLong(key.to_owned()));
        }
        if index >= NESTING_MAX {
            return Err(KeyvalError::TooDeep(key.to_owned()));
        }
    }
    Ok(())
}

fn is_index(fragment: &str) -> bool {
    !fragment.is_empty() && fragment.bytes().all(|c| c.is_ascii_digit())
}

fn put(root: &mut Map<String, Value>, key: &str, value: String) -> Result<(), KeyvalError> {
    check_key(key)?;
    let mut group = root;
    let mut consumed = 0;
    let (path, last) = match key.rsplit_once('.') {
        Some((path, last)) => (path, last),
        None => ("", key),
    };
    for fragment in path.split('.').filter(|fragment| !fragment.is_empty()) {
        consumed += fragment.len() + 1;
        let so_far = key.get(..consumed - 1).unwrap_or(key);
        let entry = group.entry(fragment).or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(inner) = entry else {
            return Err(KeyvalError::Inconsistent(so_far.to_owned()));
        };
        group = inner;
    }
    if group.get(last).is_some_and(Value::is_object) {
        return Err(KeyvalError::Inconsistent(key.to_owned()));
    }
    group.insert(last.to_owned(), Value::String(value));
    Ok(())
}

/// Turns groups whose keys are all numbers into lists.
fn with_lists(value: Value, name: &str) -> Result<Value, KeyvalError> {
    let Value::Object(group) = value else {
        return Ok(value);
    };
    let joined = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    let indices = group.keys().filter(|key| is_index(key)).count();
    if indices > 0 && indices < group.len() {
        return Err(KeyvalError::Inconsistent(name.to_owned()));
    }
    if indices == 0 || name.is_empty() {
        let mut members = Map::with_capacity(group.len());
        for (key, value) in group {
            let inner = with_lists(value, &joined(&key))?;
            members.insert(key, inner);
        }
        return Ok(Value::Object(members));
    }
    let mut items = vec![None; group.len()];
    for (key, value) in group {
        let inner = with_lists(value, &joined(&key))?;
        let place = key.parse::<usize>().ok().and_then(|index| items.get_mut(index));
        if let Some(place) = place {
            *place = Some(inner);
        }
    }
    let gap = |index: usize| KeyvalError::Gap(joined(&index.to_string()));
    let items: Result<Vec<Value>, KeyvalError> =
        items.into_iter().enumerate().map(|(at, item)| item.ok_or_else(|| gap(at))).collect();
    items.map(Value::Array)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_keys_lists_and_commas_become_a_tree() {
        let parsed = parse_keyval("nbd,a.b=1,a.c=x,,y,l.1=q,l.0=p,a.b=2,", Some("type")).unwrap();
        assert_eq!(
            parsed.value,
            json!({"type": "nbd", "a": {"b": "2", "c": "x,y"}, "l": ["p", "q"]})
        );
        assert!(!parsed.help);
    }

    #[test]
    fn help_is_found_anywhere_and_also_as_question_mark() {
        assert!(parse_keyval("iothread,help", Some("qom-type")).unwrap().help);
        assert!(parse_keyval("?", Some("qom-type")).unwrap().help);
        assert!(!parse_keyval("help=1", None).unwrap().help);
    }

    #[test]
    fn a_deep_key_is_refused_instead_of_recursed_into() {
        let key = format!("a{}=1", ".a".repeat(5000));
        assert!(matches!(parse_keyval(&key, None), Err(KeyvalError::TooDeep(_))));
    }
}
