//! Small images made byte by byte, with everything in known places, for damage to be done to.
//!
//! Written from the specification alone and independent of the product's code, so that a mistake
//! there cannot hide here. Every specimen has two L2 tables: the first is shared with a snapshot
//! (if there is one), the second is not.

/// What a specimen is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    pub(crate) extended: bool,
    pub(crate) compressed: bool,
    pub(crate) snapshot: bool,
    pub(crate) bitmap: bool,
}

/// Plain version 3 with clusters of 4 KiB.
pub(crate) const PLAIN: Shape = Shape {
    version: 3,
    cluster_bits: 12,
    refcount_order: 4,
    extended: false,
    compressed: false,
    snapshot: false,
    bitmap: false,
};

/// One of each kind.
pub(crate) const SHAPES: [(&str, Shape); 8] = [
    ("plain", PLAIN),
    ("v2", Shape { version: 2, ..PLAIN }),
    ("tiny-clusters", Shape { cluster_bits: 9, ..PLAIN }),
    ("wide-refcounts", Shape { refcount_order: 6, ..PLAIN }),
    ("one-bit-refcounts", Shape { refcount_order: 0, ..PLAIN }),
    ("extended", Shape { extended: true, cluster_bits: 14, ..PLAIN }),
    ("snapshot", Shape { snapshot: true, ..PLAIN }),
    ("all", Shape { cluster_bits: 16, compressed: true, snapshot: true, bitmap: true, ..PLAIN }),
];

/// Bit 63 of an entry.
pub(crate) const COPIED: u64 = 1 << 63;

/// Where everything is, in bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    pub(crate) reftable: u64,
    pub(crate) block: u64,
    pub(crate) l1: u64,
    pub(crate) l2: [u64; 2],
    /// Data clusters of guest clusters 0, 1, 2 of the first table, 0 and 1 of the second.
    pub(crate) data: Vec<u64>,
    /// Kept for guest cluster 5 of the first table, which reads as zeroes.
    pub(crate) kept: u64,
    /// Holds guest cluster 6, compressed.
    pub(crate) packed: u64,
    pub(crate) snapshots: u64,
    pub(crate) snapshot_l1: u64,
    pub(crate) directory: u64,
    pub(crate) bitmap_table: u64,
    pub(crate) bitmap_data: u64,
    /// The data of the bitmap extension in the header.
    pub(crate) extension: u64,
}

/// An image and where its parts are.
#[derive(Clone, Debug)]
pub(crate) struct Specimen {
    pub(crate) shape: Shape,
    pub(crate) bytes: Vec<u8>,
    pub(crate) places: Places,
}

