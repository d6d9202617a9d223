//! The local APIC by the manual (Intel SDM vol. 3A chapter 11).

use vmkit_irqchip::{
    APIC_BASE_MSR, ApicFault, ApicMessage, ApicMode, BROADCAST, CpuEvent, DeliveryMode, Ipi,
    IrqchipError, LapicAction, LapicConfig, LocalApic, LocalSource, Shorthand, TSC_DEADLINE_MSR,
    TscClock,
};

const TPR: u64 = 0x80;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR2: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_PERF: u64 = 0x340;
const LINT0: u64 = 0x350;
const LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const MASKED: u32 = 1 << 16;

fn write(apic: &mut LocalApic, offset: u64, value: u32, now: u64) -> LapicAction {
    apic.write_mmio(offset, &value.to_le_bytes(), now)
}

/// A write that asks nothing of the rest of the machine.
fn set(apic: &mut LocalApic, offset: u64, value: u32, now: u64) {
    assert_eq!(write(apic, offset, value, now), LapicAction::None);
}

fn read(apic: &mut LocalApic, offset: u64, now: u64) -> u32 {
    let mut data = [0; 4];
    apic.read_mmio(offset, &mut data, now);
    u32::from_le_bytes(data)
}

/// Enabled by software, in xAPIC mode.
fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(LapicConfig::new(0));
    set(&mut apic, SVR, 0x1ff, 0);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(LapicConfig::new(id));
    let base = apic.apic_base();
    assert_eq!(apic.write_msr(APIC_BASE_MSR, base | 1 << 10, 0), Ok(LapicAction::None));
    assert_eq!(apic.write_msr(0x80f, 0x1ff, 0), Ok(LapicAction::None));
    apic
}

fn fixed(vector: u8, level: bool) -> ApicMessage {
    ApicMessage { dest: 0, logical: false, mode: DeliveryMode::Fixed, vector, level }
}

fn take(apic: &mut LocalApic, vector: u8) {
    assert_eq!(apic.accept(&fixed(vector, false)), None);
}

#[test]
fn it_wakes_up_as_the_manual_says() {
    let mut apic = LocalApic::new(LapicConfig { virtual_wire: false, ..LapicConfig::new(3) });
    assert_eq!(apic.apic_base(), 0xfee0_0800);
    assert_eq!(LocalApic::new(LapicConfig::new(0)).apic_base(), 0xfee0_0900);
    assert_eq!(read(&mut apic, 0x20, 0), 0x0300_0000);
    assert_eq!(read(&mut apic, 0x30, 0), 0x0005_0014);
    assert_eq!(read(&mut apic, DFR, 0), u32::MAX);
    assert_eq!(read(&mut apic, SVR, 0), 0xff);
    for offset in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        assert_eq!(read(&mut apic, offset, 0), MASKED);
    }
    for offset in [TPR, LDR, ESR, ICR, ICR2, INITIAL, CURRENT, DIVIDE] {
        assert_eq!(read(&mut apic, offset, 0), 0);
    }
    assert!(!apic.accepts_extint());
    assert!(LocalApic::new(LapicConfig::new(0)).accepts_extint());
}

#[test]
fn the_highest_vector_interrupts_if_its_class_is_above_the_priority() {
    let mut apic = enabled();
    take(&mut apic, 0x35);
    take(&mut apic, 0x31);
    assert_eq!(apic.pending_vector(), Some(0x35));
    set(&mut apic, TPR, 0x30, 0);
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(apic.acknowledge(), 0xff, "spurious");
    apic.set_cr8(2);
    assert_eq!((apic.cr8(), read(&mut apic, TPR, 0)), (2, 0x20));
    assert_eq!(apic.acknowledge(), 0x35);
    assert_eq!(apic.pending_vector(), None, "0x31 is of the class in service");
    take(&mut apic, 0x41);
    assert_eq!(apic.acknowledge(), 0x41);
    assert_eq!(apic.processor_priority(), 0x40);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.processor_priority(), 0x30);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.acknowledge(), 0x31);
    assert_eq!(read(&mut apic, 0x110, 0), 1 << 0x11);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.processor_priority(), 0x20);
}

