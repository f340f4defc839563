//! The option `overlap-check`: which metadata neither guest data nor other metadata may be written
//! into.
//!
//! `inactive-l2` (in no template but `all`) costs a read of every snapshot's L1 table when the
//! image is opened for writing and when the snapshots change; what is guarded then is kept in
//! memory, at most [`INACTIVE_L2_MAX`] tables.

use liveblk_engine::format::{FormatOptions, InfoValue};

use super::cache::IntMap;
use super::image::Image;
use super::layout::OFFSET_MASK;
use super::options::OptionFault;
use super::state::Meta;
use crate::limits::INACTIVE_L2_MAX;

/// Which kinds of metadata guest data may not be written into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap(u16);

/// The kinds by their names, each with the smallest template that has it (1 constant, 2 cached, 3
/// all).
const KINDS: [(&str, u8); 9] = [
    ("main-header", 1),
    ("active-l1", 2),
    ("active-l2", 2),
    ("refcount-table", 1),
    ("refcount-block", 2),
    ("snapshot-table", 1),
    ("inactive-l1", 2),
    ("inactive-l2", 3),
    ("bitmap-directory", 1),
];

impl Default for Overlap {
    fn default() -> Self {
        Self::template(2)
    }
}

impl Overlap {
    fn template(level: u8) -> Self {
        let bits = KINDS.iter().enumerate().filter(|(_, kind)| kind.1 <= level);
        Self(bits.fold(0, |all, (bit, _)| all | 1 << bit))
    }

    /// Whether L2 tables of snapshots are guarded.
    pub(super) const fn guards_inactive_l2(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    /// Whether `meta` is guarded.
    pub(super) const fn guards(self, meta: Meta) -> bool {
        let bits = match meta {
            Meta::Header => 1,
            Meta::L1 => 1 << 1,
            Meta::L2(_) => 1 << 2,
            Meta::RefTable => 1 << 3,
            Meta::RefBlock(_) => 1 << 4,
            // The table and the L1 tables that it names are not told apart.
            Meta::Snapshots => 1 << 5 | 1 << 6,
            Meta::Bitmaps => 1 << 8,
        };
        self.0 & bits != 0
    }
}

impl Image {
    /// Learns which L2 tables belong to snapshots, if these are guarded. What cannot be read is not
    /// guarded: it is told where it is used.
    pub(super) async fn guard_snapshots(&self) {
        if !self.options.borrow().overlap.guards_inactive_l2() {
            return;
        }
        let snapshots = self.state.borrow().snapshots.clone();
        let mut tables: IntMap<()> = IntMap::default();
        for snapshot in &snapshots {
            let Ok(l1) = self.snapshot_l1(snapshot).await else { continue };
            let hosts = l1.iter().map(|raw| raw & OFFSET_MASK).filter(|host| *host != 0);
            for host in hosts {
                if tables.len() >= INACTIVE_L2_MAX {
                    tracing::warn!(image = %self.filename.display(), "too many L2 tables to guard");
                    break;
                }
                tables.insert(self.geometry.host_cluster(host).0, ());
            }
        }
        self.state.borrow_mut().inactive_l2 = tables;
    }
}

/// Reads the option `overlap-check`, flat or with members.
///
/// # Errors
/// The peer's texts.
pub(super) fn overlap_check(options: &FormatOptions) -> Result<Overlap, OptionFault> {
    const NAME: &str = "overlap-check";
    let text = |key: &str| match options.get(key) {
        Some(InfoValue::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    let flat = text(NAME);
    let member = text("overlap-check.template");
    if let (Some(flat), Some(member)) = (flat, member)
        && flat != member
    {
        return Err(OptionFault::OverlapConflict(flat.to_owned(), member.to_owned()));
    }
    let mut overlap = match flat.or(member) {
        None | Some("cached") => Overlap::template(2),
        Some("none") => Overlap::template(0),
        Some("constant") => Overlap::template(1),
        Some("all") => Overlap::template(3),
        Some(other) => return Err(OptionFault::OverlapValue(other.to_owned())),
    };
    for (bit, (kind, _)) in KINDS.iter().enumerate() {
        match flag(options, &format!("{NAME}.{kind}"))? {
            Some(true) => overlap.0 |= 1 << bit,
            Some(false) => overlap.0 &= !(1 << bit),
            None => {}
        }
    }
    Ok(overlap)
}

/// A truth value, also as the peer's command line writes it.
fn flag(options: &FormatOptions, key: &str) -> Result<Option<bool>, OptionFault> {
    Ok(match options.get(key) {
        None => None,
        Some(InfoValue::Flag(value)) => Some(*value),
        Some(InfoValue::Text(text)) if text == "on" => Some(true),
        Some(InfoValue::Text(text)) if text == "off" => Some(false),
        Some(_) => return Err(OptionFault::OnOff(key.to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, InfoValue)]) -> FormatOptions {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
    }

    fn text(text: &str) -> InfoValue {
        InfoValue::Text(text.to_owned())
    }

    fn guarded(overlap: Overlap) -> Vec<usize> {
        let all = [
            Meta::Header,
            Meta::L1,
            Meta::L2(0),
            Meta::RefTable,
            Meta::RefBlock(0),
            Meta::Snapshots,
            Meta::Bitmaps,
        ];
        (0..all.len()).filter(|at| overlap.guards(all[*at])).collect()
    }

    #[test]
    fn templates_and_single_kinds_of_the_overlap_check_are_taken() {
        let parse = |pairs: &[_]| overlap_check(&options(pairs)).map(guarded);
        assert_eq!(parse(&[]), Ok((0..7).collect()));
        assert_eq!(parse(&[("overlap-check", text("none"))]), Ok(vec![]));
        assert_eq!(parse(&[("overlap-check", text("constant"))]), Ok(vec![0, 3, 5, 6]));
        assert_eq!(parse(&[("overlap-check.template", text("all"))]), Ok((0..7).collect()));
        let single = [
            ("overlap-check", text("none")),
            ("overlap-check.active-l1", InfoValue::Flag(true)),
            ("overlap-check.inactive-l2", text("on")),
        ];
        assert_eq!(parse(&single), Ok(vec![1]));
        assert_eq!(parse(&[("overlap-check.main-header", text("off"))]), Ok((1..7).collect()));
    }

    #[test]
    fn wrong_options_are_refused_in_the_peers_words() {
        let refused = |pairs: &[_]| overlap_check(&options(pairs)).expect_err("bad").to_string();
        assert_eq!(
            refused(&[("overlap-check", text("foo"))]),
            "Unsupported value 'foo' for qcow2 option 'overlap-check'. Allowed are any of the \
             following: none, constant, cached, all"
        );
        assert_eq!(
            refused(&[("overlap-check", text("all")), ("overlap-check.template", text("none"))]),
            "Conflicting values for qcow2 options 'overlap-check' ('all') and \
             'overlap-check.template' ('none')"
        );
        assert_eq!(
            refused(&[("overlap-check.inactive-l2", text("maybe"))]),
            "Parameter 'overlap-check.inactive-l2' expects 'on' or 'off'"
        );
    }
}
