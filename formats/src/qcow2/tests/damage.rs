//! Images that lie: each is refused with its text, or reads give an error, and nothing panics.

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::format::ZeroMode;

use super::mover::{calm, file, open};
use crate::qcow2::{CreateOptions, check, create};

/// A small image with one written cluster: header, refcount table, block, L1, then L2 and data.
fn image() -> Vec<u8> {
    calm(|core| async move {
        let storage = file(&core, "/image", true).await;
        let options = CreateOptions::new(1 << 30);
        create(&core, &storage, options).await.expect("is created");
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        disk.write(0, &[7; 65536]).await.expect("writes");
        disk.format.close().await.expect("closes");
        let buf = core.pool().alloc(storage.size() as usize);
        storage.read(0, buf.clone()).await.unwrap();
        buf.to_vec()
    })
}

fn patched(image: &[u8], patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = image.to_vec();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    bytes
}

/// Opens `bytes` and gives the text of the refusal, if it is refused.
fn refusal(bytes: &[u8], writable: bool) -> Option<String> {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", bytes);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        open(&core, storage, writable).await.err().map(|error| error.to_string())
    })
}

#[test]
fn bad_headers_are_refused_with_the_peers_texts() {
    let good = image();
    let be64 = |value: u64| value.to_be_bytes();
    let be32 = |value: u32| value.to_be_bytes();
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"X", "Image is not in qcow2 format"),
        (4, &be32(4), "Unsupported qcow2 version 4"),
        (20, &be32(5), "Unsupported cluster size: 2^5"),
        (20, &be32(32), "Unsupported cluster size: 2^32"),
        (20, &be32(u32::MAX), "Unsupported cluster size: 2^4294967295"),
        (72, &be64(1 << 8), "Unsupported qcow2 feature(s): Unknown incompatible feature: 100"),
        (72, &be64(2), "qcow2: Image is corrupt; cannot be opened read/write"),
        (72, &be64(4), "'data-file' is required for this image"),
        (72, &be64(8), "qcow2: Compression type incompatible feature bit must not be set"),
        (96, &be32(7), "Reference count entry width too large; may not exceed 64 bits"),
        (100, &be32(0x60), "qcow2 header too short"),
        (100, &be32(0x10070), "qcow2 header exceeds cluster size"),
        (104, &[3], "qcow2: unknown compression type: 3"),
        (56, &be32(0), "Image does not contain a reference count table"),
        (56, &be32(0x7f00_0000), "Reference count table too large"),
        (48, &be64(0x100), "Reference count table offset invalid"),
        (48, &be64(0), "Reference count table offset invalid"),
        (48, &be64(u64::MAX << 16), "Reference count table offset invalid"),
        (40, &be64(0x100), "Active L1 table offset invalid"),
        (40, &be64(0x7fff_ffff_ffff_0000), "Active L1 table offset invalid"),
        (36, &be32(1), "L1 table is too small"),
        (36, &be32(u32::MAX), "Active L1 table too large"),
        (24, &be64(i64::MAX as u64), "Image is too big"),
        (32, &be32(1), "Unsupported qcow2 feature(s): AES encryption"),
        (32, &be32(2), "Unsupported qcow2 feature(s): LUKS encryption"),
        (32, &be32(3), "Unsupported encryption method 3"),
        (8, &[0, 0, 0, 0, 0, 2, 0, 0], "Invalid backing file offset"),
        (8, &[0, 0, 0, 0, 0, 0, 2, 16, 0, 0, 4, 0], "Backing file name too long"),
        (60, &be32(0x2_0000), "Snapshot table too large"),
        (60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0], "Snapshot table offset invalid"),
        (112, &[0x44, 0x41, 0x54, 0x41, 0x7f], "Header extension too large"),
    ];
    for (at, patch, expected) in cases {
        let text = refusal(&patched(&good, &[(*at, patch)]), true);
        assert_eq!(text.as_deref(), Some(*expected), "offset {at}");
    }
    let small = patched(&good, &[(20, &be32(13)), (72, &be64(16))]);
    assert_eq!(refusal(&small, true).as_deref(), Some("Unsupported subcluster size: 256"));
    let dirty = patched(&good, &[(72, &be64(1))]);
    assert_eq!(refusal(&dirty, true), None, "it is repaired");
    assert_eq!(refusal(&dirty, false), None);
    assert_eq!(refusal(&patched(&good, &[(72, &be64(2))]), false), None);
    let snapshots = patched(&good, &[(60, &be32(1)), (64, &be64(0x10000))]);
    assert_eq!(refusal(&snapshots, false), None);
    for len in [0, 3, 71, 100] {
        assert!(refusal(&good[..len], true).is_some(), "{len} bytes");
    }
}

