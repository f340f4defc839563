//! What each option of the handshake is answered.
//!
//! A pure function of the exports on offer, what this client negotiated before, and the option's
//! bytes: no I/O and no clock. The connection feeds it and acts on the [`Step`].

use super::contexts::{Context, ContextOffer};
use super::wire::{
    BlockSize, InfoQuery, InfoType, MetaQuery, OptionCode, OptionReply, OptionReplyWriter,
    PAYLOAD_MAX, STRING_MAX, Transmission, WireError, handshake, prefix,
};

/// Bytes of a name that a message repeats.
const NAME_SHOWN: usize = 80;

/// What a client may pick.
pub(crate) struct Offer<'a> {
    pub(crate) name: &'a str,
    pub(crate) description: Option<&'a str>,
    pub(crate) size: u64,
    pub(crate) flags: Transmission,
    pub(crate) contexts: &'a ContextOffer,
}

/// What a client negotiated so far.
#[derive(Debug, Default)]
pub(crate) struct Negotiation {
    fixed_newstyle: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export whose contexts were selected, and these.
    selected: Option<(Vec<u8>, Vec<Context>)>,
}

/// What happens after an option.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send this, then read the next option.
    Answer(Vec<u8>),
    /// Send this, then serve the offer with this index.
    Start(Vec<u8>, usize, Features),
    /// Send this, then end the connection.
    End(Vec<u8>),
}

/// What the client and the server will use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) structured: bool,
    /// The metadata contexts of a block status.
    pub(crate) contexts: Vec<Context>,
}

impl Negotiation {
    /// Takes the client's flags; `None` if it cannot be served.
    pub(crate) fn new(client_flags: u32) -> Option<Self> {
        let fixed = u32::from(handshake::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake::NO_ZEROES);
        (client_flags & !(fixed | no_zeroes) == 0).then(|| Self {
            fixed_newstyle: client_flags & fixed != 0,
            no_zeroes: client_flags & no_zeroes != 0,
            ..Self::default()
        })
    }

