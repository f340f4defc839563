//! The N-th failure: whatever write fails, the image keeps its promises.

use liveblk_engine::ErrorKind;
use liveblk_engine::executor::Core;
use liveblk_engine::format::ZeroMode;
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, open};
use crate::qcow2::{CreateOptions, check, create};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;

/// Writes that need new tables, blocks and a larger refcount table.
async fn script(disk: &Disk) -> Vec<liveblk_engine::Result<()>> {
    let mut results = Vec::new();
    for step in 0..40_u64 {
        results.push(disk.write(step * 20_000, &[step as u8 + 1; 9_000]).await);
        if step % 5 == 0 {
            results.push(disk.format.flush().await);
        }
        if step % 7 == 0 {
            results.push(disk.zero(step * 10_000, 8192, ZeroMode::Unmap).await);
        }
    }
    results.push(disk.format.resize(40 << 20).await);
    results.push(disk.format.flush().await);
    results
}

async fn image(core: &Core) -> (std::rc::Rc<Memory>, Disk) {
    let memory = Memory::new(0);
    let storage = Storage::Memory(std::rc::Rc::clone(&memory));
    let options =
        CreateOptions { cluster_size: 512, refcount_order: 6, ..CreateOptions::new(1 << 20) };
    create(core, &storage, options).await.expect("is created");
    (memory, open(core, storage, true).await.expect("opens"))
}

#[test]
fn a_full_disk_at_any_write_is_undone_and_work_goes_on_afterwards() {
    for nth in (0..700).step_by(3) {
        calm(move |core| async move {
            let (memory, disk) = image(&core).await;
            memory.plant_fault(Some((nth, ENOSPC)));
            let failed = script(&disk).await.into_iter().filter_map(Result::err);
            for error in failed {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "write {nth}: {error:?}");
            }
            let storage = disk.format.data_storage().clone();
            let report = check(&core, &storage).await.expect("is checked");
            assert_eq!(report.corruptions, 0, "write {nth}: {:?}", report.problems);
            memory.plant_fault(None);
            for result in script(&disk).await {
                result.expect("space is back");
            }
            for step in 0..40_u64 {
                let bytes = disk.read(step * 20_000 + 8192, 800).await.expect("reads");
                assert!(bytes.iter().all(|byte| *byte == step as u8 + 1 || *byte == 0));
            }
            disk.format.close().await.expect("closes");
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "write {nth}: {:?}", report.problems);
        });
    }
}

#[test]
fn a_failed_metadata_write_poisons_the_image_and_reads_go_on() {
    calm(|core| async move {
        let (memory, disk) = image(&core).await;
        disk.write(0, &[5; 4096]).await.expect("writes");
        memory.plant_fault(Some((0, EIO)));
        assert_eq!(disk.format.flush().await.expect_err("fails").errno(), EIO);
        memory.plant_fault(None);
        let error = disk.write(8192, &[1; 512]).await.expect_err("takes no more writes");
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert_eq!(disk.format.flush().await.expect_err("stays").kind(), ErrorKind::Poisoned);
        assert_eq!(disk.read(0, 4096).await.expect("reads go on"), [5; 4096]);
    });
}
