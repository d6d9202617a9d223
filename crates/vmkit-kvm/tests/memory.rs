//! Mappings: made and taken away under a running guest, and the dirty log.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Access, DATA, Machine, RAM, Recorder, kvm};
use vmkit_hypervisor::guest_memory::{
    Backing, Bytes, DirtyBitmap, GuestAddress, MemoryRegion, MemoryRegionAddress, region_at,
};
use vmkit_hypervisor::{
    HypervisorError, InterruptControllers, IoFlow, MapAccess, MapId, VcpuIo, VmExit,
};

const WINDOW: u64 = 0x40_0000;

fn region(at: u64, len: u64) -> Arc<MemoryRegion> {
    Arc::new(region_at(GuestAddress(at), len, Backing::Memfd).unwrap())
}

#[test]
fn impossible_mappings_are_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let small = region(0, 0x2000);
    let map = |at, region: &Arc<MemoryRegion>| {
        machine.partition.map(GuestAddress(at), region.clone(), MapAccess::WRITE)
    };
    for at in [0, RAM - 0x1000, WINDOW + 1, u64::MAX - 0xFFF] {
        let error = map(at, &small).unwrap_err();
        assert!(matches!(error, HypervisorError::Mapping { .. }), "{at:#x}: {error}");
    }
    assert!(machine.partition.unmap(MapId(999)).is_err());
    let id = map(WINDOW, &small).unwrap();
    assert!(map(WINDOW + 0x1000, &small).is_err());
    machine.partition.unmap(id).unwrap();
    assert!(machine.partition.unmap(id).is_err(), "an ID is not used again");
    let again = map(WINDOW + 0x1000, &small).unwrap();
    assert_ne!(again, id);
    assert!(machine.partition.unmap(id).is_err());
}

#[test]
fn a_mapping_keeps_its_region_alive_and_unmapping_lets_go() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let one = region(WINDOW, 0x1000);
    let id = machine.partition.map(GuestAddress(WINDOW), one.clone(), MapAccess::WRITE).unwrap();
    assert_eq!(Arc::strong_count(&one), 2);
    machine.partition.unmap(id).unwrap();
    assert_eq!(Arc::strong_count(&one), 1);
}

guest_program!(watch_window:
    "2:",
    "mov eax, [0x400000]",
    "out 0x10, eax",
    "jmp 2b",
);

/// What the guest sees at [`WINDOW`] while it is mapped, unmapped and mapped again by another thread:
/// one of the two regions or MMIO, and at the end what was mapped last.
#[test]
fn mappings_change_under_a_running_guest() {
    struct Watch {
        seen: [u64; 3],
        last: u32,
        enough: Arc<AtomicBool>,
    }
    impl VcpuIo for Watch {
        fn pio_read(&mut self, _: u16, _: &mut [u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn pio_write(&mut self, _: u16, data: &[u8]) -> IoFlow {
            self.last = u32::from_le_bytes(data.try_into().unwrap());
            match self.last {
                1 => self.seen[0] += 1,
                2 => self.seen[1] += 1,
                0xFFFF_FFFF => self.seen[2] += 1,
                other => panic!("the guest sees {other:#x}"),
            }
            if self.enough.load(Ordering::Acquire) { IoFlow::Stop } else { IoFlow::Continue }
        }
        fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
            data.fill(0xFF);
            IoFlow::Continue
        }
        fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
            IoFlow::Continue
        }
    }

    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, watch_window());
    let regions = [region(WINDOW, 0x1000), region(WINDOW, 0x1000)];
    for (n, region) in (1_u32..).zip(&regions) {
        region.write_obj(n, MemoryRegionAddress(0)).unwrap();
    }
    let enough = Arc::new(AtomicBool::new(false));
    let changer = thread::spawn({
        let (partition, regions, enough) =
            (machine.partition.clone(), regions.clone(), enough.clone());
        move || {
            for round in 0..300 {
                let id = partition
                    .map(GuestAddress(WINDOW), regions[round % 2].clone(), MapAccess::WRITE)
                    .unwrap();
                thread::yield_now();
                if round != 299 {
                    partition.unmap(id).unwrap();
                    thread::yield_now();
                }
            }
            enough.store(true, Ordering::Release);
        }
    });
    let mut io = Watch { seen: [0; 3], last: 0, enough };
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    changer.join().unwrap();
    // The run may have stopped with a value read just before the last mapping.
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    assert_eq!(io.last, 2, "{:?}", io.seen);
}

guest_program!(write_pages:
    "mov eax, [0x90000]",
    "mov eax, [0x93FFF - 3]",
    "mov eax, [0x95000]",
    "out 0xF4, al",
    "mov byte ptr [0x90000], 1",
    "mov byte ptr [0x93FFF], 1",
    "mov eax, [0x95000]",
    "out 0xF4, al",
    "mov byte ptr [0x95123], 1",
    "mov byte ptr [0x90001], 1",
    "out 0xF4, al",
    "2: out 0xF4, al",
    "jmp 2b",
);

#[test]
fn the_dirty_log_holds_what_was_written_since_it_was_taken() {
    let Some(kvm) = kvm() else { return };
    let access = MapAccess::WRITE | MapAccess::TRACK_DIRTY;
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, access);
    let mut vcpu = machine.vcpu(0, write_pages());
    let mut io = Recorder::default();
    // The processor itself writes: accessed and dirty bits of page tables, the accessed bit of
    // descriptors. Those are before the data pages.
    let mut run_and_take = || {
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
        let mut dirty = DirtyBitmap::for_bytes(RAM);
        machine.partition.take_dirty(machine.map, &mut dirty).unwrap();
        dirty.pages().filter(|page| *page >= DATA >> 12).collect::<Vec<_>>()
    };
    // What was only read may be in the first log, but in no later one.
    run_and_take();
    assert_eq!(run_and_take(), [0x90, 0x93]);
    assert_eq!(run_and_take(), [0x90, 0x95]);
    assert!(run_and_take().is_empty());
}

#[test]
fn taking_the_log_merges_into_what_is_there() {
    let Some(kvm) = kvm() else { return };
    let access = MapAccess::WRITE | MapAccess::TRACK_DIRTY;
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, access);
    let mut vcpu = machine.vcpu(0, write_pages());
    for _ in 0..2 {
        vcpu.run(&mut Recorder::default()).unwrap();
    }
    let mut dirty = DirtyBitmap::for_bytes(RAM);
    dirty.mark(0xFF);
    machine.partition.take_dirty(machine.map, &mut dirty).unwrap();
    assert!(dirty.is_marked(0xFF) && dirty.is_marked(0x90));
}

#[test]
fn a_mapping_that_does_not_track_has_no_log() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let mut dirty = DirtyBitmap::for_bytes(RAM);
    assert!(machine.partition.take_dirty(machine.map, &mut dirty).is_err());
    assert!(machine.partition.take_dirty(MapId(999), &mut dirty).is_err());
}

guest_program!(touch_window: "mov eax, [0x400000]", "out 0xF4, al");

#[test]
fn an_unmapped_window_is_mmio() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, touch_window());
    let id = machine
        .partition
        .map(GuestAddress(WINDOW), region(WINDOW, 0x1000), MapAccess::WRITE)
        .unwrap();
    let mut io = Recorder::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    assert_eq!(io.log, []);
    machine.partition.unmap(id).unwrap();
    machine.start(vcpu.as_mut(), touch_window());
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    assert_eq!(io.log, [Access::Read(WINDOW, 4)]);
}