#[test]
fn an_interrupt_can_be_requested_again_while_in_service() {
    let mut apic = enabled();
    take(&mut apic, 0x50);
    take(&mut apic, 0x50);
    assert_eq!(apic.acknowledge(), 0x50);
    take(&mut apic, 0x50);
    assert_eq!(apic.pending_vector(), None);
    apic.eoi();
    assert_eq!(apic.acknowledge(), 0x50);
    apic.eoi();
    assert_eq!(apic.pending_vector(), None);
}

#[test]
fn only_the_eoi_of_a_level_is_told_and_only_if_not_suppressed() {
    let mut apic = LocalApic::new(LapicConfig { directed_eoi: true, ..LapicConfig::new(0) });
    set(&mut apic, SVR, 0x1ff, 0);
    assert_eq!(read(&mut apic, 0x30, 0), 0x0105_0014);
    for (level, svr, told) in [
        (true, 0x1ff, LapicAction::Eoi(0x61)),
        (false, 0x1ff, LapicAction::None),
        (true, 0x11ff, LapicAction::None),
    ] {
        set(&mut apic, SVR, svr, 0);
        apic.accept(&fixed(0x61, level));
        assert_eq!(read(&mut apic, 0x1b0, 0), u32::from(level) << 1);
        assert_eq!(apic.acknowledge(), 0x61);
        assert_eq!(write(&mut apic, EOI, 0, 0), told);
    }
    // Without the feature the bit does not stick.
    let mut apic = enabled();
    set(&mut apic, SVR, 0x11ff, 0);
    assert_eq!(read(&mut apic, SVR, 0), 0x1ff);
}

#[test]
fn disabled_by_software_it_masks_its_lvt_and_takes_events_only() {
    let mut apic = enabled();
    set(&mut apic, LVT_TIMER, 0x40, 0);
    take(&mut apic, 0x70);
    set(&mut apic, SVR, 0xff, 0);
    assert_eq!(read(&mut apic, LVT_TIMER, 0), MASKED | 0x40);
    set(&mut apic, LVT_TIMER, 0x40, 0);
    assert_eq!(read(&mut apic, LVT_TIMER, 0), MASKED | 0x40);
    take(&mut apic, 0x80);
    assert_eq!(apic.pending_vector(), Some(0x70), "held, and nothing new");
    for (mode, event) in [
        (DeliveryMode::Nmi, CpuEvent::Nmi),
        (DeliveryMode::Smi, CpuEvent::Smi),
        (DeliveryMode::Init, CpuEvent::Init),
        (DeliveryMode::Sipi, CpuEvent::Sipi(0x9a)),
    ] {
        let message = ApicMessage { mode, ..fixed(0x9a, false) };
        assert_eq!(apic.accept(&message), Some(event));
    }
}

#[test]
fn init_resets_all_but_the_base() {
    let mut apic = x2apic(5);
    take(&mut apic, 0x70);
    apic.init();
    assert_eq!(apic.mode(), ApicMode::X2apic);
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(apic.read_msr(0x80f, 0), Ok(0xff));
    assert_eq!(apic.read_msr(0x802, 0), Ok(5));
    apic.reset();
    assert_eq!(apic.mode(), ApicMode::Xapic);
}

#[test]
fn disabling_and_enabling_through_the_base_msr_resets() {
    for mut apic in [enabled(), x2apic(0)] {
        let base = apic.apic_base();
        take(&mut apic, 0x70);
        take(&mut apic, 0x80);
        assert_eq!(apic.acknowledge(), 0x80);
        apic.set_cr8(3);
        let off = base & !0xc00;
        assert_eq!(apic.write_msr(APIC_BASE_MSR, off, 0), Ok(LapicAction::None));
        assert_eq!((apic.mode(), apic.mmio_base()), (ApicMode::Disabled, None));
        assert!(apic.accepts_extint(), "the 8259 pair reaches the processor");
        take(&mut apic, 0x90);
        assert_eq!(apic.accept(&ApicMessage { mode: DeliveryMode::Nmi, ..fixed(0, false) }), None);
        assert!(!apic.matches(0, false) && !apic.matches(BROADCAST, false));
        assert_eq!(read(&mut apic, SVR, 0), 0, "no registers in memory");
        assert_eq!(apic.write_msr(APIC_BASE_MSR, off | 0x800, 0), Ok(LapicAction::None));
        assert_eq!(apic, LocalApic::new(LapicConfig::new(0)));
    }
}

