//! `-o key=value,...`: format options, parsed and typed as qemu-img types them.
//!
//! A comma in a value is written twice. A later value replaces an earlier one. What the values mean
//! together is the format's business; here only the type of each is checked.

use std::collections::BTreeMap;

use super::failure::Failure;
use super::size;

/// The type of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Size,
    Number,
    Switch,
}

/// The options of each format with the help of each, in the order of the list.
const QCOW2: [(&str, Kind, &str); 14] = [
    ("backing_file", Kind::Text, "File name of a base image"),
    ("backing_fmt", Kind::Text, "Image format of the base image"),
    ("cluster_size", Kind::Size, "Cluster size: a power of two from 512 to 2M"),
    ("compat", Kind::Text, "Compatibility level: v2 (0.10) or v3 (1.1)"),
    ("compression_type", Kind::Text, "Method of compressed clusters: zlib or zstd"),
    ("data_file", Kind::Text, "File name of an external data file"),
    ("data_file_raw", Kind::Switch, "The data file must stay valid as a raw image"),
    ("extended_l2", Kind::Switch, "Subclusters (what overlays get if nothing is said)"),
    ("extent_size_hint", Kind::Size, "Accepted without effect"),
    ("lazy_refcounts", Kind::Switch, "Postpone refcount updates"),
    ("nocow", Kind::Switch, "Accepted without effect"),
    ("preallocation", Kind::Text, "off, metadata, falloc or full"),
    ("refcount_bits", Kind::Number, "Width of a refcount: 1, 2, 4, 8, 16, 32 or 64"),
    ("size", Kind::Size, "Virtual disk size"),
];
const RAW: [(&str, Kind, &str); 4] = [
    ("extent_size_hint", Kind::Size, "Accepted without effect"),
    ("nocow", Kind::Switch, "Accepted without effect"),
    ("preallocation", Kind::Text, "off, falloc or full"),
    ("size", Kind::Size, "Virtual disk size"),
];

/// Options of the peer's that only advise the file system, in the order in which they are shown.
pub(crate) const HINTS: [&str; 2] = ["nocow", "extent_size_hint"];

/// A typed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// A text.
    Text(String),
    /// A number, or a size in bytes.
    Number(u64),
    /// On or off.
    Switch(bool),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => number.fmt(f),
            Self::Switch(on) => f.write_str(if *on { "on" } else { "off" }),
        }
    }
}

/// The options of one new image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keys(BTreeMap<&'static str, Value>);

fn table(format: &str) -> &'static [(&'static str, Kind, &'static str)] {
    match format {
        "qcow2" => &QCOW2,
        _ => &RAW,
    }
}

/// The list of options of `format`, for `-o help`.
pub(crate) fn help(format: &str) -> String {
    let mut text = format!("Supported {format} options:\n");
    for (name, kind, about) in table(format) {
        let kind = match kind {
            Kind::Text => "<str>",
            Kind::Size => "<size>",
            Kind::Number => "<num>",
            Kind::Switch => "<bool (on/off)>",
        };
        text.push_str(&format!("  {:<22} - {about}\n", format!("{name}={kind}")));
    }
    text
}

/// Whether one of the `-o` arguments asks for the list.
pub(crate) fn wants_help(arguments: &[String]) -> bool {
    arguments.iter().any(|text| split(text).iter().any(|part| part == "help" || part == "?"))
}

impl Keys {
    /// Reads all `-o` arguments for a new image of `format`.
    ///
    /// # Errors
    /// Which parameter is unknown or what its value should be.
    pub(crate) fn parse(format: &str, arguments: &[String]) -> Result<Self, Failure> {
        let mut keys = Self::default();
        for part in arguments.iter().flat_map(|text| split(text)).filter(|part| !part.is_empty()) {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name, value),
                None => match part.strip_prefix("no").filter(|name| knows(format, name)) {
                    Some(name) => (name, "off"),
                    None => (part.as_str(), "on"),
                },
            };
            let found = table(format).iter().find(|(known, ..)| *known == name);
            if found.is_none() && name.starts_with("encrypt") {
                return Err(Failure::new(format!(
                    "Encrypted images are not supported (option '{name}')"
                )));
            }
            let Some((name, kind, _)) = found else {
                let hint = match nearest(format, name) {
                    Some(known) => format!(" (did you mean '{known}'?)"),
                    None => String::new(),
                };
                return Err(Failure::new(format!("Invalid parameter '{name}'{hint}")));
            };
            keys.0.insert(name, typed(name, *kind, value)?);
        }
        Ok(keys)
    }

    /// Sets an option.
    pub(crate) fn set(&mut self, name: &'static str, value: Value) {
        self.0.insert(name, value);
    }

    /// Sets an option that is not given.
    pub(crate) fn or_set(&mut self, name: &'static str, value: Value) {
        self.0.entry(name).or_insert(value);
    }

    /// Takes an option out.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Takes a text out.
    pub(crate) fn take_text(&mut self, name: &str) -> Option<String> {
        self.take(name).map(|value| value.to_string())
    }

    /// Takes a number out.
    pub(crate) fn take_number(&mut self, name: &str) -> Option<u64> {
        match self.take(name) {
            Some(Value::Number(number)) => Some(number),
            _ => None,
        }
    }

    /// A given value.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// All that are given.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        self.0.iter().map(|(name, value)| (*name, value))
    }
}

