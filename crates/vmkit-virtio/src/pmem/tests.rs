use std::io::Write;

use tempfile::NamedTempFile;
use vmkit_memory::{Backing, Bytes, GuestBuffers, RamLayout, allocate};

use super::*;
use crate::testing::{FREE, Rig, Ring, lone_queue};
use crate::{Mmio, Segment, WorkModel};

fn file(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn rig(pmem: Pmem) -> (Rig, Ring) {
    let rig = Rig::new(Mmio::new(pmem).work(WorkModel::Inline));
    let ring = rig.activate(0, 8).remove(0);
    (rig, ring)
}

fn request((rig, ring): &mut (Rig, Ring), kind: u32) -> u32 {
    rig.write(FREE, &kind.to_le_bytes());
    ring.add(&[(FREE, 4)], &[(FREE + 8, 4)]);
    rig.notify(0);
    assert_eq!(ring.used().unwrap().1, 4);
    u32::from_le_bytes(rig.bytes(FREE + 8, 4).try_into().unwrap())
}

#[test]
fn a_driver_learns_where_the_memory_is_and_makes_writes_durable() {
    let image = file(BLOCK);
    let mut machine = rig(Pmem::file(image.path()).unwrap());
    let config: Vec<u32> = (0..5).map(|word| machine.0.reg(0x100 + 4 * word)).collect();
    assert_eq!(config, [0, 1, BLOCK as u32, 0, 0]);
    assert_eq!((request(&mut machine, FLUSH), request(&mut machine, 1)), (OK, FAILED));
    let mut machine = rig(Pmem::read_only_file(file(2 * BLOCK).path()).unwrap());
    assert_eq!((request(&mut machine, FLUSH), request(&mut machine, u32::MAX)), (OK, FAILED));
    assert!(!machine.0.is_broken());
}

#[test]
fn requests_without_room_break_the_device() {
    for (readable, writable) in [(3, 4), (4, 3), (4, 0)] {
        let (rig, mut ring) = rig(Pmem::read_only_file(file(BLOCK).path()).unwrap());
        let writable: &[_] = if writable == 0 { &[] } else { &[(FREE + 8, writable)] };
        ring.add(&[(FREE, readable)], writable);
        rig.notify(0);
        assert!(rig.is_broken(), "{readable} {writable:?}");
    }
}

#[test]
fn devices_read_from_a_read_only_file_and_never_write_to_it() {
    let image = file(BLOCK);
    image.as_file().write_all(&[7; 8]).unwrap();
    let high = GuestAddress(1 << 20);
    let memory = Pmem::read_only_file(image.path()).unwrap().memory.clone();
    let aside = Arc::new(memory.region(high).unwrap());
    let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
    let ram = ram.insert_region(aside).unwrap();
    // All of it in the file, and from RAM into it.
    for at in [high.0, high.0 - 4] {
        let chain = |readable| {
            let segments = vec![Segment { addr: at, len: 8 }];
            Chain { head: 0, segments, readable }
        };
        let (into, from) = (chain(0), chain(1));
        let done = into.writer(&ram).write_all(&[1; 8]);
        assert!(matches!(done, Err(Fault::Memory { .. })), "{at:#x}");
        let given = into.writer(&ram).buffers(&mut GuestBuffers::new());
        assert!(matches!(given, Err(Fault::Memory { .. })), "{at:#x}");
        assert!(from.reader(&ram).read_array::<8>().is_ok(), "{at:#x}");
        from.reader(&ram).buffers(&mut GuestBuffers::new()).unwrap();
    }
    let mut found = [0; 8];
    ram.read_slice(&mut found, high).unwrap();
    assert_eq!(found, [7; 8]);
    // The page is the file's.
    std::os::unix::fs::FileExt::write_all_at(image.as_file(), &[8; 8], 0).unwrap();
    ram.read_slice(&mut found, high).unwrap();
    assert_eq!(found, [8; 8]);
}

#[test]
fn all_of_a_file_to_be_written_has_room_on_its_disk() {
    let image = file(BLOCK);
    let _pmem = Pmem::file(image.path()).unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&image.as_file().metadata().unwrap());
    assert!(blocks * 512 >= BLOCK);
}

#[test]
fn files_in_use_or_of_another_size_are_refused() {
    let image = file(BLOCK);
    let refused = |pmem: Result<Pmem, DeviceError>| pmem.err().unwrap().to_string();
    let reader = Pmem::read_only_file(image.path()).unwrap();
    assert!(refused(Pmem::file(image.path())).starts_with("pmem0: lock "));
    drop((Pmem::read_only_file(image.path()).unwrap(), reader));
    let writer = Pmem::file(image.path()).unwrap();
    assert!(refused(Pmem::read_only_file(image.path())).starts_with("pmem0: lock "));
    drop(writer);
    image.as_file().write_all(&[1]).unwrap();
    for bytes in [0, 5, BLOCK - 4096, BLOCK + 4096] {
        image.as_file().set_len(bytes).unwrap();
        let error = refused(Pmem::file(image.path()));
        assert!(error.ends_with(&format!("of {bytes} bytes: want a multiple of 2 MiB")), "{error}");
    }
    assert!(refused(Pmem::file("/nowhere/at/all")).contains("open /nowhere/at/all"));
}

#[test]
fn saved_state_fits_only_memory_like_it() {
    let save = |pmem: Pmem| {
        let device = Rig::new(Mmio::new(pmem)).device;
        device.pause();
        let Saved::Sections(sections) = device.save() else { panic!("it has state") };
        (device, sections)
    };
    let image = file(BLOCK);
    let (device, sections) = save(Pmem::read_only_file(image.path()).unwrap());
    device.load(&sections).unwrap();
    for other in [
        Pmem::file(file(BLOCK).path()).unwrap(),
        Pmem::read_only_file(file(2 * BLOCK).path()).unwrap(),
    ] {
        let device = save(other).0;
        let error = device.load(&sections).unwrap_err().to_string();
        assert!(error.contains("saved with other memory"), "{error}");
    }
}

#[test]
fn a_turn_ends_after_so_many_flushes_that_a_stop_need_not_wait_long() {
    let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
    let (queue, mut ring) = lone_queue(&ram, 0, 8);
    let mut queues = Queues::new(vec![queue]);
    let image = file(BLOCK);
    let pmem = Pmem::file(image.path()).unwrap();
    let mut worker = PmemWorker {
        name: "pmem".into(),
        memory: pmem.memory.clone(),
        chain: Chain::new(),
        errors: Arc::default(),
    };
    for _ in 0..6 {
        ring.add(&[(0x8000, 4)], &[(0x9000, 4)]);
    }
    for (progress, used) in [(Progress::More, 4), (Progress::Drained, 6)] {
        assert_eq!(worker.process(&mut queues, 0).unwrap(), progress);
        assert_eq!(ring.used_index(), used);
    }
}
