//! Another author's drivers (the virtio-drivers crate) against each device model it has one for, in
//! this process and without a processor.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]
#![allow(unsafe_code, reason = "the driver crate's hardware abstraction is an unsafe trait")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmkit_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRam};
use vmkit_virtio::testing::Rig;
use vmkit_virtio::{Block, Console, Mmio, Net, Rng, Switch, Vsock, WorkModel};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The memory of the machine whose drivers run on this thread.
struct Arena {
    ram: GuestRam,
    next: u64,
    free: HashMap<usize, Vec<u64>>,
}

thread_local! {
    static ARENA: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

impl Arena {
    fn take(&mut self, pages: usize) -> u64 {
        if let Some(at) = self.free.get_mut(&pages).and_then(Vec::pop) {
            return at;
        }
        let at = self.next;
        self.next += (pages * PAGE_SIZE) as u64;
        at
    }
}

fn with_arena<T>(f: impl FnOnce(&mut Arena) -> T) -> T {
    ARENA.with(|arena| f(arena.borrow_mut().as_mut().expect("a machine on this thread")))
}

struct GuestHal;

// SAFETY: memory comes from a guest's RAM, page-aligned and each page handed out once; RAM stays
// mapped for as long as the arena, which lives as long as the thread.
unsafe impl Hal for GuestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        with_arena(|arena| {
            let at = arena.take(pages);
            arena.ram.write_slice(&vec![0; pages * PAGE_SIZE], GuestAddress(at)).unwrap();
            let host = arena.ram.get_host_address(GuestAddress(at)).unwrap();
            (at, NonNull::new(host).unwrap())
        })
    }

    // SAFETY: nothing unsafe is done.
    unsafe fn dma_dealloc(at: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        with_arena(|arena| arena.free.entry(pages).or_default().push(at));
        0
    }

    // SAFETY: nothing unsafe is done.
    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only the PCI transport maps registers")
    }

    // SAFETY: the trait says what the caller vouches for.
    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        with_arena(|arena| {
            let at = arena.take(buffer.len().div_ceil(PAGE_SIZE));
            if direction != BufferDirection::DeviceToDriver {
                // SAFETY: the caller lends the buffer for this call.
                let bytes = unsafe { buffer.as_ref() };
                arena.ram.write_slice(bytes, GuestAddress(at)).unwrap();
            }
            at
        })
    }

    // SAFETY: the trait says what the caller vouches for.
    unsafe fn unshare(at: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        with_arena(|arena| {
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: the caller lends the buffer for this call.
                let bytes = unsafe { buffer.as_mut() };
                arena.ram.read_slice(bytes, GuestAddress(at)).unwrap();
            }
            arena.free.entry(buffer.len().div_ceil(PAGE_SIZE)).or_default().push(at);
        });
    }
}

/// The MMIO transport, access by access.
struct Registers(Rig);

