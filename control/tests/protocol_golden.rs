//! Replies recorded from the peer, for malformed input, negotiation and arguments.
//!
//! Each line of the record is one connection: what was sent (bytes as Latin-1) and the lines that
//! came back. Only the package name differs. Cases that only show in which order the peer's hash
//! table holds members (of an `id` that is an object) are left out; ours keeps the client's order.

use liveblk_control::json::{Layout, MessageStream, encode};
use liveblk_control::qmp::{PACKAGE, Session, Step};
use serde_json::{Value, json};

fn answers(negotiated: bool, input: &[u8]) -> Vec<String> {
    let mut session = Session::new();
    if negotiated {
        session.receive(Ok(json!({"execute": "qmp_capabilities"})));
    }
    let mut stream = MessageStream::new();
    let mut rest = input;
    let mut answers = Vec::new();
    while let Some(message) = stream.next(&mut rest) {
        match session.receive(message) {
            Step::Reply(value) => answers.push(encode(&value, Layout::Compact)),
            Step::Execute(request) => answers.push(format!("executes {:?}", request.command)),
        }
    }
    answers
}

#[test]
fn replies_to_bad_input_equal_the_peers() {
    let record = include_str!("golden/protocol.jsonl");
    let mut differences = Vec::new();
    for line in record.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let input: Vec<u8> = case["input"].as_str().unwrap().chars().map(|c| c as u8).collect();
        let want: Vec<String> = case["output"]
            .as_array()
            .unwrap()
            .iter()
            .map(|line| line.as_str().unwrap().replace("PACKAGE", PACKAGE))
            .collect();
        let got = answers(case["negotiated"].as_bool().unwrap(), &input);
        if got != want {
            let shown = String::from_utf8_lossy(&input).into_owned();
            differences.push(format!("{shown}\n  want {want:#?}\n  got  {got:#?}"));
        }
    }
    assert!(record.lines().count() > 150, "the record is not empty");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn nesting_beyond_the_limit_is_refused_and_at_the_limit_accepted() {
    let mut stream = MessageStream::new();
    let deep = format!("{}{}", "[".repeat(1024), "]".repeat(1024));
    assert!(stream.next(&mut deep.as_bytes()).unwrap().is_ok());
    let deeper = "[".repeat(1025);
    let error = stream.next(&mut deeper.as_bytes()).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "JSON nesting depth limit exceeded");
    let next = b"{\"execute\":\"quit\"}";
    assert!(stream.next(&mut next.as_slice()).unwrap().is_ok());
}

#[test]
fn messages_beyond_the_size_limits_are_refused() {
    let mut stream = MessageStream::new();
    let long = format!("\"{}", "x".repeat(17 << 20));
    let error = stream.next(&mut long.as_bytes()).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "JSON token size limit exceeded");

    let mut stream = MessageStream::new();
    let many = format!("[{}", "1,".repeat(600_000));
    let error = stream.next(&mut many.as_bytes()).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "JSON token count limit exceeded");
}

#[test]
fn a_message_may_arrive_byte_by_byte() {
    let text = br#"{"execute": "query-version", "id": [1, -2.5e3, 'a\u00e9']} 17 "#;
    let mut stream = MessageStream::new();
    let mut messages = Vec::new();
    for byte in text {
        let piece = [*byte];
        let mut rest = piece.as_slice();
        while let Some(message) = stream.next(&mut rest) {
            messages.push(message.unwrap());
        }
    }
    assert_eq!(messages.len(), 2);
    assert_eq!(messages[0]["id"], json!([1, Value::Number("-2.5e3".parse().unwrap()), "aé"]));
}
