//! Cards on the host's own network programs: a tap interface and passt. A host that has none says so.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::Mmio;
use crate::testing::{FREE, Rig, Ring};

const BUFFERS: u64 = FREE + 0x10_0000;
const OURS: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

struct Card {
    rig: Rig,
    rings: Vec<Ring>,
    lent: u64,
}

impl Card {
    fn new(net: Net, features: u64) -> Self {
        let rig = Rig::new(Mmio::new(net.mac(OURS)));
        let rings = rig.activate(features, 64);
        let mut card = Self { rig, rings, lent: 0 };
        (0..16).for_each(|_| card.lend());
        card
    }

    fn lend(&mut self) {
        self.rings[0].add(&[], &[(BUFFERS + self.lent % 32 * 2048, 2048)]);
        self.lent += 1;
        self.rig.notify(0);
    }

    fn send(&mut self, frame: &[u8]) {
        self.rig.write(FREE, &[0; 12]);
        self.rig.write(FREE + 12, frame);
        self.rings[1].add(&[(FREE, 12 + frame.len() as u32)], &[]);
        self.rig.notify(1);
        self.rings[1].wait_used();
    }

    /// The first frame that is wanted.
    fn hear(&mut self, what: &str, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let start = Instant::now();
        let mut next = self.lent - 16;
        while start.elapsed() < Duration::from_secs(10) {
            let Some((_, len)) = self.rings[0].used() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let frame = self.rig.bytes(BUFFERS + next % 32 * 2048 + 12, len as usize - 12);
            next += 1;
            self.lend();
            if wanted(&frame) {
                return frame;
            }
        }
        panic!("no {what}");
    }
}

/// Who has `target`? Asks `sender`.
fn arp(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let ethernet = [&[0xFF; 6][..], &OURS, &[8, 6]].concat();
    [&ethernet[..], &[0, 1, 8, 0, 6, 4, 0, 1], &OURS, &sender, &[0; 6], &target, &[0; 18]].concat()
}

/// The address in the answer to [`arp`].
fn ask(card: &mut Card, sender: [u8; 4], target: [u8; 4]) -> [u8; 6] {
    card.send(&arp(sender, target));
    let reply = card.hear("answer to ARP", |frame| {
        frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2])
    });
    assert_eq!((&reply[..6], &reply[28..32]), (&OURS[..], &target[..]));
    reply[22..28].try_into().unwrap()
}

/// An echo request.
fn ping(to: [u8; 6], source: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = [&to[..], &OURS, &[8, 0]].concat();
    frame.extend([0x45, 0, 0, 84, 0, 1, 0, 0, 64, 1, 0, 0]);
    frame.extend([source, target].concat());
    frame.extend([8, 0, 0, 0, 0x12, 0x34, 0, 1]);
    frame.extend(0..56);
    assert!(checksum::finish(&mut frame[..34], 14, 10));
    assert!(checksum::finish(&mut frame, 34, 2));
    frame
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn a_tap_interface_answers_and_takes_offloads() {
    let name = format!("vmkt{}", std::process::id());
    let net = match Net::tap(&name) {
        Ok(net) => net,
        Err(error) => return eprintln!("ignored: {error}"),
    };
    let (host, guest) = ([10, 213, 77, 1], [10, 213, 77, 2]);
    let up = run("ip", &["addr", "add", "10.213.77.1/24", "dev", &name])
        && run("ip", &["link", "set", &name, "mtu", "9000", "up"]);
    if !up {
        return eprintln!("ignored: no address for {name} (Debian package iproute2)");
    }
    assert_eq!(tap::unusual_mtu(&name), Some(9000));
    let takes = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
    let mut card = Card::new(net, feature::CSUM | feature::HOST_TSO4 | takes);
    let mac = ask(&mut card, guest, host);
    card.send(&ping(mac, guest, host));
    let echo = card.hear("echo", |frame| frame.get(34) == Some(&0) && frame.get(23) == Some(&1));
    assert_eq!(echo[38..40], [0x12, 0x34]);
    assert_eq!(echo[42..98], (0..56).collect::<Vec<u8>>());
    // A datagram of the host's comes with its checksum left to the driver that agreed to finish it.
    let socket = std::net::UdpSocket::bind("10.213.77.1:0").unwrap();
    socket.send_to(b"to the guest", "10.213.77.2:9").unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        let ours = [0, 1, 8, 0, 6, 4, 0, 2];
        let asked = card.hear("question or datagram", |frame| {
            frame.get(12..14) == Some(&[8, 6]) || frame.ends_with(b"to the guest")
        });
        if asked.ends_with(b"to the guest") {
            return;
        }
        let answer = [&asked[6..12], &OURS, &[8, 6], &ours, &OURS, &guest, &asked[22..32]].concat();
        card.send(&[&answer[..], &[0; 18]].concat());
    }
    panic!("no datagram");
}

#[test]
fn names_that_are_no_interfaces_are_errors() {
    assert!(matches!(Net::tap("a/b"), Err(DeviceError::Host { .. })));
}

/// A process that ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn passt_answers() {
    let directory = std::env::temp_dir().join(format!("vmkit-passt-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    // It gives up root, and must still be able to make its socket.
    let anyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&directory, anyone).unwrap();
    let path = directory.join("socket");
    let started = Command::new("passt")
        .args([
            "--foreground",
            "--one-off",
            "-4",
            "-a",
            "10.214.0.15",
            "-n",
            "24",
            "-g",
            "10.214.0.2",
        ])
        .args(["-M", "9a:55:9a:55:9a:55", "-t", "none", "-u", "none", "--socket"])
        .arg(&path)
        .stderr(Stdio::null())
        .spawn();
    let mut passt = match started {
        Ok(child) => Program(child),
        Err(error) => return eprintln!("ignored: passt: {error} (Debian package passt)"),
    };
    let start = Instant::now();
    let net = loop {
        match Net::connect(&path) {
            Ok(net) => break net,
            Err(error) if start.elapsed() > Duration::from_secs(10) => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        if let Ok(Some(status)) = passt.0.try_wait() {
            return eprintln!("ignored: passt ended with {status}");
        }
    };
    let mut card = Card::new(net, 0);
    let mac = ask(&mut card, [10, 214, 0, 15], [10, 214, 0, 2]);
    assert_eq!(mac, [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55]);
    // DHCP: an address is offered.
    let mut discover =
        [&[0xFF; 6][..], &OURS, &[8, 0, 0x45, 0, 1, 16, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    discover.extend([
        0, 0, 0, 0, 255, 255, 255, 255, 0, 68, 0, 67, 0, 252, 0, 0, 1, 1, 6, 0, 1, 2, 3, 4,
    ]);
    discover.extend(
        [[0; 20].as_slice(), &OURS, &[0; 202], &[0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]].concat(),
    );
    assert!(checksum::finish(&mut discover[..34], 14, 10));
    assert_eq!(discover.len(), 14 + 272);
    card.send(&discover);
    let offer = card.hear("offer", |frame| frame.get(36..38) == Some(&[0, 68]));
    assert_eq!(offer[58..62], [10, 214, 0, 15], "the address that passt was told");
    drop(card);
    let _ = std::fs::remove_dir_all(&directory);
}
