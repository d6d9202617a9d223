//! The serial device on its bus: wires, handles, threads and saved state.

use std::io::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::output::Capture;
use crate::testing::{Rig, abuses};

const DATA: u16 = 0x3F8;
const IER: u16 = 0x3F9;
const IIR: u16 = 0x3FA;
const LSR: u16 = 0x3FD;

fn rig(serial: Serial) -> (Rig, Capture, SerialInput) {
    let console = Capture::with_limit(1 << 20);
    let input = serial.input();
    (Rig::new(serial.output(console.clone())), console, input)
}

#[test]
fn the_four_ports_of_a_pc_announce_where_they_are() {
    for (serial, name, port, gsi) in [
        (Serial::com1(), "serial0", 0x3F8, 4),
        (Serial::com2(), "serial1", 0x2F8, 3),
        (Serial::com3(), "serial2", 0x3E8, 4),
        (Serial::com4(), "serial3", 0x2E8, 3),
    ] {
        let rig = Rig::new(serial);
        assert_eq!(rig.device.name(), name);
        assert_eq!(rig.device.announce(), [Announcement::Serial { port, gsi }]);
    }
}

#[test]
fn output_reaches_the_host_byte_by_byte_and_word_by_word() {
    let (rig, console, _) = rig(Serial::com1());
    let _ = rig.outb(DATA, b'h');
    // A word covers the data register and IER.
    let _ = rig.outl(DATA, 2, 0x0100 | u32::from(b'i'));
    assert_eq!(console.text(), "hi");
    assert_eq!(rig.inb(IER), 1);
    assert_eq!(rig.inl(IER, 2), 0x0101, "IER and IIR");
}

#[test]
fn input_raises_the_wire_once_and_all_of_it_arrives() {
    let (rig, _, input) = rig(Serial::com1());
    let sent: Vec<u8> = (0..100).collect();
    input.push(&sent);
    assert_eq!((rig.rises(4), input.pending()), (0, 100), "nobody listens yet");
    let _ = rig.outb(IIR, 0x07);
    let _ = rig.outb(IER, 0x01);
    assert!(rig.level(4));
    let mut got = Vec::new();
    while rig.inb(LSR) & 1 != 0 {
        assert!(rig.level(4));
        got.push(rig.inb(DATA));
    }
    assert_eq!(got, sent);
    assert!(!rig.level(4));
    assert_eq!(rig.rises(4), 1);
    input.push(b"x");
    assert!(rig.level(4));
    assert_eq!(rig.inb(DATA), b'x');
    assert_eq!((rig.level(4), rig.rises(4)), (false, 2));
}

#[test]
fn a_polling_guest_gets_its_input_too() {
    let (rig, _, input) = rig(Serial::com1());
    input.push(b"hello");
    let mut got = Vec::new();
    for _ in 0..100 {
        if rig.inb(LSR) & 1 != 0 {
            got.push(rig.inb(DATA));
        }
    }
    assert_eq!(got, b"hello");
    assert_eq!(rig.rises(4), 0);
}

#[test]
fn each_transmitted_byte_makes_an_edge_once_acknowledged() {
    let (rig, _, _) = rig(Serial::com1());
    let _ = rig.outb(IER, 0x02);
    for round in 1..5 {
        assert_eq!((rig.level(4), rig.rises(4)), (true, round));
        assert_eq!(rig.inb(IIR) & 0x0F, 0x02);
        assert!(!rig.level(4));
        let _ = rig.outb(DATA, b'x');
    }
}

#[test]
fn a_chat_script_may_type_from_its_watcher() {
    let serial = Serial::com1();
    let input = serial.input();
    let mut line = Vec::new();
    let (rig, console, _) = rig(serial.on_output(move |bytes| {
        line.extend_from_slice(bytes);
        if line.ends_with(b"login:\n") {
            input.push(b"root");
        }
    }));
    let _ = rig.outb(IER, 0x01);
    for &byte in b"login:\n" {
        let _ = rig.outb(DATA, byte);
    }
    assert_eq!(console.text(), "login:\n");
    assert_eq!(rig.inb(DATA), b'r');
}

#[test]
fn a_paused_port_leaves_its_wire_alone_and_keeps_input() {
    let (rig, _, input) = rig(Serial::com1());
    let _ = rig.outb(IER, 0x01);
    rig.device.pause();
    input.push(b"x");
    assert_eq!((rig.rises(4), input.pending()), (0, 1));
    rig.device.start().unwrap();
    assert_eq!((rig.rises(4), input.pending()), (1, 0));
}

#[test]
fn a_descriptor_is_read_while_running_and_not_after() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let (rig, _, input) = rig(Serial::com1().input_from(reader));
    writer.write_all(b"one").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while input.pending() < 3 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.device.pause();
    writer.write_all(b"two").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(input.pending(), 3);
}

/// The names of this process's threads that begin with `prefix`.
fn threads(prefix: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    // A thread that ends meanwhile has no name any more.
    let names = tasks.filter_map(|task| name(task.ok()?).ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn a_dropped_device_takes_its_threads_along_and_its_handles_do_no_harm() {
    let (_far_reader, writer) = std::io::pipe().unwrap();
    let (reader, _far_writer) = std::io::pipe().unwrap();
    let output = SerialOutput::writer(writer);
    let serial = Serial::at("dropped", 0x3F8, 4).output(output).input_from(reader);
    let input = serial.input();
    let rig = Rig::new(serial);
    // A thread takes its name a moment after it starts.
    let deadline = Instant::now() + Duration::from_secs(10);
    while threads("dropped").len() < 2 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    drop(rig);
    // One that was joined may be listed for a moment longer.
    while !threads("dropped").is_empty() {
        assert!(Instant::now() < deadline, "{:?}", threads("dropped"));
        std::thread::yield_now();
    }
    assert_eq!(input.push(b"x"), 1);
}

#[test]
fn the_probe_knows_when_output_began() {
    let serial = Serial::com1();
    let probe = serial.probe();
    let (rig, _, _) = rig(serial);
    assert!(probe.first_byte().is_none());
    let before = Instant::now();
    let _ = rig.outb(DATA, b'[');
    assert!(probe.first_byte().is_some_and(|at| at >= before));
    assert_eq!((probe.written(), probe.lost()), (1, 0));
}

#[test]
fn saved_state_carries_the_fifo_and_makes_no_edge() {
    let (from, _, input) = rig(Serial::com1());
    let _ = from.outb(IIR, 0x07);
    let _ = from.outb(IER, 0x01);
    input.push(b"abc");
    let (to, _, _) = rig(Serial::com1());
    to.device.pause();
    from.check_saved_state(&to);
    assert_eq!(to.rises(4), 0);
    to.device.start().unwrap();
    assert_eq!([to.inb(DATA), to.inb(DATA), to.inb(DATA)], *b"abc");
    assert_eq!(to.rises(4), 0);
    assert!(!to.level(4));
}

#[test]
fn reset_is_power_on() {
    let (rig, _, _) = rig(Serial::com1());
    let fresh = rig.sections();
    let _ = rig.outl(IER, 2, 0x0702);
    assert!(rig.level(4));
    rig.device.reset();
    assert!(!rig.level(4));
    assert_eq!(rig.sections(), fresh);
}

proptest! {
    #[test]
    fn no_access_harms_the_device(accesses in abuses(), typed: Vec<u8>) {
        let (rig, _, input) = rig(Serial::com1());
        input.push(&typed);
        rig.abuse(&accesses);
        let (other, _, _) = super::tests::rig(Serial::com1());
        rig.check_saved_state(&other);
        rig.device.reset();
        prop_assert!(!rig.level(4));
    }
}
