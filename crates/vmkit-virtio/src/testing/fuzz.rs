//! A driver that does what an input's bytes say: entry points for fuzz targets.
//!
//! An input is a list of operations on one device: register and configuration accesses, rings and
//! chains, right and wrong, resets, and save and load. Nothing is left over from the input before.
//! The device works inline, so that what it does for the driver is the same every time; what the
//! host brings (typed input, packets, completions of io_uring) comes on a thread of the device's, at
//! a time that differs. Where a device calls back into its backend in the middle of a request, the
//! backend changes guest memory under it, as another vCPU could.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, memfd_create};
use vmkit_device::Saved;
use vmkit_memory::{Bytes, GuestAddress, GuestBuffers, GuestRam};

use super::{DRIVER_OK, FEATURES_OK, FREE, PciRig, Rig, Ring, WINDOW};
use crate::{
    Balloon, Block, Console, Disk, Engine, Mmio, Net, Pci, Pmem, RateLimit, Rng, Switch,
    VirtioDevice, Vsock, VsockListener, WorkModel,
};

/// Number of device kinds that [`mmio`] and [`pci`] know.
pub const KINDS: u8 = 8;

/// Most operations of one input.
const MOST_OPERATIONS: usize = 256;

/// Runs `input` against a device of kind `kind % KINDS` on the MMIO transport.
pub fn mmio(kind: u8, input: &[u8]) {
    drive(Transport::Mmio, kind, input);
}

/// Runs `input` against a device of kind `kind % KINDS` on the PCI transport.
pub fn pci(kind: u8, input: &[u8]) {
    drive(Transport::Pci, kind, input);
}

#[derive(Clone, Copy)]
enum Transport {
    Mmio,
    Pci,
}

impl Transport {
    fn run(self, device: impl VirtioDevice + 'static, scribbles: &Arc<Scribbles>, input: &[u8]) {
        match self {
            Self::Mmio => run_mmio(device, scribbles, input),
            Self::Pci => run_pci(device, scribbles, input),
        }
    }
}

fn drive(transport: Transport, kind: u8, input: &[u8]) {
    let scribbles = &Arc::new(Scribbles { ram: OnceLock::new(), seed: AtomicU64::new(0) });
    match kind % KINDS {
        0 => transport.run(disk(scribbles), scribbles, input),
        1 => transport.run(rng(scribbles), scribbles, input),
        2 => transport.run(console(), scribbles, input),
        3 => transport.run(net(), scribbles, input),
        4 => {
            let (vsock, _listener) = vsock();
            transport.run(vsock, scribbles, input);
        }
        5 => transport.run(Balloon::new().hints(), scribbles, input),
        6 => transport.run(ring(), scribbles, input),
        _ => transport.run(pmem(), scribbles, input),
    }
}

