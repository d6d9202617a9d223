//! Requests through io_uring: the same answers as one by one, whatever order they end in.

use std::os::unix::fs::FileExt;

use vmkit_memory::{Backing, RamLayout, allocate};

use super::*;
use crate::testing::{EVENT_IDX, FREE, INDIRECT, Rig, Ring, lone_queue};
use crate::{EventLoop, Mmio, Progress, Queues, WorkModel};

const SECTORS: u64 = 4096;
const DATA: u64 = FREE + 0x1_0000;
const ALL: u64 =
    feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES | feature::MQ | EVENT_IDX | INDIRECT;

/// A file whose sectors begin with their numbers.
fn image() -> File {
    let name = format!("vmkit-ring-{}-{:?}", std::process::id(), std::thread::current().id());
    let path = std::env::temp_dir().join(name);
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    let mut bytes = vec![0; (SECTORS * 512) as usize];
    for (number, sector) in (0_u64..).zip(bytes.chunks_mut(512)) {
        sector[..8].copy_from_slice(&number.to_le_bytes());
    }
    file.write_all_at(&bytes, 0).unwrap();
    file
}

/// A block device on a ring, or none where the host has no io_uring.
fn block(file: &File) -> Option<Block> {
    match Block::raw(file.try_clone().unwrap()).unwrap().engine(Engine::IoUring) {
        Ok(block) => Some(block),
        Err(error) => {
            eprintln!("ignored: {error}");
            None
        }
    }
}

/// Puts request `n` of a batch into the ring: a header, `len` bytes of data and a status, at places of
/// its own.
fn add(rig: &Rig, ring: &mut Ring, n: u64, (kind, sector): (u32, u64), len: u32) {
    let (header, status, data) = (FREE + n * 32, FREE + n * 32 + 16, DATA + n * 4096);
    rig.write(header, &[kind.to_le_bytes(), [0; 4]].concat());
    rig.write(header + 8, &sector.to_le_bytes());
    rig.write(status, &[0xEE]);
    match kind {
        0 => ring.add(&[(header, 16)], &[(data, len), (status, 1)]),
        1 => ring.add(&[(header, 16), (data, len)], &[(status, 1)]),
        _ => ring.add(&[(header, 16)], &[(status, 1)]),
    };
}

fn status(rig: &Rig, n: u64) -> u8 {
    rig.bytes(FREE + n * 32 + 16, 1)[0]
}

#[test]
fn requests_in_flight_together_are_all_answered() {
    let file = image();
    let models = [WorkModel::Thread, WorkModel::Inline, WorkModel::Loop(EventLoop::new().unwrap())];
    for model in models {
        let Some(block) = block(&file) else { return };
        let rig = Rig::new(Mmio::new(block.queue_size(64)).work(model.clone()));
        let mut ring = rig.activate(ALL, 64).remove(0);
        for round in 0..20_u64 {
            for n in 0..16 {
                let sector = (round * 131 + n * 17) % (SECTORS - 8);
                add(&rig, &mut ring, n, (0, sector), 4096);
            }
            rig.notify(0);
            for _ in 0..16 {
                let mut used = None;
                rig.wait("used buffer", || {
                    if let WorkModel::Loop(events) = &model {
                        events.process_ready().unwrap();
                    }
                    used = ring.used();
                    used.is_some()
                });
                assert_eq!(used.unwrap().1, 4097);
            }
            for n in 0..16 {
                let sector = (round * 131 + n * 17) % (SECTORS - 8);
                assert_eq!(status(&rig, n), 0);
                assert_eq!(rig.bytes(DATA + n * 4096, 8), sector.to_le_bytes());
                assert_eq!(rig.bytes(DATA + n * 4096 + 3584, 8), (sector + 7).to_le_bytes());
            }
        }
    }
}

