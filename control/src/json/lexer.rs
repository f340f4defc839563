//! Byte-at-a-time lexer of the monitor's JSON dialect.
//!
//! Owns: the state between two bytes and the text of the token being read. Promises: one byte is
//! looked at most twice; after an error it skips to the next structural or control character.
//! Does not: interpret escapes or numbers, that is [`super::parse`]'s.

/// What a token is; its text is kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    String,
    Integer,
    Float,
    Keyword,
}

/// What one byte led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A token ended; its text is in [`Lexer::text`].
    Token(TokenKind),
    /// The bytes in [`Lexer::text`] are no token.
    Stray,
}

/// ```text
/// Start --quote--> String <--> Escape      Start --other--> Recovery --structural--> Start
/// Start --'-'--> Sign --> Zero | Digits --'.'--> Mantissa --> MantissaDigits
///                           any of them --'e'--> Exponent --> ExponentSign --> ExponentDigits
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Recovery,
    String(u8),
    Escape(u8),
    Sign,
    Zero,
    Digits,
    Mantissa,
    MantissaDigits,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// Where one byte takes the lexer.
enum Step {
    /// The byte belongs to the token; go on in this state.
    Shift(State),
    /// The byte belongs to the token and ends it.
    Accept(TokenKind),
    /// The token ended before this byte, which is looked at again.
    AcceptBefore(TokenKind),
    /// White space or garbage; the byte is dropped.
    Skip,
    /// Leave recovery and look at the byte again.
    Resume,
    /// The byte cannot be here.
    Stray,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    text: Vec<u8>,
}

impl Lexer {
    pub(super) fn new() -> Self {
        Self { state: State::Start, text: Vec::new() }
    }

    /// Text of the token or of the stray bytes that the last event named.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Bytes of the token being read.
    pub(super) fn pending_bytes(&self) -> usize {
        self.text.len()
    }

    /// Drops the token being read and skips to the next structural character.
    pub(super) fn recover(&mut self) {
        self.text.clear();
        self.state = State::Recovery;
    }

    /// Looks at `byte`. `consumed` is false when the same byte must be given again.
    pub(super) fn feed(&mut self, byte: u8) -> (Option<Event>, bool) {
        if matches!(self.state, State::Start) {
            self.text.clear();
        }
        match step(self.state, byte) {
            Step::Shift(state) => {
                self.text.push(byte);
                self.state = state;
                (None, true)
            }
            Step::Accept(kind) => {
                self.text.push(byte);
                self.state = State::Start;
                (Some(Event::Token(kind)), true)
            }
            Step::AcceptBefore(kind) => {
                self.state = State::Start;
                (Some(Event::Token(kind)), false)
            }
            Step::Skip => (None, true),
            Step::Resume => {
                self.state = State::Start;
                (None, false)
            }
            Step::Stray => {
                self.text.push(byte);
                self.state = State::Recovery;
                (Some(Event::Stray), true)
            }
        }
    }

    /// Ends the input: a number or keyword being read ends here, an open string is stray.
    pub(super) fn finish(&mut self) -> Option<Event> {
        let state = std::mem::replace(&mut self.state, State::Start);
        match state {
            State::Start | State::Recovery => None,
            other => match step(other, b' ') {
                Step::AcceptBefore(kind) => Some(Event::Token(kind)),
                _ => Some(Event::Stray),
            },
        }
    }
}

fn step(state: State, byte: u8) -> Step {
    match state {
        State::Start => start(byte),
        State::Recovery => match byte {
            0..=0x1f | 0xfe | 0xff => Step::Resume,
            b'{' | b'}' | b'[' | b']' | b':' | b',' => Step::Resume,
            _ => Step::Skip,
        },
        State::String(quote) => match byte {
            0..=0x1f | 0xfe | 0xff => Step::Stray,
            b'\\' => Step::Shift(State::Escape(quote)),
            _ if byte == quote => Step::Accept(TokenKind::String),
            _ => Step::Shift(State::String(quote)),
        },
        State::Escape(quote) => match byte {
            0..=0x1f | 0xfe | 0xff => Step::Stray,
            _ => Step::Shift(State::String(quote)),
        },
        State::Keyword => match byte {
            b'a'..=b'z' => Step::Shift(State::Keyword),
            _ => Step::AcceptBefore(TokenKind::Keyword),
        },
        _ => number(state, byte),
    }
}

fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip,
        b'{' => Step::Accept(TokenKind::OpenBrace),
        b'}' => Step::Accept(TokenKind::CloseBrace),
        b'[' => Step::Accept(TokenKind::OpenBracket),
        b']' => Step::Accept(TokenKind::CloseBracket),
        b':' => Step::Accept(TokenKind::Colon),
        b',' => Step::Accept(TokenKind::Comma),
        b'"' | b'\'' => Step::Shift(State::String(byte)),
        b'-' => Step::Shift(State::Sign),
        b'0' => Step::Shift(State::Zero),
        b'1'..=b'9' => Step::Shift(State::Digits),
        b'a'..=b'z' => Step::Shift(State::Keyword),
        _ => Step::Stray,
    }
}

fn number(state: State, byte: u8) -> Step {
    let digit = byte.is_ascii_digit();
    match (state, byte) {
        (State::Sign, b'0') => Step::Shift(State::Zero),
        (State::Sign, b'1'..=b'9') => Step::Shift(State::Digits),
        (State::Digits, _) if digit => Step::Shift(State::Digits),
        (State::Zero, _) if digit => Step::Stray,
        (State::Zero | State::Digits, b'.') => Step::Shift(State::Mantissa),
        (State::Zero | State::Digits | State::MantissaDigits, b'e' | b'E') => {
            Step::Shift(State::Exponent)
        }
        (State::Zero | State::Digits, _) => Step::AcceptBefore(TokenKind::Integer),
        (State::Mantissa | State::MantissaDigits, _) if digit => Step::Shift(State::MantissaDigits),
        (State::Exponent, b'+' | b'-') => Step::Shift(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, _) if digit => {
            Step::Shift(State::ExponentDigits)
        }
        (State::MantissaDigits | State::ExponentDigits, _) => Step::AcceptBefore(TokenKind::Float),
        _ => Step::Stray,
    }
}
