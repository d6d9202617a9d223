//! What Linux does to these machines when it boots, with the machines wired as a PC's board.

use vmkit_irqchip::{ApicMessage, Ioapic, LapicAction, LapicConfig, LocalApic, PIT_HZ, Pic, Pit};

/// A board with one processor that takes interrupts whenever it is asked.
/// A sink that takes everything.
fn into(sent: &mut Vec<ApicMessage>) -> impl FnMut(ApicMessage) -> bool {
    |message| {
        sent.push(message);
        true
    }
}

struct Board {
    now: u64,
    pic: Pic,
    ioapic: Ioapic,
    pit: Pit,
    lapic: LocalApic,
}

impl Board {
    fn new() -> Self {
        Self {
            now: 0,
            pic: Pic::new(),
            ioapic: Ioapic::new(),
            pit: Pit::new(),
            lapic: LocalApic::new(LapicConfig::new(0)),
        }
    }

    fn out(&mut self, port: u16, value: u8) {
        if Pic::PORTS.contains(&port) {
            self.pic.write(port, value);
        } else {
            self.pit.write(port, value, self.now);
        }
        self.wires();
    }

    fn input(&mut self, port: u16) -> u8 {
        self.now += 1_000;
        if Pic::PORTS.contains(&port) { self.pic.read(port) } else { self.pit.read(port, self.now) }
    }

    fn ioapic(&mut self, index: u8, value: u32) {
        let mut sent = Vec::new();
        self.ioapic.write(0x00, &[index], &mut |_| true);
        self.ioapic.write(0x10, &value.to_le_bytes(), &mut into(&mut sent));
        self.deliver(&sent);
    }

    fn lapic(&mut self, offset: u64, value: u32) {
        let action = self.lapic.write_mmio(offset, &value.to_le_bytes(), self.now);
        if let LapicAction::Eoi(vector) = action {
            let mut sent = Vec::new();
            self.ioapic.eoi(vector, &mut into(&mut sent));
            self.deliver(&sent);
        }
    }

    fn lapic_read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.lapic.read_mmio(offset, &mut data, self.now);
        u32::from_le_bytes(data)
    }

    fn deliver(&mut self, sent: &[ApicMessage]) {
        for message in sent {
            if self.lapic.matches(message.dest, message.logical) {
                assert_eq!(self.lapic.accept(message), None);
            }
        }
    }

    /// IRQ 0 is input 0 of the pair and, as the MADT says, pin 2 of the IOAPIC.
    fn irq0(&mut self, high: bool) {
        let mut sent = Vec::new();
        self.pic.set_level(0, high);
        self.ioapic.set_level(2, high, &mut into(&mut sent));
        self.deliver(&sent);
        self.wires();
    }

    fn wires(&mut self) {
        let intr = self.pic.output();
        assert_eq!(self.lapic.set_lint(0, intr), None);
    }

    /// Lets `ns` pass; the vectors that were taken, each with its EOI done.
    fn run(&mut self, ns: u64) -> Vec<u8> {
        let end = self.now + ns;
        let mut taken = self.take();
        loop {
            let deadlines = [self.pit.next_deadline(), self.lapic.next_deadline()];
            let Some(next) = deadlines.into_iter().flatten().min().filter(|&at| at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            self.lapic.advance(self.now);
            if self.pit.advance(self.now) {
                self.irq0(true);
                self.irq0(false);
            }
            taken.extend(self.take());
        }
        self.now = end;
        taken
    }

    fn take(&mut self) -> Vec<u8> {
        let mut taken = Vec::new();
        loop {
            if self.pic.output() && self.lapic.accepts_extint() {
                let vector = self.pic.acknowledge();
                self.lapic.extint_acknowledged();
                taken.push(vector);
                if vector >= 0x38 {
                    self.out(0xa0, 0x20);
                }
                self.out(0x20, 0x20);
            } else if self.lapic.pending_vector().is_some() {
                taken.push(self.lapic.acknowledge());
                self.lapic(0xb0, 0);
            } else {
                return taken;
            }
            assert!(taken.len() < 10_000, "an interrupt storm");
        }
    }

    /// init_8259A.
    fn init_pic(&mut self) {
        for (port, value) in [
            (0x21, 0xff),
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0xfb),
            (0xa1, 0xff),
        ] {
            self.out(port, value);
        }
    }

    /// pit_set_periodic at HZ=250.
    fn start_pit(&mut self) {
        for (port, value) in [(0x43, 0x34), (0x40, 0xa5), (0x40, 0x12)] {
            self.out(port, value);
        }
    }

    fn enable_lapic(&mut self) {
        self.lapic(0xf0, 0x1ff);
        self.lapic(0x350, 0x1_0700);
        self.lapic(0x360, 0x400);
    }
}

const HZ_250: u64 = 4_000_000;

#[test]
fn the_timer_ticks_through_the_8259_pair_and_virtual_wire() {
    let mut board = Board::new();
    board.init_pic();
    board.start_pit();
    assert!(board.run(100 * HZ_250).is_empty(), "masked");
    board.out(0x21, 0xfa);
    board.run(1);
    let ticks = board.run(1_000_000_000);
    assert!(ticks.iter().all(|&v| v == 0x30));
    assert!((249..=251).contains(&ticks.len()), "{}", ticks.len());
}

