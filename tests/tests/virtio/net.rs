//! Network cards: two machines on a switch, and one on the host's network through passt.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Instant;

use vmkit::virtio::{Net, Switch};
use vmkit_examples::devices::{Passt, Transport};
use vmkit_tests::linux::{BOOT_PATIENCE, Guest, start};
use vmkit_tests::program::install;
use vmkit_tests::transfer;

use crate::{Parts, on_backends};

/// Bytes of a transfer: 100 MiB, or as many MiB as `VMKIT_TEST_MIB` says.
fn bytes() -> usize {
    let mib = std::env::var("VMKIT_TEST_MIB").ok().map_or(100, |mib| mib.parse().unwrap());
    mib << 20
}

/// The same in pieces of 64 KiB.
fn pieces() -> u32 {
    (bytes() >> 16) as u32
}

#[test]
fn two_machines_on_a_switch_reach_each_other_and_move_data() {
    on_backends(|parts| {
        let switch = Switch::new();
        let card = |transport, words: &str, last: u8, command: &str| {
            let net = Net::switch(&switch).unwrap().mac([2, 0, 0, 0, 0, last]);
            let setup = format!("ip addr add 10.9.8.{last}/24 dev eth0; ip link set eth0 up\n");
            let script = format!("set -e\n{setup}{command}\necho sum $(cat /sum)\n");
            let plugs = parts.plugs(transport, &["virtio_net"], words, &script);
            start(plugs.plug(net).finish())
        };
        // One with MSI-X off, so that its function's pin is used.
        let receive = install("/receive", &transfer::receiver(pieces()));
        let receive = format!("{receive}echo ready; nc -l -p 5000 -e /receive 2>/sum");
        let receiver = card(Transport::Pci, "pci=nomsi", 1, &receive);
        receiver.wait_for("ready\n");
        let send = install("/send", &transfer::sender(pieces()));
        let send = format!("{send}ping -c 3 10.9.8.1; nc 10.9.8.1 5000 -e /send 2>/sum");
        let sender = card(Transport::Mmio, "", 2, &send);

        receiver.assert_success();
        sender.assert_success();
        let pings = sender.text.text();
        assert!(pings.contains("3 packets received"), "{pings}");
        let sum = transfer::sum(&transfer::stream(bytes()));
        assert_eq!((sender.said("sum "), receiver.said("sum ")), (sum.clone(), sum));
        assert_eq!(switch.ports(), 2);
    });
}

#[test]
fn a_machine_behind_passt_moves_data_to_the_host_and_back() {
    on_backends(|parts| {
        let (mut passt, socket) = match Passt::start() {
            Ok(started) => started,
            Err(failure) => return eprintln!("not run: {failure}"),
        };
        let host = TcpListener::bind("127.0.0.1:0").unwrap();
        host.set_nonblocking(true).unwrap();
        let guest = behind_passt(parts, socket, host.local_addr().unwrap().port());
        // None if passt gives up.
        let mut accept = || {
            let stream = guest.wait_until("a connection", || match host.accept() {
                Ok((stream, _)) => Some(Some(stream)),
                Err(_) => passt.has_ended().then_some(None),
            })?;
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(BOOT_PATIENCE)).unwrap();
            Some(stream)
        };

        let Some(mut stream) = accept() else { return eprintln!("not run: passt gave up") };
        let began = Instant::now();
        let mut received = Vec::new();
        (&stream).take(bytes() as u64).read_to_end(&mut received).unwrap();
        eprintln!("{} MiB from the guest in {:?}", received.len() >> 20, began.elapsed());
        let expected = transfer::stream(bytes());
        assert!(received == expected, "what came is not what was sent");
        // The host is the first to close: passt of 2023 forgets to tell a guest that was.
        drop(stream);

        // And all of it back.
        stream = accept().unwrap();
        let began = Instant::now();
        stream.write_all(&expected).unwrap();
        drop(stream);
        guest.assert_success();
        eprintln!("and back in {:?}", began.elapsed());

        let sum = transfer::sum(&expected);
        assert_eq!((guest.said("sent "), guest.said("got ")), (sum.clone(), sum));
        drop(passt);
    });
}

/// A machine that asks passt for an address, sends to the host's `port` and receives from there. The
/// default gateway stands for the host's loopback address.
fn behind_passt(parts: &Parts, socket: std::os::unix::net::UnixStream, port: u16) -> Guest {
    let send = install("/send", &transfer::sender(pieces()));
    let receive = install("/receive", &transfer::receiver(pieces()));
    let script = format!(
        "set -e\n\
         ip link set eth0 up\n\
         udhcpc -q -n -O mtu -t 10 -T 1 -i eth0 -s /vmkit/lease >/dev/null 2>&1\n\
         gateway=$(ip route | awk '/^default/ {{ print $3 }}')\n\
         {send}{receive}\
         nc $gateway {port} -e /send 2>/sum\n\
         echo sent $(cat /sum)\n\
         nc $gateway {port} -e /receive 2>/sum\n\
         echo got $(cat /sum)\n"
    );
    let plugs = parts.plugs(Transport::Pci, &["virtio_net"], "", &script);
    start(plugs.plug(Net::stream(socket).unwrap()).finish())
}
