//! Several hundred ways to damage a specimen, each with a name.

use super::specimen::{COPIED, PLAIN, SHAPES, Shape, Specimen};

/// A damaged image.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    pub(crate) name: String,
    pub(crate) specimen: Specimen,
}

const EXTENDED: Shape = Shape { extended: true, cluster_bits: 14, ..PLAIN };
const ALL: Shape =
    Shape { cluster_bits: 16, compressed: true, snapshot: true, bitmap: true, ..PLAIN };

/// The fields of the header: name, offset, bytes.
const FIELDS: [(&str, u64, usize); 19] = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing-offset", 8, 8),
    ("backing-size", 16, 4),
    ("cluster-bits", 20, 4),
    ("size", 24, 8),
    ("crypt-method", 32, 4),
    ("l1-size", 36, 4),
    ("l1-offset", 40, 8),
    ("reftable-offset", 48, 8),
    ("reftable-clusters", 56, 4),
    ("snapshots", 60, 4),
    ("snapshots-offset", 64, 8),
    ("incompatible", 72, 8),
    ("compatible", 80, 8),
    ("autoclear", 88, 8),
    ("refcount-order", 96, 4),
    ("header-length", 100, 4),
    ("compression-type", 104, 1),
];

/// All variants, always the same in the same order.
pub(crate) fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    header_fields(&mut all);
    entries(&mut all);
    counts(&mut all);
    lists(&mut all);
    extensions(&mut all);
    subclusters(&mut all);
    lengths(&mut all);
    all
}

fn push(all: &mut Vec<Variant>, name: String, shape: Shape, change: impl FnOnce(&mut Specimen)) {
    let mut specimen = Specimen::new(shape);
    change(&mut specimen);
    all.push(Variant { name, specimen });
}

fn header_fields(all: &mut Vec<Variant>) {
    let end = Specimen::new(PLAIN).bytes.len() as u64;
    let values = [
        0,
        1,
        2,
        7,
        0x1f,
        0x200,
        0x1000,
        0x1008,
        end,
        1 << 40,
        0x7fff_ffff_ffff_f000,
        u64::MAX,
        1 << 63,
    ];
    for (name, at, width) in FIELDS {
        let mut seen = Vec::new();
        for value in values {
            let cut = value & (u64::MAX >> (64 - 8 * width));
            if !seen.contains(&cut) {
                seen.push(cut);
                push(all, format!("header-{name}-{cut:#x}"), PLAIN, |new| new.set(at, width, cut));
            }
        }
    }
    for bits in 8..23 {
        push(all, format!("cluster-bits-{bits}"), PLAIN, |new| new.set(20, 4, bits));
    }
    for bits in [32, 33, 63, 64, 65, 0x8000_0009] {
        push(all, format!("cluster-bits-{bits}"), PLAIN, |new| new.set(20, 4, bits));
        push(all, format!("refcount-order-{bits}"), PLAIN, |new| new.set(96, 4, bits));
    }
    push(all, "a-huge-disk-in-a-small-file".into(), PLAIN, |new| {
        new.set(24, 8, 1 << 52);
        new.set(36, 4, 4 << 20);
    });
    push(all, "a-huge-refcount-table-in-a-small-file".into(), PLAIN, |new| new.set(56, 4, 2048));
    push(all, "tables-in-the-same-place".into(), PLAIN, |new| new.set(40, 8, new.places.reftable));
    push(all, "backing-name-is-nonsense".into(), PLAIN, |new| {
        new.set(8, 8, 300);
        new.set(16, 4, 4);
        new.set(300, 4, 0xffc0_8001);
    });
}

/// Bad values of an entry that was `own`.
fn bad_entries(base: &Specimen, own: u64) -> Vec<(String, u64)> {
    let places = &base.places;
    let end = base.bytes.len() as u64;
    let mut bad = Vec::new();
    for (name, host) in [
        ("header", 0),
        ("reftable", places.reftable),
        ("block", places.block),
        ("l1", places.l1),
        ("l2", places.l2[1]),
        ("data", places.data[4]),
        ("end", end),
        ("behind-the-end", end + base.cluster()),
        ("far", 1 << 40),
        ("top", 0x00ff_ffff_ffff_fe00 & !(base.cluster() - 1)),
    ] {
        bad.push((format!("at-{name}"), host | COPIED));
        bad.push((format!("at-{name}-shared"), host));
    }
    for (name, value) in [
        ("unaligned", own | 0x200),
        ("unaligned-zero", own | 0x201),
        ("reserved-low", own | 0x10),
        ("reserved-high", own | 1 << 57),
        ("without-copied", own & !COPIED),
        ("all-ones", u64::MAX),
        ("all-ones-below", u64::MAX >> 2),
        ("compressed-at-header", 1 << 62),
        ("compressed-copied", 3 << 62 | own & !COPIED),
        ("compressed-far", 1 << 62 | 1 << 45),
        ("compressed-long", (1 << 62) | (own & !COPIED) | (0xff << 54)),
    ] {
        bad.push((name.to_owned(), value));
    }
    bad
}

