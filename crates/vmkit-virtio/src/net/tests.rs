use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::testing::{EVENT_IDX, FREE, Rig, Ring};
use crate::{EventLoop, Mmio, WorkModel};

const BUFFERS: u64 = FREE + 0x10_0000;

fn card(net: Net, features: u64) -> (Rig, Vec<Ring>) {
    let rig = Rig::new(Mmio::new(net));
    let rings = rig.activate(features, 64);
    (rig, rings)
}

fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x08, 0x00];
    frame.extend((0..len - 14).map(|n| n as u8));
    frame
}

fn send((rig, rings): &mut (Rig, Vec<Ring>), header: [u8; 12], frame: &[u8]) {
    rig.write(FREE, &header);
    rig.write(FREE + 12, frame);
    rings[1].add(&[(FREE, 12), (FREE + 12, frame.len() as u32)], &[]);
    rig.notify(1);
    assert_eq!(rings[1].wait_used().1, 0);
}

fn lend((rig, rings): &mut (Rig, Vec<Ring>), count: u64, len: u32) {
    for n in 0..count {
        rings[0].add(&[], &[(BUFFERS + n * u64::from(len), len)]);
    }
    rig.notify(0);
}

#[test]
fn a_card_shows_its_address_and_mtu() {
    let net = Net::switch(&Switch::new()).unwrap().mac([2, 1, 2, 3, 4, 5]).mtu(9000);
    let rig = Rig::new(Mmio::new(net).work(WorkModel::Inline));
    assert_eq!(rig.config::<12>(0), [2, 1, 2, 3, 4, 5, 1, 0, 1, 0, 0x28, 0x23]);
    let random = Net::switch(&Switch::new()).unwrap();
    let mac = *random.lock_mac();
    assert_eq!(mac[0] & 3, 2);
}

#[test]
fn two_machines_reach_each_other_through_the_switch() {
    let switch = Switch::new();
    let mut one = card(Net::switch(&switch).unwrap(), EVENT_IDX);
    let mut two = card(Net::switch(&switch).unwrap(), EVENT_IDX | feature::MRG_RXBUF);
    for (len, count) in [(60, 1), (1514, 1), (9014, 3)] {
        lend(&mut one, 4, 12 + 1514);
        lend(&mut two, count, 4096);
        let sent = frame(2, 1, len);
        send(&mut one, [0; 12], &sent);
        let mut found = Vec::new();
        let (rig, rings) = &mut two;
        for n in 0..count {
            let (_, written) = rings[0].wait_used();
            found.extend(rig.bytes(BUFFERS + n * 4096, written as usize));
        }
        assert_eq!(found[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, count as u8, 0]);
        assert_eq!(found[12..], sent);
    }
    let reply = frame(1, 2, 60);
    send(&mut two, [0; 12], &reply);
    assert_eq!(one.1[0].wait_used().1, 72);
    assert_eq!(one.0.bytes(BUFFERS + 12, 60), reply);
}

#[test]
fn frames_wait_for_buffers_and_too_small_buffers_drop_them() {
    let switch = Switch::new();
    let mut one = card(Net::switch(&switch).unwrap(), 0);
    let receiver = Net::switch(&switch).unwrap();
    let counters = receiver.counters();
    let mut two = card(receiver, 0);
    send(&mut one, [0; 12], &frame(2, 1, 200));
    send(&mut one, [0; 12], &frame(2, 1, 100));
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(two.1[0].used(), None);
    lend(&mut two, 1, 150);
    // The first does not fit; the second takes the buffer.
    assert_eq!(two.1[0].wait_used().1, 112);
    assert_eq!((counters.dropped(), counters.received()), (1, 1));
}

/// A card that this thread works on, with a ring of four receive buffers, and who sends to it.
fn small_card(features: u64) -> (EventLoop, Rig, Vec<Ring>, NetCounters, impl NetBackend) {
    let switch = Switch::new();
    let (sender, net) = (switch.plug().unwrap(), Net::switch(&switch).unwrap());
    let (counters, events) = (net.counters(), EventLoop::new().unwrap());
    let rig = Rig::new(Mmio::new(net).work(WorkModel::Loop(events.clone())));
    let rings = rig.activate(features | feature::MRG_RXBUF, 4);
    (events, rig, rings, counters, sender)
}

