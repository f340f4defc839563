//! Parser: the tokens of one message to a value.
//!
//! Owns: the grammar and the texts of its errors. Promises: no recursion (the stack of open
//! containers is explicit), duplicate keys are refused, strings are valid Unicode without
//! non-characters. Does not: limit anything; [`super::stream`] did that before.

use serde_json::{Map, Value};

use super::lexer::TokenKind;
use super::number;

/// The tokens of one message: kinds, and their text in one buffer.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    kinds: Vec<(TokenKind, u32)>,
    text: Vec<u8>,
}

impl Tokens {
    pub(super) fn push(&mut self, kind: TokenKind, text: &[u8]) {
        self.text.extend_from_slice(text);
        let end = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        self.kinds.push((kind, end));
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn text_bytes(&self) -> usize {
        self.text.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn get(&self, index: usize) -> Option<(TokenKind, &[u8])> {
        let (kind, end) = *self.kinds.get(index)?;
        let start = match index.checked_sub(1) {
            Some(before) => self.kinds.get(before)?.1,
            None => 0,
        };
        Some((kind, self.text.get(start as usize..end as usize)?))
    }
}

/// An open container.
enum Frame {
    Array(Vec<Value>),
    /// `key` is there once it and its colon were read.
    Object {
        members: Map<String, Value>,
        key: Option<String>,
    },
}

/// What the grammar wants next.
enum Want {
    Value,
    /// A container was just opened: a value or its end.
    ValueOrEnd,
    /// A value is complete and belongs to the frame on top.
    Place(Value),
}

/// Parses one message. The error is the text after "JSON parse error, ".
pub(super) fn parse(tokens: &Tokens) -> Result<Value, String> {
    let mut frames: Vec<Frame> = Vec::new();
    let mut next = 0;
    let mut want = Want::Value;
    loop {
        want = match want {
            Want::Place(value) => match frames.pop() {
                None => return Ok(value),
                Some(frame) => place(frame, value, tokens, &mut next, &mut frames)?,
            },
            Want::ValueOrEnd => {
                let kind = tokens.get(next).map(|(kind, _)| kind);
                match (frames.last(), kind) {
                    (Some(Frame::Array(_)), Some(TokenKind::CloseBracket))
                    | (Some(Frame::Object { .. }), Some(TokenKind::CloseBrace)) => {
                        next += 1;
                        close(frames.pop())
                    }
                    _ => Want::Value,
                }
            }
            Want::Value => {
                let Some((kind, text)) = tokens.get(next) else {
                    return Err("premature EOI".to_owned());
                };
                next += 1;
                value(kind, text, &mut frames)?
            }
        };
    }
}

fn value(kind: TokenKind, text: &[u8], frames: &mut Vec<Frame>) -> Result<Want, String> {
    let ascii = || String::from_utf8_lossy(text);
    Ok(match kind {
        TokenKind::OpenBrace => {
            frames.push(Frame::Object { members: Map::new(), key: None });
            Want::ValueOrEnd
        }
        TokenKind::OpenBracket => {
            frames.push(Frame::Array(Vec::new()));
            Want::ValueOrEnd
        }
        TokenKind::String => Want::Place(Value::String(string(text)?)),
        TokenKind::Integer => Want::Place(Value::Number(number::integer(&ascii()))),
        TokenKind::Float => Want::Place(Value::Number(number::float(&ascii()))),
        TokenKind::Keyword => match text {
            b"true" => Want::Place(Value::Bool(true)),
            b"false" => Want::Place(Value::Bool(false)),
            b"null" => Want::Place(Value::Null),
            _ => return Err(format!("invalid keyword '{}'", ascii())),
        },
        _ => return Err("expecting value".to_owned()),
    })
}

/// Gives a complete value to its container and reads what must follow it.
fn place(
    frame: Frame,
    value: Value,
    tokens: &Tokens,
    next: &mut usize,
    frames: &mut Vec<Frame>,
) -> Result<Want, String> {
    let follower = tokens.get(*next).map(|(kind, _)| kind);
    *next += 1;
    let premature = || "premature EOI".to_owned();
    match frame {
        Frame::Array(mut items) => {
            items.push(value);
            match follower.ok_or_else(premature)? {
                TokenKind::Comma => frames.push(Frame::Array(items)),
                TokenKind::CloseBracket => return Ok(Want::Place(Value::Array(items))),
                _ => return Err("expected separator in list".to_owned()),
            }
        }
        Frame::Object { members, key: None } => {
            let Value::String(key) = value else {
                return Err("key is not a string in object".to_owned());
            };
            if follower.ok_or_else(premature)? != TokenKind::Colon {
                return Err("missing : in object pair".to_owned());
            }
            frames.push(Frame::Object { members, key: Some(key) });
        }
        Frame::Object { mut members, key: Some(key) } => {
            if members.insert(key, value).is_some() {
                return Err("duplicate key".to_owned());
            }
            match follower.ok_or_else(premature)? {
                TokenKind::Comma => frames.push(Frame::Object { members, key: None }),
                TokenKind::CloseBrace => return Ok(Want::Place(Value::Object(members))),
                _ => return Err("expected separator in dict".to_owned()),
            }
        }
    }
    Ok(Want::Value)
}

fn close(frame: Option<Frame>) -> Want {
    Want::Place(match frame {
        Some(Frame::Array(items)) => Value::Array(items),
        Some(Frame::Object { members, .. }) => Value::Object(members),
        None => Value::Null,
    })
}

/// Text of a string token (quotes included) with its escapes resolved.
fn string(token: &[u8]) -> Result<String, String> {
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    while !rest.is_empty() {
        let plain = rest.iter().position(|byte| *byte == b'\\').unwrap_or(rest.len());
        let (text, tail) = rest.split_at(plain);
        push_plain(text, &mut out)?;
        rest = if tail.is_empty() { tail } else { escape(tail, token, &mut out)? };
    }
    Ok(out)
}

fn push_plain(text: &[u8], out: &mut String) -> Result<(), String> {
    let invalid = || "invalid UTF-8 sequence in string".to_owned();
    // The two-byte form of NUL is accepted, as the peer does.
    for (index, piece) in split_long_nul(text).enumerate() {
        if index > 0 {
            out.push('\0');
        }
        let piece = std::str::from_utf8(piece).map_err(|_| invalid())?;
        if !piece.is_ascii() && piece.chars().any(is_noncharacter) {
            return Err(invalid());
        }
        out.push_str(piece);
    }
    Ok(())
}

fn split_long_nul(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        match text.windows(2).position(|pair| pair == [0xc0, 0x80]) {
            Some(at) => {
                rest = text.get(at + 2..);
                text.get(..at)
            }
            None => rest.take(),
        }
    })
}