#[test]
fn only_the_legal_mode_transitions_work() {
    const OFF: u64 = 0xfee0_0100;
    const X: u64 = OFF | 0x800;
    const X2: u64 = OFF | 0xc00;
    const BAD: u64 = OFF | 0x400;
    let legal = [(OFF, OFF), (OFF, X), (X, X), (X, X2), (X, OFF), (X2, X2), (X2, OFF)];
    for from in [OFF, X, X2] {
        for to in [OFF, X, X2, BAD] {
            let mut apic = LocalApic::new(LapicConfig::new(0));
            assert_eq!(apic.set_apic_base(from, 0), Ok(()));
            let result = apic.set_apic_base(to, 0);
            assert_eq!(result.is_ok(), legal.contains(&(from, to)), "{from:x} to {to:x}");
            assert_eq!(apic.apic_base(), if result.is_ok() { to } else { from });
        }
    }
}

#[test]
fn the_base_moves_but_not_out_of_the_address_space() {
    let mut apic = enabled();
    assert_eq!(apic.mmio_base(), Some(0xfee0_0000));
    assert_eq!(apic.set_apic_base(0x3000_0000_0900, 0), Ok(()));
    assert_eq!(apic.mmio_base(), Some(0x3000_0000_0000));
    assert!(apic.is_software_enabled(), "a move resets nothing");
    for bad in [0x4000_0000_0900, 0xfee0_0901, 0xfee0_0b00] {
        assert_eq!(apic.set_apic_base(bad, 0), Err(ApicFault));
    }
    let mut old = LocalApic::new(LapicConfig { x2apic: false, ..LapicConfig::new(0) });
    assert_eq!(old.set_apic_base(0xfee0_0d00, 0), Err(ApicFault));
}

#[test]
fn the_step_to_x2apic_mode_keeps_what_is_pending() {
    let mut apic = enabled();
    take(&mut apic, 0x70);
    set(&mut apic, LVT_TIMER, 0x40, 0);
    set(&mut apic, INITIAL, 1000, 0);
    let base = apic.apic_base();
    assert_eq!(apic.set_apic_base(base | 1 << 10, 0), Ok(()));
    assert_eq!(apic.pending_vector(), Some(0x70));
    assert_eq!(apic.read_msr(0x832, 0), Ok(0x40));
    assert_eq!(apic.next_deadline(), Some(2000));
}

#[test]
fn x2apic_registers_fault_where_they_should() {
    let mut apic = x2apic(0x25);
    assert_eq!(apic.read_msr(0x802, 0), Ok(0x25));
    assert_eq!(apic.read_msr(0x80d, 0), Ok(0x0002_0020));
    // Write-only, reserved, absent.
    for msr in [0x80b, 0x83f, 0x80e, 0x831, 0x80c, 0x809, 0x800, 0x801, 0x840, 0x8ff, 0x83a] {
        assert_eq!(apic.read_msr(msr, 0), Err(ApicFault), "{msr:x}");
    }
    // Read-only, reserved, absent.
    for msr in [0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x818, 0x820, 0x831, 0x839, 0x840] {
        assert_eq!(apic.write_msr(msr, 0, 0), Err(ApicFault), "{msr:x}");
    }
    // Reserved bits.
    for (msr, value) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 1 << 10),
        (0x80f, 1 << 12),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
        (0x832, 1 << 8),
        (0x832, 3 << 17),
        (0x834, 1 << 17),
        (0x837, 1 << 8),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(apic.write_msr(msr, value, 0), Err(ApicFault), "{msr:x}");
    }
    let mut xapic = enabled();
    assert_eq!(xapic.read_msr(0x802, 0), Err(ApicFault));
    assert_eq!(xapic.write_msr(0x80b, 0, 0), Err(ApicFault));
    assert_eq!(read(&mut apic, 0x20, 0), 0, "no memory-mapped registers in x2APIC mode");
}