/// Runs vsock packets against an active device: each is a header's 44 bytes and as much data as the
/// next byte says.
pub fn vsock_packets(input: &[u8]) {
    let (vsock, _listener) = vsock();
    let rig = Rig::new(Mmio::new(vsock).work(WorkModel::Inline));
    let mut rings = rig.activate(0, 64);
    let mut bytes = Input(input);
    for n in 0..MOST_OPERATIONS as u64 {
        if bytes.0.is_empty() {
            return;
        }
        let header: [u8; 44] = std::array::from_fn(|_| bytes.byte());
        let len = u32::from(bytes.byte());
        rig.write(FREE, &header);
        let mut plausible = header;
        if bytes.byte() & 1 == 0 {
            // Addressed so that it gets somewhere: from the guest to the host, a stream.
            plausible[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            plausible[16..24].copy_from_slice(&[header[16] & 3, 0, 0, 0, 4, 4, 0, 0]);
            plausible[28..30].copy_from_slice(&[1, 0]);
            plausible[30..32].copy_from_slice(&[header[30] & 7, 0]);
            rig.write(FREE, &plausible);
        }
        rings[1].add(&[(FREE, 44), (FREE + 0x100, len)], &[]);
        rings[0].add(&[], &[(FREE + 0x1000 + n % 64 * 0x1000, 0x1000)]);
        rig.notify(0);
        rig.notify(1);
        while rings[0].used().is_some() {}
        while rings[1].used().is_some() {}
    }
}

/// Opens a qcow2 image and has a driver use it: `input` is a number of requests, four bytes for each,
/// and the image.
#[cfg(feature = "qcow2")]
pub fn qcow2(input: &[u8]) {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    let mut bytes = Input(input);
    let requests: Vec<[u8; 4]> =
        (0..bytes.byte() % 16).map(|_| std::array::from_fn(|_| bytes.byte())).collect();
    let mut image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    image.write_all(bytes.0).unwrap();
    let path = format!("/proc/self/fd/{}", image.as_raw_fd());
    // No place is allowed a backing file, whatever the image names.
    let Ok(block) = Block::qcow2(path) else { return };
    let rig = Rig::new(Mmio::new(block).work(WorkModel::Inline));
    let mut ring = rig.activate(u64::from(u32::MAX), 16).remove(0);
    for [kind, sector, place, len] in requests {
        // Near the beginning, a cluster's or a table's size further on, or anywhere.
        let sector = u64::from(sector) << (place % 64);
        let len = (u32::from(len) + 1) * 512;
        rig.write(FREE + 8, &sector.to_le_bytes());
        let (kind, data, status) =
            ([0, 1, 4, 11, 13][usize::from(kind % 5)], FREE + 0x1000, FREE + 16);
        rig.write(FREE, &[kind, 0, 0, 0]);
        if kind > 4 {
            rig.write(data, &sector.to_le_bytes());
            rig.write(
                data + 8,
                &[(len / 512).to_le_bytes(), u32::from(place >> 7).to_le_bytes()].concat(),
            );
        }
        match kind {
            0 => ring.add(&[(FREE, 16)], &[(data, len), (status, 1)]),
            1 => ring.add(&[(FREE, 16), (data, len)], &[(status, 1)]),
            4 => ring.add(&[(FREE, 16)], &[(status, 1)]),
            _ => ring.add(&[(FREE, 16), (data, 16)], &[(status, 1)]),
        };
        rig.notify(0);
        assert!(ring.used().is_some(), "a request is answered, whatever the image");
    }
    rig.device.pause();
}

/// Where a backend writes while it has a request.
struct Scribbles {
    ram: OnceLock<GuestRam>,
    seed: AtomicU64,
}

impl Scribbles {
    fn scribble(&self) {
        let Some(ram) = self.ram.get() else { return };
        let mut seed = self.seed.load(Ordering::Relaxed) | 1;
        for _ in 0..4 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            // Rings and tables are in the first pages, requests behind `FREE`.
            let base = if seed & 1 == 0 { 0x1000 } else { FREE };
            let _ = ram.write_obj((seed >> 32) as u8, GuestAddress(base + (seed >> 8 & 0xFFF)));
        }
        self.seed.store(seed, Ordering::Relaxed);
    }
}

struct ScribblingDisk(Arc<Scribbles>);

impl Disk for ScribblingDisk {
    fn bytes(&self) -> u64 {
        1 << 20
    }
    fn read(&self, offset: u64, into: &mut GuestBuffers<'_>) -> io::Result<()> {
        assert!(offset + into.bytes() as u64 <= self.bytes());
        self.0.scribble();
        Ok(())
    }
    fn write(&self, offset: u64, from: &mut GuestBuffers<'_>) -> io::Result<()> {
        assert!(offset + from.bytes() as u64 <= self.bytes());
        self.0.scribble();
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset + len <= self.bytes());
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        assert!(offset + len <= self.bytes());
        Ok(())
    }
}

fn disk(scribbles: &Arc<Scribbles>) -> Block {
    Block::disk(ScribblingDisk(scribbles.clone())).unwrap().queues(2)
}

/// A disk whose requests are in flight while the driver goes on, where the host has io_uring.
fn ring() -> Block {
    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    image.set_len(1 << 20).unwrap();
    let raw = || Block::raw(image.try_clone().unwrap()).unwrap();
    raw()
        .engine(Engine::IoUring)
        .unwrap_or_else(|_| raw())
        .limit(RateLimit::new().operations(1 << 20))
}