fn knows(format: &str, name: &str) -> bool {
    table(format).iter().any(|(known, kind, _)| *known == name && *kind == Kind::Switch)
}

/// The option that somebody may have meant by `name`: at most two letters are wrong.
fn nearest(format: &str, name: &str) -> Option<&'static str> {
    let known = table(format).iter().map(|(known, ..)| (distance(known, name), *known));
    known.filter(|(wrong, _)| *wrong <= 2 && name.len() > 3).min().map(|(_, known)| known)
}

/// How many letters must be changed, added or left out to make one word of the other.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.bytes().enumerate() {
        let mut before = index;
        let mut next = vec![index + 1];
        for (right, (up, found)) in row.iter().skip(1).zip(other.bytes()).enumerate() {
            let left = next.get(right).copied().unwrap_or(0);
            let here = (before + usize::from(found != letter)).min(up + 1).min(left + 1);
            before = *up;
            next.push(here);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

fn typed(name: &str, kind: Kind, value: &str) -> Result<Value, Failure> {
    let wrong = |what: &str| Err(Failure::new(format!("Parameter '{name}' expects {what}")));
    match kind {
        Kind::Text => Ok(Value::Text(value.to_owned())),
        Kind::Switch => match value {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(false)),
            _ => wrong("'on' or 'off'"),
        },
        Kind::Number => match value.parse() {
            Ok(number) => Ok(Value::Number(number)),
            Err(_) => wrong("a number"),
        },
        Kind::Size => match size::parse(value) {
            Some(bytes) => Ok(Value::Number(bytes)),
            None => wrong(
                "a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
                 kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
            ),
        },
    }
}

/// The parts between single commas; a double comma is one comma of a value.
pub(crate) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Keys, Failure> {
        Keys::parse("qcow2", &[text.to_owned()])
    }

    #[test]
    fn options_are_typed_and_commas_are_doubled() {
        let keys =
            parse("cluster_size=64k,backing_file=a,,b,lazy_refcounts,size=1.5k").expect("ok");
        assert_eq!(keys.get("cluster_size"), Some(&Value::Number(65536)));
        assert_eq!(keys.get("backing_file"), Some(&Value::Text("a,b".into())));
        assert_eq!(keys.get("size"), Some(&Value::Number(1536)));
        assert_eq!(keys.get("lazy_refcounts"), Some(&Value::Switch(true)));
        let keys = parse("lazy_refcounts,nolazy_refcounts").expect("ok");
        assert_eq!(keys.get("lazy_refcounts"), Some(&Value::Switch(false)));
        assert!(parse("").expect("ok").iter().next().is_none());
    }

    #[test]
    fn each_wrong_option_is_named() {
        let all = [
            ("foo=1", "'foo'"),
            ("foo", "'foo'"),
            ("=1", "''"),
            ("lazy_refcounts=maybe", "'on' or"),
            ("refcount_bits=x", "a number"),
            ("cluster_size=x", "below 2^64"),
            ("nofoo", "'nofoo'"),
        ];
        for (text, part) in all {
            let error = parse(text).expect_err(text).text;
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Keys::parse("raw", &["cluster_size=1".to_owned()]).is_err());
        let near = [
            ("cluster_sze=4k", "(did you mean 'cluster_size'?)"),
            ("cluster-size=4k", "(did you mean 'cluster_size'?)"),
            ("lazyrefcounts=on", "(did you mean 'lazy_refcounts'?)"),
            ("encryption=on", "Encrypted images are not supported (option 'encryption')"),
        ];
        for (text, part) in near {
            let error = parse(text).expect_err(text).text;
            assert!(error.ends_with(part), "{text}: {error}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        let far = parse("clusters=1").expect_err("unknown").text;
        assert_eq!(far, "Invalid parameter 'clusters'");
        assert!(wants_help(&["size=1,help".to_owned()]) && wants_help(&["?".to_owned()]));
    }
}