fn rests(events: &EventLoop) -> bool {
    (0..10).any(|_| events.process_ready().unwrap() == 0)
}

#[test]
fn a_frame_that_needs_more_buffers_than_there_are_waits_for_them_at_rest() {
    for features in [0, EVENT_IDX] {
        let (events, rig, mut rings, _, mut sender) = small_card(features);
        let lend = |rings: &mut Vec<Ring>| {
            rings[0].add(&[], &[(BUFFERS, 1526)]);
            // As drivers do, only if asked to.
            let asked = rings[0].avail_event() == rings[0].avail_idx.wrapping_sub(1);
            if if features == 0 { rings[0].used_flags() == 0 } else { asked } {
                rig.notify(0);
            }
            assert!(rests(&events), "it goes on and on");
        };
        sender.send(&frame(2, 1, 3000), &Offload::default()).unwrap();
        sender.flush();
        lend(&mut rings);
        assert_eq!(rings[0].used(), None);
        lend(&mut rings);
        assert_eq!((rings[0].used(), rings[0].used()), (Some((0, 1526)), Some((1, 1486))));
    }
}

/// A network that fails some times before each frame, and has no event for it.
struct Failing {
    errors: usize,
    left: usize,
    asked: Arc<AtomicUsize>,
}

impl NetBackend for Failing {
    fn register(&mut self, _: &crate::Poller) -> std::io::Result<()> {
        Ok(())
    }
    fn event(&mut self, _: crate::Event) {}
    fn carries_offloads(&self) -> bool {
        false
    }
    fn send(&mut self, _: &[u8], _: &Offload) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) {}
    fn receive(&mut self, into: &mut [u8]) -> std::io::Result<(usize, Offload)> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.left > 0 {
            self.left -= 1;
            return Err(std::io::ErrorKind::Other.into());
        }
        self.left = self.errors;
        into[..60].copy_from_slice(&frame(2, 1, 60));
        Ok((60, Offload::default()))
    }
}

#[test]
fn a_failed_read_holds_up_no_frames_and_a_network_that_is_gone_keeps_nobody_busy() {
    for (errors, used) in [(3, 1), (usize::MAX, 0)] {
        let asked = Arc::new(AtomicUsize::new(0));
        let network = Failing { errors, left: errors, asked: asked.clone() };
        let events = EventLoop::new().unwrap();
        let model = WorkModel::Loop(events.clone());
        let rig = Rig::new(Mmio::new(Net::new(network)).work(model));
        let mut rings = rig.activate(0, 64);
        rings[0].add(&[], &[(BUFFERS, 2048)]);
        rig.notify(0);
        assert!(rests(&events));
        assert_eq!(rings[0].used().is_some(), used == 1, "{errors}");
        assert!(asked.load(Ordering::Relaxed) < 100);
    }
}

#[test]
fn a_frame_larger_than_all_that_a_queue_holds_is_dropped() {
    let (events, rig, mut rings, counters, mut sender) = small_card(0);
    for len in [9000, 60] {
        sender.send(&frame(2, 1, len), &Offload::default()).unwrap();
    }
    sender.flush();
    for n in 0..4 {
        rings[0].add(&[], &[(BUFFERS + n * 2048, 1526)]);
    }
    rig.notify(0);
    assert!(rests(&events));
    assert_eq!((counters.dropped(), counters.received()), (1, 1));
    assert_eq!(rings[0].used(), Some((0, 72)));
}