    /// The answer to `option` with `data`.
    pub(crate) fn answer(&mut self, offers: &[Offer<'_>], option: OptionCode, data: &[u8]) -> Step {
        if !self.fixed_newstyle && option != OptionCode::ExportName {
            return Step::End(Vec::new());
        }
        let mut out = OptionReplyWriter::new(option);
        match option {
            OptionCode::ExportName => return self.export_name(offers, data),
            OptionCode::Abort => {
                out.ack();
                return Step::End(out.into_bytes());
            }
            OptionCode::Go | OptionCode::Info => return self.info(offers, option, data),
            OptionCode::List | OptionCode::StructuredReply | OptionCode::StartTls
                if !data.is_empty() =>
            {
                refuse(&mut out, option, WireError::Trailing);
            }
            OptionCode::List => {
                for offer in offers {
                    out.server(offer.name, offer.description.unwrap_or_default());
                }
                out.ack();
            }
            OptionCode::StructuredReply if self.structured => {
                let message = "structured replies were negotiated before";
                out.error(OptionReply::ErrInvalid, message);
            }
            OptionCode::StructuredReply => {
                self.structured = true;
                out.ack();
            }
            OptionCode::StartTls => out.error(OptionReply::ErrPolicy, "TLS is not configured"),
            OptionCode::ListMetaContext | OptionCode::SetMetaContext => {
                self.meta_context(offers, option, data, &mut out);
            }
            OptionCode::ExtendedHeaders | OptionCode::Unknown(_) => {
                let message = format!("Unsupported option {} ({})", option.number(), option.name());
                out.error(OptionReply::ErrUnsupported, &message);
            }
        }
        Step::Answer(out.into_bytes())
    }

    /// The answer to an option whose data is too long to be looked at.
    pub(crate) fn answer_too_long(&self, option: OptionCode) -> Step {
        if !self.fixed_newstyle || option == OptionCode::ExportName {
            return Step::End(Vec::new());
        }
        let mut out = OptionReplyWriter::new(option);
        out.error(OptionReply::ErrTooBig, "the option's data is too long");
        Step::Answer(out.into_bytes())
    }

    /// EXPORT_NAME has no error replies: what cannot be served ends the connection.
    fn export_name(&self, offers: &[Offer<'_>], data: &[u8]) -> Step {
        let found = (data.len() <= STRING_MAX).then(|| find(offers, data)).flatten();
        let Some((index, offer)) = found else { return Step::End(Vec::new()) };
        let mut reply = offer.size.to_be_bytes().to_vec();
        reply.extend_from_slice(&self.flags(offer).0.to_be_bytes());
        if !self.no_zeroes {
            reply.extend_from_slice(&[0; 124]);
        }
        Step::Start(reply, index, self.features(offer))
    }

    fn info(&self, offers: &[Offer<'_>], option: OptionCode, data: &[u8]) -> Step {
        let mut out = OptionReplyWriter::new(option);
        let query = match InfoQuery::decode(data) {
            Ok(query) => query,
            Err(error) => {
                refuse(&mut out, option, error);
                return Step::Answer(out.into_bytes());
            }
        };
        let Some((index, offer)) = find(offers, query.name) else {
            not_present(&mut out, query.name);
            return Step::Answer(out.into_bytes());
        };
        if query.wants_name {
            out.info_text(InfoType::Name, offer.name.as_bytes());
        }
        if let Some(description) = offer.description {
            out.info_text(InfoType::Description, description.as_bytes());
        }
        // Any alignment is served, so the minimum is 1 whether the client asked or not.
        out.info_block_size(BlockSize { minimum: 1, preferred: 4096, maximum: PAYLOAD_MAX });
        out.info_export(offer.size, self.flags(offer));
        out.ack();
        match option {
            OptionCode::Go => Step::Start(out.into_bytes(), index, self.features(offer)),
            _ => Step::Answer(out.into_bytes()),
        }
    }

    fn meta_context(
        &mut self,
        offers: &[Offer<'_>],
        option: OptionCode,
        data: &[u8],
        out: &mut OptionReplyWriter,
    ) {
        let set = option == OptionCode::SetMetaContext;
        if set {
            // Whatever comes of it, an earlier selection is over.
            self.selected = None;
            if !self.structured {
                let message = "metadata contexts need structured replies";
                return out.error(OptionReply::ErrInvalid, message);
            }
        }
        let query = match MetaQuery::decode(data) {
            Ok(query) => query,
            Err(error) => return refuse(out, option, error),
        };
        let Some((_, offer)) = find(offers, query.name) else {
            return not_present(out, query.name);
        };
        let queries: Vec<&[u8]> = query.queries().collect();
        let picked = offer.contexts.pick(!set, &queries);
        for context in &picked {
            out.meta_context(context.id(), &offer.contexts.name(*context));
        }
        self.selected = set.then(|| (query.name.to_vec(), picked));
        out.ack();
    }

    fn flags(&self, offer: &Offer<'_>) -> Transmission {
        if self.structured { offer.flags.with(Transmission::DF) } else { offer.flags }
    }

    fn features(&self, offer: &Offer<'_>) -> Features {
        let selected = self.selected.as_ref().filter(|_| self.structured);
        let own = selected.filter(|(name, _)| name == offer.name.as_bytes());
        let contexts = own.map(|(_, contexts)| contexts.clone()).unwrap_or_default();
        Features { structured: self.structured, contexts }
    }
}

fn find<'a, 'b>(offers: &'b [Offer<'a>], name: &[u8]) -> Option<(usize, &'b Offer<'a>)> {
    offers.iter().enumerate().find(|(_, offer)| offer.name.as_bytes() == name)
}

fn refuse(out: &mut OptionReplyWriter, option: OptionCode, error: WireError) {
    let message = match error {
        WireError::NameTooLong(_) => error.to_string(),
        WireError::Trailing => format!("option '{}' has unexpected length", option.name()),
        _ => format!("{error} in option {}", option.name()),
    };
    out.error(OptionReply::ErrInvalid, &message);
}

fn not_present(out: &mut OptionReplyWriter, name: &[u8]) {
    let name = String::from_utf8_lossy(name);
    let start = prefix(&name, NAME_SHOWN);
    let dots = if start.len() < name.len() { "..." } else { "" };
    let message = format!("export '{start}{dots}' not present");
    out.error(OptionReply::ErrUnknown, &message);
}

#[cfg(test)]
mod tests;
