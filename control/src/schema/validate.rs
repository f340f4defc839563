//! Arguments against their type.
//!
//! Owns: which value a type accepts, and the text of each refusal. Promises: the first refusal in
//! the order of the type's members is reported, unknown members last; what is returned has exactly
//! the types of the table (from the command line, texts have become numbers and booleans).
//! Does not: know commands, nor check what only the engine can know.

use std::fmt;

use serde_json::{Map, Value};

use super::types::{Int, Member, ObjectType, Type};

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// JSON: types must be right.
    Json,
    /// `key=value` options: all leaves are texts and are converted.
    Keyval,
}

/// Why a value is refused; displays as the peer words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArgumentError {
    /// A mandatory member is not there.
    Missing(String),
    /// A member that the type does not have.
    Unexpected(String),
    /// Members below a key that takes a plain value (command line).
    UnexpectedGroup(String),
    /// Another JSON kind than the type's; the second text names what was expected.
    WrongType(String, &'static str),
    /// A word that an enumeration does not have.
    WrongWord(String, String),
    /// A value outside what the type can hold; the second text names what was expected.
    Expects(String, &'static str),
}

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(name) => write!(f, "Parameter '{name}' is missing"),
            Self::Unexpected(name) => write!(f, "Parameter '{name}' is unexpected"),
            Self::UnexpectedGroup(name) => write!(f, "Parameters '{name}.*' are unexpected"),
            Self::WrongType(name, expected) => {
                write!(f, "Invalid parameter type for '{name}', expected: {expected}")
            }
            Self::WrongWord(name, word) => {
                write!(f, "Parameter '{name}' does not accept value '{word}'")
            }
            Self::Expects(name, what) => write!(f, "Parameter '{name}' expects {what}"),
        }
    }
}

impl std::error::Error for ArgumentError {}

/// Checks `value` against an object type and returns it with the type's own types.
pub fn validate(ty: &ObjectType, value: Value, source: Source) -> Result<Value, ArgumentError> {
    let mut check = Check { source, path: Vec::new() };
    check.object(ty, value)
}

struct Check {
    source: Source,
    path: Vec<Step>,
}

enum Step {
    Key(String),
    Index(usize),
}

impl Check {
    /// The full name of the value being checked.
    fn name(&self) -> String {
        let mut name = String::new();
        for step in &self.path {
            match (step, self.source) {
                (Step::Key(key), _) if name.is_empty() => name.push_str(key),
                (Step::Key(key), _) => name.extend([".", key]),
                (Step::Index(index), Source::Json) => name.push_str(&format!("[{index}]")),
                (Step::Index(index), Source::Keyval) => name.push_str(&format!(".{index}")),
            }
        }
        if name.is_empty() { "null".to_owned() } else { name }
    }

    /// The last part of the name, which some refusals show alone; elements of arrays have none.
    fn last_name(&self) -> String {
        match self.path.last() {
            Some(Step::Key(key)) => key.clone(),
            _ => "null".to_owned(),
        }
    }

    fn wrong_type(&self, expected: &'static str) -> ArgumentError {
        ArgumentError::WrongType(self.name(), expected)
    }

    fn value(&mut self, ty: &Type, value: Value) -> Result<Value, ArgumentError> {
        let plain = !matches!(ty, Type::Object(_) | Type::Array(_) | Type::Alternate(_));
        if self.source == Source::Keyval && plain && (value.is_object() || value.is_array()) {
            return Err(ArgumentError::UnexpectedGroup(self.name()));
        }
        match ty {
            Type::Any => Ok(value),
            Type::Str => self.text(value),
            Type::Bool => self.boolean(value),
            Type::Null => self.null(value),
            Type::Number if value.is_number() => Ok(value),
            Type::Number => Err(self.wrong_type("number")),
            Type::Int(int) => self.integer(*int, value),
            Type::Enum(words) => {
                let word = self.text(value)?;
                match word.as_str() {
                    Some(word) if !words.values.contains(&word) => {
                        Err(ArgumentError::WrongWord(self.last_name(), word.to_owned()))
                    }
                    _ => Ok(word),
                }
            }
            Type::Object(object) => self.object(object, value),
            Type::Array(element) => self.array(element, value),
            Type::Alternate(alternate) => {
                match alternate.choices.iter().find(|choice| takes_kind(choice, &value)) {
                    Some(choice) => self.value(choice, value),
                    None => Err(ArgumentError::WrongType(self.last_name(), alternate.name)),
                }
            }
        }
    }

    fn text(&self, value: Value) -> Result<Value, ArgumentError> {
        if value.is_string() { Ok(value) } else { Err(self.wrong_type("string")) }
    }

    fn null(&self, value: Value) -> Result<Value, ArgumentError> {
        if value.is_null() { Ok(value) } else { Err(self.wrong_type("null")) }
    }

    fn boolean(&self, value: Value) -> Result<Value, ArgumentError> {
        match (self.source, &value) {
            (_, Value::Bool(_)) => Ok(value),
            (Source::Keyval, Value::String(text)) => parse_switch(text)
                .map(Value::Bool)
                .ok_or_else(|| ArgumentError::Expects(self.name(), "'on' or 'off'")),
            _ => Err(self.wrong_type("boolean")),
        }
    }