/// A machine with this device, whose drivers run on this thread.
fn machine(builder: Mmio) -> Registers {
    let rig = Rig::new(builder);
    let ram = rig.ram.clone();
    ARENA.with(|arena| {
        *arena.borrow_mut() = Some(Arena { ram, next: 0x10_0000, free: HashMap::new() });
    });
    Registers(rig)
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        DeviceType::try_from(self.0.reg(8)).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.device_features()
    }

    fn write_driver_features(&mut self, features: u64) {
        for (word, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.0.set_reg(0x24, word);
            self.0.set_reg(0x20, value);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.0.set_reg(0x30, queue.into());
        self.0.reg(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.0.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.0.status())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.0.set_reg(0x70, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, desc: u64, avail: u64, used: u64) {
        self.0.place(queue, size, desc, avail, used);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.0.set_reg(0x30, queue.into());
        self.0.set_reg(0x44, 0);
        assert_eq!(self.0.reg(0x44), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.0.set_reg(0x30, queue.into());
        self.0.reg(0x44) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let causes = self.0.reg(0x60);
        self.0.set_reg(0x64, causes);
        InterruptStatus::from_bits_truncate(causes)
    }

    fn read_config_generation(&self) -> u32 {
        self.0.reg(0xFC)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        for (n, part) in value.as_mut_bytes().chunks_mut(4).enumerate() {
            self.0.device.read(0, 0x100 + offset as u64 + 4 * n as u64, part);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        let _ = self.0.device.write(0, 0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

#[test]
fn the_block_driver_reads_writes_flushes_and_identifies() {
    // The driver spins while it waits for another thread, so that it makes fewer rounds then.
    for (work, rounds) in [(WorkModel::Thread, 5), (WorkModel::Inline, 50)] {
        let disk = Block::memory(vec![0; 1 << 20]).unwrap().serial("virtio-drivers");
        let mut driver =
            VirtIOBlk::<GuestHal, _>::new(machine(Mmio::new(disk).work(work))).unwrap();
        assert_eq!((driver.capacity(), driver.readonly()), (2048, false));
        let mut wanted = vec![0; 64 * SECTOR_SIZE];
        for round in 0..rounds {
            wanted.iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8 ^ round as u8);
            let sector = round * 31;
            driver.write_blocks(sector, &wanted).unwrap();
            let mut found = vec![0; wanted.len()];
            driver.read_blocks(sector, &mut found).unwrap();
            assert_eq!(found, wanted);
        }
        driver.flush().unwrap();
        let mut id = [0; 20];
        assert_eq!(driver.device_id(&mut id).unwrap(), 14);
        assert_eq!(&id[..14], b"virtio-drivers");
        assert!(driver.read_blocks(2047, &mut wanted).is_err());
        assert!(driver.ack_interrupt().contains(InterruptStatus::QUEUE_INTERRUPT));
        // The driver's end stops the queue; another driver takes the device over.
    }
}

#[test]
fn the_entropy_driver_gets_different_bytes() {
    let mut driver = VirtIORng::<GuestHal, _>::new(machine(Mmio::new(Rng::new()))).unwrap();
    let (mut one, mut other) = ([0; 64], [0; 64]);
    assert_eq!(driver.request_entropy(&mut one).unwrap(), 64);
    assert_eq!(driver.request_entropy(&mut other).unwrap(), 64);
    assert_ne!(one, other);
}

#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_console_driver_types_and_is_typed_to() {
    let text = Text::default();
    let console = Console::new(text.clone()).unwrap().size(100, 40);
    let input = console.input();
    let mut driver = VirtIOConsole::<GuestHal, _>::new(machine(Mmio::new(console))).unwrap();
    let size = driver.size().unwrap().unwrap();
    assert_eq!((size.columns, size.rows), (100, 40));
    driver.send_bytes(b"from the driver").unwrap();
    assert_eq!(&*text.0.lock().unwrap(), b"from the driver");
    let mut found = Vec::new();
    for line in ["first\n", "second\n"] {
        input.send(line.as_bytes());
        while found.last() != Some(&b'\n') || !found.ends_with(line.as_bytes()) {
            found.extend(driver.recv(true).unwrap());
        }
    }
    assert_eq!(found, b"first\nsecond\n");
}

#[test]
fn network_drivers_of_two_machines_exchange_frames() {
    let switch = Switch::new();
    let (ready, start) = std::sync::mpsc::channel();
    const ROUNDS: usize = 200;
    let echo = {
        let switch = switch.clone();
        std::thread::spawn(move || {
            let card = Net::switch(&switch).unwrap().mac([2, 0, 0, 0, 0, 2]);
            let mut driver =
                VirtIONet::<GuestHal, _, 16>::new(machine(Mmio::new(card)), 2048).unwrap();
            ready.send(()).unwrap();
            for _ in 0..ROUNDS {
                let frame = loop {
                    match driver.receive() {
                        Ok(frame) => break frame,
                        Err(_) => std::thread::yield_now(),
                    }
                };
                let mut reply = driver.new_tx_buffer(frame.packet_len());
                reply.packet_mut().copy_from_slice(frame.packet());
                reply.packet_mut()[..12].rotate_left(6);
                driver.send(reply).unwrap();
                driver.recycle_rx_buffer(frame).unwrap();
            }
        })
    };
    let card = Net::switch(&switch).unwrap().mac([2, 0, 0, 0, 0, 1]);
    let mut driver = VirtIONet::<GuestHal, _, 16>::new(machine(Mmio::new(card)), 2048).unwrap();
    assert_eq!(driver.mac_address(), [2, 0, 0, 0, 0, 1]);
    start.recv().unwrap();
    for round in 0..ROUNDS {
        let len = 60 + round * 2 % 1454;
        let mut frame = driver.new_tx_buffer(len);
        frame.packet_mut().fill(round as u8);
        frame.packet_mut()[..12].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        driver.send(frame).unwrap();
        let reply = loop {
            match driver.receive() {
                Ok(reply) => break reply,
                Err(_) => std::thread::yield_now(),
            }
        };
        assert_eq!(reply.packet_len(), len);
        assert_eq!(reply.packet()[..12], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        assert!(reply.packet()[12..].iter().all(|byte| *byte == round as u8));
        driver.recycle_rx_buffer(reply).unwrap();
    }
    echo.join().unwrap();
}

#[test]
fn the_socket_driver_connects_sends_and_receives() {
    let mut vsock = Vsock::new(5).unwrap();
    let listener = vsock.listen(1024);
    let driver = VirtIOSocket::<GuestHal, _>::new(machine(Mmio::new(vsock))).unwrap();
    assert_eq!(driver.guest_cid(), 5);
    let mut sockets = VsockConnectionManager::new(driver);
    let host = VsockAddr { cid: 2, port: 1024 };
    sockets.connect(host, 99).unwrap();
    assert_eq!(sockets.wait_for_event().unwrap().event_type, VsockEventType::Connected);
    let mut stream = listener.accept_timeout(Duration::from_secs(10)).unwrap();
    // An echo, by far more bytes than there is credit for at once.
    let echo = std::thread::spawn(move || {
        let mut bytes = [0; 700];
        loop {
            match stream.read(&mut bytes).unwrap() {
                0 => break,
                count => stream.write_all(&bytes[..count]).unwrap(),
            }
        }
    });
    let mut sum = 0;
    for round in 0..200_u32 {
        let sent = vec![round as u8; 1 + (round as usize * 7) % 900];
        sockets.send(host, 99, &sent).unwrap();
        let mut found = Vec::<u8>::new();
        while found.len() < sent.len() {
            let mut bytes = [0; 1024];
            if sockets.recv_buffer_available_bytes(host, 99).unwrap() == 0 {
                let _ = sockets.poll().unwrap();
                std::thread::yield_now();
            }
            let count = sockets.recv(host, 99, &mut bytes).unwrap();
            found.extend(&bytes[..count]);
        }
        assert_eq!(found, sent);
        sum += found.len();
    }
    assert!(sum > 50_000);
    sockets.shutdown(host, 99).unwrap();
    echo.join().unwrap();
}
