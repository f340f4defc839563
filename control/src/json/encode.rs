//! Values to the monitor's output form.
//!
//! Owns: separators, escapes and the pretty layout. Promises: ASCII only (other characters as
//! `\uXXXX`, surrogate pairs beyond U+FFFF), members in their order, lines end in CR LF.

use std::fmt::Write;

use serde_json::Value;

use super::number;

/// How containers are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// One line.
    #[default]
    Compact,
    /// One member per line, indented by four spaces (`--monitor …,pretty=on`).
    Pretty,
}

/// The text of `value`.
pub fn encode(value: &Value, layout: Layout) -> String {
    let mut out = String::with_capacity(128);
    Writer { out: &mut out, layout }.value(value, 0);
    out
}

/// The text of `value` as one monitor message; every line of it ends with CR LF.
pub fn encode_line(value: &Value, layout: Layout) -> String {
    let mut out = encode(value, layout);
    if layout == Layout::Pretty {
        // Line feeds inside strings are escaped, so these are the ends of lines.
        out = out.replace('\n', "\r\n");
    }
    out.push_str("\r\n");
    out
}

struct Writer<'a> {
    out: &'a mut String,
    layout: Layout,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(true) => self.out.push_str("true"),
            Value::Bool(false) => self.out.push_str("false"),
            Value::Number(number) => self.out.push_str(&number::written(number)),
            Value::String(text) => self.string(text),
            Value::Array(items) => {
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.separator(index, depth + 1);
                    self.value(item, depth + 1);
                }
                self.indent(depth);
                self.out.push(']');
            }
            Value::Object(members) => {
                self.out.push('{');
                for (index, (key, member)) in members.iter().enumerate() {
                    self.separator(index, depth + 1);
                    self.string(key);
                    self.out.push_str(": ");
                    self.value(member, depth + 1);
                }
                self.indent(depth);
                self.out.push('}');
            }
        }
    }

    fn separator(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(if self.layout == Layout::Pretty { "," } else { ", " });
        }
        self.indent(depth);
    }

    fn indent(&mut self, depth: usize) {
        if self.layout == Layout::Pretty {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str("    "));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                ' '..='~' => self.out.push(c),
                _ => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        // Writing to a String cannot fail.
                        let _ = write!(self.out, "\\u{unit:04X}");
                    }
                }
            }
        }
        self.out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn compact_output_is_ascii_with_the_peers_separators() {
        let value = json!({"b": [1, true, "é\u{7f}\u{1f}\"\\/\u{8}\u{c}\n\r\t😀"], "a": null});
        assert_eq!(
            encode(&value, Layout::Compact),
            r#"{"b": [1, true, "\u00E9\u007F\u001F\"\\/\b\f\n\r\t\uD83D\uDE00"], "a": null}"#
        );
    }

    #[test]
    fn pretty_output_breaks_also_empty_containers() {
        let value = json!({"return": [], "id": {"c": [1, {}]}});
        let want = [
            "{",
            "    \"return\": [",
            "    ],",
            "    \"id\": {",
            "        \"c\": [",
            "            1,",
            "            {",
            "            }",
            "        ]",
            "    }",
            "}",
            "",
        ]
        .join("\r\n");
        assert_eq!(encode_line(&value, Layout::Pretty), want);
    }
}