#[test]
fn writes_and_flushes_reach_the_file_also_for_a_driver_that_cannot_flush() {
    for features in [ALL, ALL & !feature::FLUSH] {
        let file = image();
        let Some(block) = block(&file) else { return };
        let rig = Rig::new(Mmio::new(block));
        let mut ring = rig.activate(features, 64).remove(0);
        for n in 0..8 {
            rig.write(DATA + n * 4096, &[n as u8 + 1; 4096]);
            add(&rig, &mut ring, n, (1, n * 8), 4096);
        }
        rig.notify(0);
        for _ in 0..8 {
            assert_eq!(ring.wait_used().1, 1);
        }
        add(&rig, &mut ring, 9, (4, 0), 0);
        rig.notify(0);
        assert_eq!((ring.wait_used().1, status(&rig, 9)), (1, 0));
        for n in 0..8_u64 {
            let mut found = [0; 4096];
            file.read_exact_at(&mut found, n * 4096).unwrap();
            assert_eq!(found, [n as u8 + 1; 4096]);
        }
    }
}

#[test]
fn what_may_not_be_done_is_answered_as_without_a_ring() {
    let file = image();
    let Some(block) = block(&file) else { return };
    let rig = Rig::new(Mmio::new(block.serial("ring").read_only()));
    let mut ring = rig.activate(ALL | feature::RO, 64).remove(0);
    let cases = [
        ((0, SECTORS), 512, 1),
        ((0, u64::MAX), 512, 1),
        ((0, 0), 100, 1),
        ((1, 0), 512, 1),
        ((99, 0), 0, 2),
        ((11, 0), 0, 2),
        ((0, SECTORS - 1), 512, 0),
    ];
    for (n, (request, len, expected)) in (0..).zip(cases) {
        add(&rig, &mut ring, n, request, len);
        rig.notify(0);
        ring.wait_used();
        assert_eq!(status(&rig, n), expected, "{request:?}");
    }
    ring.add(&[(FREE, 16)], &[(crate::testing::RAM - 256, 512), (FREE + 16, 1)]);
    rig.write(FREE, &[0; 16]);
    rig.notify(0);
    rig.wait("broken device", || rig.is_broken());
}

#[test]
fn a_file_that_shrank_gives_an_error_and_not_half_an_answer() {
    let file = image();
    let Some(block) = block(&file) else { return };
    let rig = Rig::new(Mmio::new(block));
    let mut ring = rig.activate(ALL, 64).remove(0);
    file.set_len(1024).unwrap();
    add(&rig, &mut ring, 0, (0, 0), 4096);
    rig.notify(0);
    assert_eq!((ring.wait_used().1, status(&rig, 0)), (1, 1));
}

#[test]
fn after_a_pause_nothing_is_in_flight_and_a_reset_leaves_memory_alone() {
    let file = image();
    let Some(block) = block(&file) else { return };
    let rig = Rig::new(Mmio::new(block));
    for round in 0..50_u64 {
        let mut ring = rig.activate(ALL, 64).remove(0);
        for n in 0..20 {
            add(&rig, &mut ring, n, (0, n * 8), 4096);
        }
        rig.notify(0);
        if round % 2 == 0 {
            rig.device.pause();
            let before = rig.bytes(FREE, 0x4_0000);
            let taken = std::iter::from_fn(|| ring.used()).count();
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(before == rig.bytes(FREE, 0x4_0000), "memory changes during a pause");
            assert!(ring.used().is_none());
            rig.device.start().unwrap();
            for _ in taken..20 {
                assert_eq!(ring.wait_used().1, 4097);
            }
        } else {
            rig.set_reg(0x70, 0);
            let zeros = vec![0; 0x4_0000];
            rig.write(FREE, &zeros);
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(rig.bytes(FREE, 0x4_0000) == zeros, "memory changes after a reset");
        }
    }
}

#[test]
fn a_request_that_cannot_be_answered_leaves_no_other_in_flight_after_a_pause() {
    if block(&image()).is_none() {
        return;
    }
    // Reads from a pipe end when somebody writes to it.
    let (from, mut to) = std::io::pipe().unwrap();
    let mut piped = Block::memory(vec![0; (SECTORS * 512) as usize]).unwrap();
    piped.file = Some(File::from(std::os::fd::OwnedFd::from(from)));
    piped.engine = Engine::IoUring;
    let events = EventLoop::new().unwrap();
    let rig = Rig::new(Mmio::new(piped).work(WorkModel::Loop(events.clone())));
    let mut ring = rig.activate(ALL, 64).remove(0);
    for n in 0..3 {
        let nowhere = crate::testing::RAM + 0x1000;
        rig.write(FREE + n * 32, &[0; 16]);
        ring.add(&[(FREE + n * 32, 16)], &[(DATA + n * 4096, 512), (nowhere, 1)]);
    }
    rig.notify(0);
    events.process_ready().unwrap();
    let writer = std::thread::spawn(move || {
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(30));
            std::io::Write::write_all(&mut to, &[7; 512]).unwrap();
        }
    });
    rig.device.pause();
    assert!(rig.is_broken());
    for n in 0..3 {
        assert_eq!(rig.bytes(DATA + n * 4096, 512), [7; 512], "request {n} is still in flight");
    }
    writer.join().unwrap();
}

