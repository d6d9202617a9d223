//! Drivers that do what no driver may, against the transport and the rings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmkit_device::{Device, Doorbell, Doorbells, EventFd};

use crate::testing::*;
use crate::{Block, EventLoop, Mmio, Rng, WorkModel};

fn rig() -> Rig {
    Rig::new(Mmio::new(Rng::from_source(|bytes| bytes.fill(1))).work(WorkModel::Inline))
}

/// Asserts that a notification breaks the device without a used buffer, and that a reset heals it.
fn assert_breaks(rig: &Rig, ring: &mut Ring, what: &str) {
    rig.notify(0);
    assert!(rig.is_broken(), "{what}");
    assert_eq!(ring.used(), None, "{what}");
    assert_eq!(rig.reg(0x60) & 2, 2, "{what}: no configuration interrupt");
    let mut ring = rig.activate(0, 8).remove(0);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)), "{what}: not healed");
}

#[test]
fn the_registers_identify_a_modern_device() {
    let rig = rig();
    assert_eq!((rig.reg(0), rig.reg(4), rig.reg(8)), (0x7472_6976, 2, 4));
    assert_eq!(rig.device_features(), VERSION_1 | EVENT_IDX | INDIRECT);
    assert!([0xB0, 0xB4, 0xB8, 0xBC].iter().all(|register| rig.reg(*register) == u32::MAX));
}

#[test]
fn features_that_were_not_offered_or_are_too_old_are_refused() {
    for features in [0, VERSION_1 | 1, VERSION_1 | 1 << 63] {
        let rig = rig();
        rig.set_reg(0x70, ACKNOWLEDGE_DRIVER);
        rig.accept(features);
        assert_eq!(rig.status(), ACKNOWLEDGE_DRIVER, "{features:#x}");
        rig.driver_ok();
        assert_eq!(rig.status() & DRIVER_OK, 0, "{features:#x}");
    }
}

#[test]
fn features_cannot_change_after_negotiation() {
    let rig = rig();
    rig.negotiate(0);
    rig.accept(u64::MAX);
    let _ring = rig.queue(0, 8);
    rig.driver_ok();
    assert!(!rig.is_broken());
    assert_eq!(rig.faults.count(), 2);
}

#[test]
fn status_bits_stay_until_a_reset_and_drivers_cannot_break_a_device_by_writing_so() {
    let rig = rig();
    rig.set_reg(0x70, ACKNOWLEDGE_DRIVER | NEEDS_RESET);
    rig.set_reg(0x70, 1);
    assert_eq!(rig.status(), ACKNOWLEDGE_DRIVER);
    rig.set_reg(0x70, 0);
    assert_eq!(rig.status(), 0);
}

#[test]
fn queue_registers_rewritten_after_activation_change_nothing() {
    let rig = rig();
    let mut ring = rig.activate(0, 8).remove(0);
    rig.place(0, 4, FREE, FREE, FREE);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!((ring.used(), rig.is_broken()), (Some((0, 8)), false));
    assert!(rig.faults.count() >= 8);
}

#[test]
fn a_stopped_queue_stays_stopped_until_a_reset() {
    let rig = rig();
    let mut ring = rig.activate(0, 8).remove(0);
    rig.set_reg(0x30, 0);
    assert_eq!(rig.reg(0x44), 1);
    rig.set_reg(0x44, 0);
    assert_eq!(rig.reg(0x44), 0);
    ring.add(&[], &[(FREE, 8)]);
    rig.set_reg(0x44, 1);
    rig.notify(0);
    assert_eq!((ring.used(), rig.is_broken()), (None, false));
}

#[test]
fn queues_that_do_not_exist_are_left_alone() {
    let rig = rig();
    rig.negotiate(0);
    for index in [1, 64, 0xFFFF] {
        rig.place(index, 8, 0x1000, 0x2000, 0x3000);
        assert_eq!((rig.reg(0x34), rig.reg(0x44)), (0, 0));
    }
    rig.set_reg(0x30, u32::MAX);
    assert_eq!(rig.reg(0x34), 0);
    let mut ring = rig.queue(0, 8);
    rig.driver_ok();
    for index in [1, 63, 64, 0xFFFF] {
        rig.notify(index);
    }
    rig.set_reg(0x50, u32::MAX);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)));
}