#[test]
fn check_timer_finds_the_timer_at_ioapic_pin_2() {
    let mut board = Board::new();
    board.init_pic();
    board.enable_lapic();
    board.start_pit();
    board.run(10 * HZ_250);
    // Pin 2: edge, logical flat, to processor 0; unmasked last.
    board.lapic(0xd0, 0x0100_0000);
    board.lapic(0xe0, 0xffff_ffff);
    board.ioapic(0x15, 0x0100_0000);
    board.ioapic(0x14, 0x0001_0830);
    assert!(board.run(10 * HZ_250).is_empty());
    board.ioapic(0x14, 0x0000_0830);
    // timer_irq_works: more than 4 ticks in 10 jiffies.
    let ticks = board.run(10 * HZ_250);
    assert!(ticks.iter().all(|&v| v == 0x30));
    assert!((9..=11).contains(&ticks.len()), "{}", ticks.len());
}

#[test]
fn the_last_resorts_of_check_timer_work_too() {
    // Virtual wire: LINT0 takes the pair's output as a fixed interrupt. The pair runs in AEOI mode
    // for that.
    let mut board = Board::new();
    board.init_pic();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03), (0x21, 0xfa)] {
        board.out(port, value);
    }
    board.enable_lapic();
    board.start_pit();
    board.lapic(0x350, 0x31);
    assert!(board.run(2 * HZ_250).contains(&0x31));
    // ExtINT: the pair gives the vector.
    board.init_pic();
    board.out(0x21, 0xfa);
    board.lapic(0x350, 0x700);
    let ticks = board.run(10 * HZ_250);
    assert!(ticks.len() >= 9 && ticks.iter().all(|&v| v == 0x30), "{ticks:x?}");
}

#[test]
fn the_tsc_is_calibrated_by_counter_2() {
    // pit_calibrate_tsc with 10 ms, then 50 ms.
    for ms in [10, 50] {
        let mut board = Board::new();
        let latch = (PIT_HZ / (1000 / ms)) as u16;
        let port61 = board.input(0x61);
        board.out(0x61, port61 & !0x02 | 0x01);
        board.out(0x43, 0xb0);
        board.out(0x42, latch as u8);
        board.out(0x42, (latch >> 8) as u8);
        let start = board.now;
        let mut polls = 0_u64;
        while board.input(0x61) & 0x20 == 0 {
            polls += 1;
            assert!(polls < 1_000_000);
        }
        let measured = board.now - start;
        let error = measured.abs_diff(ms * 1_000_000);
        assert!(error < 3_000, "{ms} ms took {measured} ns");
    }
}

#[test]
fn the_quick_calibration_sees_the_high_byte_fall_in_step() {
    // quick_pit_calibrate: counter 2 in mode 0 from 0xffff, reading pairs of bytes.
    let mut board = Board::new();
    let port61 = board.input(0x61);
    board.out(0x61, port61 & !0x02 | 0x01);
    for (port, value) in [(0x43, 0xb0), (0x42, 0xff), (0x42, 0xff)] {
        board.out(port, value);
    }
    board.input(0x42);
    board.input(0x42);
    let mut last = board.now;
    for expected in (0xe0..=0xff_u8).rev() {
        let mut count = 0;
        loop {
            board.input(0x42);
            if board.input(0x42) != expected {
                break;
            }
            count += 1;
        }
        // 256 clocks are 214.6 µs; Linux wants more than five reads per step.
        assert!(count > 5);
        if expected < 0xff {
            let step = board.now - last;
            assert!(step.abs_diff(214_552) < 4_000, "{step}");
        }
        last = board.now;
    }
}

#[test]
fn the_lapic_timer_is_calibrated_by_pit_ticks() {
    // calibrate_APIC_clock: divider 16, count from the top, over 100 ms of ticks.
    let mut board = Board::new();
    board.init_pic();
    board.enable_lapic();
    board.start_pit();
    board.lapic(0x350, 0x700);
    board.out(0x21, 0xfa);
    board.lapic(0x3e0, 0x3);
    board.lapic(0x320, 0x1_00ec);
    board.lapic(0x380, u32::MAX);
    let mut ticks = 0;
    let mut window = (0, 0);
    while ticks < 26 {
        ticks += board.run(100_000).len();
        let count = board.lapic_read(0x390);
        match ticks {
            1 if window.0 == 0 => window.0 = count,
            26 => window.1 = count,
            _ => {}
        }
    }
    let delta = u64::from(window.0 - window.1);
    // 100 ms of 1 GHz / 16, within a polling step.
    assert!(delta.abs_diff(6_250_000) < 20_000, "{delta}");
    // And then it ticks by itself: one-shot of a jiffy.
    board.out(0x21, 0xff);
    board.lapic(0x320, 0xec);
    board.lapic(0x380, 250_000);
    assert_eq!(board.run(HZ_250 + 1), [0xec]);
}

#[test]
fn a_shared_level_interrupt_comes_until_its_device_is_quiet() {
    let mut board = Board::new();
    board.init_pic();
    board.enable_lapic();
    board.lapic(0xd0, 0x0100_0000);
    board.ioapic(0x25, 0x0100_0000);
    board.ioapic(0x24, 0x0000_8841);
    let mut sent = Vec::new();
    board.ioapic.set_level(10, true, &mut into(&mut sent));
    board.deliver(&sent);
    for _ in 0..5 {
        assert_eq!(board.lapic.acknowledge(), 0x41);
        assert_eq!(board.lapic.pending_vector(), None);
        board.lapic(0xb0, 0);
    }
    assert_eq!(board.lapic.acknowledge(), 0x41);
    board.ioapic.set_level(10, false, &mut |_| panic!("a falling level sends nothing"));
    board.lapic(0xb0, 0);
    assert_eq!(board.lapic.pending_vector(), None);
}