#[test]
fn an_icr_write_becomes_a_message() {
    let mut apic = enabled();
    set(&mut apic, ICR2, 0x0300_0000, 0);
    let message = ApicMessage { dest: 3, ..fixed(0x44, false) };
    assert_eq!(
        write(&mut apic, ICR, 0x0000_4044, 0),
        LapicAction::Ipi(Ipi { shorthand: Shorthand::None, message })
    );
    assert_eq!((read(&mut apic, ICR, 0), read(&mut apic, ICR2, 0)), (0x4044, 0x0300_0000));
    set(&mut apic, ICR2, 0xff00_0000, 0);
    let LapicAction::Ipi(ipi) = write(&mut apic, ICR, 0x0000_4844, 0) else {
        panic!("no IPI");
    };
    assert_eq!((ipi.message.dest, ipi.message.logical), (BROADCAST, true));
    let mut apic = x2apic(1);
    let Ok(LapicAction::Ipi(ipi)) = apic.write_msr(0x830, 0x0001_0002_0000_4844, 0) else {
        panic!("no IPI");
    };
    assert_eq!((ipi.message.dest, ipi.message.logical), (0x0001_0002, true));
    assert_eq!(apic.read_msr(0x830, 0), Ok(0x0001_0002_0000_4844));
}

#[test]
fn shorthands_go_where_they_say() {
    let mut apic = enabled();
    let shorthand = |apic: &mut LocalApic, icr| match write(apic, ICR, icr, 0) {
        LapicAction::Ipi(ipi) => Some((ipi.shorthand, ipi.message.mode)),
        _ => None,
    };
    let all = (Shorthand::All, DeliveryMode::Fixed);
    assert_eq!(shorthand(&mut apic, 0x8_4044), Some(all));
    let others = (Shorthand::AllButSelf, DeliveryMode::Nmi);
    assert_eq!(shorthand(&mut apic, 0xc_4400), Some(others));
    assert_eq!(shorthand(&mut apic, 0x4_4044), None);
    assert_eq!(apic.pending_vector(), Some(0x44), "to itself at once");
    // Not valid: an NMI to itself, INIT to all with self; delivery modes 3 and 7.
    for icr in [0x4_4400, 0x8_4500, 0x4300, 0x4700] {
        assert_eq!(shorthand(&mut apic, icr), None);
    }
}

#[test]
fn the_init_sipi_sequence_comes_out_and_deassert_does_not() {
    let mut bsp = enabled();
    let mut ap = LocalApic::new(LapicConfig::new(1));
    set(&mut bsp, ICR2, 0x0100_0000, 0);
    let mut events = Vec::new();
    // Linux: INIT assert, INIT de-assert, two SIPIs.
    for icr in [0xc500, 0x8500, 0x0699, 0x0699] {
        if let LapicAction::Ipi(ipi) = write(&mut bsp, ICR, icr, 0) {
            assert!(ap.matches(ipi.message.dest, ipi.message.logical));
            assert!(!bsp.matches(ipi.message.dest, ipi.message.logical));
            events.extend(ap.accept(&ipi.message));
        }
    }
    assert_eq!(events, [CpuEvent::Init, CpuEvent::Sipi(0x99), CpuEvent::Sipi(0x99)]);
}

#[test]
fn self_ipi_is_an_edge_to_itself() {
    let mut apic = x2apic(2);
    assert_eq!(apic.write_msr(0x83f, 0x33, 0), Ok(LapicAction::None));
    assert_eq!(apic.acknowledge(), 0x33);
}

