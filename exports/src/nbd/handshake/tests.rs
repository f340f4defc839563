//! Every option with good and bad data; expected bytes are the peer's where it is measured.

use proptest::prelude::*;

use super::*;
use crate::nbd::wire::{OptionReplyHeader, encode_info_query, encode_meta_query};

const FLAGS: Transmission = Transmission(0xd6d & !0x80);

/// Nothing beyond `base:allocation`.
fn no_more() -> &'static ContextOffer {
    Box::leak(Box::default())
}

fn offers() -> Vec<Offer<'static>> {
    vec![
        Offer { name: "e", description: None, size: 1 << 20, flags: FLAGS, contexts: no_more() },
        Offer {
            name: "",
            description: Some("a disk"),
            size: 512,
            flags: FLAGS,
            contexts: no_more(),
        },
    ]
}

fn client() -> Negotiation {
    Negotiation::new(3).unwrap()
}

/// Replies as (type, data); the step must be an answer or a start.
fn replies(step: &Step) -> Vec<(u32, Vec<u8>)> {
    let (Step::Answer(bytes) | Step::Start(bytes, ..) | Step::End(bytes)) = step;
    let mut rest = &bytes[..];
    let mut replies = Vec::new();
    while !rest.is_empty() {
        let head = OptionReplyHeader::decode(rest).unwrap();
        let end = OptionReplyHeader::SIZE + head.length.get() as usize;
        replies.push((head.reply.get(), rest[OptionReplyHeader::SIZE..end].to_vec()));
        rest = &rest[end..];
    }
    replies
}

fn ask(client: &mut Negotiation, option: OptionCode, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    replies(&client.answer(&offers(), option, data))
}

fn error(replies: &[(u32, Vec<u8>)]) -> (u32, String) {
    assert_eq!(replies.len(), 1, "an error comes alone");
    (replies[0].0 & 0x7fff_ffff, String::from_utf8(replies[0].1.clone()).unwrap())
}

#[test]
fn go_answers_block_sizes_then_export_then_ack_and_starts() {
    let step = client().answer(&offers(), OptionCode::Go, &encode_info_query(b"e", &[]));
    let sizes = b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec();
    let export = b"\0\0\0\0\0\0\0\x10\0\0\x0d\x6d".to_vec();
    assert_eq!(replies(&step), [(3, sizes), (3, export), (1, Vec::new())]);
    let features = Features { structured: false, contexts: Vec::new() };
    assert!(matches!(step, Step::Start(_, 0, got) if got == features));
}

#[test]
fn name_is_sent_on_request_and_a_description_always() {
    let infos = [InfoType::Export, InfoType::Name, InfoType::Description];
    let got = ask(&mut client(), OptionCode::Info, &encode_info_query(b"", &infos));
    assert_eq!(got[0], (3, b"\0\x01".to_vec()));
    assert_eq!(got[1], (3, b"\0\x02a disk".to_vec()));
    let got = ask(&mut client(), OptionCode::Info, &encode_info_query(b"", &[]));
    assert_eq!(got[0], (3, b"\0\x02a disk".to_vec()));
    assert_eq!(got.last(), Some(&(1, Vec::new())));
}

#[test]
fn structured_replies_add_the_df_flag_and_can_be_asked_for_once() {
    let mut client = client();
    assert_eq!(ask(&mut client, OptionCode::StructuredReply, b""), [(1, Vec::new())]);
    assert_eq!(error(&ask(&mut client, OptionCode::StructuredReply, b"")).0, 3);
    let got = ask(&mut client, OptionCode::Info, &encode_info_query(b"e", &[]));
    assert_eq!(got[1].1[10..], [0x0d, 0xed]);
}

#[test]
fn malformed_names_and_lengths_are_refused_as_the_peer_does() {
    let cases: [(&str, Vec<u8>, u32, &str); 8] = [
        ("missing", encode_info_query(b"nope", &[]), 6, "export 'nope' not present"),
        ("5000", encode_info_query(&[b'n'; 5000], &[]), 3, "Invalid name length: 5000"),
        ("4097", encode_info_query(&[b'n'; 4097], &[]), 3, "Invalid name length: 4097"),
        ("short", vec![0, 0], 3, "Inconsistent lengths in option go"),
        ("claims more", b"\0\0\0\x64e".to_vec(), 3, "Inconsistent lengths in option go"),
        ("empty", Vec::new(), 3, "Inconsistent lengths in option go"),
        ("infos missing", b"\0\0\0\x01e\0\x09".to_vec(), 3, "Inconsistent lengths in option go"),
        (
            "trailing",
            [encode_info_query(b"e", &[]), b"zz".to_vec()].concat(),
            3,
            "option 'go' has unexpected length",
        ),
    ];
    for (case, data, code, message) in cases {
        let got = error(&ask(&mut client(), OptionCode::Go, &data));
        assert_eq!(got, (code, message.to_owned()), "{case}");
    }
    let got = error(&ask(&mut client(), OptionCode::Go, &encode_info_query(&[b'n'; 4096], &[])));
    assert_eq!(got, (6, format!("export '{}...' not present", "n".repeat(80))));
}

#[test]
fn list_names_all_exports_in_order() {
    let got = ask(&mut client(), OptionCode::List, b"");
    let expected = [(2, b"\0\0\0\x01e".to_vec()), (2, b"\0\0\0\0a disk".to_vec()), (1, Vec::new())];
    assert_eq!(got, expected);
    let got = error(&ask(&mut client(), OptionCode::List, b"x"));
    assert_eq!(got, (3, "option 'list' has unexpected length".to_owned()));
}

