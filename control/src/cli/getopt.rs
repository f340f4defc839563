//! Splitting the command line into options, as GNU `getopt_long` does.
//!
//! Owns: the list of options, prefixes, `--opt=value`, clustered short options. Promises: items
//! come in order; an unambiguous prefix of an option of the peer is that option, options of ours
//! are spelled in full, so that no prefix changes its meaning.

use std::fmt;

/// An option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opt {
    /// `-h`.
    Help,
    /// `-V`.
    Version,
    /// `-T ARG`: accepted, has no effect.
    Trace,
    /// `--blockdev ARG`.
    Blockdev,
    /// `--chardev ARG`.
    Chardev,
    /// `--daemonize`.
    Daemonize,
    /// `--export ARG`.
    Export,
    /// `--monitor ARG`.
    Monitor,
    /// `--nbd-server ARG`.
    NbdServer,
    /// `--object ARG`.
    Object,
    /// `--pidfile ARG`.
    Pidfile,
    /// `--header-refs ARG`, ours.
    HeaderRefs,
    /// `--allow-dir ARG`, ours.
    AllowDir,
}

struct Long {
    name: &'static str,
    opt: Opt,
    takes_argument: bool,
}

const fn long(name: &'static str, opt: Opt, takes_argument: bool) -> Long {
    Long { name, opt, takes_argument }
}

/// Options that may be shortened.
static LONG: &[Long] = &[
    long("blockdev", Opt::Blockdev, true),
    long("chardev", Opt::Chardev, true),
    long("daemonize", Opt::Daemonize, false),
    long("export", Opt::Export, true),
    long("help", Opt::Help, false),
    long("monitor", Opt::Monitor, true),
    long("nbd-server", Opt::NbdServer, true),
    long("object", Opt::Object, true),
    long("pidfile", Opt::Pidfile, true),
    long("trace", Opt::Trace, true),
    long("version", Opt::Version, false),
];

/// Options that may not.
static LONG_OURS: &[Long] =
    &[long("allow-dir", Opt::AllowDir, true), long("header-refs", Opt::HeaderRefs, true)];

/// An option as it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Which one.
    pub opt: Opt,
    /// Its argument, empty if it takes none.
    pub argument: String,
    /// The words as typed, for error texts.
    pub text: String,
}

/// One item of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// An option.
    Option(Given),
    /// A word that is no option.
    Word(String),
}

/// Why the command line cannot be split; displays without the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GetoptError {
    /// No such long option.
    Unrecognized(String),
    /// No such short option.
    Invalid(char),
    /// A prefix of several options.
    Ambiguous(String),
    /// A long option without its argument.
    NeedsArgument(&'static str),
    /// A short option without its argument.
    ShortNeedsArgument(char),
    /// `=value` after an option that takes none.
    TakesNoArgument(&'static str),
}

impl fmt::Display for GetoptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unrecognized(text) => write!(f, "unrecognized option '--{text}'"),
            Self::Invalid(letter) => write!(f, "invalid option -- '{letter}'"),
            Self::Ambiguous(text) => write!(f, "option '--{text}' is ambiguous"),
            Self::NeedsArgument(name) => write!(f, "option '--{name}' requires an argument"),
            Self::ShortNeedsArgument(c) => write!(f, "option requires an argument -- '{c}'"),
            Self::TakesNoArgument(name) => write!(f, "option '--{name}' doesn't allow an argument"),
        }
    }
}

/// Iterates over the items of a command line (without the program's name).
#[derive(Debug)]
pub struct Scanner<'a> {
    words: &'a [String],
    next: usize,
    /// Letters of a cluster of short options that are not handed out yet.
    cluster: Option<&'a str>,
}

impl<'a> Scanner<'a> {
    /// A scanner at the first word.
    pub fn new(words: &'a [String]) -> Self {
        Self { words, next: 0, cluster: None }
    }

