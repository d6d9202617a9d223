use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout, allocate};

use super::worker::BalloonWorker;
use super::*;
use crate::testing::{FREE, Rig, Ring, lone_queue};
use crate::{Mmio, Progress, Queues, WorkModel, Worker};

/// Pages of memory that tests give away.
const SPARE: u64 = FREE + 0x10_0000;

fn balloon(features: u64) -> (Rig, Vec<Ring>, BalloonHandle) {
    with(Balloon::new(), features)
}

fn with(balloon: Balloon, features: u64) -> (Rig, Vec<Ring>, BalloonHandle) {
    let handle = balloon.handle();
    let rig = Rig::new(Mmio::new(balloon).work(WorkModel::Inline));
    let rings = rig.activate(features, 16);
    (rig, rings, handle)
}

fn fill(rig: &Rig, pages: u64) {
    rig.write(SPARE, &vec![0xAA; (pages * PAGE) as usize]);
}

fn kept(rig: &Rig, pages: u64) -> Vec<u64> {
    (0..pages).filter(|page| rig.bytes(SPARE + page * PAGE + 5, 1) == [0xAA]).collect()
}

#[test]
fn inflating_gives_pages_back_and_a_target_is_announced() {
    let (rig, mut rings, handle) = balloon(0);
    handle.set_target(3 * PAGE + 100);
    assert_eq!((rig.config::<4>(0), rig.reg(0x60)), ([3, 0, 0, 0], 2));
    fill(&rig, 8);
    let numbers: Vec<u8> =
        [2, 3, 7, 6, 0].iter().flat_map(|n| (SPARE as u32 / 4096 + n).to_le_bytes()).collect();
    rig.write(FREE, &numbers);
    rings[0].add(&[(FREE, 20)], &[]);
    rig.notify(0);
    assert!(rings[0].used().is_some());
    assert_eq!(kept(&rig, 8), [1, 4, 5]);
    assert_eq!(handle.given(), 5 * PAGE);
    let _ = rig.device.write(0, 0x104, &5_u32.to_le_bytes());
    assert_eq!(handle.actual(), 5 * PAGE);
    // Only `actual` is the driver's to write.
    for (at, len) in [(0x100, 4), (0x108, 4), (0x104, 2), (0x106, 4)] {
        let _ = rig.device.write(0, at, &vec![0xFF; len]);
    }
    assert_eq!(
        (handle.actual(), rig.config::<12>(0)),
        (5 * PAGE, [3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0])
    );
    rings[1].add(&[(FREE, 20)], &[]);
    rig.notify(1);
    assert!(rings[1].used().is_some());
}

#[test]
fn memory_really_goes_back_to_the_host() {
    use vmkit_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let (rig, mut rings, _) = balloon(feature::REPORTING);
    let blocks = || {
        let region = rig.ram.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
    };
    fill(&rig, 1024);
    let before = blocks();
    rings[2].add(&[], &[(SPARE, 512 * PAGE as u32), (SPARE + 512 * PAGE, 512 * PAGE as u32)]);
    rig.notify(2);
    assert!(rings[2].used().is_some());
    // Blocks are of 512 bytes; the used ring has touched a page of its own.
    assert!(before - blocks() >= 1023 * 8);
    assert!(kept(&rig, 1024).is_empty());
}

#[test]
fn hints_count_only_in_their_round() {
    let features = feature::FREE_PAGE_HINT | feature::REPORTING;
    let (rig, mut rings, handle) = with(Balloon::new().hints(), features);
    fill(&rig, 4);
    let page = |n: u64| (SPARE + n * PAGE, PAGE as u32);
    let tell = |rings: &mut Vec<Ring>, round: Option<u32>, buffer: Option<u64>| {
        rig.write(FREE, &round.unwrap_or(0).to_le_bytes());
        let readable: Vec<_> = round.map(|_| (FREE, 4)).into_iter().collect();
        let writable: Vec<_> = buffer.map(page).into_iter().collect();
        rings[2].add(&readable, &writable);
        rig.notify(2);
        assert!(rings[2].used().is_some());
    };
    tell(&mut rings, None, Some(0));
    assert_eq!(kept(&rig, 4), [0, 1, 2, 3]);
    handle.ask_for_hints();
    assert_eq!(rig.config::<4>(8), [2, 0, 0, 0]);
    tell(&mut rings, Some(9), None);
    tell(&mut rings, None, Some(0));
    assert_eq!(kept(&rig, 4), [0, 1, 2, 3]);
    tell(&mut rings, Some(2), None);
    tell(&mut rings, None, Some(1));
    assert!(!handle.hinted());
    tell(&mut rings, Some(0), None);
    assert!(handle.hinted());
    tell(&mut rings, None, Some(2));
    assert_eq!(kept(&rig, 4), [0, 2, 3]);
    handle.end_hints();
    assert_eq!(rig.config::<4>(8), [1, 0, 0, 0]);
    // The reports' queue is the next.
    rings[3].add(&[], &[page(3)]);
    rig.notify(3);
    assert_eq!(kept(&rig, 4), [0, 2]);
}

#[test]
fn a_hinted_page_that_the_guest_uses_again_keeps_what_it_wrote() {
    let (rig, mut rings, handle) = balloon(feature::FREE_PAGE_HINT);
    handle.ask_for_hints();
    rig.write(FREE, &2_u32.to_le_bytes());
    // Linux takes a page back before it was told that the hint was taken.
    rings[2].add(&[(FREE, 4)], &[]);
    rings[2].add(&[], &[(SPARE, PAGE as u32)]);
    fill(&rig, 1);
    rig.notify(2);
    assert_eq!((kept(&rig, 1), handle.given()), (vec![0], 0));
    assert_eq!(rig.device_features() & feature::FREE_PAGE_HINT, 0);
}

