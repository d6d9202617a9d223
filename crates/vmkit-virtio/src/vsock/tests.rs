use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::packet::{HEADER, Header, op};
use super::*;
use crate::testing::{EVENT_IDX, FREE, Rig, Ring};
use crate::{EventLoop, Mmio, WorkModel};

const CID: u32 = 7;
const OUT: u64 = FREE;
const BUFFERS: u64 = FREE + 0x10_0000;
const LEN: u32 = 4096;

/// A guest's driver of the socket device.
struct Guest {
    rig: Rig,
    rings: Vec<Ring>,
    misuse: FaultCounter,
    lent: u64,
}

impl Guest {
    fn new(vsock: Vsock) -> Self {
        let misuse = vsock.misuse();
        let rig = Rig::new(Mmio::new(vsock));
        let rings = rig.activate(EVENT_IDX, 256);
        let mut guest = Self { rig, rings, misuse, lent: 0 };
        guest.lend(64);
        guest
    }

    fn lend(&mut self, count: u64) {
        for _ in 0..count {
            let at = BUFFERS + self.lent % 256 * u64::from(LEN);
            self.rings[0].add(&[], &[(at, LEN)]);
            self.lent += 1;
        }
        self.rig.notify(0);
    }

    fn post(&mut self, header: Header, data: &[u8]) {
        self.rig.write(OUT, &header.to_bytes());
        self.rig.write(OUT + HEADER as u64, data);
        self.rings[1].add(&[(OUT, HEADER as u32), (OUT + HEADER as u64, data.len() as u32)], &[]);
        self.rig.notify(1);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.post(header, data);
        self.rings[1].wait_used();
    }

    /// The next packet from the device; its buffer is lent again.
    fn hear(&mut self) -> (Header, Vec<u8>) {
        let (head, written) = self.rings[0].wait_used();
        let at = self.rig.bytes(self.rings[0].desc + u64::from(head) * 16, 8);
        let at = u64::from_le_bytes(at.try_into().unwrap());
        let bytes = self.rig.bytes(at, written as usize);
        self.lend(1);
        (Header::parse(bytes[..HEADER].try_into().unwrap()), bytes[HEADER..].to_vec())
    }

    fn silent(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(20));
        self.rings[0].used().is_none()
    }

    /// Connects guest port 1000 to host port `port`.
    fn connect(&mut self, port: u32) -> Header {
        self.send(header(port, op::REQUEST), &[]);
        self.hear().0
    }
}

fn header(port: u32, op: u16) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: 2,
        src_port: 1000,
        dst_port: port,
        kind: 1,
        op,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

fn data(port: u32, len: usize) -> Header {
    Header { len: len as u32, ..header(port, op::RW) }
}