#[test]
fn no_single_byte_of_the_metadata_makes_anything_panic() {
    let good = image();
    let header: Vec<usize> = (0..112).chain([0x70, 0x73, 0x74, 0x77]).collect();
    let tables = [0x10000, 0x20000, 0x30000, 0x40000].map(|table| (table..table + 8).collect());
    for at in header.into_iter().chain(tables.into_iter().flat_map(|range: Vec<usize>| range)) {
        for byte in [0, 1, 0x40, 0x7f, 0x80, 0xff] {
            let bytes = patched(&good, &[(at, &[byte])]);
            let mut sim = Sim::new(SimConfig::new(1).calm());
            sim.fs().create("/image", &bytes);
            sim.block_on(0, |core| async move {
                let storage = file(&core, "/image", false).await;
                let _ = check(&core, &storage).await;
                let Ok(disk) = open(&core, storage, true).await else { return };
                let _ = disk.read(0, 1 << 20).await;
                let _ = disk.write(100, &[1; 200_000]).await;
                let _ = disk.zero(0, 65536, ZeroMode::Unmap).await;
                let _ = disk.format.flush().await;
                let _ = disk.format.close().await;
            });
            let size = sim.fs().size("/image").unwrap();
            assert!(size < 4 << 30, "byte {byte:#x} at {at:#x}: the file grew to {size}");
        }
    }
}

#[test]
fn a_damaged_entry_gives_an_error_and_marks_the_image_corrupt() {
    let good = image();
    let l1: &[(usize, u64)] = &[(0x30000, 1 << 63), (0x30000, 0x8000_0000_0003_0000)];
    let l2: &[(usize, u64)] = &[
        (0x40000, 1 << 63),
        (0x40000, 0x80ff_ffff_ffff_0000),
        (0x40000, 0x8000_0000_0000_0200 | 0x50000),
        (0x40000, 0x8000_0000_0001_0000),
    ];
    for (at, entry) in l1.iter().chain(l2) {
        let bytes = patched(&good, &[(*at, &entry.to_be_bytes())]);
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &bytes);
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            let error = disk.write(0, &[1; 4096]).await.expect_err("is damaged");
            assert_eq!(error.errno(), 5, "{error}");
            assert!(error.to_string().contains("corrupt"), "{error}");
            assert!(disk.read(0, 4096).await.is_err());
            assert!(disk.write(512 << 20, &[1; 512]).await.is_err(), "no further writes");
            assert!(disk.read(512 << 20, 512).await.is_ok(), "reads of the rest go on");
        });
        sim.run_idle();
        let mut incompatible = [0; 8];
        assert!(sim.fs().read_at("/image", 72, &mut incompatible));
        assert_eq!(u64::from_be_bytes(incompatible), 2, "entry {entry:#x}: the corrupt bit");
    }
}

#[test]
fn a_compressed_cluster_gives_eio_and_names_the_reason() {
    let bytes = patched(&image(), &[(0x40000, &(1_u64 << 62 | 0x50000).to_be_bytes())]);
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &bytes);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let error = disk.read(0, 512).await.expect_err("compressed");
        assert_eq!(error.errno(), 5);
        assert!(error.to_string().contains("the compressed bytes are damaged"), "{error}");
        assert_eq!(disk.write(0, &[1; 512]).await.expect_err("compressed").errno(), 5);
        disk.write(65536, &[1; 512]).await.expect("the rest goes on");
    });
}

#[test]
fn autoclear_bits_are_cleared_by_a_writable_open_only() {
    let bytes = patched(&image(), &[(88, &(0x8001_u64).to_be_bytes())]);
    for writable in [false, true] {
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &bytes);
        sim.block_on(0, |core| async move {
            open(&core, file(&core, "/image", false).await, writable).await.expect("opens");
        });
        let mut bits = [0; 8];
        assert!(sim.fs().read_at("/image", 88, &mut bits));
        assert_eq!(u64::from_be_bytes(bits), if writable { 0 } else { 0x8001 });
    }
}
