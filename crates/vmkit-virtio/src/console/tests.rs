use vmkit_memory::{Backing, RamLayout, allocate};

use super::worker::PortWorker;
use super::*;
use crate::testing::{FREE, Rig, lone_queue, wait};
use crate::{EventLoop, Mmio, Progress, Queues, WorkModel, Worker};

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

impl Text {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[test]
fn output_arrives_and_input_waits_for_buffers() {
    let text = Text::default();
    let console = Console::new(text.clone()).unwrap().size(80, 25);
    let input = console.input();
    let rig = Rig::new(Mmio::new(console));
    assert_eq!(rig.config::<4>(0), [80, 0, 25, 0]);
    assert_eq!(input.send(b"hello"), 5);
    let mut rings = rig.activate(feature::SIZE, 8);
    rig.write(FREE, b"from the guest");
    rings[1].add(&[(FREE, 5), (FREE + 5, 9)], &[]);
    rig.notify(1);
    assert_eq!(rings[1].wait_used(), (0, 0));
    assert_eq!(text.text(), "from the guest");
    rings[0].add(&[], &[(FREE, 3)]);
    rings[0].add(&[], &[(FREE + 0x100, 100)]);
    rig.notify(0);
    assert_eq!((rings[0].wait_used().1, rings[0].wait_used().1), (3, 2));
    assert_eq!((rig.bytes(FREE, 3), rig.bytes(FREE + 0x100, 2)), (b"hel".to_vec(), b"lo".to_vec()));
    // With buffers there, input comes by itself.
    rings[0].add(&[], &[(FREE, 10)]);
    rig.notify(0);
    input.send(b"more");
    assert_eq!(rings[0].wait_used().1, 4);
}

#[test]
fn input_that_nobody_reads_is_bounded() {
    let mut input = Console::new(std::io::sink()).unwrap().input();
    assert_eq!(input.send(&vec![0; 100_000]), 64 << 10);
    assert_eq!(input.write(b"x").unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn what_a_guest_wrote_just_before_its_machine_stopped_is_not_lost() {
    for broken in [false, true] {
        let text = Text::default();
        let console = Console::new(text.clone()).unwrap();
        // Nobody turns the loop: the device has had no time yet.
        let events = EventLoop::new().unwrap();
        let rig = Rig::new(Mmio::new(console).work(WorkModel::Loop(events)));
        let mut rings = rig.activate(0, 8);
        rig.write(FREE, b"last words");
        rings[1].add(&[(FREE, 4)], &[]);
        rings[1].add(&[(FREE + 4, 6)], &[]);
        if broken {
            rings[1].set_avail_idx(99);
        }
        rig.notify(1);
        rig.device.pause();
        assert_eq!(text.text(), if broken { "" } else { "last words" });
        assert_eq!((rings[1].used().is_some(), rig.is_broken()), (!broken, broken));
        rig.device.pause();
        assert_eq!(rig.faults.count(), u64::from(broken));
    }
}

#[test]
fn what_a_saved_machine_had_to_say_waits_until_it_runs() {
    let text = Text::default();
    let rig = Rig::new(Mmio::new(Console::new(text.clone()).unwrap()));
    let mut rings = rig.activate(0, 8);
    rig.device.pause();
    rig.write(FREE, b"later");
    rings[1].add(&[(FREE, 5)], &[]);
    rig.device.load(&rig.sections()).unwrap();
    rig.device.pause();
    assert_eq!(text.text(), "");
    rig.device.start().unwrap();
    rings[1].wait_used();
    assert_eq!(text.text(), "later");
}

#[test]
fn buffers_without_room_do_not_keep_the_worker() {
    let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
    let (queue, mut ring) = lone_queue(&ram, 0, 8);
    let mut queues = Queues::new(vec![queue]);
    let port = Port::new(String::new(), true, Box::new(std::io::sink())).unwrap();
    port.input().push_back(b'x');
    let mut worker = PortWorker::new(Arc::new(port), 0);
    // By the time the worker has taken the last, a fast driver has lent the first again.
    for _ in 0..3 {
        for _ in 0..8 {
            ring.add(&[], &[(0x8000, 0)]);
        }
        assert_eq!(worker.process(&mut queues, 0).unwrap(), Progress::More);
        (0..8).for_each(|_| assert_eq!(ring.used().unwrap().1, 0));
    }
    ring.add(&[], &[(0x8000, 4)]);
    assert_eq!(worker.process(&mut queues, 0).unwrap(), Progress::Waiting);
    assert_eq!(ring.used().unwrap().1, 1);
}

#[test]
fn a_turn_ends_after_so_much_output_that_a_stop_need_not_wait_long() {
    let ram = allocate(&RamLayout::pc(2 << 20).unwrap(), Backing::Anonymous).unwrap();
    let (queue, mut ring) = lone_queue(&ram, 1, 64);
    let mut queues = Queues::new(vec![queue]);
    let port = Port::new(String::new(), true, Box::new(std::io::sink())).unwrap();
    let mut worker = PortWorker::new(Arc::new(port), 0);
    for _ in 0..20 {
        ring.add(&[(0x8000, 1 << 20)], &[]);
    }
    assert_eq!(worker.process(&mut queues, 1).unwrap(), Progress::More);
    assert_eq!(ring.used_index(), 16);
    assert_eq!(worker.process(&mut queues, 1).unwrap(), Progress::Drained);
}

#[test]
fn a_resize_is_announced() {
    let console = Console::new(std::io::sink()).unwrap().size(80, 25);
    let size = console.resizer();
    let rig = Rig::new(Mmio::new(console));
    let _rings = rig.activate(feature::SIZE, 8);
    let before = rig.reg(0xFC);
    size.set(132, 50);
    assert_eq!((rig.config::<4>(0), rig.reg(0x60)), ([132, 0, 50, 0], 2));
    assert_ne!(rig.reg(0xFC), before);
    let sizeless = Console::new(std::io::sink()).unwrap();
    sizeless.resizer().set(1, 1);
    assert_eq!(VirtioDevice::features(&sizeless), 0);
}

fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

#[test]
fn named_ports_are_announced_opened_and_carry_data() {
    let text = Text::default();
    let mut console = Console::new(std::io::sink()).unwrap();
    let agent = console.port("agent", text.clone()).unwrap();
    let rig = Rig::new(Mmio::new(console));
    let mut rings = rig.activate(feature::MULTIPORT, 16);
    assert_eq!((rings.len(), rig.config::<4>(4)), (6, [2, 0, 0, 0]));
    for n in 0..8 {
        rings[2].add(&[], &[(FREE + n * 0x100, 0x100)]);
    }
    rig.notify(2);
    let say = |rings: &mut Vec<crate::testing::Ring>, message: Vec<u8>| {
        rig.write(FREE + 0x8000, &message);
        rings[3].add(&[(FREE + 0x8000, message.len() as u32)], &[]);
        rig.notify(3);
        assert_eq!(rings[3].wait_used().1, 0);
    };
    let mut next = 0;
    let mut heard = |rings: &mut Vec<crate::testing::Ring>| {
        let len = rings[2].wait_used().1;
        next += 1;
        rig.bytes(FREE + (next - 1) * 0x100, len as usize)
    };
    say(&mut rings, control(0, 0, 1));
    assert_eq!(heard(&mut rings), control(0, 1, 1));
    assert_eq!(heard(&mut rings), control(1, 1, 1));
    say(&mut rings, control(0, 3, 1));
    assert_eq!(heard(&mut rings), control(0, 4, 1));
    assert_eq!(heard(&mut rings), control(0, 6, 1));
    say(&mut rings, control(1, 3, 1));
    assert_eq!(heard(&mut rings), [control(1, 7, 1), b"agent".to_vec()].concat());
    assert_eq!(heard(&mut rings), control(1, 6, 1));
    // What is typed before a program listens waits for it.
    agent.send(b"ping");
    rings[4].add(&[], &[(FREE + 0x9000, 64)]);
    rig.notify(4);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert!(rings[4].used().is_none() && !agent.is_open());
    say(&mut rings, control(1, 6, 1));
    assert_eq!(rings[4].wait_used().1, 4);
    assert!(agent.is_open());
    rig.write(FREE + 0x9000, b"pong");
    rings[5].add(&[(FREE + 0x9000, 4)], &[]);
    rig.notify(5);
    rings[5].wait_used();
    assert_eq!(text.text(), "pong");
    rig.check_damaged_state();
    assert!(agent.is_open());
    rig.set_reg(0x70, 0);
    assert!(!agent.is_open());
}

#[test]
fn a_name_longer_than_the_drivers_buffer_is_cut_off() {
    let mut console = Console::new(std::io::sink()).unwrap();
    console.port("org.example.agent", std::io::sink()).unwrap();
    let rig = Rig::new(Mmio::new(console).work(WorkModel::Inline));
    let mut rings = rig.activate(feature::MULTIPORT, 16);
    rings[2].add(&[], &[(FREE, 12)]);
    rig.write(FREE + 0x8000, &control(1, 3, 1));
    rings[3].add(&[(FREE + 0x8000, 8)], &[]);
    rig.notify(3);
    rig.notify(2);
    assert_eq!((rings[2].used(), rig.is_broken()), (Some((0, 12)), false));
    assert_eq!(rig.bytes(FREE, 13), [control(1, 7, 1), b"org.\0".to_vec()].concat());
}

#[test]
fn a_driver_with_several_ports_is_told_the_size_and_its_changes() {
    let mut console = Console::new(std::io::sink()).unwrap().size(132, 43);
    console.port("agent", std::io::sink()).unwrap();
    let resizer = console.resizer();
    let rig = Rig::new(Mmio::new(console));
    let mut rings = rig.activate(feature::SIZE | feature::MULTIPORT, 16);
    for n in 0..8 {
        rings[2].add(&[], &[(FREE + n * 0x100, 0x100)]);
    }
    rig.notify(2);
    for (number, message) in [control(0, 0, 1), control(0, 3, 1)].into_iter().enumerate() {
        rig.write(FREE + 0x8000, &message);
        rings[3].add(&[(FREE + 0x8000, 8)], &[]);
        rig.notify(3);
        rings[3].wait_used();
        // Two ports added; then console, open and size.
        for _ in 0..2 + number {
            rings[2].wait_used();
        }
    }
    let sized = |columns, rows| [control(0, 5, 0), vec![columns, 0, rows, 0]].concat();
    assert_eq!(rig.bytes(FREE + 0x400, 12), sized(132, 43));
    resizer.set(80, 25);
    assert_eq!(rings[2].wait_used().1, 12);
    assert_eq!(rig.bytes(FREE + 0x500, 12), sized(80, 25));
}

#[test]
fn hostile_control_messages_grow_nothing_and_short_ones_break_the_device() {
    let mut console = Console::new(std::io::sink()).unwrap();
    console.port("agent", std::io::sink()).unwrap();
    let rig = Rig::new(Mmio::new(console).work(WorkModel::Inline));
    let mut rings = rig.activate(feature::MULTIPORT, 16);
    for n in 0..if cfg!(miri) { 50 } else { 1000_u32 } {
        let message = control(n.wrapping_mul(0x9E37_79B9) >> (n % 32), n as u16 % 9, 1);
        rig.write(FREE, &message);
        rings[3].add(&[(FREE, 8)], &[]);
        rig.notify(3);
        assert!(rings[3].used().is_some());
    }
    assert!(!rig.is_broken());
    // All that is owed is at most four messages a port.
    let mut count = 0;
    for _ in 0..20 {
        rings[2].add(&[], &[(FREE, 0x100)]);
        rig.notify(2);
        wait("nothing", || true);
        count += u32::from(rings[2].used().is_some());
    }
    assert!(count <= 8, "{count}");
    rings[3].add(&[(FREE, 7)], &[]);
    rig.notify(3);
    assert!(rig.is_broken());
}

#[test]
fn too_many_ports_and_bad_names_are_refused() {
    let mut console = Console::new(std::io::sink()).unwrap();
    assert!(console.port("", std::io::sink()).is_err());
    assert!(console.port(&"x".repeat(256), std::io::sink()).is_err());
    for n in 0..30 {
        console.port(&format!("p{n}"), std::io::sink()).unwrap();
    }
    assert!(console.port("one", std::io::sink()).is_err());
    assert_eq!(console.queues().len(), 64);
}