#[test]
fn bad_queue_sizes_and_places_break_the_device_when_it_is_activated() {
    for (size, desc, avail, used) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (0x10008, 0x1000, 0x2000, 0x3000),
        (u32::MAX, 0x1000, 0x2000, 0x3000),
        (8, 0x1001, 0x2000, 0x3000),
        (8, 0x1000, 0x2001, 0x3000),
        (8, 0x1000, 0x2000, 0x3002),
        (8, RAM - 16, 0x2000, 0x3000),
        (8, 0x1000, RAM - 16, 0x3000),
        (8, 0x1000, 0x2000, RAM - 16),
        (8, u64::MAX - 15, 0x2000, 0x3000),
        (8, 0x1000, u64::MAX - 1, 0x3000),
        (8, 0x1000, 0x2000, u64::MAX - 3),
    ] {
        let rig = rig();
        rig.negotiate(0);
        rig.place(0, size, desc, avail, used);
        rig.driver_ok();
        assert!(rig.is_broken(), "{size} {desc:#x} {avail:#x} {used:#x}");
        rig.notify(0);
        rig.activate(0, 8);
        assert!(!rig.is_broken());
    }
}

#[test]
fn an_available_index_beyond_the_ring_breaks_the_device() {
    for beyond in [9, 0x8000, 0xFFFF] {
        let rig = rig();
        let mut ring = rig.activate(0, 8).remove(0);
        ring.descriptor(0, FREE, 8, WRITE, 0);
        ring.set_avail_idx(beyond);
        assert_breaks(&rig, &mut ring, "index");
    }
}

#[test]
fn malformed_chains_break_the_device() {
    type Make = fn(&Ring);
    let cases: [(&str, Make); 9] = [
        ("loop of one", |r| r.descriptor(0, FREE, 8, WRITE | NEXT, 0)),
        ("loop of two", |r| {
            r.descriptor(0, FREE, 8, WRITE | NEXT, 1);
            r.descriptor(1, FREE, 8, WRITE | NEXT, 0);
        }),
        ("next out of range", |r| r.descriptor(0, FREE, 8, WRITE | NEXT, 8)),
        ("readable after writable", |r| {
            r.descriptor(0, FREE, 8, WRITE | NEXT, 1);
            r.descriptor(1, FREE, 8, 0, 0);
        }),
        ("lengths that overflow", |r| {
            r.descriptor(0, FREE, u32::MAX, WRITE | NEXT, 1);
            r.descriptor(1, FREE, u32::MAX, WRITE, 0);
        }),
        ("indirect in indirect", |r| {
            r.descriptor(0, FREE, 16, INDIRECT_TABLE, 0);
            r.descriptor_in(FREE, 0, FREE, 16, INDIRECT_TABLE, 0);
        }),
        ("indirect table of an odd size", |r| r.descriptor(0, FREE, 17, INDIRECT_TABLE, 0)),
        ("indirect table outside of memory", |r| {
            r.descriptor(0, u64::MAX - 7, 16, INDIRECT_TABLE, 0);
        }),
        ("empty indirect table", |r| r.descriptor(0, FREE, 0, INDIRECT_TABLE, 0)),
    ];
    for (what, make) in cases {
        let rig = rig();
        let mut ring = rig.activate(INDIRECT, 8).remove(0);
        make(&ring);
        ring.offer(0);
        assert_breaks(&rig, &mut ring, what);
    }
}

#[test]
fn an_indirect_chain_of_more_than_1024_buffers_breaks_the_device() {
    for (len, breaks) in [(8, false), (9, false), (1024, false), (1025, true), (4096, true)] {
        let rig = rig();
        let mut ring = rig.activate(INDIRECT, 8).remove(0);
        for n in 0..len {
            let flags = if n + 1 == len { WRITE } else { WRITE | NEXT };
            ring.descriptor_in(FREE, n, FREE + 0x10_0000, 1, flags, n + 1);
        }
        ring.descriptor(0, FREE, u32::from(len) * 16, INDIRECT_TABLE, 0);
        ring.offer(0);
        if breaks {
            assert_breaks(&rig, &mut ring, "long chain");
        } else {
            rig.notify(0);
            assert_eq!(ring.used(), Some((0, len.into())));
        }
    }
}

#[test]
fn a_head_out_of_range_breaks_the_device() {
    let rig = rig();
    let mut ring = rig.activate(0, 8).remove(0);
    ring.offer(8);
    assert_breaks(&rig, &mut ring, "head");
}