#[test]
fn hints_of_an_earlier_round_neither_give_pages_nor_end_the_next() {
    let (rig, mut rings, handle) = with(Balloon::new().hints(), feature::FREE_PAGE_HINT);
    let mut tell = |said: Option<u32>| {
        rig.write(FREE, &said.unwrap_or(0).to_le_bytes());
        match said {
            Some(_) => rings[2].add(&[(FREE, 4)], &[]),
            None => rings[2].add(&[], &[(SPARE, PAGE as u32)]),
        };
        rig.notify(2);
        assert!(rings[2].used().is_some());
    };
    fill(&rig, 1);
    handle.ask_for_hints();
    tell(Some(2));
    handle.ask_for_hints();
    tell(None);
    assert_eq!(kept(&rig, 1), [0]);
    tell(Some(0));
    assert!(!handle.hinted());
    tell(Some(3));
    tell(None);
    assert!(kept(&rig, 1).is_empty());
    tell(Some(0));
    assert!(handle.hinted());
}

#[test]
fn a_round_ends_when_the_machine_is_loaded_and_the_driver_is_told() {
    let (rig, _rings, handle) = with(Balloon::new().hints(), feature::FREE_PAGE_HINT);
    handle.ask_for_hints();
    rig.device.pause();
    let sections = rig.sections();
    rig.set_reg(0x64, 3);
    rig.device.load(&sections).unwrap();
    rig.set_reg(0x64, 3);
    assert_eq!(rig.config::<4>(8), [1, 0, 0, 0]);
    let before = rig.reg(0xFC);
    rig.device.start().unwrap();
    assert_eq!((rig.reg(0x60), rig.reg(0xFC) != before, handle.hinted()), (2, true, false));
}

#[test]
fn no_hinted_page_is_given_back_after_the_end_of_its_round() {
    let (rig, mut rings, handle) = with(Balloon::new().hints(), feature::FREE_PAGE_HINT);
    handle.ask_for_hints();
    rig.write(FREE, &2_u32.to_le_bytes());
    rings[2].add(&[(FREE, 4)], &[]);
    fill(&rig, 1);
    rings[2].add(&[], &[(SPARE, PAGE as u32)]);
    std::thread::scope(|scope| {
        // The worker has seen that the round is wanted, and the page is the next.
        let giving = handle.shared.giving();
        let worker = scope.spawn(|| rig.notify(2));
        rings[2].wait_used();
        handle.shared.hint.store(HINT_DONE, Ordering::Release);
        drop(giving);
        worker.join().unwrap();
    });
    assert_eq!(kept(&rig, 1), [0]);
    assert_eq!(rings[2].used().unwrap().1, 0);
}

#[test]
fn pages_that_are_not_there_are_passed_over_and_odd_lengths_break_the_device() {
    let (rig, mut rings, handle) = balloon(feature::REPORTING);
    rig.write(FREE, &[0xFF; 64]);
    rings[0].add(&[(FREE, 64)], &[]);
    rig.notify(0);
    rings[2].add(&[], &[(u64::MAX - 5, 1 << 31), (1 << 40, 4096)]);
    rig.notify(2);
    assert_eq!((handle.given(), rig.is_broken()), (0, false));
    rings[0].add(&[(FREE, 63)], &[]);
    rig.notify(0);
    assert!(rig.is_broken());
    let (rig, mut rings, _) = balloon(0);
    rings[2].add(&[], &[(FREE, 4096)]);
    rig.notify(2);
    assert!(rig.is_broken(), "a queue that was not agreed on");
}

#[test]
fn state_is_saved_and_a_reset_empties_the_balloon() {
    let (rig, _rings, handle) = balloon(0);
    handle.set_target(1 << 20);
    let _ = rig.device.write(0, 0x104, &5_u32.to_le_bytes());
    rig.check_damaged_state();
    rig.set_reg(0x70, 0);
    assert_eq!((handle.actual(), handle.target()), (0, 1 << 20));
}

#[test]
fn a_turn_ends_after_so_many_pages_that_a_stop_need_not_wait_long() {
    let ram = allocate(&RamLayout::pc(16 << 20).unwrap(), Backing::Anonymous).unwrap();
    // The same page again and again, in as many numbers as a request may have.
    ram.write_slice(&[8; 4096 * 4], GuestAddress(0x8000)).unwrap();
    for (index, turns) in [(0, 3), (1, 0), (2, 3)] {
        let (queue, mut ring) = lone_queue(&ram, index, 64);
        ram.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
        for _ in 0..3 {
            if index == 2 {
                ring.add(&[], &[(0x10_0000, 8 << 20), (0x10_0000, 8 << 20)]);
            } else {
                ring.add(&[(0x8000, 4096 * 4)], &[]);
            }
        }
        let shared = Balloon::new().shared;
        let mut worker = BalloonWorker::new("balloon".into(), shared, None, Some(2));
        let mut queues = Queues::new(vec![queue]);
        for turn in 1..=turns {
            assert_eq!(worker.process(&mut queues, index).unwrap(), Progress::More);
            assert_eq!(ring.used_index(), turn, "{index}");
        }
        assert_eq!(worker.process(&mut queues, index).unwrap(), Progress::Drained);
        assert_eq!(ring.used_index(), 3);
    }
}
