//! Repairs on a device, whose size is fixed: new refcounts go behind what is used, or nowhere.

use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{calm, open};
use super::specimen::{PLAIN, Specimen};
use crate::qcow2::{Repair, check, repair};

/// An image without usable refcounts, with `more` clusters behind it.
fn patient(more: u64) -> (Specimen, Rc<Memory>) {
    let mut specimen = Specimen::new(PLAIN);
    specimen.set(specimen.places.reftable, 8, 0);
    let mut bytes = specimen.bytes.clone();
    bytes.resize(bytes.len() + (more * specimen.cluster()) as usize, 0);
    let memory = Memory::from_bytes(&bytes);
    memory.fix_size();
    (specimen, memory)
}

/// Row R10's kin: an error in the middle must leave what was there.
#[test]
fn a_device_without_room_for_new_refcounts_is_refused_and_stays_as_it_is() {
    let (specimen, memory) = patient(0);
    let storage = Storage::Memory(Rc::clone(&memory));
    let before = memory.to_bytes();
    let written = memory.traffic().written;
    calm(|core| async move {
        let error = repair(&core, &storage, Repair::All).await.expect_err("has no room");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let text = error.to_string();
        assert!(text.contains("and the device has 0 there; enlarge the device"), "{text}");
        let report = check(&core, &storage).await.expect("can still be checked");
        assert!(report.corruptions > 0);
        let disk = open(&core, storage, false).await.expect("and read");
        let bytes = disk.read(0, specimen.cluster()).await.expect("reads");
        let expected: Vec<u8> = (0..specimen.cluster()).map(|at| specimen.expected(at)).collect();
        assert!(bytes == expected);
    });
    assert_eq!(memory.traffic().written, written, "nothing was written");
    assert!(memory.to_bytes() == before);
}

#[test]
fn on_a_device_new_refcounts_go_behind_what_is_used() {
    let (specimen, memory) = patient(100);
    let size = memory.size();
    let storage = Storage::Memory(Rc::clone(&memory));
    calm(|core| async move {
        let report = repair(&core, &storage, Repair::All).await.expect("has room");
        assert!(report.is_clean(), "{:?}", report.problems);
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        let len = 6 * specimen.cluster();
        let expected: Vec<u8> = (0..len).map(|at| specimen.expected(at)).collect();
        assert!(disk.read(0, len).await.expect("reads") == expected);
        for index in 10..30 {
            disk.write(index * specimen.cluster(), &[7; 4096]).await.expect("has room");
        }
        disk.format.close().await.expect("closes");
        let report = check(&core, &storage).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
    assert_eq!(memory.size(), size, "a device stays as large as it is");
}