#[test]
fn errors_show_after_a_write_and_interrupt_once() {
    let mut apic = enabled();
    set(&mut apic, LVT_ERROR, 0xfe, 0);
    set(&mut apic, ICR, 0x4003, 0);
    assert_eq!(apic.acknowledge(), 0xfe);
    apic.eoi();
    take(&mut apic, 0x0f);
    assert_eq!(apic.pending_vector(), None, "not armed again before the ESR is written");
    assert_eq!(read(&mut apic, ESR, 0), 0);
    set(&mut apic, ESR, 0, 0);
    assert_eq!(read(&mut apic, ESR, 0), 0x60);
    assert_eq!(read(&mut apic, 0x40, 0), 0);
    assert_eq!(apic.acknowledge(), 0xfe);
    set(&mut apic, ESR, 0, 0);
    assert_eq!(read(&mut apic, ESR, 0), 0x80);
    set(&mut apic, ESR, 0, 0);
    assert_eq!(read(&mut apic, ESR, 0), 0);
    // An error entry with an illegal vector does not recurse.
    set(&mut apic, LVT_ERROR, 0x05, 0);
    set(&mut apic, ICR, 0x4003, 0);
    set(&mut apic, ESR, 0, 0);
    assert_eq!(read(&mut apic, ESR, 0), 0x60);
}

#[test]
fn lint_pins_deliver_by_their_mode() {
    let mut apic = enabled();
    set(&mut apic, LINT0, 0x700, 0);
    assert!(apic.accepts_extint());
    set(&mut apic, LINT0, 0x1_0700, 0);
    assert!(!apic.accepts_extint());
    set(&mut apic, LINT1, 0x400, 0);
    assert_eq!(apic.set_lint(1, true), Some(CpuEvent::Nmi));
    assert_eq!(apic.set_lint(1, true), None);
    set(&mut apic, LINT1, 0x1_0400, 0);
    apic.set_lint(1, false);
    assert_eq!(apic.set_lint(1, true), None);
    // Fixed and edge: once per edge. Linux tries this "virtual wire" for a broken timer.
    set(&mut apic, LINT0, 0x31, 0);
    apic.set_lint(0, true);
    apic.set_lint(0, true);
    assert_eq!(apic.acknowledge(), 0x31);
    apic.eoi();
    assert_eq!(apic.pending_vector(), None);
    apic.set_lint(0, false);
    // Fixed and level: again after EOI while high.
    set(&mut apic, LINT0, 0x8031, 0);
    apic.set_lint(0, true);
    for _ in 0..3 {
        assert_eq!(read(&mut apic, LINT0, 0), 0xc031);
        assert_eq!(apic.acknowledge(), 0x31);
        assert_eq!(apic.pending_vector(), None);
        apic.eoi();
    }
    assert_eq!(apic.acknowledge(), 0x31);
    apic.set_lint(0, false);
    apic.eoi();
    assert_eq!((apic.pending_vector(), read(&mut apic, LINT0, 0)), (None, 0x8031));
    assert_eq!(apic.set_lint(2, true), None);
}

#[test]
fn an_extint_message_opens_the_door_once() {
    let mut apic = enabled();
    set(&mut apic, LINT0, 0x1_0700, 0);
    apic.accept(&ApicMessage { mode: DeliveryMode::ExtInt, ..fixed(0, false) });
    assert!(apic.accepts_extint());
    apic.extint_acknowledged();
    assert!(!apic.accepts_extint());
}

#[test]
fn a_counter_overflow_masks_its_entry() {
    let mut apic = enabled();
    set(&mut apic, LVT_PERF, 0x400, 0);
    assert_eq!(apic.signal(LocalSource::Performance), Some(CpuEvent::Nmi));
    assert_eq!(apic.signal(LocalSource::Performance), None);
    assert_eq!(read(&mut apic, LVT_PERF, 0), MASKED | 0x400);
    set(&mut apic, 0x330, 0xfa, 0);
    assert_eq!(apic.signal(LocalSource::Thermal), None);
    assert_eq!(apic.pending_vector(), Some(0xfa));
}

#[test]
fn a_one_shot_counts_down_and_interrupts_once() {
    let mut apic = enabled();
    set(&mut apic, DIVIDE, 0b1011, 0);
    set(&mut apic, LVT_TIMER, 0x40, 0);
    set(&mut apic, INITIAL, 1000, 500);
    assert_eq!(apic.next_deadline(), Some(1500));
    assert_eq!(read(&mut apic, CURRENT, 700), 800);
    apic.advance(1499);
    assert_eq!(apic.pending_vector(), None);
    apic.advance(1500);
    assert_eq!(apic.acknowledge(), 0x40);
    assert_eq!((apic.next_deadline(), read(&mut apic, CURRENT, 1600)), (None, 0));
    set(&mut apic, INITIAL, 1000, 2000);
    set(&mut apic, INITIAL, 0, 2500);
    assert_eq!((apic.next_deadline(), read(&mut apic, CURRENT, 2600)), (None, 0));
}