    fn word(&mut self) -> Option<&'a str> {
        let word = self.words.get(self.next)?;
        self.next += 1;
        Some(word)
    }

    fn long(&mut self, word: &'a str) -> Result<Item, GetoptError> {
        let body = word.strip_prefix("--").unwrap_or(word);
        let (name, inline) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (body, None),
        };
        let option = find(name)?;
        if !option.takes_argument {
            if inline.is_some() {
                return Err(GetoptError::TakesNoArgument(option.name));
            }
            return Ok(given(option.opt, "", word.to_owned()));
        }
        match inline {
            Some(value) => Ok(given(option.opt, value, word.to_owned())),
            None => {
                let value = self.word().ok_or(GetoptError::NeedsArgument(option.name))?;
                Ok(given(option.opt, value, format!("{word} {value}")))
            }
        }
    }

    fn short(&mut self, letters: &'a str) -> Result<Item, GetoptError> {
        let mut rest = letters.chars();
        let letter = rest.next().unwrap_or('-');
        let rest = rest.as_str();
        self.cluster = (!rest.is_empty()).then_some(rest);
        match letter {
            'h' => Ok(given(Opt::Help, "", "-h".to_owned())),
            'V' => Ok(given(Opt::Version, "", "-V".to_owned())),
            'T' => match self.cluster.take() {
                Some(value) => Ok(given(Opt::Trace, value, format!("-T{value}"))),
                None => {
                    let value = self.word().ok_or(GetoptError::ShortNeedsArgument('T'))?;
                    Ok(given(Opt::Trace, value, format!("-T {value}")))
                }
            },
            _ => Err(GetoptError::Invalid(letter)),
        }
    }
}

impl Iterator for Scanner<'_> {
    type Item = Result<Item, GetoptError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(letters) = self.cluster.take() {
            return Some(self.short(letters));
        }
        let word = self.word()?;
        if word == "--" {
            // What follows is ignored, as by the peer.
            self.next = self.words.len();
            return None;
        }
        if word.starts_with("--") {
            return Some(self.long(word));
        }
        match word.strip_prefix('-') {
            Some(letters) if !letters.is_empty() => Some(self.short(letters)),
            _ => Some(Ok(Item::Word(word.to_owned()))),
        }
    }
}

fn given(opt: Opt, argument: &str, text: String) -> Item {
    Item::Option(Given { opt, argument: argument.to_owned(), text })
}

fn find(name: &str) -> Result<&'static Long, GetoptError> {
    let unrecognized = || GetoptError::Unrecognized(name.to_owned());
    if let Some(exact) = LONG.iter().chain(LONG_OURS).find(|long| long.name == name) {
        return Ok(exact);
    }
    let mut candidates = LONG.iter().filter(|long| long.name.starts_with(name));
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(GetoptError::Ambiguous(name.to_owned())),
        _ => Err(unrecognized()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(words: &[&str]) -> Vec<Result<Item, String>> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Scanner::new(&words).map(|item| item.map_err(|error| error.to_string())).collect()
    }

    #[test]
    fn every_option_of_the_peer_may_be_shortened_to_one_letter() {
        for (short, opt) in [("--h", Opt::Help), ("--v", Opt::Version), ("--d", Opt::Daemonize)] {
            assert_eq!(scan(&[short]), vec![Ok(given(opt, "", short.to_owned()))]);
        }
        let want = vec![Ok(given(Opt::NbdServer, "x", "--n x".to_owned()))];
        assert_eq!(scan(&["--n", "x"]), want);
    }

    #[test]
    fn clusters_words_and_the_double_dash_are_split_as_getopt_does() {
        assert_eq!(
            scan(&["-hV", "word", "-Tx", "--export=a=b", "-", "--", "rest"]),
            vec![
                Ok(given(Opt::Help, "", "-h".to_owned())),
                Ok(given(Opt::Version, "", "-V".to_owned())),
                Ok(Item::Word("word".to_owned())),
                Ok(given(Opt::Trace, "x", "-Tx".to_owned())),
                Ok(given(Opt::Export, "a=b", "--export=a=b".to_owned())),
                Ok(Item::Word("-".to_owned())),
            ]
        );
    }
}