fn entries(all: &mut Vec<Variant>) {
    for (kind, shape) in [("plain", PLAIN), ("extended", EXTENDED), ("all", ALL)] {
        let base = Specimen::new(shape);
        let places = &base.places;
        let mut targets = vec![
            ("l1-0", places.l1),
            ("l1-1", places.l1 + 8),
            ("l2-data", base.entry(0, 0)),
            ("l2-kept", base.entry(0, 5)),
            ("l2-other", base.entry(1, 1)),
        ];
        if kind == "plain" {
            targets.extend([("reftable-0", places.reftable), ("reftable-1", places.reftable + 8)]);
        }
        if kind == "all" {
            targets = vec![
                ("l1-0", places.l1),
                ("l2-packed", base.entry(0, 6)),
                ("snapshot-l1-0", places.snapshot_l1),
                ("snapshot-place", places.snapshots),
                ("bitmap-table-0", places.bitmap_table),
                ("bitmap-place", places.directory),
            ];
        }
        for (target, at) in targets {
            for (bad, value) in bad_entries(&base, base.get(at, 8)) {
                push(all, format!("{kind}-{target}-{bad}"), shape, |new| new.set(at, 8, value));
            }
        }
    }
    push(all, "both-l1-entries-at-one-table".into(), PLAIN, |new| {
        new.set(new.places.l1 + 8, 8, new.places.l2[0] | COPIED);
    });
    push(all, "every-entry-at-one-cluster".into(), PLAIN, |new| {
        let host = new.places.data[0] | COPIED;
        (0..512).for_each(|index| new.set(new.places.l2[0] + index * 8, 8, host));
    });
}

fn counts(all: &mut Vec<Variant>) {
    for (kind, shape) in SHAPES {
        let places = Specimen::new(shape).places;
        let end = Specimen::new(shape).bytes.len() as u64;
        for (name, host) in [
            ("header", 0),
            ("reftable", places.reftable),
            ("block", places.block),
            ("l1", places.l1),
            ("l2", places.l2[1]),
            ("data", places.data[4]),
            ("nothing", end - (1 << shape.cluster_bits)),
        ] {
            for count in [0, 1, 2, 0xffff] {
                if shape.refcount_order > 0 || count < 2 {
                    let name = format!("{kind}-count-of-{name}-{count}");
                    push(all, name, shape, |new| new.set_count(host, count));
                }
            }
        }
        push(all, format!("{kind}-no-counts"), shape, |new| {
            (0..16).for_each(|cluster| new.set_count(cluster * new.cluster(), 0));
        });
        push(all, format!("{kind}-dirty-without-counts"), shape, |new| {
            if shape.version >= 3 {
                new.set(72, 8, new.get(72, 8) | 1);
            }
            (5..16).for_each(|cluster| new.set_count(cluster * new.cluster(), 0));
        });
    }
}

fn lists(all: &mut Vec<Variant>) {
    let base = Specimen::new(ALL);
    let (at, directory) = (base.places.snapshots, base.places.directory);
    for (name, at, width) in [
        ("snapshot-l1-size", at + 8, 4),
        ("snapshot-id-size", at + 12, 2),
        ("snapshot-name-size", at + 14, 2),
        ("snapshot-extra-size", at + 36, 4),
        ("bitmap-entries", directory + 8, 4),
        ("bitmap-flags", directory + 12, 4),
        ("bitmap-type", directory + 16, 1),
        ("bitmap-granularity", directory + 17, 1),
        ("bitmap-name-size", directory + 18, 2),
        ("bitmap-extra-size", directory + 20, 4),
        ("bitmap-count", base.places.extension, 4),
        ("bitmap-directory-size", base.places.extension + 8, 8),
        ("bitmap-directory-offset", base.places.extension + 16, 8),
    ] {
        for value in [0, 1, 3, 0x7f, 0x200, 0xffff, 0x0fff_ffff, u64::MAX] {
            let cut = value & (u64::MAX >> (64 - 8 * width));
            push(all, format!("{name}-{cut:#x}"), ALL, |new| new.set(at, width, cut));
        }
    }
    for count in [2, 100, 65_536, 65_537, u32::MAX.into()] {
        push(all, format!("snapshot-count-{count}"), ALL, |new| new.set(60, 4, count));
    }
}

fn extensions(all: &mut Vec<Variant>) {
    for (name, kind) in [
        ("backing-format", 0xe279_2aca),
        ("feature-names", 0x6803_f857),
        ("bitmaps", 0x2385_2875),
        ("encryption", 0x0537_be77),
        ("data-file", 0x4441_5441),
        ("unknown", 0x7777_7777),
    ] {
        for len in [0, 7, 8, 16, 24, 47, 48, 3972, 3976, 3977, 0x7fff_fff8, 0xffff_ffff_u64] {
            push(all, format!("extension-{name}-of-{len}"), PLAIN, |new| {
                new.set(112, 4, kind);
                new.set(116, 4, len);
                new.set(120, 8, u64::MAX / 3);
            });
        }
    }
}

fn subclusters(all: &mut Vec<Variant>) {
    for (name, index, bitmap) in [
        ("both-bits", 0, 0x0000_0001_ffff_ffff_u64),
        ("all-bits", 0, u64::MAX),
        ("no-bits", 0, 0),
        ("data-bits-of-nothing", 9, 1),
        ("all-bits-of-nothing", 9, u64::MAX),
        ("zero-bits-of-nothing", 9, 0xf0f0_0000_0000),
        ("mixed", 1, 0x5555_5555_aaaa_aaaa),
    ] {
        push(all, format!("extended-bitmap-{name}"), EXTENDED, |new| {
            new.set(new.entry(0, index) + 8, 8, bitmap);
        });
    }
}

fn lengths(all: &mut Vec<Variant>) {
    for (kind, shape) in [("plain", PLAIN), ("all", ALL)] {
        let whole = Specimen::new(shape).bytes.len();
        for len in [0, 1, 4, 71, 72, 103, 104, 111, 112, 511, 512, 4095, 4096] {
            push(all, format!("{kind}-cut-to-{len}"), shape, |new| new.bytes.truncate(len));
        }
        for parts in 1..16 {
            let len = whole * parts / 16;
            push(all, format!("{kind}-cut-to-{len}"), shape, |new| new.bytes.truncate(len));
        }
    }
}
