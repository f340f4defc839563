//! Data of options and of the replies to them.

use zerocopy::IntoBytes;

use super::chunk::prefix;
use super::codes::{BlockSize, InfoType, OptionCode, OptionReply, Transmission, magic};
use super::error::WireError;
use super::layout::{InfoBlockSize, InfoExport, OptionHeader, OptionReplyHeader};
use super::{PAYLOAD_MAX, STRING_MAX};

/// Data of INFO and GO: an export and the facts asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// Whether the name is asked for.
    pub wants_name: bool,
    /// Whether block sizes are asked for.
    pub wants_block_size: bool,
}

impl<'a> InfoQuery<'a> {
    /// Reads the data of an INFO or GO option.
    ///
    /// # Errors
    /// If lengths contradict each other, the name is too long, or bytes are left over.
    pub fn decode(data: &'a [u8]) -> Result<Self, WireError> {
        let mut rest = Cursor(data);
        let mut query = Self { name: rest.name()?, wants_name: false, wants_block_size: false };
        for _ in 0..rest.u16()? {
            let info = rest.u16()?;
            query.wants_name |= info == InfoType::Name as u16;
            query.wants_block_size |= info == InfoType::BlockSize as u16;
        }
        if rest.0.is_empty() { Ok(query) } else { Err(WireError::Trailing) }
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT: an export and context queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// How many queries there are.
    pub count: u32,
    queries: &'a [u8],
}

impl<'a> MetaQuery<'a> {
    /// Reads the data of a meta context option. Bytes after the last query are ignored.
    ///
    /// # Errors
    /// If lengths contradict each other or the export's name is too long.
    pub fn decode(data: &'a [u8]) -> Result<Self, WireError> {
        let mut rest = Cursor(data);
        let name = rest.name()?;
        let count = rest.u32()?;
        let queries = rest.0;
        for _ in 0..count {
            rest.text()?;
        }
        Ok(Self { name, count, queries })
    }

    /// The queries in order; ones longer than [`STRING_MAX`] are left out.
    pub fn queries(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = Cursor(self.queries);
        // Decoding proved that there are this many.
        (0..self.count).map_while(move |_| rest.text().ok()).filter(|text| text.len() <= STRING_MAX)
    }
}

/// Encodes a whole option.
pub fn encode_option(option: OptionCode, data: &[u8]) -> Vec<u8> {
    let mut out = OptionHeader::new(option.number(), length(data)).as_bytes().to_vec();
    out.extend_from_slice(data);
    out
}

/// Encodes the data of INFO and GO.
pub fn encode_info_query(name: &[u8], infos: &[InfoType]) -> Vec<u8> {
    let mut out = Vec::new();
    put_text(&mut out, name);
    let count = u16::try_from(infos.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&count.to_be_bytes());
    for info in infos.iter().take(usize::from(count)) {
        out.extend_from_slice(&(*info as u16).to_be_bytes());
    }
    out
}

/// Encodes the data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn encode_meta_query(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    put_text(&mut out, name);
    out.extend_from_slice(&u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes());
    for query in queries {
        put_text(&mut out, query);
    }
    out
}

/// Reads a reply of type `MetaContext`: id and name.
///
/// # Errors
/// If it is too short or its name is not UTF-8.
pub fn decode_meta_context(data: &[u8]) -> Result<(u32, &str), WireError> {
    let mut rest = Cursor(data);
    let id = rest.u32()?;
    Ok((id, str::from_utf8(rest.0).map_err(|_| WireError::NotText)?))
}

/// Reads a reply of type `Server`: name and description.
///
/// # Errors
/// If lengths contradict each other.
pub fn decode_server_entry(data: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let mut rest = Cursor(data);
    let name = rest.name()?;
    Ok((name, rest.0))
}

/// Collects the replies to one option.
#[derive(Debug)]
pub struct OptionReplyWriter {
    option: OptionCode,
    bytes: Vec<u8>,
}

impl OptionReplyWriter {
    /// No replies yet.
    pub fn new(option: OptionCode) -> Self {
        Self { option, bytes: Vec::new() }
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Success.
    pub fn ack(&mut self) {
        self.put(OptionReply::Ack, &[]);
    }

    /// A failure with a message for people.
    pub fn error(&mut self, reply: OptionReply, message: &str) {
        self.put(reply, prefix(message, STRING_MAX).as_bytes());
    }

    /// One export of a list.
    pub fn server(&mut self, name: &str, description: &str) {
        let mut data = Vec::with_capacity(4 + name.len() + description.len());
        put_text(&mut data, name.as_bytes());
        data.extend_from_slice(description.as_bytes());
        self.put(OptionReply::Server, &data);
    }

    /// A fact that is a text.
    pub fn info_text(&mut self, info: InfoType, text: &[u8]) {
        let mut data = (info as u16).to_be_bytes().to_vec();
        data.extend_from_slice(text);
        self.put(OptionReply::Info, &data);
    }

    /// The fact of block sizes.
    pub fn info_block_size(&mut self, sizes: BlockSize) {
        let data = InfoBlockSize {
            info: (InfoType::BlockSize as u16).into(),
            minimum: sizes.minimum.into(),
            preferred: sizes.preferred.into(),
            maximum: sizes.maximum.into(),
        };
        self.put(OptionReply::Info, data.as_bytes());
    }

    /// The fact of size and flags.
    pub fn info_export(&mut self, size: u64, flags: Transmission) {
        let data = InfoExport {
            info: (InfoType::Export as u16).into(),
            size: size.into(),
            flags: flags.0.into(),
        };
        self.put(OptionReply::Info, data.as_bytes());
    }

    /// A metadata context.
    pub fn meta_context(&mut self, id: u32, name: &str) {
        let mut data = id.to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        self.put(OptionReply::MetaContext, &data);
    }

    fn put(&mut self, reply: OptionReply, data: &[u8]) {
        let header = OptionReplyHeader {
            magic: magic::OPTION_REPLY.into(),
            option: self.option.number().into(),
            reply: (reply as u32).into(),
            length: length(data).into(),
        };
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
    }
}

/// Reads big-endian parts off the front of bytes.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(WireError::Inconsistent)?;
        self.0 = tail;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        let bytes = self.bytes(2)?;
        bytes.try_into().map(u16::from_be_bytes).map_err(|_| WireError::Inconsistent)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        let bytes = self.bytes(4)?;
        bytes.try_into().map(u32::from_be_bytes).map_err(|_| WireError::Inconsistent)
    }

    /// A length and that many bytes.
    fn text(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).map_err(|_| WireError::Inconsistent)?)
    }

    /// As `text`, of at most [`STRING_MAX`] bytes.
    fn name(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.u32()?;
        match usize::try_from(len) {
            Ok(bytes) if bytes <= STRING_MAX => self.bytes(bytes),
            _ => Err(WireError::NameTooLong(len)),
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&length(text).to_be_bytes());
    out.extend_from_slice(text);
}

/// The length of something that our side made, which is always far below the limit.
fn length(data: &[u8]) -> u32 {
    debug_assert!(data.len() <= PAYLOAD_MAX as usize, "invariant: our own data is short");
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}
