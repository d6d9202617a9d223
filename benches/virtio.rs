//! What a device model costs per request, beside the floor: the same descriptor walks and copies done
//! by hand on virtio-queue. `cargo bench --bench virtio`
//!
//! A driver in this process makes a batch of requests available, notifies once and takes the used
//! buffers back; the device works inline, on the same thread. What is timed is the notification, which
//! is the device's work on the batch, and in its place the floor's; not the driver's.

#![allow(clippy::unwrap_used, clippy::panic, reason = "benchmarks fail by panicking")]

use std::hint::black_box;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmkit_memory::{Bytes, GuestAddress, GuestBuffers, GuestMemoryBackend, GuestRam, GuestSlice};
use vmkit_virtio::testing::{EVENT_IDX, FREE, Rig, Ring};
use vmkit_virtio::{
    Block, Console, Disk, Engine, Event, Mmio, Net, NetBackend, Offload, Poller, VirtioDevice,
    Vsock, WorkModel,
};

/// Requests of a batch, unless they would not fit into what is behind the device.
const BATCH: u64 = 32;
/// Where data lies, and how far apart that of two requests is.
const DATA: u64 = FREE + 0x1000;
const STRIDE: u64 = 0x2_0000;
/// Where headers lie: one for each request, 64 bytes apart.
const HEADERS: u64 = FREE - 0x1000;
/// Bytes of an image.
const IMAGE: u64 = 16 << 20;

struct NullDisk;