    fn integer(&self, int: Int, value: Value) -> Result<Value, ArgumentError> {
        let wide = match (self.source, &value) {
            (Source::Keyval, Value::String(text)) if int == Int::Size => parse_size(text)
                .map(i128::from)
                .ok_or_else(|| ArgumentError::Expects(self.name(), "a size value"))?,
            (Source::Keyval, Value::String(text)) => parse_integer(text)
                .filter(|value| fits(int, *value))
                .ok_or_else(|| ArgumentError::Expects(self.name(), "integer"))?,
            (_, Value::Number(number)) => number
                .as_i64()
                .map(i128::from)
                .or_else(|| number.as_u64().map(i128::from))
                .filter(|value| fits(int, *value))
                .ok_or_else(|| self.no_integer(int))?,
            _ => return Err(self.no_integer(int)),
        };
        let narrowed = |max: u32, what| match u32::try_from(wide) {
            Ok(value) if value <= max => Ok(Value::from(value)),
            _ => Err(ArgumentError::Expects(self.last_name(), what)),
        };
        match int {
            Int::U32 => narrowed(u32::MAX, "uint32_t"),
            Int::U16 => narrowed(u16::MAX.into(), "uint16_t"),
            // `fits` has bounded both; a negative unsigned number wraps, as in the peer.
            Int::I64 => Ok(Value::from(wide as i64)),
            Int::U64 | Int::Size => Ok(Value::from(wide as u64)),
        }
    }

    /// A value that is no whole number: the peer has two texts for it.
    fn no_integer(&self, int: Int) -> ArgumentError {
        match (self.source, int) {
            (Source::Json, Int::U64 | Int::U32 | Int::U16 | Int::Size) => {
                ArgumentError::Expects(self.name(), "uint64")
            }
            _ => self.wrong_type("integer"),
        }
    }

    fn array(&mut self, element: &Type, value: Value) -> Result<Value, ArgumentError> {
        let Value::Array(items) = value else {
            return Err(self.wrong_type("array"));
        };
        let mut checked = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            self.path.push(Step::Index(index));
            checked.push(self.value(element, item)?);
            self.path.pop();
        }
        Ok(Value::Array(checked))
    }

    fn object(&mut self, ty: &ObjectType, value: Value) -> Result<Value, ArgumentError> {
        let Value::Object(mut given) = value else {
            return Err(self.wrong_type("object"));
        };
        let mut checked = Map::with_capacity(given.len());
        self.members(ty.members, &mut given, &mut checked)?;
        let mut inner = ty;
        while let Some(variants) = &inner.variants {
            let tag = checked.get(variants.tag).and_then(Value::as_str);
            let Some((_, case)) = variants.cases.iter().find(|(name, _)| Some(*name) == tag) else {
                break;
            };
            self.members(case.members, &mut given, &mut checked)?;
            inner = case;
        }
        if let Some(unknown) = given.keys().next() {
            self.path.push(Step::Key(unknown.clone()));
            return Err(ArgumentError::Unexpected(self.name()));
        }
        Ok(Value::Object(checked))
    }

    /// Moves `members` from `given` to `checked`.
    fn members(
        &mut self,
        members: &[Member],
        given: &mut Map<String, Value>,
        checked: &mut Map<String, Value>,
    ) -> Result<(), ArgumentError> {
        for member in members {
            let value = given.swap_remove(member.name);
            if value.is_none() && member.optional {
                continue;
            }
            self.path.push(Step::Key(member.name.to_owned()));
            let value = value.ok_or_else(|| ArgumentError::Missing(self.name()))?;
            checked.insert(member.name.to_owned(), self.value(&member.ty, value)?);
            self.path.pop();
        }
        Ok(())
    }
}

/// Whether an alternate chooses `ty` for a value of this JSON kind.
fn takes_kind(ty: &Type, value: &Value) -> bool {
    match ty {
        Type::Str | Type::Enum(_) => value.is_string(),
        Type::Bool => value.is_boolean(),
        Type::Null => value.is_null(),
        Type::Int(_) | Type::Number => value.is_number(),
        Type::Object(_) => value.is_object(),
        Type::Array(_) => value.is_array(),
        Type::Any => true,
        Type::Alternate(_) => false,
    }
}

/// Whether the JSON reader of this width takes the number at all (narrower ones refuse later).
fn fits(int: Int, value: i128) -> bool {
    match int {
        Int::I64 => i64::try_from(value).is_ok(),
        Int::U64 | Int::U32 | Int::U16 | Int::Size => {
            value >= i128::from(i64::MIN) && value <= i128::from(u64::MAX)
        }
    }
}

/// `on`, `yes`, `true`, `y` and their opposites.
pub(crate) fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A whole number as C's `strtol` with base 0 reads it: decimal, `0x` hexadecimal, `0` octal.
pub(crate) fn parse_integer(text: &str) -> Option<i128> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (16, digits.get(2..)?),
        [b'0', _, ..] => (8, digits.get(1..)?),
        _ => (10, digits),
    };
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -value } else { value })
}

/// A size: a decimal number, perhaps with a fraction, and an optional suffix (bytes without one).
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, suffix) = text.split_at(split);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let unit = 1u64 << shift;
    let whole: u64 = whole.parse().ok()?;
    let part = match fraction {
        "" => 0,
        _ if shift == 0 => return None,
        _ => (format!("0.{fraction}").parse::<f64>().ok()? * unit as f64) as u64,
    };
    whole.checked_mul(unit)?.checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_with_c_prefixes_and_nothing_may_follow() {
        assert_eq!(parse_integer("010"), Some(8));
        assert_eq!(parse_integer("0x10"), Some(16));
        assert_eq!(parse_integer("-1"), Some(-1));
        assert_eq!(parse_integer("0"), Some(0));
        assert_eq!(parse_integer("1k"), None);
        assert_eq!(parse_integer(""), None);
        assert_eq!(parse_integer("--1"), None);
    }

    #[test]
    fn sizes_take_suffixes_and_fractions_of_them() {
        assert_eq!(parse_size("1.5M"), Some(3 << 19));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("1x"), None);
        assert_eq!(parse_size("99999999999E"), None);
    }
}