#[test]
fn a_periodic_timer_goes_on_and_merges_what_was_missed() {
    let mut apic = enabled();
    set(&mut apic, DIVIDE, 0b1011, 0);
    set(&mut apic, LVT_TIMER, 0x2_0040, 0);
    set(&mut apic, INITIAL, 1000, 0);
    for n in 1..5 {
        assert_eq!(apic.next_deadline(), Some(n * 1000));
        apic.advance(n * 1000);
        assert_eq!(apic.acknowledge(), 0x40);
        apic.eoi();
    }
    apic.advance(9_999_500);
    assert_eq!((apic.acknowledge(), apic.next_deadline()), (0x40, Some(10_000_000)));
    assert_eq!(read(&mut apic, CURRENT, 9_999_600), 400);
    assert_eq!(apic.pending_vector(), None);
}

#[test]
fn a_masked_timer_runs_and_says_nothing() {
    let mut apic = enabled();
    set(&mut apic, DIVIDE, 0b1011, 0);
    set(&mut apic, LVT_TIMER, MASKED | 0x40, 0);
    set(&mut apic, INITIAL, 1000, 0);
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(read(&mut apic, CURRENT, 400), 600);
    set(&mut apic, LVT_TIMER, 0x40, 500);
    assert_eq!(apic.next_deadline(), Some(1000));
    set(&mut apic, LVT_TIMER, MASKED | 0x40, 600);
    assert_eq!(read(&mut apic, CURRENT, 1200), 0);
    set(&mut apic, LVT_TIMER, 0x40, 1300);
    apic.advance(2000);
    assert_eq!(apic.pending_vector(), None);
}

#[test]
fn a_tsc_deadline_fires_when_the_counter_reaches_it() {
    let clock = TscClock { hz: 2_600_000_000, offset: 1000 };
    let mut apic = LocalApic::new(LapicConfig { tsc: clock, ..LapicConfig::new(0) });
    set(&mut apic, SVR, 0x1ff, 0);
    let arm = |apic: &mut LocalApic, tsc, now| {
        assert_eq!(apic.write_msr(TSC_DEADLINE_MSR, tsc, now), Ok(LapicAction::None));
    };
    arm(&mut apic, 5000, 0);
    assert_eq!(apic.read_msr(TSC_DEADLINE_MSR, 0), Ok(0), "not in that mode");
    set(&mut apic, LVT_TIMER, 0x4_0040, 0);
    arm(&mut apic, 1000 + 2600, 0);
    assert_eq!(apic.read_msr(TSC_DEADLINE_MSR, 999), Ok(3600));
    assert_eq!(apic.next_deadline(), Some(1000));
    apic.advance(1000);
    assert_eq!((apic.acknowledge(), apic.read_msr(TSC_DEADLINE_MSR, 1000)), (0x40, Ok(0)));
    apic.eoi();
    // In the past: at once. Zero: disarmed.
    arm(&mut apic, 1, 2000);
    assert_eq!(apic.acknowledge(), 0x40);
    apic.eoi();
    arm(&mut apic, 1 << 40, 3000);
    arm(&mut apic, 0, 3000);
    assert_eq!(apic.next_deadline(), None);
    // The initial count does nothing, and leaving the mode disarms.
    set(&mut apic, INITIAL, 5, 3000);
    assert_eq!((read(&mut apic, INITIAL, 3000), read(&mut apic, CURRENT, 3000)), (0, 0));
    arm(&mut apic, 1 << 40, 3000);
    set(&mut apic, LVT_TIMER, 0x40, 3000);
    assert_eq!(apic.next_deadline(), None);
    set(&mut apic, LVT_TIMER, 0x4_0040, 3000);
    assert_eq!(apic.read_msr(TSC_DEADLINE_MSR, 3000), Ok(0));
}

