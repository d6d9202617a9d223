//! The PCI transport, and drivers that misuse it.

use std::sync::{Arc, Mutex};

use vmkit_device::{Doorbell, Doorbells, EventFd, Saved, Section};

use crate::testing::*;
use crate::{Block, Pci, Rng, WorkModel};

fn rng() -> Pci {
    Pci::new(Rng::from_source(|bytes| bytes.fill(1)))
}

fn rig() -> PciRig {
    PciRig::new(rng().work(WorkModel::Inline))
}

/// Where the capability `id` is, the `nth` of those.
fn capability(rig: &PciRig, id: u32, nth: usize) -> u64 {
    let mut at = rig.config_space(0x34) & 0xFF;
    let mut found = Vec::new();
    while at != 0 {
        let head = rig.config_space(at.into());
        if head & 0xFF == id {
            found.push(u64::from(at));
        }
        at = head >> 8 & 0xFF;
    }
    found[nth]
}

/// Lets all vectors through, with data 0x40 and up, and enables them.
fn enable_vectors(rig: &PciRig) {
    let table = u64::from(rig.config_space(0x14)) - WINDOW_BASE;
    let control = capability(rig, 0x11, 0);
    let count = rig.config_space(control) >> 16 & 0x7FF;
    for vector in 0..=u64::from(count) {
        for (at, value) in [(0, 0xFEE0_0000_u32), (4, 0), (8, 0x40 + vector as u32), (12, 0)] {
            let _ = rig.device.write(WINDOW, table + vector * 16 + at, &value.to_le_bytes());
        }
    }
    rig.set_config_space(control, 0x8000 << 16);
}

#[test]
fn a_modern_device_is_found_with_its_structures() {
    let rig = rig();
    assert_eq!((rig.config_space(0), rig.config_space(8)), (0x1044_1AF4, 0xFF00_0001));
    assert_eq!(rig.config_space(0x2C), 0x1100_1AF4);
    let kinds = (0..5).map(|n| {
        let at = capability(&rig, 9, n);
        (rig.config_space(at) >> 24, rig.config_space(at + 8), rig.config_space(at + 12))
    });
    let expected =
        [(1, 0, 56), (3, 0x1000, 1), (4, 0x2000, 0x1000), (2, 0x3000, 0x1000), (5, 0, 0)];
    assert_eq!(kinds.collect::<Vec<_>>(), expected);
    assert_eq!(rig.config_space(capability(&rig, 9, 3) + 16), 4);
    assert_eq!(rig.read::<2>(18), [1, 0], "queues");
}

#[test]
fn requests_are_served_and_told_by_vector_or_pin() {
    let rig = rig();
    let mut ring = rig.activate(0, 8);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)));
    assert!(rig.wires.high() && rig.wires.messages().is_empty());
    assert_eq!((rig.read::<1>(0x1000), rig.wires.high(), rig.read::<1>(0x1000)), ([1], false, [0]));
    enable_vectors(&rig);
    for (vector, expected) in [(0_u64, Some(0x40)), (1, Some(0x41)), (2, None), (0xFFFF, None)] {
        rig.write(22, 2, 0);
        rig.write(26, 2, vector);
        let back = if vector < 2 { vector as u16 } else { 0xFFFF };
        assert_eq!(u16::from_le_bytes(rig.read(26)), back);
        let before = rig.wires.messages().len();
        ring.add(&[], &[(FREE, 8)]);
        rig.notify(0);
        assert!(ring.used().is_some());
        let new = rig.wires.messages().get(before).map(|message| message.data);
        assert_eq!((new, rig.wires.high()), (expected, false));
    }
}

#[test]
fn a_broken_device_says_so_on_the_configuration_vector() {
    let rig = rig();
    enable_vectors(&rig);
    let mut ring = rig.activate(0, 8);
    rig.write(16, 2, 1);
    ring.add(&[], &[(u64::MAX, 8)]);
    rig.notify(0);
    assert_ne!(rig.status() & NEEDS_RESET, 0);
    assert_eq!(rig.wires.messages().last().map(|message| message.data), Some(0x41));
    let mut ring = rig.activate(0, 8);
    assert_eq!(rig.read::<2>(16), [0xFF; 2], "a reset forgets vectors");
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)));
}