#[test]
fn only_raw_images_have_a_ring() {
    let memory = Block::memory(vec![0; 4096]).unwrap().engine(Engine::IoUring);
    assert!(matches!(memory, Err(DeviceError::Config { .. })));
}

#[test]
fn a_turn_ends_after_so_much_work_that_a_stop_need_not_wait_long() {
    let file = image();
    let Some(_) = block(&file) else { return };
    let ram = allocate(&RamLayout::pc(16 << 20).unwrap(), Backing::Anonymous).unwrap();
    let (queue, mut ring) = lone_queue(&ram, 0, 64);
    for _ in 0..20 {
        // All of the disk, two mebibytes.
        ring.add(&[(0x4000, 16)], &[(0x10_0000, 2 << 20), (0x4100, 1)]);
    }
    let clock: Arc<dyn vmkit_device::Clock> = Arc::new(vmkit_device::ManualClock::default());
    let limiter = Limiter::new(&Budget::new(RateLimit::new()), &clock).unwrap();
    let disk = Arc::new(FileDisk::new(file.try_clone().unwrap(), None).unwrap());
    let target = RequestTarget::new("disk".into(), disk, 0, false, [0; SERIAL_LEN]);
    let mut worker = RingWorker::new((0, 64), target, limiter, file, ram.clone()).unwrap();
    let mut queues = Queues::new(vec![queue]);
    for (begun, progress) in [(8, Progress::More), (16, Progress::More), (20, Progress::Drained)] {
        assert_eq!(worker.process(&mut queues, 0).unwrap(), progress);
        assert_eq!(queues.get(0).unwrap().positions().0, begun);
    }
    worker.quiesce(&mut queues).unwrap();
    assert_eq!(ring.used_index(), 20);
}

#[test]
fn a_slow_disk_has_no_more_bytes_in_flight_than_a_stop_can_wait_for() {
    if block(&image()).is_none() {
        return;
    }
    // What is never written to is slower than any disk.
    let (reader, writer) = std::io::pipe().unwrap();
    let file = File::from(std::os::fd::OwnedFd::from(reader));
    let ram = allocate(&RamLayout::pc(32 << 20).unwrap(), Backing::Anonymous).unwrap();
    let (queue, mut ring) = lone_queue(&ram, 0, 64);
    for _ in 0..10 {
        ring.add(&[(0x4000, 16)], &[(0x10_0000, 16 << 20), (0x4100, 1)]);
    }
    let clock: Arc<dyn vmkit_device::Clock> = Arc::new(vmkit_device::ManualClock::default());
    let limiter = Limiter::new(&Budget::new(RateLimit::new()), &clock).unwrap();
    let disk = Arc::new(MemoryDisk::new(vec![0; 16 << 20]));
    let target = RequestTarget::new("slow".into(), disk, 0, false, [0; SERIAL_LEN]);
    let mut worker = RingWorker::new((0, 64), target, limiter, file, ram.clone()).unwrap();
    // Dropped before the worker, which waits for what is in flight.
    let writer = writer;
    let mut queues = Queues::new(vec![queue]);
    let turns = (0..9).map(|_| worker.process(&mut queues, 0).unwrap());
    assert_eq!(turns.filter(|turn| *turn == Progress::Waiting).count(), 5);
    assert_eq!((queues.get(0).unwrap().positions().0, ring.used_index()), (4, 0));
    // All fail now, and those that waited have their turn.
    drop(writer);
    worker.quiesce(&mut queues).unwrap();
    assert_eq!(ring.used_index(), 4);
    while worker.process(&mut queues, 0).unwrap() != Progress::Drained {}
    worker.quiesce(&mut queues).unwrap();
    assert_eq!(ring.used_index(), 10);
}