#[test]
fn an_armed_deadline_follows_a_written_tsc() {
    let mut apic = enabled();
    set(&mut apic, LVT_TIMER, 0x4_0040, 0);
    assert!(apic.write_msr(TSC_DEADLINE_MSR, 10_000, 0).is_ok());
    apic.set_tsc(TscClock { hz: 1_000_000_000, offset: 4_000 }, 100);
    assert_eq!(apic.next_deadline(), Some(6_000));
    apic.set_tsc(TscClock { hz: 1_000_000_000, offset: 20_000 }, 200);
    apic.advance(200);
    assert_eq!(apic.pending_vector(), Some(0x40));
}

#[test]
fn the_deadline_msr_is_absent_without_the_feature() {
    let mut apic = LocalApic::new(LapicConfig { tsc_deadline: false, ..LapicConfig::new(0) });
    assert_eq!(apic.read_msr(TSC_DEADLINE_MSR, 0), Err(ApicFault));
    assert_eq!(apic.write_msr(TSC_DEADLINE_MSR, 0, 0), Err(ApicFault));
    assert!(LocalApic::has_msr(TSC_DEADLINE_MSR) && !LocalApic::has_msr(0x900));
}

#[test]
fn odd_memory_accesses_are_answered() {
    let mut apic = enabled();
    let mut data = [0xaa; 8];
    apic.read_mmio(SVR + 1, &mut data[..1], 0);
    assert_eq!(data[0], 0x01);
    apic.read_mmio(SVR + 2, &mut data, 0);
    assert_eq!(data, [0; 8]);
    apic.read_mmio(u64::MAX, &mut data, 0);
    for len in 0..8 {
        if len != 4 {
            assert_eq!(apic.write_mmio(SVR, &data[..len], 0), LapicAction::None);
        }
    }
    assert_eq!(apic.write_mmio(SVR + 4, &[0; 4], 0), LapicAction::None);
    assert_eq!(apic.write_mmio(!15, &[0; 4], 0), LapicAction::None);
    assert_eq!(read(&mut apic, SVR, 0), 0x1ff);
}

#[test]
fn a_state_of_another_or_an_impossible_one_is_refused() {
    let mut apic = enabled();
    take(&mut apic, 0x70);
    set(&mut apic, DIVIDE, 0b1011, 0);
    set(&mut apic, LVT_TIMER, 0x2_0040, 0);
    set(&mut apic, INITIAL, 1000, 0);
    let good = apic.save(250);
    let mut other = LocalApic::new(LapicConfig::new(1));
    assert_eq!(other.load(&good, 0), Err(IrqchipError::ApicId { found: 0, want: 1 }));
    let mut bad = vec![good.clone(); 8];
    bad[0].apic_base = 0x400;
    bad[1].apic_base |= 1 << 50;
    bad[2].registers.set(0x370, 1 << 8);
    bad[3].registers.set(0xf0, 1 << 20);
    bad[4].registers.set(0x390, 1001);
    bad[5].timer_remaining = Some(1001);
    bad[6].registers.set(0x280, 0x100);
    bad[7].registers.set(0x3e0, 4);
    let before = apic.clone();
    for state in &bad {
        assert!(matches!(apic.load(state, 250), Err(IrqchipError::InvalidState { .. })));
        assert_eq!(apic, before);
    }
    // Illegal vectors and reserved modes, which some savers let a guest leave, are dropped.
    let mut odd = good.clone();
    odd.registers.set(0x200, 0xffff);
    odd.registers.set(0x320, 7 << 16);
    odd.timer_remaining = None;
    assert_eq!(apic.clone().load(&odd, 0), Ok(()));
    // What remained remains, at whatever time it is loaded; also by the count register alone.
    for remaining in [good.timer_remaining, None] {
        let state = vmkit_irqchip::LapicState { timer_remaining: remaining, ..good.clone() };
        assert_eq!(apic.load(&state, 1_000_000), Ok(()));
        assert_eq!(apic.next_deadline(), Some(1_000_750));
        assert_eq!(apic.pending_vector(), Some(0x70));
    }
}