impl Disk for NullDisk {
    fn bytes(&self) -> u64 {
        1 << 30
    }
    fn read(&self, _: u64, into: &mut GuestBuffers<'_>) -> io::Result<()> {
        black_box(into.bytes());
        Ok(())
    }
    fn write(&self, _: u64, from: &mut GuestBuffers<'_>) -> io::Result<()> {
        black_box(from.bytes());
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

struct NullNetwork;

impl NetBackend for NullNetwork {
    fn register(&mut self, _: &Poller) -> io::Result<()> {
        Ok(())
    }
    fn event(&mut self, _: Event) {}
    fn carries_offloads(&self) -> bool {
        true
    }
    fn send(&mut self, frame: &[u8], _: &Offload) -> io::Result<()> {
        black_box(frame);
        Ok(())
    }
    fn flush(&mut self) {}
    fn receive(&mut self, _: &mut [u8]) -> io::Result<(usize, Offload)> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// One request's buffers: readable, then writable.
type Buffers = (Vec<(u64, u32)>, Vec<(u64, u32)>);
/// A chain, as the floor sees it: address, length, and whether it may be written.
type Chain = [(u64, u32, bool)];

/// What is asked of a device.
struct Work<'a> {
    name: &'a str,
    /// Bytes of data of a request.
    bytes: u64,
    batch: u64,
    queue: u16,
    request: &'a dyn Fn(u64) -> Buffers,
    /// Headers of the requests.
    headers: &'a dyn Fn(u64) -> Vec<u8>,
}

impl Work<'_> {
    fn write_headers(&self, ram: &GuestRam) {
        for n in 0..self.batch {
            ram.write_slice(&(self.headers)(n), GuestAddress(HEADERS + n * 64)).unwrap();
        }
    }

    /// Runs batches, and calls `serve` to have one served: what that takes is what is measured.
    fn measure(
        &self,
        c: &mut Criterion,
        what: &str,
        ring: &mut Ring,
        mut serve: impl FnMut(),
        mut after: impl FnMut(),
    ) {
        let mut group = c.benchmark_group(self.name);
        group.throughput(Throughput::ElementsAndBytes {
            elements: self.batch,
            bytes: self.batch * self.bytes,
        });
        let mut fastest = Duration::MAX;
        group.bench_function(what, |b| {
            b.iter_custom(|batches| {
                let mut time = Duration::ZERO;
                for _ in 0..batches {
                    for n in 0..self.batch {
                        let (readable, writable) = (self.request)(n);
                        ring.add(&readable, &writable);
                    }
                    let start = Instant::now();
                    serve();
                    let batch = start.elapsed();
                    time += batch;
                    fastest = fastest.min(batch);
                    for _ in 0..self.batch {
                        ring.used().unwrap();
                    }
                    after();
                }
                time
            });
        });
        // What is left of a host that does other things meanwhile.
        eprintln!("{}/{what}: fastest batch {fastest:?}", self.name);
    }

    /// Measures `device`. `prepare` is called once it is active, and its answer after each batch.
    fn device<After: FnMut(&mut [Ring])>(
        &self,
        c: &mut Criterion,
        what: &str,
        device: impl VirtioDevice + 'static,
        prepare: impl FnOnce(&Rig, &mut [Ring]) -> After,
    ) {
        let rig = Rig::with_ram(Mmio::new(device).work(WorkModel::Inline), 64 << 20);
        let mut rings = rig.activate(EVENT_IDX, 256);
        let mut after = prepare(&rig, &mut rings);
        self.write_headers(&rig.ram);
        let mut ring = rings.remove(self.queue.into());
        let mut others = rings;
        let serve = || rig.notify(self.queue);
        self.measure(c, what, &mut ring, serve, || after(&mut others));
        assert!(!rig.is_broken());
    }

    /// Measures the floor: `serve` does a request's work and answers how many bytes it wrote.
    fn floor(
        &self,
        c: &mut Criterion,
        mut serve: impl FnMut(&GuestRam, &Chain) -> u32,
        after: impl FnMut(),
    ) {
        let rig = Rig::with_ram(Mmio::new(vmkit_virtio::Rng::new()), 64 << 20);
        let ram = &rig.ram;
        self.write_headers(ram);
        let mut ring = Ring::placed(ram, 0, 256, 0x1000, 0x2000, 0x3000);
        let mut queue = Queue::new(256).unwrap();
        queue.try_set_desc_table_address(GuestAddress(ring.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(ring.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(ring.used)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        let mut chain = Vec::new();
        let batch = || {
            queue.disable_notification(ram).unwrap();
            loop {
                while let Some(descriptors) = queue.iter(ram).unwrap().next() {
                    let head = descriptors.head_index();
                    chain.clear();
                    chain.extend(descriptors.map(|d| (d.addr().0, d.len(), d.is_write_only())));
                    let written = serve(ram, &chain);
                    queue.add_used(ram, head, written).unwrap();
                }
                black_box(queue.needs_notification(ram).unwrap());
                if !queue.enable_notification(ram).unwrap() {
                    break;
                }
            }
        };
        self.measure(c, "floor", &mut ring, batch, after);
    }
}

fn nothing(_: &Rig, _: &mut [Ring]) -> impl FnMut(&mut [Ring]) + use<> {
    |_| ()
}

/// Memory of a buffer that lies in one region, as all do here.
fn slice(ram: &GuestRam, at: u64, len: u32) -> GuestSlice<'_> {
    GuestMemoryBackend::get_slice(ram, GuestAddress(at), len as usize).unwrap()
}

fn piece(ram: &GuestRam, at: u64, len: u32) -> GuestBuffers<'_> {
    let mut buffers = GuestBuffers::new();
    assert!(buffers.push(slice(ram, at, len)));
    buffers
}

fn header<const N: usize>(ram: &GuestRam, chain: &Chain) -> [u8; N] {
    let mut bytes = [0; N];
    slice(ram, chain[0].0, N as u32).copy_to(&mut bytes);
    black_box(bytes)
}

/// Where request `n` reads, somewhere in the image.
fn place(n: u64, len: u64) -> u64 {
    n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (IMAGE / len) * len
}

#[derive(Clone, Copy, PartialEq)]
enum Behind {
    Nothing,
    Memory,
    File,
}

fn block(c: &mut Criterion) {
    let file = tempfile();
    for (name, len, random, behind) in [
        ("block/4 KiB random, null", 4096, true, Behind::Nothing),
        ("block/4 KiB random, memory", 4096, true, Behind::Memory),
        ("block/4 KiB random, cached file", 4096, true, Behind::File),
        ("block/128 KiB sequential, memory", 128 << 10, false, Behind::Memory),
        ("block/128 KiB sequential, cached file", 128 << 10, false, Behind::File),
    ] {
        let offset = move |n| if random { place(n, len) } else { n * len };
        let work = Work {
            name,
            bytes: len,
            batch: BATCH,
            queue: 0,
            request: &|n| {
                let data = (DATA + n * STRIDE, len as u32);
                (vec![(HEADERS + n * 64, 16)], vec![data, (HEADERS + n * 64 + 16, 1)])
            },
            headers: &|n| [[0; 8], (offset(n) / 512).to_le_bytes()].concat(),
        };
        let raw = || Block::raw(file.try_clone().unwrap()).unwrap();
        let device = match behind {
            Behind::Nothing => Block::disk(NullDisk).unwrap(),
            Behind::Memory => Block::memory(vec![0; IMAGE as usize]).unwrap(),
            Behind::File => raw(),
        };
        work.device(c, "device", device, nothing);
        if behind == Behind::File
            && let Ok(block) = raw().engine(Engine::IoUring)
        {
            work.device(c, "device, io_uring", block, nothing);
        }
        let image = vec![0_u8; if behind == Behind::Memory { IMAGE as usize } else { 0 }];
        let serve = |ram: &GuestRam, chain: &Chain| {
            let header: [u8; 16] = header(ram, chain);
            let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
            let (at, len) = (chain[1].0, chain[1].1);
            match behind {
                Behind::Nothing => drop(black_box(piece(ram, at, len))),
                Behind::Memory => {
                    let from = (sector * 512) as usize;
                    let data = &image[from..from + len as usize];
                    slice(ram, at, len).copy_from(data);
                }
                Behind::File => {
                    let buffers = piece(ram, at, len);
                    let read = buffers.read_from(file.as_fd(), Some(sector * 512)).unwrap();
                    assert_eq!(read, len as usize);
                }
            }
            slice(ram, chain[2].0, 1).copy_from(&[0_u8]);
            len + 1
        };
        work.floor(c, serve, || ());
    }
}

fn net(c: &mut Criterion) {
    for len in [64, 1500, 65_000] {
        let work = Work {
            name: &format!("net/send {len} B, null"),
            bytes: len,
            batch: BATCH,
            queue: 1,
            request: &|n| (vec![(HEADERS, 12), (DATA + n * STRIDE, len as u32)], vec![]),
            headers: &|_| vec![0; 12],
        };
        work.device(c, "device", Net::new(NullNetwork), nothing);
        let mut frame = vec![0_u8; 65_536];
        let serve = |ram: &GuestRam, chain: &Chain| {
            header::<12>(ram, chain);
            let frame = &mut frame[..chain[1].1 as usize];
            slice(ram, chain[1].0, chain[1].1).copy_to(frame);
            black_box(frame);
            0
        };
        work.floor(c, serve, || ());
    }
}

/// A packet of a stream from port 1000 of guest 7 to port 52 of the host, with room for 64 KiB back.
fn packet(op: u16, len: u32) -> Vec<u8> {
    let addresses = [7_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    let ports = [1000_u32.to_le_bytes(), 52_u32.to_le_bytes(), len.to_le_bytes()].concat();
    let kind = [1_u16.to_le_bytes(), op.to_le_bytes()].concat();
    let credit = [0_u32.to_le_bytes(), (1_u32 << 16).to_le_bytes(), [0; 4]].concat();
    [addresses, ports, kind, credit].concat()
}

fn vsock(c: &mut Criterion) {
    // A batch must fit into the socket.
    for (len, batch) in [(64, BATCH), (4096, 16), (64 << 10, 2)] {
        let work = Work {
            name: &format!("vsock/send {len} B"),
            bytes: len,
            batch,
            queue: 1,
            request: &|n| (vec![(HEADERS + n * 64, 44), (DATA + n * STRIDE, len as u32)], vec![]),
            headers: &|_| packet(5, len as u32),
        };
        let mut socket = Vsock::new(7).unwrap();
        let listener = socket.listen(52);
        let mut sink = vec![0; (len * batch) as usize];
        work.device(c, "device", socket, |rig, rings| {
            for n in 0..64 {
                rings[0].add(&[], &[(FREE - 0x10_0000 + n * 0x1000, 4096)]);
            }
            rig.ram.write_slice(&packet(1, 0), GuestAddress(HEADERS)).unwrap();
            rings[1].add(&[(HEADERS, 44)], &[]);
            rig.notify(1);
            rings[1].wait_used();
            let mut stream = listener.accept().unwrap();
            move |rings| {
                stream.read_exact(&mut sink).unwrap();
                // What the guest is told of its credit.
                while let Some((head, _)) = rings[0].used() {
                    rings[0].offer(head);
                }
            }
        });
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut sink = vec![0; (len * batch) as usize];
        let serve = |ram: &GuestRam, chain: &Chain| {
            header::<44>(ram, chain);
            let buffers = piece(ram, chain[1].0, chain[1].1);
            assert_eq!(buffers.send(ours.as_fd()).unwrap(), len as usize);
            0
        };
        work.floor(c, serve, || theirs.read_exact(&mut sink).unwrap());
    }
}

fn console(c: &mut Criterion) {
    let work = Work {
        name: "console/write 64 B, null",
        bytes: 64,
        batch: BATCH,
        queue: 1,
        request: &|_| (vec![(DATA, 64)], vec![]),
        headers: &|_| Vec::new(),
    };
    work.device(c, "device", Console::new(io::sink()).unwrap(), nothing);
    let serve = |ram: &GuestRam, chain: &Chain| {
        let mut bytes = [0_u8; 64];
        slice(ram, chain[0].0, 64).copy_to(&mut bytes);
        black_box(bytes);
        0
    };
    work.floor(c, serve, || ());
}

/// An image, in the page cache.
fn tempfile() -> std::fs::File {
    let path = std::env::temp_dir().join(format!("vmkit-bench-{}", std::process::id()));
    std::fs::write(&path, vec![0; IMAGE as usize]).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

criterion_group!(benches, block, net, vsock, console);
criterion_main!(benches);