/// Persistent memory that a guest cannot write.
pub fn pmem() -> Pmem {
    use std::os::fd::AsRawFd;

    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    image.set_len(2 << 20).unwrap();
    Pmem::read_only_file(format!("/proc/self/fd/{}", image.as_raw_fd())).unwrap()
}

fn rng(scribbles: &Arc<Scribbles>) -> Rng {
    let scribbles = scribbles.clone();
    Rng::from_source(move |_| scribbles.scribble())
}

fn console() -> Console {
    let mut console = Console::new(io::sink()).unwrap().size(80, 25);
    console.port("port", io::sink()).unwrap();
    console.input().send(b"some input");
    console
}

fn net() -> Net {
    let switch = Switch::new();
    Net::switch(&switch).unwrap()
}

fn vsock() -> (Vsock, VsockListener) {
    let mut vsock = Vsock::new(3).unwrap();
    // Nobody accepts, but up to the backlog connections are made.
    let listener = vsock.listen(0x404);
    (vsock, listener)
}

/// The bytes of an input; zeros when they are used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// An address: mostly of a request or a ring, sometimes anything.
    fn address(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => u64::from(self.long()) << 32 | u64::from(self.long()),
            1 => 0x1000 + u64::from(self.word()),
            2 => super::RAM - u64::from(self.byte()),
            _ => FREE + u64::from(self.word()),
        }
    }
}

fn run_mmio(device: impl VirtioDevice + 'static, scribbles: &Arc<Scribbles>, input: &[u8]) {
    let rig = Rig::new(Mmio::new(device).work(WorkModel::Inline));
    let _ = scribbles.ram.set(rig.ram.clone());
    let mut bytes = Input(input);
    scribbles.seed.store(bytes.long().into(), Ordering::Relaxed);
    let mut rings: Vec<Ring> = Vec::new();
    for _ in 0..MOST_OPERATIONS {
        if bytes.0.is_empty() {
            break;
        }
        match bytes.byte() % 12 {
            0 => rig.set_reg(u64::from(bytes.byte()) & 0xFC, bytes.long()),
            1 => {
                let (at, width) = (u64::from(bytes.word()) & 0xFF7, 1 << (bytes.byte() % 4));
                rig.device.read(0, at, &mut [0; 8][..width]);
            }
            2 => {
                let (at, width) = (u64::from(bytes.word()) & 0xFF7, 1 << (bytes.byte() % 4));
                let value = u64::from(bytes.long()).to_le_bytes();
                let _ = rig.device.write(0, at, &value[..width]);
            }
            3 => rings = activate(&rig, u64::from(bytes.long()) | 3 << 28),
            4 => rig.notify(bytes.word() & 0x3F),
            5 => rig.set_reg(0x70, 0),
            6 => {
                rig.device.pause();
                if let Saved::Sections(sections) = rig.device.save() {
                    rig.device.load(&sections).unwrap();
                }
                rig.device.start().unwrap();
            }
            operation => ring_operation(operation, &rig.ram, &mut rings, &mut bytes),
        }
    }
    let _ = rig.status();
}

/// Sets the device up with rings at the same places every time, four pages for each queue.
fn activate(rig: &Rig, features: u64) -> Vec<Ring> {
    rig.propose(features);
    if rig.status() & FEATURES_OK == 0 {
        rig.negotiate(0);
    }
    let mut rings = Vec::new();
    for index in 0..8_u16 {
        rig.set_reg(0x30, index.into());
        if rig.reg(0x34) != 0 {
            let at = 0x1000 + u64::from(index) * 0x4000;
            rings.push(Ring::at(rig, index, 16, at, at + 0x1000, at + 0x2000));
        }
    }
    rig.set_reg(0x70, super::ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK);
    rings
}

