//! Invariants of the interrupt controllers under any sequence of accesses.

use proptest::prelude::*;
use vmkit_irqchip::{
    APIC_BASE_MSR, ApicMessage, DeliveryMode, Ioapic, LapicAction, LapicConfig, LocalApic, Pic,
    TSC_DEADLINE_MSR,
};

#[derive(Clone, Debug)]
enum PicStep {
    Line(u8, bool),
    Write(u16, u8),
    Read(u16),
    Acknowledge,
}

fn pic_step() -> impl Strategy<Value = PicStep> {
    let port = prop::sample::select(&Pic::PORTS[..]);
    prop_oneof![
        4 => (0..18_u8, any::<bool>()).prop_map(|(irq, high)| PicStep::Line(irq, high)),
        3 => (port.clone(), any::<u8>()).prop_map(|(port, value)| PicStep::Write(port, value)),
        1 => port.prop_map(PicStep::Read),
        3 => Just(PicStep::Acknowledge),
    ]
}

fn run_pic(pic: &mut Pic, step: &PicStep) -> u8 {
    match *step {
        PicStep::Line(irq, high) => pic.set_level(irq, high),
        PicStep::Write(port, value) => pic.write(port, value),
        PicStep::Read(port) => return pic.read(port),
        PicStep::Acknowledge => return pic.acknowledge(),
    }
    0
}

/// A pair with everything unmasked and vectors from 0x30.
fn open_pic() -> Pic {
    let mut pic = Pic::new();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x01),
    ] {
        pic.write(port, value);
    }
    pic.write(0x21, 0);
    pic.write(0xa1, 0);
    pic
}

/// Rank of an input of the pair: the secondary's come in at 2.
fn pic_rank(irq: u8) -> u8 {
    match irq {
        0..=1 => irq,
        3..=7 => irq + 8,
        _ => irq - 6,
    }
}