#[test]
fn checksums_are_finished_and_impossible_ones_drop_the_frame() {
    let switch = Switch::new();
    let sender = Net::switch(&switch).unwrap();
    let counters = sender.counters();
    let mut one = card(sender, feature::CSUM);
    let mut two = card(Net::switch(&switch).unwrap(), 0);
    lend(&mut two, 4, 2048);
    let mut sent = frame(2, 1, 60);
    sent[30..32].fill(0);
    for (start, offset) in [(60_u16, 0_u16), (0xFFFF, 0xFFFF), (20, 39)] {
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        send(&mut one, [1, 0, 0, 0, 0, 0, s0, s1, o0, o1, 0, 0], &sent);
    }
    assert_eq!(counters.dropped(), 3);
    send(&mut one, [1, 0, 0, 0, 0, 0, 20, 0, 10, 0, 0, 0], &sent);
    assert_eq!(two.1[0].wait_used().1, 72);
    let mut expected = sent.clone();
    assert!(checksum::finish(&mut expected, 20, 10));
    assert_ne!(expected, sent);
    assert_eq!(two.0.bytes(BUFFERS + 12, 60), expected);
    // A frame to be cut up was never agreed on.
    send(&mut one, [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &sent);
    send(&mut one, [0; 12], &sent[..13]);
    assert_eq!(counters.dropped(), 5);
}

/// A TCP frame over IPv4 with a kilobyte more than a segment of payload, and its header.
fn large(segment: u16) -> ([u8; 12], Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 9, 9, 0, 0, 0, 0]);
    frame.extend((0..usize::from(segment) + 1000).map(|n| n as u8));
    let [g0, g1] = segment.to_le_bytes();
    ([1, 1, 54, 0, g0, g1, 34, 0, 16, 0, 0, 0], frame)
}