/// Resolves the escape at the start of `tail`; returns what follows it. `token` is only there to
/// say how far an error text may quote.
fn escape<'a>(tail: &'a [u8], token: &[u8], out: &mut String) -> Result<&'a [u8], String> {
    let resolved = match tail.get(1) {
        Some(b'"') => '"',
        Some(b'\'') => '\'',
        Some(b'\\') => '\\',
        Some(b'/') => '/',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => {
            let (resolved, used) = unicode(tail).ok_or_else(|| {
                let quote = token.last().copied().unwrap_or(b'"');
                let shown: Vec<u8> = tail.iter().copied().chain([quote]).take(6).collect();
                let shown = String::from_utf8_lossy(&shown);
                format!("{shown} is not a valid Unicode character")
            })?;
            out.push(resolved);
            return Ok(tail.get(used..).unwrap_or_default());
        }
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    out.push(resolved);
    Ok(tail.get(2..).unwrap_or_default())
}

/// The character of `\uXXXX` or of a surrogate pair, and the bytes it took.
fn unicode(tail: &[u8]) -> Option<(char, usize)> {
    let unit = hex4(tail.get(2..6)?)?;
    let (code, used) = match unit {
        0xd800..=0xdbff if tail.get(6..8) == Some(br"\u".as_slice()) => {
            let low = hex4(tail.get(8..12)?)?;
            if !(0xdc00..=0xdfff).contains(&low) {
                return None;
            }
            (0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00), 12)
        }
        _ => (unit, 6),
    };
    char::from_u32(code).filter(|resolved| !is_noncharacter(*resolved)).map(|c| (c, used))
}

fn hex4(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |code, digit| Some(code << 4 | (*digit as char).to_digit(16)?))
}

fn is_noncharacter(c: char) -> bool {
    let code = u32::from(c);
    (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
}
