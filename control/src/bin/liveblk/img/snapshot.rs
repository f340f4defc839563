//! `liveblk img snapshot`: snapshots inside an image.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use liveblk::Host;
use liveblk::engine::format::{SnapshotChoice, SnapshotInfo};
use serde_json::{Value, json};

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::keys;
use super::size;
use super::source::{self, Wanted};

/// List, take, apply or delete snapshots inside an image
#[derive(Args, Debug)]
#[group(id = "snapshot-verb", multiple = false, args = ["list", "create", "apply", "delete"])]
pub(crate) struct SnapshotOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    /// List them (what is done if nothing is said)
    #[arg(short, long)]
    list: bool,
    /// Take one
    #[arg(short, long, value_name = "NAME")]
    create: Option<String>,
    /// Make the disk what it was at this one (id or name)
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// Delete this one (id or name)
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
}

/// Does it.
pub(crate) async fn run(host: &Host, options: SnapshotOptions) -> Answer {
    let changes = options.create.is_some() || options.apply.is_some() || options.delete.is_some();
    if changes && options.force_share {
        return Err(Failure::new("--force-share (-U) is for listing only"));
    }
    let wanted = Wanted {
        format: options.format.as_deref(),
        by_options: options.image_opts,
        writable: changes,
        shared: options.force_share,
        alone: true,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    let snapshots = node.format().abilities().snapshots;
    if !changes {
        let list = snapshots.map(|held| held.list()).unwrap_or_default();
        if options.output.is_json() {
            println!("{:#}", list.iter().map(json).collect::<Value>());
        } else if !list.is_empty() {
            println!("{}", table(&list));
        }
        return Ok(0);
    }
    let unsupported = liveblk::ErrorKind::Unsupported;
    let change = |verb: &str, name: &str, cause: &dyn std::fmt::Display| {
        Failure::new(format!("Could not {verb} snapshot '{name}': {cause}"))
    };
    let mut made = None;
    if let Some(name) = &options.create {
        let Some(held) = snapshots else { return Err(change("create", name, &unsupported)) };
        let taken = held.create(now(name, node.size())).await;
        made = Some(taken.map_err(|error| change("create", name, &error))?);
    } else if let Some(name) = &options.apply {
        let Some(held) = snapshots else { return Err(change("apply", name, &unsupported)) };
        held.apply(name).await.map_err(|error| change("apply", name, &error))?;
    } else if let Some(name) = &options.delete {
        let Some(held) = snapshots else { return Err(change("delete", name, &unsupported)) };
        held.delete(name).await.map_err(|error| change("delete", name, &error))?;
    }
    host.graph().remove(&node).await?;
    if options.output.is_json() {
        println!("{:#}", made.as_ref().map_or(json!({}), json));
    }
    Ok(0)
}

/// A snapshot that is taken now.
fn now(name: &str, disk_size: u64) -> SnapshotInfo {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SnapshotInfo {
        name: name.to_owned(),
        date_sec: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        date_nsec: since.subsec_micros() * 1000,
        icount: Some(0),
        disk_size,
        ..SnapshotInfo::default()
    }
}

/// The snapshot that `-l` of `convert` names: an id or a name, or both in the long form
/// `snapshot.id=ID,snapshot.name=NAME`.
///
/// # Errors
/// Which parameter of the long form is unknown.
pub(crate) fn choice(text: &str) -> Result<SnapshotChoice, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotChoice::Text(text.to_owned()));
    }
    let (mut id, mut name) = (None, None);
    for part in keys::split(text) {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            found => {
                let key = found.map_or(part.as_str(), |(key, _)| key);
                return Err(Failure::new(format!(
                    "Invalid parameter '{key}'\nFailed in parsing snapshot param '{text}' (there \
                     are snapshot.id and snapshot.name)"
                )));
            }
        }
    }
    Ok(SnapshotChoice::Exact { id, name })
}

/// A snapshot in the peer's JSON shape.
pub(crate) fn json(snapshot: &SnapshotInfo) -> Value {
    let mut row = json!({
        "icount": snapshot.icount,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        "name": snapshot.name,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    });
    if snapshot.icount.is_none()
        && let Some(members) = row.as_object_mut()
    {
        members.remove("icount");
    }
    row
}

/// The list for people.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> String {
    let mut text = String::from("Snapshot list:\n");
    text.push_str(&format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    ));
    for snapshot in snapshots {
        let seconds = snapshot.vm_clock_nsec / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            snapshot.vm_clock_nsec / 1_000_000 % 1000
        );
        let count = snapshot.icount.map_or("--".to_owned(), |count| count.to_string());
        text.push_str(&format!(
            "\n{:<7} {:<16} {:>8} {:>19} {clock:>15} {count:>10}",
            snapshot.id,
            snapshot.name,
            size::shown(snapshot.vm_state_size),
            date(snapshot.date_sec),
        ));
    }
    text
}

/// A time in UTC, as `YYYY-MM-DD hh:mm:ss`.
fn date(seconds: u32) -> String {
    let (days, rest) = (i64::from(seconds / 86_400), seconds % 86_400);
    // Days since 1 March of year 0 in eras of 400 years: leap days come last in each.
    let days = days + 719_468;
    let era_day = days % 146_097;
    let year_of_era = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let year_day = era_day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * year_day + 2) / 153;
    let day = year_day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + days / 146_097 * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_chosen_by_one_text_or_by_id_and_name() {
        let text = |text: &str| Some(text.to_owned());
        let all = [
            ("s1", SnapshotChoice::Text("s1".to_owned())),
            ("", SnapshotChoice::Text(String::new())),
            ("snapshot.id=1", SnapshotChoice::Exact { id: text("1"), name: None }),
            (
                "snapshot.id=1,snapshot.name=a,,b",
                SnapshotChoice::Exact { id: text("1"), name: text("a,b") },
            ),
        ];
        for (given, wanted) in all {
            assert_eq!(choice(given), Ok(wanted), "{given}");
        }
        for (given, named) in [("snapshot.foo=7", "'snapshot.foo'"), ("snapshot.", "'snapshot.'")] {
            let text = choice(given).expect_err(given).text;
            assert!(text.starts_with(&format!("Invalid parameter {named}\n")), "{text}");
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let all = [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_324_571, "2026-11-22 05:16:11"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ];
        for (seconds, text) in all {
            assert_eq!(date(seconds), text);
        }
    }

    #[test]
    fn the_list_has_the_peers_columns() {
        let snapshot = SnapshotInfo {
            id: "1".into(),
            name: "s1".into(),
            date_sec: 1_795_324_571,
            icount: Some(0),
            ..SnapshotInfo::default()
        };
        let text = table(&[snapshot]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "Snapshot list:",
                "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT",
                "1       s1                    0 B 2026-11-22 05:16:11  0000:00:00.000          0",
            ]
        );
    }
}