#[test]
fn a_large_frame_goes_whole_to_who_takes_it_and_in_segments_to_others() {
    let switch = Switch::new();
    let offers = feature::CSUM | feature::HOST_TSO4;
    let mut one = card(Net::switch(&switch).unwrap(), offers);
    let takes = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::MRG_RXBUF;
    let mut whole = card(Net::switch(&switch).unwrap(), takes);
    let mut cut = card(Net::switch(&switch).unwrap(), 0);
    lend(&mut whole, 2, 2048);
    lend(&mut cut, 2, 2048);
    let (header, frame) = large(1460);
    send(&mut one, header, &frame);
    let lens = [whole.1[0].wait_used().1, whole.1[0].wait_used().1];
    assert_eq!(lens, [2048, 12 + frame.len() as u32 - 2048]);
    let found = whole.0.bytes(BUFFERS, 12 + frame.len());
    assert_eq!(found[..12], [1, 1, 54, 0, 0xB4, 5, 34, 0, 16, 0, 2, 0]);
    assert_eq!(found[12..], frame);
    let lens = [cut.1[0].wait_used().1, cut.1[0].wait_used().1];
    assert_eq!(lens, [12 + 54 + 1460, 12 + 54 + 1000]);
    let mut payload = cut.0.bytes(BUFFERS + 66, 1460);
    payload.extend(cut.0.bytes(BUFFERS + 2048 + 66, 1000));
    assert_eq!(payload, frame[54..]);
    assert_eq!(cut.0.bytes(BUFFERS, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn who_was_told_of_an_mtu_gets_no_longer_packets() {
    let switch = Switch::new();
    let mut one = card(Net::switch(&switch).unwrap(), feature::CSUM | feature::HOST_TSO4);
    let tagged = |len| {
        let mut frame = frame(2, 1, len);
        frame[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
        frame
    };
    for (features, told, dropped) in [(feature::MTU, true, 3), (0, false, 0)] {
        let net = Net::switch(&switch).unwrap().mtu(1000);
        let counters = net.counters();
        let mut two = card(net, features);
        lend(&mut two, 8, 12 + 4000);
        let (header, large) = large(1460);
        send(&mut one, [0; 12], &frame(2, 1, 1015));
        send(&mut one, [0; 12], &tagged(1019));
        send(&mut one, header, &large);
        send(&mut one, [0; 12], &frame(2, 1, 1014));
        send(&mut one, [0; 12], &tagged(1018));
        let got: Vec<u32> =
            (0..if told { 2 } else { 6 }).map(|_| two.1[0].wait_used().1 - 12).collect();
        assert_eq!(got[got.len() - 2..], [1014, 1018]);
        assert_eq!(counters.dropped(), dropped);
    }
    let mut whole = card(
        Net::switch(&switch).unwrap().mtu(1000),
        feature::MTU | feature::GUEST_CSUM | feature::GUEST_TSO4,
    );
    lend(&mut whole, 1, 12 + 4000);
    let (header, large) = large(946);
    send(&mut one, header, &large);
    assert_eq!(whole.1[0].wait_used().1, 12 + large.len() as u32);
}

#[test]
fn segments_are_not_agreed_on_without_checksums() {
    use crate::testing::{ACKNOWLEDGE_DRIVER, FEATURES_OK, VERSION_1};
    let (guest, host) = (feature::GUEST_CSUM, feature::CSUM);
    for (features, good) in [
        (feature::GUEST_TSO4, false),
        (feature::GUEST_TSO6 | host, false),
        (feature::HOST_TSO4 | guest, false),
        (feature::HOST_TSO6, false),
        (feature::GUEST_TSO4 | guest | feature::HOST_TSO6 | host, true),
    ] {
        let rig = Rig::new(Mmio::new(Net::switch(&Switch::new()).unwrap()));
        rig.set_reg(0x70, ACKNOWLEDGE_DRIVER);
        rig.accept(features | VERSION_1);
        assert_eq!(rig.status() & FEATURES_OK != 0, good, "{features:#x}");
    }
}

#[test]
fn a_checksum_is_left_to_a_driver_that_agreed_to_finish_it() {
    let switch = Switch::new();
    let mut one = card(Net::switch(&switch).unwrap(), feature::CSUM);
    let mut two = card(Net::switch(&switch).unwrap(), feature::GUEST_CSUM);
    lend(&mut two, 1, 2048);
    let sent = frame(2, 1, 60);
    send(&mut one, [1, 0, 0, 0, 0, 0, 20, 0, 10, 0, 0, 0], &sent);
    two.1[0].wait_used();
    assert_eq!(two.0.bytes(BUFFERS, 12), [1, 0, 0, 0, 0, 0, 20, 0, 10, 0, 1, 0]);
    assert_eq!(two.0.bytes(BUFFERS + 12, 60), sent);
}

#[test]
fn large_frames_that_were_not_agreed_on_or_make_no_sense_are_dropped() {
    let switch = Switch::new();
    for features in [feature::CSUM, feature::CSUM | feature::HOST_TSO4] {
        let net = Net::switch(&switch).unwrap();
        let counters = net.counters();
        let mut one = card(net, features);
        let (header, mut frame) = large(1460);
        if features & feature::HOST_TSO4 != 0 {
            frame[23] = 17;
        }
        send(&mut one, header, &frame);
        send(&mut one, [header[0], 4, 0, 0, 1, 0, 34, 0, 16, 0, 0, 0], &frame);
        send(&mut one, [header[0], 3, 0, 0, 1, 0, 34, 0, 16, 0, 0, 0], &frame);
        assert_eq!((counters.dropped(), counters.sent()), (3, 0));
    }
}

#[test]
fn a_stream_carries_frames_both_ways() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut card = card(Net::stream(ours).unwrap(), 0);
    lend(&mut card, 4, 2048);
    let sent = frame(1, 2, 333);
    theirs.write_all(&333_u32.to_be_bytes()).unwrap();
    theirs.write_all(&sent).unwrap();
    assert_eq!(card.1[0].wait_used().1, 345);
    assert_eq!(card.0.bytes(BUFFERS + 12, 333), sent);
    send(&mut card, [0; 12], &frame(2, 1, 77));
    let mut found = [0; 81];
    theirs.read_exact(&mut found).unwrap();
    assert_eq!(found[..4], 77_u32.to_be_bytes());
    assert_eq!(found[4..], frame(2, 1, 77));
}

#[test]
fn a_stream_that_takes_no_more_holds_the_driver_back_and_loses_nothing() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (rig, mut rings) = card(Net::stream(ours).unwrap(), 0);
    let sent = frame(2, 1, 1514);
    rig.write(FREE + 12, &sent);
    // A frame is there before the driver hears of it, so that reading must not wait for one.
    theirs.set_nonblocking(true).unwrap();
    let (mut found, mut piece) = (Vec::new(), [0; 1518]);
    for _ in 0..63 {
        for _ in 0..16 {
            rings[1].add(&[(FREE, 12 + 1514)], &[]);
        }
        rig.notify(1);
        // Wait for all of them, unless the socket is full.
        for _ in 0..16 {
            let start = std::time::Instant::now();
            while rings[1].used().is_none() {
                if start.elapsed().as_millis() > 200
                    && let Ok(count) = theirs.read(&mut piece)
                {
                    found.extend_from_slice(&piece[..count]);
                }
            }
        }
    }
    assert!(found.chunks_exact(1518).all(|frame| frame[4..] == sent));
    rig.set_reg(0x70, 0);
    assert!(!rig.is_broken());
}

#[test]
fn limited_cards_send_and_receive_with_guest_time() {
    let switch = Switch::new();
    let limit = RateLimit::new().operations(10).burst(std::time::Duration::ZERO);
    let (rig, mut rings) = card(Net::switch(&switch).unwrap().limit_sent(limit), 0);
    let mut other = card(Net::switch(&switch).unwrap().limit_received(limit), 0);
    lend(&mut other, 4, 2048);
    rig.write(FREE, &[0; 12]);
    rig.write(FREE + 12, &frame(2, 1, 100));
    for _ in 0..2 {
        rings[1].add(&[(FREE, 112)], &[]);
    }
    rig.notify(1);
    assert_eq!((rings[1].wait_used().1, other.1[0].wait_used().1), (0, 112));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rings[1].used(), None);
    rig.clock.advance(std::time::Duration::from_millis(100));
    assert_eq!(rings[1].wait_used().1, 0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(other.1[0].used(), None);
    other.0.clock.advance(std::time::Duration::from_millis(100));
    assert_eq!(other.1[0].wait_used().1, 112);
}

#[test]
fn segments_of_a_large_frame_count_as_frames_to_a_limit() {
    let switch = Switch::new();
    let mut one = card(Net::switch(&switch).unwrap(), feature::CSUM | feature::HOST_TSO4);
    let limit = RateLimit::new().operations(10).burst(std::time::Duration::ZERO);
    let mut other = card(Net::switch(&switch).unwrap().limit_received(limit), 0);
    lend(&mut other, 2, 2048);
    let (header, frame) = large(1460);
    send(&mut one, header, &frame);
    assert_eq!(other.1[0].wait_used().1, 12 + 54 + 1460);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(other.1[0].used(), None);
    other.0.clock.advance(std::time::Duration::from_millis(100));
    assert_eq!(other.1[0].wait_used().1, 12 + 54 + 1000);
}

#[test]
fn a_transmit_buffer_without_a_header_breaks_the_device() {
    let (rig, mut rings) = card(Net::switch(&Switch::new()).unwrap(), 0);
    rings[1].add(&[(FREE, 11)], &[]);
    rig.notify(1);
    rig.wait("broken device", || rig.is_broken());
    assert_eq!(rings[1].used(), None);
}

#[test]
fn saved_state_carries_the_address() {
    let rig = Rig::new(Mmio::new(Net::switch(&Switch::new()).unwrap().mac([2, 9, 9, 9, 9, 9])));
    let _rings = rig.activate(0, 8);
    rig.check_damaged_state();
    rig.device.pause();
    let other = Rig::new(Mmio::new(Net::switch(&Switch::new()).unwrap()));
    other.device.pause();
    other.device.load(&rig.sections()).unwrap();
    assert_eq!(other.config::<6>(0), [2, 9, 9, 9, 9, 9]);
}