proptest! {
    #[test]
    fn a_restored_pair_goes_on_as_if_nothing_had_been(
        before in prop::collection::vec(pic_step(), 0..60),
        after in prop::collection::vec(pic_step(), 0..60),
    ) {
        let mut pic = Pic::new();
        for step in &before {
            run_pic(&mut pic, step);
        }
        let mut copy = Pic::new();
        prop_assert_eq!(copy.load(&pic.save()), Ok(()));
        prop_assert_eq!(&copy, &pic);
        for step in &after {
            prop_assert_eq!(run_pic(&mut pic, step), run_pic(&mut copy, step));
            prop_assert_eq!(pic.output(), copy.output());
        }
    }

    #[test]
    fn the_pair_delivers_each_edge_once_in_order_of_priority(
        edges in prop::collection::btree_set(0..16_u8, 0..16),
    ) {
        let mut pic = open_pic();
        for &irq in &edges {
            pic.set_level(irq, true);
            pic.set_level(irq, true);
            pic.set_level(irq, false);
        }
        let mut expected: Vec<u8> = edges.into_iter().filter(|&irq| irq != 2).collect();
        expected.sort_by_key(|&irq| pic_rank(irq));
        let mut seen = Vec::new();
        while pic.output() {
            let irq = pic.acknowledge() - 0x30;
            seen.push(irq);
            if irq >= 8 {
                pic.write(0xa0, 0x20);
            }
            pic.write(0x20, 0x20);
        }
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn an_acknowledge_ends_the_output_until_something_happens(
        steps in prop::collection::vec(pic_step(), 0..80),
    ) {
        let mut pic = Pic::new();
        for step in &steps {
            run_pic(&mut pic, step);
            let (mut probe, mut count) = (pic.clone(), 0);
            let level = probe.read(0x4d0) != 0 || probe.read(0x4d1) != 0;
            while probe.output() && !level {
                probe.acknowledge();
                count += 1;
                prop_assert!(count <= 17, "more acknowledges than inputs");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum IoapicStep {
    Line(u8, bool),
    Register(u8, u32),
    Raw(u64, Vec<u8>),
    Eoi(u8),
}

/// Few vectors and pins, so that they meet.
fn ioapic_step() -> impl Strategy<Value = IoapicStep> {
    let entry =
        (0..4_u8, 0x30..0x34_u32, prop::sample::select(vec![0_u32, 0, 0, 1, 4, 7]), 0..16_u32)
            .prop_map(|(pin, vector, mode, bits)| {
                let bits = (bits & 1) << 13 | (bits >> 1 & 1) << 15 | u32::from(bits > 12) << 16;
                IoapicStep::Register(0x10 + 2 * pin, vector | mode << 8 | bits)
            });
    prop_oneof![
        5 => (0..4_u8, any::<bool>()).prop_map(|(pin, high)| IoapicStep::Line(pin, high)),
        3 => entry,
        1 => (any::<u8>(), any::<u32>()).prop_map(|(index, value)| IoapicStep::Register(index, value)),
        1 => (0..0x60_u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| IoapicStep::Raw(offset, data)),
        3 => (0x30..0x34_u8).prop_map(IoapicStep::Eoi),
    ]
}

fn run_ioapic(ioapic: &mut Ioapic, step: &IoapicStep) -> Vec<ApicMessage> {
    let mut sent = Vec::new();
    let sink = &mut |message| {
        sent.push(message);
        true
    };
    match step {
        IoapicStep::Line(pin, high) => ioapic.set_level(*pin, *high, sink),
        IoapicStep::Register(index, value) => {
            ioapic.write(0, &[*index], sink);
            ioapic.write(0x10, &value.to_le_bytes(), sink);
        }
        IoapicStep::Raw(offset, data) => {
            let mut copy = data.clone();
            ioapic.read(*offset, &mut copy);
            ioapic.write(*offset, data, sink);
        }
        IoapicStep::Eoi(vector) => ioapic.eoi(*vector, sink),
    }
    sent
}

proptest! {
    #[test]
    fn no_level_is_forgotten_and_none_is_sent_twice(
        steps in prop::collection::vec(ioapic_step(), 0..200),
    ) {
        let mut ioapic = Ioapic::new();
        for step in &steps {
            let before = ioapic.save();
            let sent = run_ioapic(&mut ioapic, step);
            let after = ioapic.save();
            for pin in 0..24 {
                let entry = after.entries[pin];
                let mode = entry >> 8 & 7;
                let asserted = after.levels >> pin & 1 != 0;
                let level = entry & 1 << 15 != 0 && mode < 2;
                let (masked, serving) = (entry & 1 << 16 != 0, entry & 1 << 14 != 0);
                let forgotten = level && asserted && !masked && !serving;
                prop_assert!(!forgotten, "pin {pin} is forgotten");
                prop_assert!(level || !serving, "an edge on pin {pin} is in service");
                prop_assert_eq!(entry & 1 << 12, 0);
            }
            // Pins that entered service are those that sent a level message.
            let entered = (0..24)
                .filter(|&pin| {
                    let freed = matches!(step, IoapicStep::Eoi(v) if *v == before.entries[pin] as u8)
                        || matches!(step, IoapicStep::Raw(0x40, data)
                            if data.first() == Some(&(before.entries[pin] as u8)));
                    after.entries[pin] & 1 << 14 != 0
                        && (before.entries[pin] & 1 << 14 == 0 || freed)
                })
                .count();
            prop_assert_eq!(sent.iter().filter(|m| m.level).count(), entered);
            // A wire makes at most one message, and the same level again makes none.
            if let IoapicStep::Line(..) = step {
                prop_assert!(sent.len() <= 1);
                prop_assert!(run_ioapic(&mut ioapic.clone(), step).is_empty());
            }
        }
    }

    #[test]
    fn a_restored_ioapic_goes_on_as_if_nothing_had_been(
        before in prop::collection::vec(ioapic_step(), 0..80),
        after in prop::collection::vec(ioapic_step(), 0..80),
    ) {
        let mut ioapic = Ioapic::new();
        for step in &before {
            run_ioapic(&mut ioapic, step);
        }
        let mut copy = Ioapic::new();
        prop_assert_eq!(copy.load(&ioapic.save()), Ok(()));
        copy.resample(&mut |message| panic!("{message:?} was not owed"));
        prop_assert_eq!(&copy, &ioapic);
        for step in &after {
            prop_assert_eq!(run_ioapic(&mut ioapic, step), run_ioapic(&mut copy, step));
        }
    }
}

#[derive(Clone, Debug)]
enum LapicStep {
    Mmio(u64, u32),
    OddMmio(u64, Vec<u8>),
    Msr(u32, u64),
    Read(u64),
    Accept(ApicMessage),
    Lint(usize, bool),
    Acknowledge,
    Eoi,
    Advance,
    Cr8(u8),
}

fn message() -> impl Strategy<Value = ApicMessage> {
    let mode = prop::sample::select(vec![
        DeliveryMode::Fixed,
        DeliveryMode::LowestPriority,
        DeliveryMode::Nmi,
        DeliveryMode::ExtInt,
        DeliveryMode::Sipi,
    ]);
    (mode, any::<u8>(), any::<bool>()).prop_map(|(mode, vector, level)| ApicMessage {
        dest: 0,
        logical: false,
        mode,
        vector,
        level,
    })
}

fn lapic_step() -> impl Strategy<Value = (u64, LapicStep)> {
    let timer =
        (any::<u8>(), 0..3_u32, prop::bool::weighted(0.2)).prop_map(|(vector, mode, masked)| {
            LapicStep::Mmio(0x320, u32::from(vector) | mode << 17 | u32::from(masked) << 16)
        });
    let base = prop::sample::select(vec![0xfee0_0100_u64, 0xfee0_0900, 0xfee0_0d00, 0xfee0_0d00]);
    let step = prop_oneof![
        6 => (0..0x41_u64, any::<u32>()).prop_map(|(reg, value)| LapicStep::Mmio(reg << 4, value)),
        3 => timer,
        3 => (0..5_000_u32).prop_map(|count| LapicStep::Mmio(0x380, count)),
        4 => Just(LapicStep::Mmio(0xf0, 0x1ff)),
        1 => (0..0x1100_u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| LapicStep::OddMmio(offset, data)),
        6 => (0x800..0x842_u32, any::<u32>()).prop_map(|(msr, v)| LapicStep::Msr(msr, v.into())),
        2 => (0x800..0x842_u32, any::<u64>()).prop_map(|(msr, v)| LapicStep::Msr(msr, v)),
        2 => (0..40_000_u64).prop_map(|tsc| LapicStep::Msr(TSC_DEADLINE_MSR, tsc)),
        1 => base.prop_map(|base| LapicStep::Msr(APIC_BASE_MSR, base)),
        4 => (0..0x41_u64).prop_map(|reg| LapicStep::Read(reg << 4)),
        8 => message().prop_map(LapicStep::Accept),
        1 => (0..3_usize, any::<bool>()).prop_map(|(pin, high)| LapicStep::Lint(pin, high)),
        6 => Just(LapicStep::Acknowledge),
        5 => Just(LapicStep::Eoi),
        4 => Just(LapicStep::Advance),
        1 => (0..16_u8).prop_map(LapicStep::Cr8),
    ];
    (prop_oneof![Just(0_u64), 0..3_000_u64, 0..1_000_000_000_000_u64], step)
}

/// Runs a step; what a processor could see of it.
fn run_lapic(apic: &mut LocalApic, now: u64, step: &LapicStep) -> String {
    match step {
        LapicStep::Mmio(offset, value) => {
            format!("{:?}", apic.write_mmio(*offset, &value.to_le_bytes(), now))
        }
        LapicStep::OddMmio(offset, data) => {
            let mut copy = data.clone();
            apic.read_mmio(*offset, &mut copy, now);
            format!("{copy:?} {:?}", apic.write_mmio(*offset, data, now))
        }
        LapicStep::Msr(msr, value) => {
            format!("{:?} {:?}", apic.read_msr(*msr, now), apic.write_msr(*msr, *value, now))
        }
        LapicStep::Read(offset) => {
            let mut data = [0; 4];
            apic.read_mmio(*offset, &mut data, now);
            let msr = apic.read_msr(0x800 + (*offset >> 4) as u32, now);
            format!("{data:?} {msr:?}")
        }
        LapicStep::Accept(message) => format!("{:?}", apic.accept(message)),
        LapicStep::Lint(pin, high) => format!("{:?}", apic.set_lint(*pin, *high)),
        LapicStep::Acknowledge => format!("{:?}", apic.acknowledge()),
        LapicStep::Eoi => format!("{:?}", apic.eoi()),
        LapicStep::Advance => {
            apic.advance(now);
            String::new()
        }
        LapicStep::Cr8(value) => {
            apic.set_cr8(*value);
            String::new()
        }
    }
}

/// The vectors of a 256-bit register of the saved page.
fn vectors(page: &vmkit_irqchip::LapicPage, first: usize) -> Vec<u8> {
    (0..=255_u8)
        .filter(|&v| page.get(first + usize::from(v) / 32 * 16) & 1 << (v % 32) != 0)
        .collect()
}

proptest! {
    #[test]
    fn the_local_apic_never_contradicts_its_registers(
        steps in prop::collection::vec(lapic_step(), 0..150),
    ) {
        let mut apic = LocalApic::new(LapicConfig::new(0));
        let mut now = 0;
        for (wait, step) in &steps {
            now += wait;
            run_lapic(&mut apic, now, step);
            apic.advance(now);
            prop_assert!(apic.next_deadline().is_none_or(|at| at > now));
            let page = apic.save(now).registers;
            let requested = vectors(&page, 0x200).last().copied();
            let serving = vectors(&page, 0x100).last().copied().unwrap_or(0);
            let priority = page.get(0x80).max(u32::from(serving & 0xf0)) & 0xf0;
            let expected = requested.filter(|&v| u32::from(v & 0xf0) > priority);
            prop_assert_eq!(apic.pending_vector(), expected);
            prop_assert_eq!(u32::from(apic.processor_priority()) & 0xf0, priority);
            prop_assert!(requested.is_none_or(|v| v >= 16));
            // Taking what is pending puts it above all else in service.
            if let Some(vector) = expected {
                let mut probe = apic.clone();
                prop_assert_eq!(probe.acknowledge(), vector);
                prop_assert!(probe.pending_vector().is_none_or(|v| v >> 4 > vector >> 4));
            }
        }
    }

    #[test]
    fn a_restored_local_apic_goes_on_as_if_nothing_had_been(
        before in prop::collection::vec(lapic_step(), 0..80),
        after in prop::collection::vec(lapic_step(), 0..80),
    ) {
        let mut apic = LocalApic::new(LapicConfig::new(0));
        let mut now = 0;
        for (wait, step) in &before {
            now += wait;
            run_lapic(&mut apic, now, step);
        }
        let mut copy = LocalApic::new(LapicConfig::new(0));
        let state = apic.save(now);
        prop_assert_eq!(copy.load(&state, now), Ok(()));
        prop_assert_eq!(copy.save(now), state);
        for (wait, step) in &after {
            now += wait;
            prop_assert_eq!(run_lapic(&mut apic, now, step), run_lapic(&mut copy, now, step));
            prop_assert_eq!(apic.next_deadline(), copy.next_deadline());
            prop_assert_eq!(apic.pending_vector(), copy.pending_vector());
            prop_assert_eq!(apic.accepts_extint(), copy.accepts_extint());
        }
    }

    #[test]
    fn any_state_is_taken_whole_or_refused(
        base: u64,
        registers in prop::collection::vec((0..64_usize, any::<u32>()), 0..8),
        remaining: Option<u64>,
        pending_errors: u8,
        steps in prop::collection::vec(lapic_step(), 0..20),
    ) {
        let mut apic = LocalApic::new(LapicConfig::new(0));
        let _: LapicAction = apic.write_mmio(0xf0, &[0xff, 1, 0, 0], 0);
        let mut state = apic.save(0);
        if base & 1 != 0 {
            state.apic_base = base;
        }
        for (index, value) in registers {
            state.registers.set(index * 16, value);
        }
        state.timer_remaining = remaining;
        state.pending_errors = pending_errors;
        let untouched = apic.clone();
        match apic.load(&state, 0) {
            Err(_) => prop_assert_eq!(apic, untouched),
            Ok(()) => {
                let mut now = 0;
                for (wait, step) in &steps {
                    now += wait;
                    run_lapic(&mut apic, now, step);
                    let saved = apic.save(now);
                    prop_assert_eq!(apic.clone().load(&saved, now), Ok(()));
                }
            }
        }
    }

    #[test]
    fn the_current_count_only_falls(
        divide in 0..16_u32,
        count in 1..100_000_u32,
        hz in 1_000..5_000_000_000_u64,
        mut looks in prop::collection::vec(0..200_000_000_u64, 1..50),
    ) {
        let mut apic = LocalApic::new(LapicConfig { timer_hz: hz, ..LapicConfig::new(0) });
        let mut set = |offset, value: u32| {
            let _: LapicAction = apic.write_mmio(offset, &value.to_le_bytes(), 0);
        };
        set(0xf0, 0x1ff);
        set(0x320, 0x40);
        set(0x3e0, divide);
        set(0x380, count);
        let deadline = apic.next_deadline().unwrap();
        looks.sort_unstable();
        let mut last = count;
        for &now in &looks {
            let mut data = [0; 4];
            apic.read_mmio(0x390, &mut data, now);
            let current = u32::from_le_bytes(data);
            prop_assert!(current <= last);
            prop_assert_eq!(current == 0, now >= deadline);
            last = current;
        }
    }
}
