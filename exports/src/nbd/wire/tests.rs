//! Round trips, and any bytes whatsoever.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

fn name() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..40)
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused_without_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = RequestHeader::decode(&bytes);
        let _ = OptionHeader::decode(&bytes);
        let _ = OptionReplyHeader::decode(&bytes);
        let _ = SimpleReplyHeader::decode(&bytes);
        let _ = ChunkHeader::decode(&bytes);
        let _ = InfoQuery::decode(&bytes);
        if let Ok(query) = MetaQuery::decode(&bytes) {
            prop_assert!(query.queries().count() <= bytes.len());
        }
        let _ = decode_meta_context(&bytes);
        let _ = decode_server_entry(&bytes);
        let _ = decode_status(&bytes).map(|(_, runs)| runs.count());
    }

    #[test]
    fn info_queries_survive_the_wire(name in name(), wants_name: bool, wants_sizes: bool) {
        let mut infos = Vec::new();
        infos.extend(wants_name.then_some(InfoType::Name));
        infos.extend(wants_sizes.then_some(InfoType::BlockSize));
        let data = encode_info_query(&name, &infos);
        let query = InfoQuery::decode(&data).unwrap();
        prop_assert_eq!(query.name, &name[..]);
        prop_assert_eq!((query.wants_name, query.wants_block_size), (wants_name, wants_sizes));
        // Every shorter form contradicts itself, a longer one has bytes left over.
        for len in 0..data.len() {
            prop_assert_eq!(InfoQuery::decode(&data[..len]), Err(WireError::Inconsistent));
        }
        let longer = [&data[..], b"x"].concat();
        prop_assert_eq!(InfoQuery::decode(&longer), Err(WireError::Trailing));
    }

    #[test]
    fn meta_queries_survive_the_wire(
        name in name(),
        queries in proptest::collection::vec(name(), 0..6),
    ) {
        let queries: Vec<&[u8]> = queries.iter().map(Vec::as_slice).collect();
        let data = encode_meta_query(&name, &queries);
        let query = MetaQuery::decode(&data).unwrap();
        prop_assert_eq!(query.name, &name[..]);
        prop_assert_eq!(query.queries().collect::<Vec<_>>(), queries);
        for len in 0..data.len() {
            prop_assert_eq!(MetaQuery::decode(&data[..len]), Err(WireError::Inconsistent));
        }
    }

    #[test]
    fn status_payloads_survive_the_wire(
        id: u32,
        runs in proptest::collection::vec((1_u32.., any::<u32>()), 1..20),
    ) {
        let mut payload = Vec::new();
        encode_status_context(&mut payload, id);
        for (length, flags) in &runs {
            encode_status(&mut payload, *length, *flags);
        }
        let (read_id, read) = decode_status(&payload).unwrap();
        prop_assert_eq!((read_id, read.collect::<Vec<_>>()), (id, runs));
        prop_assert!(decode_status(&payload[..payload.len() - 1]).is_err());
    }

    #[test]
    fn heads_of_replies_name_their_request_and_length(
        cookie: u64,
        offset: u64,
        length in 0_u32..1 << 25,
    ) {
        let head = ChunkHead::data(cookie, offset, length, true);
        let chunk = ChunkHeader::decode(head.as_bytes()).unwrap();
        prop_assert_eq!((chunk.cookie.get(), chunk.length.get()), (cookie, length + 8));
        prop_assert_eq!(head.as_bytes().len(), ChunkHeader::SIZE + 8);
        let head = ChunkHead::hole(cookie, offset, length, false);
        let chunk = ChunkHeader::decode(head.as_bytes()).unwrap();
        prop_assert_eq!((chunk.flags.get(), chunk.length.get()), (0, 12));
        prop_assert_eq!(&head.as_bytes()[28..], &length.to_be_bytes()[..]);
    }
}

#[test]
fn a_greeting_is_the_eighteen_bytes_of_the_specification() {
    let greeting = Greeting::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    assert_eq!(greeting.as_bytes(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn a_request_has_the_layout_of_the_specification() {
    let request = RequestHeader::new(1, 1, 0x0102, 0x1000, 512);
    let bytes = [
        0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0x10, 0, 0,
        0, 2, 0,
    ];
    assert_eq!(request.as_bytes(), bytes);
}

#[test]
fn claimed_lengths_beyond_the_limit_are_named_and_not_allocated() {
    let mut data = 5000_u32.to_be_bytes().to_vec();
    data.extend_from_slice(&[b'n'; 5000]);
    assert_eq!(InfoQuery::decode(&data), Err(WireError::NameTooLong(5000)));
    let data = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(MetaQuery::decode(&data), Err(WireError::Inconsistent));
}

#[test]
fn context_queries_longer_than_a_string_may_be_are_left_out() {
    let long = vec![b'n'; STRING_MAX + 1];
    let data = encode_meta_query(b"e", &[&long, b"base:allocation"]);
    let query = MetaQuery::decode(&data).unwrap();
    assert_eq!(query.queries().collect::<Vec<_>>(), [b"base:allocation"]);
}

#[test]
fn options_and_commands_keep_their_numbers() {
    for number in 0..20 {
        assert_eq!(OptionCode::from_number(number).number(), number);
    }
    for number in 0..20 {
        assert_eq!(Command::from_number(number).number(), number);
    }
    for errno in 0..200 {
        let code = ErrorCode::from_errno(errno);
        assert_eq!(ErrorCode::from_number(code as u32), code);
    }
    assert_eq!(ErrorCode::from_errno(30), ErrorCode::Perm);
    assert_eq!(ErrorCode::from_errno(122), ErrorCode::NoSpace);
    assert_eq!(ErrorCode::from_errno(110), ErrorCode::Inval);
}

#[test]
fn messages_are_cut_at_a_character() {
    let long = "ä".repeat(STRING_MAX);
    let payload = encode_error_payload(ErrorCode::Io, &long);
    assert_eq!(payload.len(), 6 + STRING_MAX);
    assert!(str::from_utf8(&payload[6..]).is_ok());
}