#[test]
fn odd_accesses_to_the_common_structure_do_what_whole_fields_do_or_nothing() {
    let rig = rig();
    // 64 bits at once are two halves.
    rig.write(22, 2, 0);
    rig.write(32, 8, 0x1122_3344_5566_7780);
    assert_eq!(rig.read::<8>(32), 0x1122_3344_5566_7780_u64.to_le_bytes());
    assert_eq!(rig.read::<4>(36), 0x1122_3344_u32.to_le_bytes());
    for (at, width) in [(1, 1), (33, 2), (34, 4), (32, 2), (24, 1), (55, 8), (56, 4), (0xFF8, 8)] {
        let before = rig.read::<8>(32);
        rig.write(at, width, u64::MAX);
        assert_eq!(rig.read::<8>(32), before, "{at} {width}");
    }
    assert_eq!(rig.status(), 0);
    rig.write(22, 2, 9);
    assert_eq!((rig.read::<2>(24), rig.read::<2>(26)), ([0; 2], [0xFF; 2]));
    rig.write(26, 2, 0);
    rig.write(28, 2, 1);
    rig.write(24, 2, 8);
    rig.notify(9);
    rig.notify(1023);
    assert_eq!(rig.status(), 0);
}

#[test]
fn the_configuration_window_reaches_the_device() {
    let block = Block::memory(vec![0; 8 << 10]).unwrap();
    let rig = PciRig::new(Pci::new(block).work(WorkModel::Inline));
    let window = capability(&rig, 9, 4);
    rig.set_config_space(window + 4, 0);
    rig.set_config_space(window + 8, 0x2000);
    rig.set_config_space(window + 12, 4);
    assert_eq!(rig.config_space(window + 16), 16, "sectors");
    assert_eq!(rig.config_space(0) >> 16, 0x1042);
}

#[derive(Default)]
struct Hung(Mutex<Vec<(Doorbell, EventFd)>>);

impl Doorbells for Hung {
    fn add(&self, at: Doorbell, fd: &EventFd) -> std::io::Result<()> {
        self.0.lock().unwrap().push((at, fd.try_clone()?));
        Ok(())
    }
    fn remove(&self, at: Doorbell, _: &EventFd) -> std::io::Result<()> {
        self.0.lock().unwrap().retain(|(place, _)| *place != at);
        Ok(())
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let hung = Arc::new(Hung::default());
    let mut rig = PciRig::with_doorbells(rng(), Some(hung.clone()));
    let places = || {
        let hung = hung.0.lock().unwrap();
        hung.iter().map(|(at, _)| *at).collect::<Vec<_>>()
    };
    let bell = |base: u64| Doorbell::Mmio { address: base + 0x3000, width: 0, value: None };
    assert_eq!(places(), [bell(WINDOW_BASE + rig.bar)]);
    let moved = 0xC800_0000;
    rig.set_config_space(0x10, moved);
    rig.bar = u64::from(moved) - WINDOW_BASE;
    assert_eq!(places(), [bell(moved.into())]);
    let mut ring = rig.activate(0, 8);
    ring.add(&[], &[(FREE, 8)]);
    let fd = hung.0.lock().unwrap()[0].1.try_clone().unwrap();
    fd.write(1).unwrap();
    assert_eq!(ring.wait_used(), (0, 8));
    rig.set_config_space(4, 0);
    assert!(places().is_empty());
}

fn sections(rig: &PciRig) -> Vec<Section> {
    match rig.device.save() {
        Saved::Sections(sections) => sections,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_machine_goes_on_from_saved_state() {
    use vmkit_memory::{Bytes, GuestAddress};
    let rig = rig();
    enable_vectors(&rig);
    let mut ring = rig.activate(EVENT_IDX, 8);
    rig.write(22, 2, 0);
    rig.write(26, 2, 1);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)));
    rig.device.pause();
    ring.set_used_event(1);
    ring.add(&[], &[(FREE, 8)]);
    let saved = sections(&rig);
    let other = self::rig();
    other.device.pause();
    let mut all = vec![0; RAM as usize];
    rig.ram.read_slice(&mut all, GuestAddress(0)).unwrap();
    other.ram.write_slice(&all, GuestAddress(0)).unwrap();
    let fresh = sections(&other);
    for cut in 0..saved[1].bytes.len() {
        let mut damaged = saved.clone();
        damaged[1].bytes.truncate(cut);
        assert!(other.device.load(&damaged).is_err());
        assert_eq!(sections(&other), fresh);
    }
    other.device.load(&saved).unwrap();
    assert_eq!(sections(&other), saved);
    other.device.start().unwrap();
    let mut continued = Ring::placed(&other.ram, 0, 8, 0x1000, 0x2000, 0x3000);
    continued.used_idx = 1;
    assert_eq!(continued.used(), Some((1, 8)));
    assert_eq!(other.wires.messages().last().map(|message| message.data), Some(0x41));
}
