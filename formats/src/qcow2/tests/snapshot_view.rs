//! Reading a snapshot inside an image while the disk goes on.

use liveblk_engine::executor::Core;
use liveblk_engine::format::{SnapshotChoice, ZeroMode};
use liveblk_engine::{ErrorKind, Result};

use super::mover::{Disk, calm, file, open};
use super::snapshots::{shapes, snapshots, take};
use crate::qcow2::{CreateOptions, check, create};

const MIB: u64 = 1 << 20;

async fn image(core: &Core, options: CreateOptions) -> Disk {
    let storage = file(core, "/image", true).await;
    create(core, &storage, options).await.expect("is created");
    Disk { below: |at| (at / 4096) as u8, ..open(core, storage, true).await.expect("opens") }
}

async fn view(disk: &Disk, name: &str) -> Result<Disk> {
    let format = snapshots(disk).view(SnapshotChoice::Text(name.to_owned())).await?;
    Ok(Disk { format, ..disk.clone() })
}

#[test]
fn a_snapshot_reads_as_it_was_whatever_happens_to_the_disk() {
    for options in shapes() {
        println!("{options:?}");
        let narrow = options.refcount_order < 2;
        calm(move |core| async move {
            let disk = image(&core, options).await;
            disk.write(700, &[1; 300_000]).await.unwrap();
            disk.write(800_000, &[2; 70_000]).await.unwrap();
            let before = disk.read(0, MIB).await.unwrap();
            take(&disk, "first").await.expect("is taken");
            let first = view(&disk, "first").await.expect("opens");
            assert_eq!(first.format.size(), MIB);
            assert_eq!(first.read(0, 500_000).await.unwrap(), before[..500_000]);
            disk.write(100_000, &[3; 400_000]).await.unwrap();
            disk.zero(0, 65_536, ZeroMode::Discard).await.unwrap();
            if !narrow {
                take(&disk, "second").await.expect("is taken");
            }
            disk.write(0, &[4; 1_000_000]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_eq!(first.read(0, MIB).await.unwrap(), before);
            let error = snapshots(&disk).delete("first").await.expect_err("is being read");
            assert_eq!(error.kind(), ErrorKind::Busy);
            if !narrow {
                snapshots(&disk).apply("second").await.expect("is applied");
                snapshots(&disk).delete("second").await.expect("nobody reads it");
            }
            disk.write(0, &[5; 1_000_000]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_eq!(first.read(0, MIB).await.unwrap(), before);
            assert_eq!(view(&disk, "first").await.unwrap().read(0, MIB).await.unwrap(), before);
            first.format.close().await.expect("has nothing to do");
            drop(first);
            snapshots(&disk).delete("first").await.expect("nobody reads it any more");
            disk.format.close().await.expect("closes");
            let report = check(&core, disk.format.data_storage()).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
        });
    }
}

#[test]
fn a_snapshot_has_the_size_that_the_disk_had() {
    calm(|core| async move {
        let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(MIB) };
        let disk = image(&core, options).await;
        disk.write(0, &[1; 1 << 20]).await.unwrap();
        take(&disk, "full").await.expect("is taken");
        disk.format.resize(300_032).await.expect("shrinks");
        take(&disk, "small").await.expect("is taken");
        disk.format.resize(8 * MIB).await.expect("grows");
        for (name, size) in [("full", MIB), ("small", 300_032)] {
            let old = view(&disk, name).await.expect("opens");
            assert_eq!(old.format.size(), size);
            let bytes = old.read(0, size).await.unwrap();
            assert!(bytes.iter().all(|byte| *byte == 1), "{name}");
        }
    });
}

#[test]
fn a_snapshot_is_read_only_and_is_found_by_id_or_name_or_both() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(MIB)).await;
        take(&disk, "2").await.expect("its id is 1");
        disk.write(0, &[1; 512]).await.unwrap();
        take(&disk, "b").await.expect("its id is 2");
        let first = async |which| {
            let format = snapshots(&disk).view(which).await?;
            let disk = Disk { format, ..disk.clone() };
            Ok::<u8, liveblk_engine::Error>(disk.read(0, 1).await?[0])
        };
        let exact = |id: Option<&str>, name: Option<&str>| SnapshotChoice::Exact {
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        let found = [
            (SnapshotChoice::Text("2".into()), 1),
            (SnapshotChoice::Text("b".into()), 1),
            (SnapshotChoice::Text("1".into()), 0),
            (exact(None, Some("2")), 0),
            (exact(Some("2"), None), 1),
            (exact(Some("1"), Some("2")), 0),
        ];
        for (which, byte) in found {
            assert_eq!(first(which.clone()).await.expect("is found"), byte, "{which:?}");
        }
        for which in [
            SnapshotChoice::Text("c".into()),
            exact(Some("1"), Some("b")),
            exact(None, None),
            exact(Some("b"), None),
        ] {
            let error = first(which.clone()).await.expect_err("there is none");
            assert_eq!(error.kind(), ErrorKind::NotFound, "{which:?}");
        }
        let old = view(&disk, "b").await.expect("opens");
        for refused in [
            old.write(0, &[1; 512]).await,
            old.zero(0, 512, ZeroMode::Unmap).await,
            old.format.resize(2 * MIB).await,
            old.format.set_writable(true).await,
            old.format.set_backing(None).await,
        ] {
            assert_eq!(refused.expect_err("is read-only").kind(), ErrorKind::ReadOnly);
        }
        old.format.flush().await.expect("has nothing to do");
        old.format.set_writable(false).await.expect("is so already");
    });
}