#[test]
fn what_is_not_supported_is_refused_and_the_handshake_goes_on() {
    let mut client = client();
    assert_eq!(error(&ask(&mut client, OptionCode::StartTls, b"")).0, 2);
    assert_eq!(error(&ask(&mut client, OptionCode::StartTls, b"x")).0, 3);
    assert_eq!(error(&ask(&mut client, OptionCode::ExtendedHeaders, b"")).0, 1);
    assert_eq!(error(&ask(&mut client, OptionCode::Unknown(99), b"abc")).0, 1);
    assert_eq!(replies(&client.answer_too_long(OptionCode::Go))[0].0, (1 << 31) | 9);
    assert_eq!(ask(&mut client, OptionCode::List, b"").len(), 3);
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let step = client().answer(&offers(), OptionCode::Abort, b"xyz");
    assert!(matches!(step, Step::End(_)));
    assert_eq!(replies(&step), [(1, Vec::new())]);
}

#[test]
fn export_name_starts_or_ends_and_pads_for_old_clients() {
    let step = client().answer(&offers(), OptionCode::ExportName, b"e");
    assert!(matches!(&step, Step::Start(bytes, 0, _) if bytes.len() == 10));
    for flags in [0, 1] {
        let mut old = Negotiation::new(flags).unwrap();
        let step = old.answer(&offers(), OptionCode::ExportName, b"e");
        assert!(matches!(&step, Step::Start(bytes, ..) if bytes.len() == 134));
    }
    for name in [&b"x"[..], &[b'n'; 5000]] {
        let step = client().answer(&offers(), OptionCode::ExportName, name);
        assert_eq!(step, Step::End(Vec::new()));
    }
    let mut old = Negotiation::new(0).unwrap();
    assert_eq!(old.answer(&offers(), OptionCode::List, b""), Step::End(Vec::new()));
    assert!(Negotiation::new(0xff).is_none(), "unknown client flags");
}

fn features_after(client: &mut Negotiation, name: &[u8]) -> Features {
    match client.answer(&offers(), OptionCode::Go, &encode_info_query(name, &[])) {
        Step::Start(.., features) => features,
        other => panic!("{other:?}"),
    }
}

#[test]
fn contexts_are_listed_by_wildcard_and_set_by_name() {
    let listed = [(4, b"\0\0\0\0base:allocation".to_vec()), (1, Vec::new())];
    let none = [(1, Vec::new())];
    let (list, set) = (OptionCode::ListMetaContext, OptionCode::SetMetaContext);
    let unknown: &[&[u8]] = &[b"foo:bar", b"qemu:", b"base:allo", b"nocolon", b""];
    let cases: [(OptionCode, &[&[u8]], bool); 8] = [
        (list, &[], true),
        (list, &[b"base:"], true),
        (list, &[b"base:allocation"], true),
        (list, unknown, false),
        (set, &[], false),
        (set, &[b"base:"], false),
        (set, &[b"base:allocation", b"base:allocation"], true),
        (set, unknown, false),
    ];
    for (option, queries, found) in cases {
        let mut client = client();
        ask(&mut client, OptionCode::StructuredReply, b"");
        let got = ask(&mut client, option, &encode_meta_query(b"e", queries));
        assert_eq!(got, if found { &listed[..] } else { &none[..] }, "{option:?} {queries:?}");
        assert_eq!(
            features_after(&mut client, b"e").contexts.is_empty(),
            !(found && option == set)
        );
    }
}

#[test]
fn a_context_holds_for_the_export_it_was_set_for_and_until_the_next_set() {
    let set = OptionCode::SetMetaContext;
    let query = encode_meta_query(b"e", &[b"base:allocation"]);
    let mut client = client();
    assert_eq!(error(&ask(&mut client, set, &query)).0, 3, "needs structured replies");
    ask(&mut client, OptionCode::StructuredReply, b"");
    ask(&mut client, set, &query);
    assert!(features_after(&mut client, b"").contexts.is_empty());
    assert_eq!(features_after(&mut client, b"e").contexts, [Context::Allocation]);
    assert_eq!(error(&ask(&mut client, set, &encode_meta_query(b"x", &[]))).0, 6);
    assert!(features_after(&mut client, b"e").contexts.is_empty());
}

#[test]
fn malformed_context_queries_are_refused() {
    let mut client = client();
    ask(&mut client, OptionCode::StructuredReply, b"");
    let whole = encode_meta_query(b"e", &[b"base:"]);
    for option in [OptionCode::ListMetaContext, OptionCode::SetMetaContext] {
        let got = error(&ask(&mut client, option, &whole[..whole.len() - 2]));
        assert_eq!(got, (3, format!("Inconsistent lengths in option {}", option.name())));
        let long = encode_meta_query(&[b'n'; 5000], &[]);
        assert_eq!(error(&ask(&mut client, option, &long)).1, "Invalid name length: 5000");
    }
}

proptest! {
    #[test]
    fn any_sequence_of_options_gets_well_formed_answers(
        flags in 0_u32..4,
        options in proptest::collection::vec(
            (0_u32..13, proptest::collection::vec(any::<u8>(), 0..60)), 0..8),
    ) {
        let mut client = Negotiation::new(flags).unwrap();
        for (number, data) in options {
            let option = OptionCode::from_number(number);
            let step = client.answer(&offers(), option, &data);
            if option != OptionCode::ExportName {
                let replies = replies(&step);
                let finals = replies.iter().filter(|(kind, _)| *kind == 1 || kind >> 31 == 1);
                prop_assert!(finals.count() <= 1);
            }
        }
    }
}