impl Specimen {
    /// Makes the image.
    pub(crate) fn new(shape: Shape) -> Self {
        let mut new = Self { shape, bytes: Vec::new(), places: Places::default() };
        new.lay_out();
        new.header();
        new.tables();
        if shape.snapshot {
            new.snapshot();
        }
        if shape.bitmap {
            new.bitmap();
        }
        new.counts();
        new
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(crate) fn entry_bytes(&self) -> u64 {
        if self.shape.extended { 16 } else { 8 }
    }

    /// Guest bytes of one L2 table.
    pub(crate) fn span(&self) -> u64 {
        self.cluster() / self.entry_bytes() * self.cluster()
    }

    /// Virtual size: what two tables cover.
    pub(crate) fn size(&self) -> u64 {
        2 * self.span()
    }

    /// Where the entry of guest cluster `index` of table `table` is.
    pub(crate) fn entry(&self, table: usize, index: u64) -> u64 {
        self.places.l2[table] + index * self.entry_bytes()
    }

    /// The number of `width` bytes at `at`.
    pub(crate) fn get(&self, at: u64, width: usize) -> u64 {
        let at = usize::try_from(at).expect("small");
        self.bytes[at..at + width].iter().fold(0, |all, byte| all << 8 | u64::from(*byte))
    }

    /// Sets the number of `width` bytes at `at`.
    pub(crate) fn set(&mut self, at: u64, width: usize, value: u64) {
        let at = usize::try_from(at).expect("small");
        if self.bytes.len() < at + width {
            self.bytes.resize(at + width, 0);
        }
        self.bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }

    /// The refcount of the cluster at byte `host`, of a block that has whole bytes per count.
    pub(crate) fn count_place(&self, host: u64) -> (u64, usize) {
        let width = (1_usize << self.shape.refcount_order) / 8;
        (self.places.block + host / self.cluster() * width as u64, width)
    }

    /// Sets the refcount of the cluster at byte `host`.
    pub(crate) fn set_count(&mut self, host: u64, count: u64) {
        if self.shape.refcount_order >= 3 {
            let (at, width) = self.count_place(host);
            return self.set(at, width, count);
        }
        let bits = 1 << self.shape.refcount_order;
        let index = host / self.cluster() * bits;
        let at = usize::try_from(self.places.block + index / 8).expect("small");
        let mask = ((1_u16 << bits) - 1) as u8;
        let shift = (index % 8) as u32;
        self.bytes[at] = self.bytes[at] & !(mask << shift) | ((count as u8) & mask) << shift;
    }

    /// What guest byte `at` is: data clusters are filled with their number from 1 on.
    pub(crate) fn expected(&self, at: u64) -> u8 {
        let (table, within) = (at / self.span(), at % self.span());
        let (index, inside) = (within / self.cluster(), within % self.cluster());
        match (table, index) {
            // With subclusters the second half of this one reads as zeroes.
            (0, 2) if self.shape.extended && inside >= self.cluster() / 2 => 0,
            (0, 0..=2) => index as u8 + 1,
            (0, 6) if self.shape.compressed => 6,
            (1, 0..=1) => index as u8 + 4,
            _ => 0,
        }
    }

    fn lay_out(&mut self) {
        let cluster = self.cluster();
        let mut next = 0;
        let mut take = || {
            next += cluster;
            next
        };
        let shape = self.shape;
        let mut optional = |wanted: bool| if wanted { take() } else { 0 };
        self.places = Places {
            reftable: optional(true),
            block: optional(true),
            l1: optional(true),
            l2: [optional(true), optional(true)],
            data: (0..5).map(|_| optional(true)).collect(),
            kept: optional(shape.version >= 3),
            // What does not shrink when packed needs a little more than a cluster.
            packed: if optional(shape.compressed) == 0 { 0 } else { optional(true) - cluster },
            snapshots: optional(shape.snapshot),
            snapshot_l1: optional(shape.snapshot),
            directory: optional(shape.bitmap),
            bitmap_table: optional(shape.bitmap),
            bitmap_data: optional(shape.bitmap),
            extension: 0,
        };
        let end = take();
        self.bytes = vec![0; usize::try_from(end).expect("small")];
    }

    fn header(&mut self) {
        let (shape, places) = (self.shape, self.places.clone());
        self.set(0, 4, 0x5146_49fb);
        self.set(4, 4, shape.version.into());
        self.set(20, 4, shape.cluster_bits.into());
        self.set(24, 8, self.size());
        self.set(36, 4, 2);
        self.set(40, 8, places.l1);
        self.set(48, 8, places.reftable);
        self.set(56, 4, 1);
        self.set(60, 4, shape.snapshot.into());
        self.set(64, 8, places.snapshots);
        let mut at = 72;
        if shape.version >= 3 {
            self.set(72, 8, if shape.extended { 16 } else { 0 });
            self.set(88, 8, shape.bitmap.into());
            self.set(96, 4, shape.refcount_order.into());
            self.set(100, 4, 112);
            at = 112;
        }
        if shape.bitmap {
            self.set(at, 4, 0x2385_2875);
            self.set(at + 4, 4, 24);
            self.places.extension = at + 8;
            self.set(at + 8, 4, 1);
            self.set(at + 16, 8, 32);
            self.set(at + 24, 8, places.directory);
            at += 32;
        }
        // An extension that nobody knows.
        self.set(at, 4, 0x1234_5678);
        self.set(at + 4, 4, 5);
        self.set(at + 8, 8, 0x6b65_6570_6d00_0000);
    }

    fn tables(&mut self) {
        let (shape, places) = (self.shape, self.places.clone());
        let cluster = self.cluster();
        self.set(places.reftable, 8, places.block);
        let first = if shape.snapshot { 0 } else { COPIED };
        self.set(places.l1, 8, places.l2[0] | first);
        self.set(places.l1 + 8, 8, places.l2[1] | COPIED);
        for (number, host) in places.data.iter().enumerate() {
            let (table, index) = if number < 3 { (0, number) } else { (1, number - 3) };
            let copied = if table == 0 { first } else { COPIED };
            let at = self.entry(table, index as u64);
            self.set(at, 8, host | copied);
            if shape.extended {
                // The third one is half data, half zeroes.
                let bitmap = if number == 2 { 0xffff_0000_0000_ffff } else { 0xffff_ffff };
                self.set(at + 8, 8, bitmap);
            }
            let from = usize::try_from(*host).expect("small");
            let len = usize::try_from(cluster).expect("small");
            self.bytes[from..from + len].fill(number as u8 + 1);
        }
        if shape.version >= 3 {
            let (plain, kept) = (self.entry(0, 4), self.entry(0, 5));
            let zero = u64::from(!shape.extended);
            self.set(plain, 8, zero);
            self.set(kept, 8, places.kept | first | zero);
            if shape.extended {
                self.set(plain + 8, 8, 0xffff_ffff_0000_0000);
                self.set(kept + 8, 8, 0xffff_ffff_0000_0000);
            }
        }
        if shape.compressed {
            self.packed();
        }
    }

    /// A cluster of sixes in stored blocks of deflate.
    fn packed(&mut self) {
        let cluster = usize::try_from(self.cluster()).expect("small");
        let mut stream = Vec::new();
        let mut left = cluster;
        while left > 0 {
            let len = u16::try_from(left.min(0x8000)).expect("small");
            left -= usize::from(len);
            stream.push(u8::from(left == 0));
            stream.extend_from_slice(&len.to_le_bytes());
            stream.extend_from_slice(&(!len).to_le_bytes());
            stream.resize(stream.len() + usize::from(len), 6);
        }
        let from = usize::try_from(self.places.packed).expect("small");
        self.bytes[from..from + stream.len()].copy_from_slice(&stream);
        let sectors = stream.len().div_ceil(512) as u64 - 1;
        let bits = 62 - (self.shape.cluster_bits - 8);
        let at = self.entry(0, 6);
        self.set(at, 8, 1 << 62 | sectors << bits | self.places.packed);
    }

    fn snapshot(&mut self) {
        let places = self.places.clone();
        self.set(places.snapshot_l1, 8, places.l2[0]);
        let at = places.snapshots;
        self.set(at, 8, places.snapshot_l1);
        self.set(at + 8, 4, 2);
        self.set(at + 12, 2, 1);
        self.set(at + 14, 2, 4);
        self.set(at + 16, 4, 1_700_000_000);
        self.set(at + 36, 4, 16);
        self.set(at + 48, 8, self.size());
        self.set(at + 56, 5, u64::from_be_bytes(*b"\0\0\x001snap"));
    }

    fn bitmap(&mut self) {
        let places = self.places.clone();
        let at = places.directory;
        self.set(at, 8, places.bitmap_table);
        self.set(at + 8, 4, 1);
        self.set(at + 12, 4, 2);
        self.set(at + 16, 1, 1);
        self.set(at + 17, 1, u64::from(self.shape.cluster_bits));
        self.set(at + 18, 2, 3);
        self.set(at + 24, 3, u64::from_be_bytes(*b"\0\0\0\0\0map"));
        self.set(places.bitmap_table, 8, places.bitmap_data);
        self.set(places.bitmap_data, 1, 0x5a);
    }

    fn counts(&mut self) {
        let shared = if self.shape.snapshot { 2 } else { 1 };
        let places = self.places.clone();
        let mut counted = vec![(0, 1), (places.reftable, 1), (places.block, 1), (places.l1, 1)];
        counted.extend([(places.l2[0], shared), (places.l2[1], 1), (places.kept, shared)]);
        let data = places.data.iter().enumerate();
        counted.extend(data.map(|(at, host)| (*host, if at < 3 { shared } else { 1 })));
        counted.extend([(places.packed, shared), (places.snapshots, 1), (places.snapshot_l1, 1)]);
        counted.extend([(places.directory, 1), (places.bitmap_table, 1), (places.bitmap_data, 1)]);
        if places.packed != 0 {
            counted.push((places.packed + self.cluster(), shared));
        }
        for (at, (host, count)) in counted.into_iter().enumerate() {
            if at == 0 || host != 0 {
                self.set_count(host, count);
            }
        }
    }
}