#[test]
fn the_same_head_twice_in_flight_is_served_twice() {
    let rig = rig();
    let mut ring = rig.activate(0, 8).remove(0);
    ring.descriptor(3, FREE, 8, WRITE, 0);
    ring.offer(3);
    ring.offer(3);
    rig.notify(0);
    assert_eq!((ring.used(), ring.used(), ring.used()), (Some((3, 8)), Some((3, 8)), None));
}

#[test]
fn a_buffer_may_not_leave_memory_nor_cross_the_hole_in_it() {
    for (at, len) in [(RAM - 4, 8), (RAM, 8), (3 << 30, 8), (u64::MAX - 3, 8)] {
        let rig = rig();
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(at, len)]);
        assert_breaks(&rig, &mut ring, "outside");
    }
}

#[test]
fn odd_register_accesses_do_nothing_and_odd_config_accesses_read_zeros() {
    let rig = Rig::new(Mmio::new(Block::memory(vec![0; 4096]).unwrap()).work(WorkModel::Inline));
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xFC, 8), (0xFE, 2)] {
        let mut data = vec![0xEE; len];
        rig.device.read(0, offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{offset:#x}");
        let _ = rig.device.write(0, 0x70, &vec![0xFF; len.min(3)]);
    }
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.config::<1>(0), [8]);
    assert_eq!(rig.config::<2>(1), [0, 0]);
    assert_eq!(rig.config::<8>(56), [0; 8]);
    for offset in [59, 60, 0xEF8, u64::MAX - 0x100] {
        assert_eq!(rig.config::<8>(offset), [0; 8]);
    }
    let _ = rig.device.write(0, 0x100, &[0xFF; 8]);
    assert_eq!(rig.config::<1>(0), [8]);
}

#[test]
fn interrupts_come_only_when_the_driver_wants_them() {
    // With the flag.
    let rig = rig();
    let mut ring = rig.activate(0, 8).remove(0);
    ring.set_avail_flags(1);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!((ring.used(), rig.wires.rises(), rig.reg(0x60)), (Some((0, 8)), 0, 0));
    ring.set_avail_flags(0);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!((rig.wires.rises(), rig.wires.high(), rig.reg(0x60)), (1, true, 1));
    rig.set_reg(0x64, 1);
    assert_eq!((rig.wires.high(), rig.reg(0x60)), (false, 0));
    // With an index.
    let mut ring = rig.activate(EVENT_IDX, 8).remove(0);
    ring.set_used_event(2);
    for expected in [0, 0, 1, 0] {
        let before = rig.wires.rises();
        ring.add(&[], &[(FREE, 8)]);
        rig.notify(0);
        assert!(ring.used().is_some());
        assert_eq!(rig.wires.rises() - before, expected);
        rig.set_reg(0x64, 3);
    }
    assert_eq!(ring.avail_event(), 4);
}

#[test]
#[cfg_attr(miri, ignore = "races on purpose, as guests may")]
fn a_driver_that_changes_memory_meanwhile_cannot_hang_or_panic_the_device() {
    let block = Block::memory(vec![0; 1 << 20]).unwrap();
    let rig = Rig::new(Mmio::new(block));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ram = &rig.ram;
        let (writer_stop, base) = (&stop, FREE);
        scope.spawn(move || {
            use vmkit_memory::{Bytes, GuestAddress};
            let mut random = 0x1234_5678_9ABC_DEF1_u64;
            while !writer_stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // The page of the descriptors, and the header and status of the requests.
                let at = if random & 1 == 0 {
                    0x1000 + (random >> 8 & 0xFF)
                } else {
                    base + (random >> 8 & 0x1F)
                };
                let _ = ram.write_obj((random >> 40) as u8, GuestAddress(at));
            }
        });
        for _ in 0..300 {
            // Descriptors in the first page handed out, which the writer scribbles on.
            let mut ring = {
                rig.negotiate(INDIRECT);
                let ring = Ring::at(&rig, 0, 16, 0x1000, 0x2000, 0x3000);
                rig.driver_ok();
                ring
            };
            for _ in 0..4 {
                ring.add(&[(FREE, 16)], &[(FREE + 0x1000, 4096), (FREE + 0x10, 1)]);
                rig.notify(0);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    // It still works for a driver that behaves.
    let mut ring = rig.activate(0, 8).remove(0);
    rig.write(FREE, &[0; 16]);
    ring.add(&[(FREE, 16)], &[(FREE + 0x1000, 512), (FREE + 0x10, 1)]);
    rig.notify(0);
    assert_eq!(ring.wait_used(), (0, 513));
}

#[test]
#[cfg_attr(miri, ignore = "level-triggered epoll")]
fn an_embedders_loop_does_the_work_only_when_it_turns() {
    let events = EventLoop::new().unwrap();
    let rig =
        Rig::new(Mmio::new(Rng::from_source(|b| b.fill(1))).work(WorkModel::Loop(events.clone())));
    let mut ring = rig.activate(0, 8).remove(0);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), None);
    assert_eq!(events.process_ready().unwrap(), 1);
    assert_eq!(ring.used(), Some((0, 8)));
    // While the machine stands still, the loop has nothing to do, and forgets nothing.
    rig.device.pause();
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    events.process_ready().unwrap();
    assert_eq!(ring.used(), None);
    rig.device.start().unwrap();
    events.process_ready().unwrap();
    assert_eq!(ring.used(), Some((1, 8)));
    rig.set_reg(0x70, 0);
    assert_eq!(events.process_ready().unwrap(), 0);
}

