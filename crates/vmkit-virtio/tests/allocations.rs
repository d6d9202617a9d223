//! A request in steady state allocates nothing, whatever the device.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::Read;

use vmkit_testkit::alloc::{Counting, counted};
use vmkit_virtio::testing::{EVENT_IDX, FREE, INDIRECT, Rig, Ring};
use vmkit_virtio::{
    Balloon, Block, Console, Engine, Mmio, Net, Pmem, RateLimit, Rng, Switch, Vsock, WorkModel,
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Makes requests until the device has all it needs, then counts what a hundred more allocate on
/// this thread, which does the device's work.
fn allocations(rig: &Rig, mut request: impl FnMut(&Rig)) -> u64 {
    for _ in 0..400 {
        request(rig);
    }
    let ((), made) = counted(|| (0..100).for_each(|_| request(rig)));
    assert!(!rig.is_broken());
    made.allocations
}

fn inline(builder: Mmio) -> (Rig, Vec<Ring>) {
    let rig = Rig::new(builder.work(WorkModel::Inline));
    let rings = rig.activate(EVENT_IDX | INDIRECT | u64::from(u32::MAX), 64);
    (rig, rings)
}

#[test]
fn block_requests_allocate_nothing() {
    let path = std::env::temp_dir().join(format!("vmkit-allocations-{}", std::process::id()));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    for block in [Block::memory(vec![0; 1 << 20]).unwrap(), Block::file(&path).unwrap()] {
        let (rig, mut rings) = inline(Mmio::new(block));
        let mut kind = 0;
        let made = allocations(&rig, |rig| {
            kind ^= 1;
            rig.write(FREE, &[kind, 0, 0, 0]);
            let data = [(FREE + 0x1000, 4096), (FREE + 0x4000, 4096)];
            if kind == 1 {
                rings[0].add(&[(FREE, 16), data[0], data[1]], &[(FREE + 0x100, 1)]);
            } else {
                rings[0].add(&[(FREE, 16)], &[data[0], data[1], (FREE + 0x100, 1)]);
            }
            rig.notify(0);
            assert!(rings[0].used().is_some());
        });
        assert_eq!(made, 0);
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn requests_through_io_uring_allocate_nothing() {
    let path = std::env::temp_dir().join(format!("vmkit-ring-allocations-{}", std::process::id()));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let block = Block::file(&path).unwrap().limit(RateLimit::new().bytes(1 << 50));
    std::fs::remove_file(path).unwrap();
    let block = match block.engine(Engine::IoUring) {
        Ok(block) => block,
        Err(error) => return eprintln!("ignored: {error}"),
    };
    let (rig, mut rings) = inline(Mmio::new(block));
    let made = allocations(&rig, |rig| {
        rig.clock.advance(std::time::Duration::from_secs(1));
        rig.write(FREE, &[0; 16]);
        for n in 0..4 {
            rings[0].add(&[(FREE, 16)], &[(FREE + 0x1000 * (n + 1), 4096), (FREE + 0x100 + n, 1)]);
        }
        rig.notify(0);
        // The kernel may be done a little later, on the device's own thread.
        for _ in 0..4 {
            assert_eq!(rings[0].wait_used().1, 4097);
        }
    });
    assert_eq!(made, 0);
}

#[test]
fn packets_of_a_socket_allocate_nothing() {
    let mut vsock = Vsock::new(3).unwrap();
    let listener = vsock.listen(52);
    let (rig, mut rings) = inline(Mmio::new(vsock));
    let packet = |op: u16, len: u32| {
        let addresses = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
        let ports = [1000_u32.to_le_bytes(), 52_u32.to_le_bytes(), len.to_le_bytes()].concat();
        let kind = [1_u16.to_le_bytes(), op.to_le_bytes()].concat();
        [addresses, ports, kind, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0].to_vec()].concat()
    };
    let mut lent = 0;
    let mut lend = |rings: &mut Vec<Ring>| {
        lent += 1;
        rings[0].add(&[], &[(FREE + 0x1_0000 + lent % 32 * 0x1000, 4096)]);
    };
    (0..16).for_each(|_| lend(&mut rings));
    rig.notify(0);
    rig.write(FREE, &packet(1, 0));
    rings[1].add(&[(FREE, 44)], &[]);
    rig.notify(1);
    assert_eq!(rings[0].wait_used().1, 44, "accepted");
    let mut stream = listener.accept().unwrap();
    rig.write(FREE, &packet(5, 256));
    let mut found = [0; 256];
    let made = allocations(&rig, |rig| {
        rings[1].add(&[(FREE, 44), (FREE + 0x100, 256)], &[]);
        rig.notify(1);
        assert!(rings[1].used().is_some());
        stream.read_exact(&mut found).unwrap();
        // Now and then the guest is told of its credit.
        while rings[0].used().is_some() {
            lend(&mut rings);
        }
    });
    assert_eq!(made, 0);
}

/// A driver that polls asks for no interrupt and gets none; one that wants them gets one for a batch.
#[test]
fn a_busy_queue_costs_no_interrupts() {
    for polls in [false, true] {
        let block = Block::memory(vec![0; 1 << 20]).unwrap();
        let rig = Rig::new(Mmio::new(block).work(WorkModel::Inline));
        let mut ring = rig.activate(EVENT_IDX, 64).remove(0);
        rig.write(FREE, &[0; 16]);
        let mut served = 0_u16;
        for _ in 0..100 {
            ring.set_used_event(served.wrapping_add(if polls { 0x8000 } else { 15 }));
            for n in 0..16 {
                ring.add(&[(FREE, 16)], &[(FREE + 0x1000, 512), (FREE + 0x100 + n, 1)]);
            }
            rig.notify(0);
            (0..16).for_each(|_| assert!(ring.used().is_some()));
            served = served.wrapping_add(16);
            rig.set_reg(0x64, 3);
        }
        assert_eq!(rig.wires.rises(), if polls { 0 } else { 100 });
    }
}

#[test]
fn entropy_console_balloon_and_pmem_requests_allocate_nothing() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(2 << 20).unwrap();
    let pmem = Pmem::file(image.path()).unwrap();
    let devices = [
        (Mmio::new(Rng::new()), 0, false, true),
        (Mmio::new(Console::new(std::io::sink()).unwrap()), 1, true, false),
        (Mmio::new(Balloon::new().hints()), 0, true, false),
        (Mmio::new(pmem), 0, true, true),
    ];
    let (out, into) = ([(FREE, 64)], [(FREE + 0x100, 64)]);
    for (device, queue, readable, writable) in devices {
        let (rig, mut rings) = inline(device);
        let ring = &mut rings[usize::from(queue)];
        let made = allocations(&rig, |rig| {
            ring.add(if readable { &out } else { &[] }, if writable { &into } else { &[] });
            rig.notify(queue);
            assert!(ring.used().is_some());
        });
        assert_eq!(made, 0);
    }
}

#[test]
fn frames_through_the_switch_allocate_nothing() {
    let switch = Switch::new();
    let (one, mut send) = inline(Mmio::new(Net::switch(&switch).unwrap()));
    let (other, mut receive) = inline(Mmio::new(Net::switch(&switch).unwrap()));
    one.write(FREE, &[0; 12]);
    one.write(FREE + 12, &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    let made = allocations(&one, |one| {
        send[1].add(&[(FREE, 12 + 1514)], &[]);
        one.notify(1);
        assert!(send[1].used().is_some());
        receive[0].add(&[], &[(FREE, 2048)]);
        other.notify(0);
        // The other card's own thread may have been faster.
        assert_eq!(receive[0].wait_used().1, 12 + 1514);
    });
    assert_eq!(made, 0);
}
