//! Messages out of a byte stream.
//!
//! Owns: where a message ends (all brackets closed) and the bounds on its size. Promises: every
//! message or error is reported at the byte that completes it; after an error the next message is
//! found as the peer finds it; memory stays within the bounds of [`crate::limits`].

use std::fmt;

use serde_json::Value;

use super::lexer::{Event, Lexer, TokenKind};
use super::parse::{self, Tokens};
use crate::limits::{MESSAGE_BYTES_MAX, MESSAGE_TOKENS_MAX, NESTING_MAX};

/// Why bytes are no message; displays as the peer words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JsonError {
    /// Bytes that start no token, or a token that cannot end like this (lossy text).
    Stray(String),
    /// The tokens do not form a value; the text says what was wrong.
    Grammar(String),
    /// More token text than [`MESSAGE_BYTES_MAX`].
    TooLong,
    /// More tokens than [`MESSAGE_TOKENS_MAX`].
    TooManyTokens,
    /// Deeper than [`NESTING_MAX`].
    TooDeep,
    /// More than one value where one was expected.
    Several,
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stray(text) => write!(f, "JSON parse error, stray '{text}'"),
            Self::Grammar(text) => write!(f, "JSON parse error, {text}"),
            Self::TooLong => f.write_str("JSON token size limit exceeded"),
            Self::TooManyTokens => f.write_str("JSON token count limit exceeded"),
            Self::TooDeep => f.write_str("JSON nesting depth limit exceeded"),
            Self::Several => f.write_str("Expecting at most one JSON value"),
        }
    }
}

impl std::error::Error for JsonError {}

/// Splits a byte stream into messages.
#[derive(Debug)]
pub struct MessageStream {
    lexer: Lexer,
    tokens: Tokens,
    braces: i64,
    brackets: i64,
}

impl Default for MessageStream {
    fn default() -> Self {
        Self::new()
    }
}

impl MessageStream {
    /// A stream at its first byte.
    pub fn new() -> Self {
        Self { lexer: Lexer::new(), tokens: Tokens::default(), braces: 0, brackets: 0 }
    }

    /// Takes bytes from the front of `input` until a message or an error is complete. `None` means
    /// that all of `input` was taken and nothing is complete yet.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, JsonError>> {
        while let Some((byte, rest)) = input.split_first() {
            let (event, consumed) = self.lexer.feed(*byte);
            if consumed {
                *input = rest;
            }
            if let Some(outcome) = event.and_then(|event| self.take(event)) {
                return Some(outcome);
            }
            if self.lexer.pending_bytes() > MESSAGE_BYTES_MAX {
                self.lexer.recover();
                return Some(self.emit(Err(JsonError::TooLong)));
            }
        }
        None
    }

    /// Ends the input: what was begun is an error, nothing begun is `None`.
    pub fn finish(&mut self) -> Option<Result<Value, JsonError>> {
        if let Some(outcome) = self.lexer.finish().and_then(|event| self.take(event)) {
            return Some(outcome);
        }
        (self.tokens.len() > 0).then(|| self.complete())
    }

    fn take(&mut self, event: Event) -> Option<Result<Value, JsonError>> {
        let kind = match event {
            Event::Token(kind) => kind,
            Event::Stray => {
                let text = c_text(self.lexer.text());
                return Some(self.emit(Err(JsonError::Stray(text))));
            }
        };
        match kind {
            TokenKind::OpenBrace => self.braces += 1,
            TokenKind::CloseBrace => self.braces -= 1,
            TokenKind::OpenBracket => self.brackets += 1,
            TokenKind::CloseBracket => self.brackets -= 1,
            _ => {}
        }
        let text = self.lexer.text();
        let refusal = if self.tokens.text_bytes() + text.len() > MESSAGE_BYTES_MAX {
            Some(JsonError::TooLong)
        } else if self.tokens.len() + 1 > MESSAGE_TOKENS_MAX {
            Some(JsonError::TooManyTokens)
        } else if self.braces + self.brackets > NESTING_MAX as i64 {
            Some(JsonError::TooDeep)
        } else {
            None
        };
        if let Some(error) = refusal {
            return Some(self.emit(Err(error)));
        }
        self.tokens.push(kind, text);
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        Some(self.complete())
    }

    fn complete(&mut self) -> Result<Value, JsonError> {
        let parsed = parse::parse(&self.tokens).map_err(JsonError::Grammar);
        self.emit(parsed)
    }

    fn emit(&mut self, outcome: Result<Value, JsonError>) -> Result<Value, JsonError> {
        self.tokens.clear();
        self.braces = 0;
        self.brackets = 0;
        outcome
    }
}

/// Parses text that must hold at most one value (an option argument). `None` for blank text.
pub fn parse_one(text: &str) -> Result<Option<Value>, JsonError> {
    let mut stream = MessageStream::new();
    let mut input = text.as_bytes();
    let mut first = None;
    loop {
        let outcome = match stream.next(&mut input) {
            Some(outcome) => outcome,
            None => match stream.finish() {
                Some(outcome) => outcome,
                None => return Ok(first),
            },
        };
        if first.is_some() {
            return Err(JsonError::Several);
        }
        first = Some(outcome?);
    }
}

/// Text up to the first NUL, with what is not Unicode replaced: what a C client is shown.
fn c_text(bytes: &[u8]) -> String {
    let shown = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(shown).into_owned()
}
