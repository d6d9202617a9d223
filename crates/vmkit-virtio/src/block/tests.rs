use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmkit_memory::{Backing, Bytes, GuestAddress, GuestBuffers, RamLayout, allocate};

use super::*;
use crate::testing::{EVENT_IDX, FREE, INDIRECT, Rig, Ring, lone_queue};
use crate::{Mmio, Progress, Queues, WorkModel};

const HEADER: u64 = FREE;
const STATUS: u64 = FREE + 0x100;
const DATA: u64 = FREE + 0x1000;
const ALL: u64 =
    feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES | feature::MQ | feature::RO;

fn disk_file(sectors: usize) -> File {
    let path = std::env::temp_dir().join(format!(
        "vmkit-block-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8 + 1; 512]).unwrap();
    }
    file
}

fn rig(block: Block) -> (Rig, Ring) {
    let rig = Rig::new(Mmio::new(block).work(WorkModel::Inline));
    let ring = rig.activate(ALL, 16).remove(0);
    (rig, ring)
}

fn header(rig: &Rig, kind: u32, sector: u64) {
    rig.write(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
    rig.write(HEADER + 8, &sector.to_le_bytes());
    rig.write(STATUS, &[0xEE]);
}

/// Makes one request and returns its status and how much was written.
fn request(
    (rig, ring): &mut (Rig, Ring),
    kind: u32,
    sector: u64,
    out: &[(u64, u32)],
    into: &[(u64, u32)],
) -> (u8, u32) {
    header(rig, kind, sector);
    let readable = [&[(HEADER, 16)], out].concat();
    let writable = [into, &[(STATUS, 1)]].concat();
    ring.add(&readable, &writable);
    rig.notify(0);
    let (_, written) = ring.wait_used();
    (rig.bytes(STATUS, 1)[0], written)
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn a_file_is_read_written_and_identified() {
    let mut file = disk_file(8);
    let mut disk = rig(Block::raw(file.try_clone().unwrap()).unwrap().serial("vmkit-test"));
    assert_eq!(u64::from_le_bytes(disk.0.config(0)), 8);
    assert_eq!(request(&mut disk, 0, 2, &[], &[(DATA, 512), (DATA + 0x1000, 512)]), (0, 1025));
    assert_eq!(disk.0.bytes(DATA, 512), [3; 512]);
    assert_eq!(disk.0.bytes(DATA + 0x1000, 512), [4; 512]);
    disk.0.write(DATA, &[0x77; 1024]);
    assert_eq!(request(&mut disk, 1, 6, &[(DATA, 1024)], &[]), (0, 1));
    assert_eq!(request(&mut disk, 4, 0, &[], &[]), (0, 1));
    let mut found = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut found).unwrap();
    assert_eq!((&found[6 * 512..], found.len()), (&[0x77; 1024][..], 4096));
    assert_eq!(request(&mut disk, 8, 0, &[], &[(DATA, 20)]), (0, 21));
    assert_eq!(&disk.0.bytes(DATA, 12), b"vmkit-test\0\0");
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn headers_and_status_may_share_buffers_with_data() {
    let mut disk = rig(Block::raw(disk_file(2)).unwrap());
    header(&disk.0, 0, 1);
    // Header in three pieces, data and status in one.
    disk.1.add(&[(HEADER, 1), (HEADER + 1, 10), (HEADER + 11, 5)], &[(DATA, 513)]);
    disk.0.notify(0);
    assert_eq!(disk.1.wait_used().1, 513);
    assert_eq!(disk.0.bytes(DATA, 513), [&[2; 512][..], &[0]].concat());
}

#[test]
fn what_lies_outside_of_the_disk_is_an_error_however_it_overflows() {
    let mut disk = rig(Block::memory(vec![9; 8 * 512]).unwrap());
    for sector in [8, 7, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(request(&mut disk, 0, sector, &[], &[(DATA, 1024)]), (1, 1), "{sector:#x}");
        assert_eq!(request(&mut disk, 1, sector, &[(DATA, 1024)], &[]), (1, 1), "{sector:#x}");
    }
    assert_eq!(request(&mut disk, 0, 0, &[], &[(DATA, 100)]), (1, 1), "part of a sector");
    assert_eq!(request(&mut disk, 0, 7, &[], &[(DATA, 512)]), (0, 513));
    assert!(!disk.0.is_broken());
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn unknown_requests_and_flags_are_unsupported() {
    let mut disk = rig(Block::raw(disk_file(64)).unwrap());
    for kind in [2, 3, 5, 12, 14, 99, u32::MAX] {
        assert_eq!(request(&mut disk, kind, 0, &[], &[]), (2, 1), "{kind}");
    }
    let range = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    for (kind, flags) in [(11, 1), (11, 2), (13, 2), (13, u32::MAX)] {
        disk.0.write(DATA, &range(0, 1, flags));
        assert_eq!(request(&mut disk, kind, 0, &[(DATA, 16)], &[]), (2, 1));
    }
    for (sector, count, len) in
        [(63, 2, 16), (u64::MAX, 1, 16), (0, u32::MAX, 16), (0, 1, 15), (0, 1, 0), (0, 1, 17 * 16)]
    {
        disk.0.write(DATA, &[0; 17 * 16]);
        disk.0.write(DATA, &range(sector, count, 0));
        for kind in [11, 13] {
            assert_eq!(
                request(&mut disk, kind, 0, &[(DATA, len)], &[]),
                (1, 1),
                "{sector} {count}"
            );
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    let file = disk_file(64);
    let mut disk = rig(Block::raw(file).unwrap());
    let ranges = [(8_u64, 8_u32, 1_u32), (24, 1, 0)];
    for (n, (sector, count, flags)) in ranges.into_iter().enumerate() {
        let at = DATA + n as u64 * 16;
        disk.0.write(at, &sector.to_le_bytes());
        disk.0.write(at + 8, &[count.to_le_bytes(), flags.to_le_bytes()].concat());
    }
    assert_eq!(request(&mut disk, 13, 0, &[(DATA, 32)], &[]), (0, 1));
    assert_eq!(request(&mut disk, 0, 0, &[], &[(DATA, 64 * 512)]).0, 0);
    let found = disk.0.bytes(DATA, 64 * 512);
    for (sector, bytes) in found.chunks(512).enumerate() {
        let zero = (8..16).contains(&sector) || sector == 24;
        assert_eq!(bytes[0], if zero { 0 } else { sector as u8 + 1 }, "{sector}");
    }
    disk.0.write(DATA, &[32_u64.to_le_bytes(), [8, 0, 0, 0, 0, 0, 0, 0]].concat());
    assert_eq!(request(&mut disk, 11, 0, &[(DATA, 16)], &[]), (0, 1));
    assert_eq!(request(&mut disk, 0, 32, &[], &[(DATA, 512)]).0, 0);
    assert_eq!(disk.0.bytes(DATA, 512), [0; 512]);
}

#[test]
fn a_read_only_disk_refuses_writes_whatever_the_driver_accepted() {
    let rig = Rig::new(
        Mmio::new(Block::memory(vec![9; 4096]).unwrap().read_only()).work(WorkModel::Inline),
    );
    assert_ne!(rig.device_features() & feature::RO, 0);
    for features in [ALL, 0] {
        let ring = rig.activate(features, 16).remove(0);
        let mut disk = (rig.share(), ring);
        assert_eq!(request(&mut disk, 1, 0, &[(DATA, 512)], &[]), (1, 1));
        assert_eq!(request(&mut disk, 0, 0, &[], &[(DATA + 0x1000, 512)]), (0, 513));
        assert_eq!(disk.0.bytes(DATA + 0x1000, 1), [9]);
    }
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn several_queues_work_at_once_on_their_own_threads() {
    let block = Block::raw(disk_file(64)).unwrap().queues(4);
    let rig = Rig::new(Mmio::new(block));
    let mut rings = rig.activate(ALL | EVENT_IDX | INDIRECT, 16);
    assert_eq!((rings.len(), u16::from_le_bytes(rig.config(34))), (4, 4));
    for (n, ring) in rings.iter_mut().enumerate() {
        let at = FREE + n as u64 * 0x10000;
        rig.write(at, &[0; 16]);
        rig.write(at + 8, &(n as u64 * 8).to_le_bytes());
        for k in 0..3 {
            ring.add(&[(at, 16)], &[(at + 0x1000 * (k + 1), 4096), (at + 0x100 + k, 1)]);
        }
        rig.notify(n as u16);
    }
    for (n, ring) in rings.iter_mut().enumerate() {
        for k in 0..3 {
            assert_eq!(ring.wait_used().1, 4097);
            let at = FREE + n as u64 * 0x10000 + 0x1000 * (k + 1);
            assert_eq!(rig.bytes(at, 1), [n as u8 * 8 + 1]);
        }
    }
}

/// A disk that cannot settle while told so.
struct Unsettled(Arc<AtomicBool>);

impl Disk for Unsettled {
    fn bytes(&self) -> u64 {
        4096
    }
    fn read(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        Ok(())
    }
    fn settle(&self) -> std::io::Result<()> {
        if self.0.load(Ordering::SeqCst) {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

#[test]
fn a_disk_that_cannot_settle_cannot_be_saved_until_it_can() {
    let full = Arc::new(AtomicBool::new(true));
    let rig = Rig::new(Mmio::new(Block::disk(Unsettled(full.clone())).unwrap()));
    rig.device.pause();
    match rig.device.save() {
        Saved::Cannot(reason) => assert!(reason.contains("image"), "{reason}"),
        other => panic!("saved: {other:?}"),
    }
    full.store(false, Ordering::SeqCst);
    assert!(matches!(rig.device.save(), Saved::Sections(_)));
}

/// A disk whose reads wait until they are let go.
struct Gate(Arc<AtomicBool>, Arc<AtomicBool>);

impl Disk for Gate {
    fn bytes(&self) -> u64 {
        1 << 20
    }
    fn read(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        self.0.store(true, Ordering::SeqCst);
        while !self.1.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
    fn write(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        Err(std::io::ErrorKind::StorageFull.into())
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_reset_during_io_waits_for_it_and_leaves_memory_alone_afterwards() {
    let (entered, open) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
    let rig = Rig::new(Mmio::new(Block::disk(Gate(entered.clone(), open.clone())).unwrap()));
    let mut ring = rig.activate(ALL, 16).remove(0);
    header(&rig, 0, 0);
    for _ in 0..4 {
        ring.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    }
    rig.notify(0);
    rig.wait("read in flight", || entered.load(Ordering::SeqCst));
    std::thread::scope(|scope| {
        let resetter = scope.spawn(|| rig.set_reg(0x70, 0));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!resetter.is_finished(), "the reset did not wait");
        open.store(true, Ordering::SeqCst);
    });
    assert_eq!((rig.status(), rig.reg(0x60), rig.wires.high()), (0, 0, false));
    rig.write(STATUS, &[0xEE]);
    while ring.used().is_some() {}
    rig.notify(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((ring.used(), rig.bytes(STATUS, 1)), (None, vec![0xEE]));
}

#[test]
fn a_host_error_is_the_guests_io_error() {
    let (entered, open) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
    let mut disk = rig(Block::disk(Gate(entered, open)).unwrap());
    assert_eq!(request(&mut disk, 1, 0, &[(DATA, 512)], &[]), (1, 1));
    assert!(!disk.0.is_broken());
}

#[test]
fn requests_without_room_for_a_status_or_header_break_the_device() {
    for (readable, writable) in [(&[(HEADER, 16)][..], &[][..]), (&[(HEADER, 15)], &[(STATUS, 1)])]
    {
        let (rig, mut ring) = rig(Block::memory(vec![0; 4096]).unwrap());
        ring.add(readable, writable);
        rig.notify(0);
        assert!(rig.is_broken());
        assert_eq!(ring.used(), None);
    }
}

#[test]
#[cfg_attr(miri, ignore = "a timer of the host")]
fn a_limited_disk_goes_on_with_guest_time_and_also_after_a_reset() {
    let limit = RateLimit::new().operations(100).bytes(1 << 20).burst(Duration::ZERO);
    let block = Block::memory(vec![0; 1 << 20]).unwrap().limit(limit);
    let rig = Rig::new(Mmio::new(block));
    let mut ring = rig.activate(ALL, 16).remove(0);
    header(&rig, 0, 0);
    for _ in 0..3 {
        ring.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    }
    rig.notify(0);
    assert_eq!(ring.wait_used().1, 513);
    // While guest time stands still, nothing is saved up.
    std::thread::sleep(Duration::from_millis(40));
    assert_eq!(ring.used(), None);
    rig.clock.advance(Duration::from_millis(9));
    rig.device.pause();
    rig.device.start().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used(), None);
    rig.clock.advance(Duration::from_millis(1));
    assert_eq!(ring.wait_used().1, 513);
    // 256 KiB take a quarter of a second.
    rig.clock.advance(Duration::from_secs(1));
    assert_eq!(ring.wait_used().1, 513);
    ring.add(&[(HEADER, 16)], &[(DATA, 256 << 10), (STATUS, 1)]);
    rig.clock.advance(Duration::from_secs(1));
    rig.notify(0);
    assert_eq!(ring.wait_used().1, (256 << 10) + 1);
    let mut ring = rig.activate(ALL, 16).remove(0);
    rig.clock.advance(Duration::from_millis(249));
    ring.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    rig.notify(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used(), None);
    rig.clock.advance(Duration::from_millis(2));
    assert_eq!(ring.wait_used().1, 513);
}

#[test]
fn saved_state_goes_on_and_fits_only_a_disk_like_it() {
    let block = || Block::memory(vec![5; 4096]).unwrap().serial("a");
    let mut disk = rig(block());
    assert_eq!(request(&mut disk, 0, 0, &[], &[(DATA, 512)]), (0, 513));
    header(&disk.0, 0, 1);
    disk.1.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    disk.0.check_damaged_state();
    disk.0.device.pause();
    let saved = disk.0.sections();
    let other = Rig::new(Mmio::new(block()));
    other.device.pause();
    // The other machine has the same memory.
    let all = disk.0.bytes(0, crate::testing::RAM as usize);
    other.write(0, &all);
    other.device.load(&saved).unwrap();
    assert_eq!(other.sections(), saved);
    other.device.start().unwrap();
    other.wait("request of before", || other.bytes(STATUS, 1) == [0]);
    let another = Rig::new(Mmio::new(block().serial("b")));
    another.device.pause();
    let error = another.device.load(&saved).unwrap_err();
    assert!(error.to_string().contains("another disk"), "{error}");
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn an_image_in_use_is_refused() {
    let path = std::env::temp_dir().join(format!("vmkit-lock-{}", std::process::id()));
    std::fs::write(&path, [0; 512]).unwrap();
    let first = Block::file(&path).unwrap();
    assert!(matches!(Block::read_only_file(&path), Err(DeviceError::Host { .. })));
    drop(first);
    let readers = (Block::read_only_file(&path).unwrap(), Block::read_only_file(&path).unwrap());
    assert!(Block::file(&path).is_err());
    drop(readers);
    std::fs::write(&path, [0; 511]).unwrap();
    assert!(matches!(Block::file(&path), Err(DeviceError::Config { .. })));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_range_to_zero_is_no_longer_than_the_driver_was_told() {
    let mut disk = rig(Block::disk(Hollow).unwrap());
    let most = u32::from_le_bytes(disk.0.config(48));
    assert_eq!(u64::from(most) * 512, 16 << 20);
    for (count, status) in [(most, 0), (most + 1, 1)] {
        disk.0.write(DATA, &[&[0; 8], &count.to_le_bytes()[..], &[0; 4]].concat());
        assert_eq!(request(&mut disk, 13, 0, &[(DATA, 16)], &[]), (status, 1));
    }
}

/// A disk of a tebibyte with nothing in it.
struct Hollow;

impl Disk for Hollow {
    fn bytes(&self) -> u64 {
        1 << 40
    }
    fn read(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn zeroes_are_durable_for_a_driver_that_cannot_flush() {
    #[derive(Default)]
    struct Flushes(Arc<std::sync::atomic::AtomicU32>);
    impl Disk for Flushes {
        fn bytes(&self) -> u64 {
            1 << 20
        }
        fn read(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
            Ok(())
        }
        fn write(&self, _: u64, _: &mut GuestBuffers<'_>) -> std::io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> std::io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
            Ok(())
        }
    }
    for (features, flushes) in [(ALL, 0), (ALL & !feature::FLUSH, 1)] {
        let disk = Flushes::default();
        let count = disk.0.clone();
        let rig = Rig::new(Mmio::new(Block::disk(disk).unwrap()).work(WorkModel::Inline));
        let ring = rig.activate(features, 16).remove(0);
        let mut disk = (rig, ring);
        let range = [&[0; 8][..], &[1, 0, 0, 0], &[0; 4]].concat();
        disk.0.write(DATA, &[range.clone(), range].concat());
        assert_eq!(request(&mut disk, 13, 0, &[(DATA, 32)], &[]), (0, 1));
        assert_eq!(count.load(Ordering::SeqCst), flushes);
    }
}

#[test]
#[cfg_attr(miri, ignore = "files")]
fn what_the_host_cannot_do_to_a_range_is_done_otherwise() {
    let disk = super::disk::FileDisk::new(disk_file(8), None).unwrap();
    // Empty ranges get the answer that parts of a block get from a block device.
    disk.discard(0, 0).unwrap();
    disk.write_zeroes(0, 0, true).unwrap();
    disk.write_zeroes(0, 0, false).unwrap();
}

#[test]
fn a_driver_that_keeps_to_what_it_was_told_makes_no_request_that_is_too_large() {
    for entries in [4, 64, 256, 1024, 1 << 15] {
        let block = Block::memory(vec![0; 512]).unwrap().queue_size(entries);
        assert_ne!(VirtioDevice::features(&block) & feature::SIZE_MAX, 0);
        let config = block.config();
        let word = |at: usize| u64::from(u32::from_le_bytes(*config[at..].first_chunk().unwrap()));
        assert!(word(8) >= 4096 && word(8) * word(12) <= MOST_BYTES, "{entries}");
        assert!(entries > 256 || word(8) == 1 << 20);
    }
}

#[test]
fn bytes_that_are_zeroed_without_a_buffer_count_to_a_limit() {
    let limit = RateLimit::new().bytes(1 << 20).burst(Duration::ZERO);
    let block = Block::disk(Hollow).unwrap().limit(limit);
    // No time for a thread to find the timer.
    let events = crate::EventLoop::new().unwrap();
    let rig = Rig::new(Mmio::new(block).work(WorkModel::Loop(events.clone())));
    let mut ring = rig.activate(ALL, 16).remove(0);
    rig.clock.advance(Duration::from_secs(1));
    header(&rig, 13, 0);
    rig.write(DATA, &[&[0; 8], &(1_u32 << 14).to_le_bytes()[..], &[0; 4]].concat());
    for _ in 0..2 {
        ring.add(&[(HEADER, 16), (DATA, 16)], &[(STATUS, 1)]);
    }
    let turn = || (0..10).for_each(|_| assert!(events.process_ready().unwrap() < 10));
    rig.notify(0);
    turn();
    assert_eq!((ring.used().is_some(), ring.used()), (true, None));
    // 8 MiB take eight seconds. A notification has it look again.
    rig.clock.advance(Duration::from_millis(7_990));
    rig.notify(0);
    turn();
    assert_eq!(ring.used(), None);
    rig.clock.advance(Duration::from_millis(20));
    rig.notify(0);
    turn();
    assert!(ring.used().is_some());
    // What is discarded costs nothing.
    header(&rig, 11, 0);
    rig.clock.advance(Duration::from_secs(9));
    for _ in 0..2 {
        ring.add(&[(HEADER, 16), (DATA, 16)], &[(STATUS, 1)]);
    }
    rig.notify(0);
    turn();
    assert!(ring.used().is_some());
    rig.clock.advance(Duration::from_millis(1));
    rig.notify(0);
    turn();
    assert!(ring.used().is_some());
}

#[test]
fn a_turn_ends_after_so_much_work_that_a_stop_need_not_wait_long() {
    const MIB: u32 = 1 << 20;
    let ram = allocate(&RamLayout::pc(16 << 20).unwrap(), Backing::Anonymous).unwrap();
    let put = |at, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(at)).unwrap();
    let range = |count: u32| [&[0; 8], &count.to_le_bytes()[..], &[0; 4]].concat();
    let ranges = [range(1 << 14), range(1 << 14)].concat();
    let features = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
    // Kind, bytes of data, whether the driver can flush, and how many requests make a turn.
    for (kind, len, features, each) in [
        (0, 4 * MIB, features, 4),
        (1, 4 * MIB, features, 4),
        (1, 512, features, 12),
        (1, 512, 0, 4),
        (4, 0, features, 4),
        (11, 32, features, 1),
        (13, 32, features, 1),
        (13, 32, features & !feature::FLUSH, 1),
    ] {
        let (queue, mut ring) = lone_queue(&ram, 0, 64);
        put(0x1000, &[0; 0x3000]);
        put(0x4000, &[kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        put(0x5000, &ranges);
        for _ in 0..12 {
            let data = [(0x5000, len)];
            let data = if len == 0 { &[][..] } else { &data };
            let (status, header) = ([(0x4100, 1)], [(0x4000, 16)]);
            if kind == 0 {
                ring.add(&header, &[data, &status].concat());
            } else {
                ring.add(&[&header, data].concat(), &status);
            }
        }
        let clock: Arc<dyn vmkit_device::Clock> = Arc::new(vmkit_device::ManualClock::default());
        let limiter = Limiter::new(&Budget::new(RateLimit::new()), &clock).unwrap();
        let disk = Arc::new(Hollow);
        let target = RequestTarget::new("hollow".into(), disk, features, false, [0; SERIAL_LEN]);
        let (mut worker, mut queues) =
            (BlockWorker::new(0, target, limiter), Queues::new(vec![queue]));
        for turn in 1..=12 / each {
            let progress = worker.process(&mut queues, 0).unwrap();
            let more = if each == 12 { Progress::Drained } else { Progress::More };
            assert_eq!((progress, ring.used_index()), (more, each * turn), "{kind}");
        }
        assert_eq!(worker.process(&mut queues, 0).unwrap(), Progress::Drained);
        let mut status = [9];
        ram.read_slice(&mut status, GuestAddress(0x4100)).unwrap();
        assert_eq!(status, [0], "{kind}");
    }
}
