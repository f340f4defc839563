//! Errors of the command line, recorded from the peer.
//!
//! Each line of the record is one command line and what the peer wrote to standard error; the
//! program's name is normalised. Only what is found before anything is opened is recorded here.

use liveblk_control::cli::{Action, plan};
use serde_json::Value;

/// What our daemon would print: the first refusal in order.
fn refusal(words: &[String]) -> Option<String> {
    let plan = match plan("/usr/bin/PROGRAM", words) {
        Ok(plan) => plan,
        Err(early) if early.status == 0 => return None,
        Err(early) => return Some(early.error.trim_end().to_owned()),
    };
    for step in plan.actions() {
        match step.action {
            Ok(Action::Print(_)) => return None,
            Ok(_) => {}
            Err(error) => return Some(format!("PROGRAM: {}: {error}", step.text)),
        }
    }
    None
}

#[test]
fn refusals_equal_the_peers() {
    let record = include_str!("golden/command_line.jsonl");
    let mut differences = Vec::new();
    for line in record.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let words: Vec<String> = serde_json::from_value(case["words"].clone()).unwrap();
        let want = case["error"].as_str();
        let got = refusal(&words);
        if got.as_deref().map(str::trim_end) != want {
            differences.push(format!("{words:?}\n  want {want:?}\n  got  {got:?}"));
        }
    }
    assert!(record.lines().count() > 60, "the record is not empty");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn help_and_version_end_with_success_and_name_us_first() {
    for word in ["-h", "--help", "-V", "--version", "-Vh"] {
        let early = plan("liveblkd", &[word.to_owned()]).unwrap_err();
        assert_eq!(early.status, 0);
        assert!(early.output.contains("liveblkd"), "{word}");
    }
    let early = plan("liveblkd", &["-V".to_owned()]).unwrap_err();
    assert!(early.output.starts_with("liveblkd version "));
    assert!(early.output.contains("qemu-storage-daemon 10.0.2"));
}

#[test]
fn help_on_objects_and_chardevs_is_printed() {
    for words in [["--object", "help"], ["--object", "iothread,help"], ["--chardev", "help"]] {
        let words = words.map(str::to_owned);
        let plan = plan("liveblkd", &words).unwrap();
        assert!(matches!(plan.actions().next().unwrap().action, Ok(Action::Print(_))));
    }
}

#[test]
fn the_promised_bitmap_option_of_exports_is_accepted() {
    let words = ["--export".to_owned(), "nbd,id=a,node-name=x,bitmap=b".to_owned()];
    let plan = plan("liveblkd", &words).unwrap();
    assert!(matches!(plan.actions().next().unwrap().action, Ok(Action::Export(_))));
}