/// What a driver does in memory.
fn ring_operation(operation: u8, ram: &GuestRam, rings: &mut [Ring], bytes: &mut Input<'_>) {
    let count = rings.len().max(1);
    let index = usize::from(bytes.byte()) % count;
    match (operation, rings.get_mut(index)) {
        (7, Some(ring)) => {
            let buffers = |bytes: &mut Input<'_>| {
                let count = bytes.byte() % 4;
                (0..count).map(|_| (bytes.address(), u32::from(bytes.word()))).collect::<Vec<_>>()
            };
            let (readable, writable) = (buffers(bytes), buffers(bytes));
            if !(readable.is_empty() && writable.is_empty()) {
                ring.add(&readable, &writable);
            }
        }
        (8, Some(ring)) => {
            let (slot, next) = (bytes.word() % 16, bytes.word());
            ring.descriptor(slot, bytes.address(), bytes.long(), bytes.word() & 7, next);
        }
        (9, Some(ring)) => ring.offer(bytes.word() % 32),
        (10, Some(ring)) => ring.set_avail_idx(bytes.word()),
        _ => {
            let (at, len) = (bytes.address(), usize::from(bytes.byte() % 64));
            let data: Vec<u8> = (0..len).map(|_| bytes.byte()).collect();
            let _ = ram.write_slice(&data, GuestAddress(at));
        }
    }
}

fn run_pci(device: impl VirtioDevice + 'static, scribbles: &Arc<Scribbles>, input: &[u8]) {
    let rig = PciRig::new(Pci::new(device).work(WorkModel::Inline));
    let _ = scribbles.ram.set(rig.ram.clone());
    let mut bytes = Input(input);
    scribbles.seed.store(bytes.long().into(), Ordering::Relaxed);
    let mut rings: Vec<Ring> = Vec::new();
    for _ in 0..MOST_OPERATIONS {
        if bytes.0.is_empty() {
            break;
        }
        let width = 1 << (bytes.byte() % 4);
        match bytes.byte() % 12 {
            0 => rig.set_config_space(u64::from(bytes.byte()) & 0xFC, bytes.long()),
            1 => {
                // Ports, configuration space or the window, mostly where the device is.
                let region = usize::from(bytes.byte() % 3);
                let at = [u64::from(bytes.byte() & 7), 0x8000, rig.bar][region];
                let at = at + if region == 0 { 0 } else { u64::from(bytes.word() & 0x7FFF) };
                let at = if region == 0 { at & !(width as u64 - 1) } else { at };
                let value = u64::from(bytes.long()).to_le_bytes();
                let _ = rig.device.write(region, at, &value[..width]);
                rig.device.read(region, at, &mut [0; 8][..width]);
            }
            2 => rig.write(u64::from(bytes.byte() % 64), width, bytes.long().into()),
            3 => {
                rig.set_config_space(4, 6);
                rig.set_config_space(0x10, (super::WINDOW_BASE + rig.bar) as u32);
                rings = vec![rig.activate(u64::from(bytes.long()) | 3 << 28, 16)];
            }
            4 => rig.notify(bytes.word() & 0x3F),
            5 => rig.write(20, 1, 0),
            6 => {
                rig.device.pause();
                if let Saved::Sections(sections) = rig.device.save() {
                    rig.device.load(&sections).unwrap();
                }
                rig.device.start().unwrap();
            }
            operation => ring_operation(operation, &rig.ram, &mut rings, &mut bytes),
        }
    }
    rig.device.read(WINDOW, rig.bar, &mut [0; 4]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_driver_is_survived(kind in 0..KINDS, input in prop::collection::vec(any::<u8>(), 0..2000)) {
            mmio(kind, &input);
            pci(kind, &input);
        }

        #[cfg(feature = "qcow2")]
        #[test]
        fn any_image_is_survived(
            requests in prop::collection::vec(any::<[u8; 4]>(), 15),
            edits in prop::collection::vec((0..2048_usize, any::<u8>()), 0..8),
        ) {
            let mut image = include_bytes!("../../tests/data/base.qcow2").to_vec();
            for (at, byte) in edits {
                image[at] = byte;
            }
            qcow2(&[&[15], requests.as_flattened(), &image].concat());
        }

        #[test]
        fn any_packets_are_survived(input in prop::collection::vec(any::<u8>(), 0..4000)) {
            vsock_packets(&input);
        }
    }
}