#[test]
fn nothing_moves_while_the_machine_stands_still() {
    let rig = Rig::new(Mmio::new(Rng::from_source(|bytes| bytes.fill(1))));
    let mut ring = rig.activate(0, 8).remove(0);
    rig.device.pause();
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(ring.used(), None);
    rig.device.start().unwrap();
    assert_eq!(ring.wait_used(), (0, 8));
}

#[derive(Default)]
struct Bells(std::sync::Mutex<Vec<(Doorbell, EventFd)>>);

impl Doorbells for Bells {
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
fn doorbells_are_hung_at_the_notify_register_and_taken_down_with_the_device() {
    let bells = Arc::new(Bells::default());
    let rig =
        Rig::with_doorbells(Mmio::new(Rng::from_source(|bytes| bytes.fill(1))), bells.clone());
    let mut ring = rig.activate(0, 8).remove(0);
    ring.add(&[], &[(FREE, 8)]);
    let (at, fd) = {
        let hung = bells.0.lock().unwrap();
        assert_eq!(hung.len(), 1);
        (hung[0].0, hung[0].1.try_clone().unwrap())
    };
    assert!(matches!(at, Doorbell::Mmio { width: 4, value: Some(0), .. }));
    fd.write(1).unwrap();
    assert_eq!(ring.wait_used(), (0, 8));
    drop(rig);
    assert!(bells.0.lock().unwrap().is_empty());
}

#[test]
fn a_reset_of_the_machine_is_power_on() {
    let rig = rig();
    let _ring = rig.activate(EVENT_IDX, 8);
    rig.device.pause();
    rig.device.reset();
    let fresh = self::rig();
    fresh.device.pause();
    assert_eq!(rig.sections(), fresh.sections());
    let device: &dyn Device = &*rig.device;
    device.start().unwrap();
    let mut ring = rig.activate(0, 8).remove(0);
    ring.add(&[], &[(FREE, 8)]);
    rig.notify(0);
    assert_eq!(ring.used(), Some((0, 8)));
}

#[test]
fn inline_work_that_never_ends_goes_on_when_the_driver_does_not_come_by() {
    const TOTAL: u32 = 5000;
    let ring: Arc<Mutex<Option<Ring>>> = Arc::default();
    let (driver, mut served) = (ring.clone(), 0);
    // A driver that has a next request by the time each is served.
    let rng = Rng::from_source(move |_| {
        served += 1;
        if served < TOTAL
            && let Some(ring) = &mut *driver.lock().unwrap()
        {
            ring.add(&[], &[(FREE, 8)]);
        }
    });
    let rig = Rig::new(Mmio::new(rng).work(WorkModel::Inline));
    let mut first = rig.activate(0, 8).remove(0);
    first.add(&[], &[(FREE, 8)]);
    *ring.lock().unwrap() = Some(first);
    let taken = || ring.lock().unwrap().as_ref().map_or(0, |ring| u32::from(ring.used_index()));
    rig.notify(0);
    wait("end of the requests", || taken() == TOTAL);
}