fn path(what: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("vmkit-vsock-{what}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn in_process() -> (Guest, VsockListener) {
    let mut vsock = Vsock::new(CID).unwrap();
    let listener = vsock.listen(52);
    (Guest::new(vsock), listener)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_guest_program_reaches_the_embedder_and_bytes_flow_both_ways() {
    let (mut guest, listener) = in_process();
    assert_eq!(guest.rig.config::<8>(0), [7, 0, 0, 0, 0, 0, 0, 0]);
    let answer = guest.connect(52);
    assert_eq!((answer.op, answer.src_port, answer.dst_port), (op::RESPONSE, 52, 1000));
    assert_eq!((answer.src_cid, answer.dst_cid, answer.kind), (2, CID.into(), 1));
    let mut stream = listener.accept_timeout(SOON).unwrap();
    guest.send(data(52, 5), b"hello");
    let mut text = [0; 5];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    stream.write_all(b"world!").unwrap();
    let (found, bytes) = guest.hear();
    assert_eq!((found.op, found.len, bytes.as_slice()), (op::RW, 6, &b"world!"[..]));
    // The embedder closes; the guest learns and lets go.
    drop(stream);
    assert_eq!(guest.hear().0.op, op::SHUTDOWN);
    guest.send(Header { flags: 3, ..header(52, op::SHUTDOWN) }, &[]);
    assert_eq!(guest.hear().0.op, op::RST);
    assert!(guest.silent() && guest.misuse.count() == 0);
}

#[test]
fn a_refused_transport_leaves_the_device_as_it_was() {
    let rig = Rig::new(Mmio::new(Vsock::new(CID).unwrap()).work(WorkModel::Inline));
    rig.device.pause();
    let sections = || match rig.device.save() {
        Saved::Sections(sections) => sections,
        other => panic!("{other:?}"),
    };
    let before = sections();
    let mut hostile = before.clone();
    // The last byte of the transport's own part: the causes of its interrupt.
    *hostile[0].bytes.last_mut().unwrap() = 0xFF;
    rig.device.load(&hostile).unwrap_err();
    assert_eq!(sections(), before);
    rig.device.load(&before).unwrap();
}

#[test]
fn nobody_there_is_refused() {
    let (mut guest, _listener) = in_process();
    assert_eq!(guest.connect(53).op, op::RST);
    guest.send(data(53, 3), b"abc");
    assert_eq!(guest.hear().0.op, op::RST);
    guest.send(header(53, op::RST), &[]);
    assert!(guest.silent());
}

#[test]
fn host_programs_connect_through_a_unix_socket() {
    let path = path("connect");
    let mut guest = Guest::new(Vsock::new(CID).unwrap().sockets(&path).unwrap());
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONNECT 1000\nearly").unwrap();
    let (asked, _) = guest.hear();
    assert_eq!((asked.op, asked.dst_port), (op::REQUEST, 1000));
    guest.send(header(asked.src_port, op::RESPONSE), &[]);
    let line = format!("OK {}\n", asked.src_port);
    let mut found = vec![0; line.len()];
    program.read_exact(&mut found).unwrap();
    assert_eq!(found, line.as_bytes());
    assert_eq!(guest.hear().1, b"early");
    guest.send(data(asked.src_port, 2), b"ok");
    let mut text = [0; 2];
    program.read_exact(&mut text).unwrap();
    // A refusal closes the program's end.
    let mut other = UnixStream::connect(&path).unwrap();
    other.write_all(b"CONNECT 1000\n").unwrap();
    let (asked, _) = guest.hear();
    guest.send(header(asked.src_port, op::RST), &[]);
    assert_eq!(other.read(&mut text).unwrap(), 0);
    for bad in [&b"CONNECT x\n"[..], &[b'x'; 40], b"\n"] {
        let mut program = UnixStream::connect(&path).unwrap();
        program.write_all(bad).unwrap();
        // Closed with some bytes unread, which a socket may tell as a reset.
        assert!(matches!(program.read(&mut text), Ok(0) | Err(_)));
    }
    drop(guest);
    assert!(!path.exists());
}

#[test]
fn guest_programs_reach_unix_sockets_by_port() {
    let path = path("listen");
    let listening =
        std::os::unix::net::UnixListener::bind(format!("{}_77", path.display())).unwrap();
    let mut guest = Guest::new(Vsock::new(CID).unwrap().sockets(&path).unwrap());
    assert_eq!(guest.connect(77).op, op::RESPONSE);
    let (mut stream, _) = listening.accept().unwrap();
    guest.send(data(77, 4), b"ping");
    let mut text = [0; 4];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ping");
    std::fs::remove_file(format!("{}_77", path.display())).unwrap();
}

#[test]
fn the_embedder_connects_to_the_guest() {
    let vsock = Vsock::new(CID).unwrap();
    let connector = vsock.connector();
    let mut guest = Guest::new(vsock);
    let mut stream = connector.connect(1000).unwrap();
    stream.write_all(b"hi").unwrap();
    let (asked, _) = guest.hear();
    assert_eq!(asked.op, op::REQUEST);
    assert!(guest.silent(), "data before the guest agreed");
    guest.send(header(asked.src_port, op::RESPONSE), &[]);
    assert_eq!(guest.hear().1, b"hi");
    drop(guest);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(connector.connect(1).is_err());
}

#[test]
fn the_device_sends_no_more_than_the_guest_has_credit_for() {
    let (mut guest, listener) = in_process();
    guest.send(Header { buf_alloc: 10, ..header(52, op::REQUEST) }, &[]);
    guest.hear();
    let mut stream = listener.accept_timeout(SOON).unwrap();
    stream.write_all(&[5; 25]).unwrap();
    assert_eq!(guest.hear().1.len(), 10);
    assert_eq!(guest.hear().0.op, op::CREDIT_REQUEST);
    assert!(guest.silent());
    let update = |fwd_cnt| Header { buf_alloc: 10, fwd_cnt, ..header(52, op::CREDIT_UPDATE) };
    guest.send(update(4), &[]);
    assert_eq!(guest.hear().1.len(), 4);
    assert_eq!(guest.hear().0.op, op::CREDIT_REQUEST);
    // A guest that claims to have read what was never sent gets nothing for it.
    guest.send(update(1000), &[]);
    assert!(guest.silent());
    guest.send(update(14), &[]);
    assert_eq!(guest.hear().1.len(), 10);
}

#[test]
fn a_guest_that_sends_beyond_its_credit_loses_the_connection_and_memory_stays_bounded() {
    let (mut guest, listener) = in_process();
    guest.connect(52);
    let stream = listener.accept_timeout(SOON).unwrap();
    let piece = vec![1; 32 << 10];
    let mut sent = 0;
    // Nobody reads: the socket's own buffer and then the connection's fill up.
    while guest.misuse.count() == 0 {
        guest.send(data(52, piece.len()), &piece);
        sent += piece.len();
        assert!(sent < 4 << 20, "no end to what the device takes");
    }
    loop {
        match guest.hear().0.op {
            op::RST => break,
            op => assert_eq!(op, op::CREDIT_UPDATE),
        }
    }
    drop(stream);
    assert!(!guest.rig.is_broken());
}

#[test]
fn a_guest_that_heeds_its_credit_can_send_for_ever() {
    let (mut guest, listener) = in_process();
    let answer = guest.connect(52);
    let (buffer, mut forwarded, mut sent) = (answer.buf_alloc, 0_u32, 0_u32);
    let mut stream = listener.accept_timeout(SOON).unwrap();
    const TOTAL: u32 = 4 << 20;
    let reader = std::thread::spawn(move || {
        let mut sum = 0;
        let mut bytes = vec![0; 10_000];
        while sum < u64::from(TOTAL) {
            sum += stream.read(&mut bytes).unwrap() as u64;
        }
        sum
    });
    let piece = vec![9; 60_000];
    while sent < TOTAL {
        let room = buffer - (sent - forwarded);
        let len = room.min(piece.len() as u32).min(TOTAL - sent);
        if len > 0 {
            guest.send(data(52, len as usize), &piece[..len as usize]);
            sent += len;
        }
        while let Some((head, written)) = guest.rings[0].used() {
            assert_eq!(written, HEADER as u32);
            let at = guest.rig.bytes(guest.rings[0].desc + u64::from(head) * 16, 8);
            let at = u64::from_le_bytes(at.try_into().unwrap());
            let found = Header::parse(&guest.rig.bytes(at, HEADER).try_into().unwrap());
            // The reader hangs up when it has all.
            assert!(found.op == op::CREDIT_UPDATE || found.op == op::SHUTDOWN && sent == TOTAL);
            forwarded = found.fwd_cnt;
            guest.lend(1);
        }
    }
    assert_eq!(reader.join().unwrap(), u64::from(TOTAL));
    assert_eq!(guest.misuse.count(), 0);
}

#[test]
fn the_table_of_connections_is_bounded() {
    let (mut guest, listener) = in_process();
    let mut streams = Vec::new();
    let mut refused = 0;
    for port in 0..300 {
        guest.send(Header { src_port: port, ..header(52, op::REQUEST) }, &[]);
        match guest.hear().0.op {
            op::RESPONSE => streams.push(listener.accept_timeout(SOON).unwrap()),
            _ => refused += 1,
        }
    }
    assert_eq!((streams.len(), refused), (table::MOST, 300 - table::MOST));
    guest.send(Header { src_port: 0, ..header(52, op::RST) }, &[]);
    guest.send(Header { src_port: 999, ..header(52, op::REQUEST) }, &[]);
    assert_eq!(guest.hear().0.op, op::RESPONSE);
}

#[test]
fn a_guest_that_takes_no_refusals_waits_and_costs_nothing() {
    let mut vsock = Vsock::new(CID).unwrap();
    let _listener = vsock.listen(52);
    let rig = Rig::new(Mmio::new(vsock));
    let rings = rig.activate(0, 256);
    let misuse = FaultCounter::default();
    let mut guest = Guest { rig, rings, misuse, lent: 0 };
    for port in 0..200 {
        guest.post(Header { src_port: port, ..header(99, op::REQUEST) }, &[]);
    }
    let mut taken = 0;
    while taken < 64 {
        guest.rings[1].wait_used();
        taken += 1;
    }
    // A while for more to be taken than should.
    std::thread::sleep(Duration::from_millis(30));
    while guest.rings[1].used().is_some() {
        taken += 1;
    }
    assert!(taken < 200, "{taken}");
    // With buffers the rest is served.
    for _ in 0..200 {
        guest.lend(1);
        let (_, written) = guest.rings[0].wait_used();
        assert_eq!(written, HEADER as u32);
    }
    while taken < 200 {
        guest.rings[1].wait_used();
        taken += 1;
    }
}

#[test]
fn impossible_packets_end_connections_and_not_the_device() {
    let (mut guest, listener) = in_process();
    guest.send(Header { src_cid: 9, ..header(52, op::REQUEST) }, &[]);
    assert!(guest.silent());
    for (dst_cid, kind) in [(3, 1), (2, 2), (2, 0xFFFF)] {
        guest.send(Header { dst_cid, kind, ..header(52, op::REQUEST) }, &[]);
        assert_eq!(guest.hear().0.op, op::RST);
    }
    for bad in [
        Header { len: 4000, ..header(52, op::RW) },
        Header { len: u32::MAX, ..header(52, op::RW) },
        header(52, 0),
        header(52, 99),
        header(52, op::REQUEST),
        header(52, op::RESPONSE),
    ] {
        assert_eq!(guest.connect(52).op, op::RESPONSE);
        drop(listener.accept_timeout(SOON).unwrap());
        assert_eq!(guest.hear().0.op, op::SHUTDOWN);
        guest.send(bad, b"xx");
        assert_eq!(guest.hear().0.op, op::RST, "{bad:?}");
        guest.send(header(52, op::RST), &[]);
    }
    assert!(guest.misuse.count() >= 7 && !guest.rig.is_broken());
    // Too short for a header.
    guest.rings[1].add(&[(OUT, 43)], &[]);
    guest.rig.notify(1);
    guest.rig.wait("broken device", || guest.rig.is_broken());
}

#[test]
fn after_a_restore_the_driver_learns_that_its_connections_are_gone() {
    let (mut guest, listener) = in_process();
    guest.rings[2].add(&[], &[(OUT + 0x8000, 8)]);
    guest.rig.notify(2);
    guest.connect(52);
    let mut stream = listener.accept_timeout(SOON).unwrap();
    guest.rig.device.pause();
    let saved = guest.rig.sections();
    guest.rig.device.load(&saved).unwrap();
    guest.rig.device.start().unwrap();
    assert_eq!(guest.rings[2].wait_used().1, 4);
    assert_eq!(guest.rig.bytes(OUT + 0x8000, 4), [0; 4]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.connect(52).op, op::RESPONSE);
    assert!(Vsock::new(2).is_err());
}

#[test]
fn a_device_with_something_to_say_rests_until_the_driver_has_buffers_for_it() {
    let mut vsock = Vsock::new(CID).unwrap();
    let _listener = vsock.listen(52);
    let misuse = vsock.misuse();
    let events = EventLoop::new().unwrap();
    let rig = Rig::new(Mmio::new(vsock).work(WorkModel::Loop(events.clone())));
    let rings = rig.activate(EVENT_IDX, 256);
    let mut guest = Guest { rig, rings, misuse, lent: 0 };
    let rests = || (0..10).any(|_| events.process_ready().unwrap() == 0);
    assert!(rests());
    guest.post(header(52, op::REQUEST), &[]);
    assert!(rests(), "it goes on and on");
    assert!(guest.rings[1].used().is_some() && guest.rings[0].used().is_none());
    guest.lend(1);
    assert!(rests());
    assert_eq!(guest.rings[0].used(), Some((0, HEADER as u32)));
}

#[test]
fn what_a_guest_sent_just_before_its_machine_stopped_is_not_lost() {
    let mut vsock = Vsock::new(CID).unwrap();
    let listener = vsock.listen(52);
    let misuse = vsock.misuse();
    // Nobody turns the loop: the device has had no time yet.
    let model = WorkModel::Loop(EventLoop::new().unwrap());
    let rig = Rig::new(Mmio::new(vsock).work(model));
    let rings = rig.activate(EVENT_IDX, 256);
    let mut guest = Guest { rig, rings, misuse, lent: 0 };
    guest.post(header(52, op::REQUEST), &[]);
    let bytes = data(52, 4).to_bytes();
    guest.rig.write(OUT + 0x1000, &[&bytes[..], b"last"].concat());
    guest.rings[1].add(&[(OUT + 0x1000, HEADER as u32 + 4)], &[]);
    guest.rig.device.pause();
    let mut text = [0; 4];
    listener.try_accept().unwrap().read_exact(&mut text).unwrap();
    assert_eq!(&text, b"last");
}
