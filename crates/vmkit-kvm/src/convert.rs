//! The in-kernel PIC, IOAPIC and PIT: KVM's structures to neutral states and back.
//!
//! What KVM does not keep, or does not let anyone set, is lost on the way: the PIC's single mode,
//! the phase of PIT counter 0 (it starts a new cycle), and check enables in port 0x61. States that
//! come in are untrusted; what the chips cannot be in is refused.

#![allow(unsafe_code, reason = "KVM's structures hold unions")]

use std::mem::MaybeUninit;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use vmkit_hypervisor::{HypervisorError, PartitionState, Result};
use vmkit_irqchip::{
    IOAPIC_PINS, IoapicState, PicChipState, PicState, PitChannelState, PitRun, PitState,
};

/// Input clock of the 8254 in Hz.
const PIT_HZ: i128 = 1_193_182;
/// What KVM's 8254 is in before the guest programs it.
const UNPROGRAMMED: u8 = 0xFF;
/// ELCR bits that exist: inputs 3 to 7; 9 to 12, 14 and 15.
const ELCR_MASKS: [u8; 2] = [0xF8, 0xDE];
/// Where the IOAPIC is.
const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// IOAPIC redirection entry bit 15: level-triggered.
const LEVEL: u64 = 1 << 15;

// KVM's names for which byte of a counter is next.
const LOW: u8 = 1;
const HIGH: u8 = 2;
const LOW_THEN_HIGH: u8 = 3;
const HIGH_AFTER_LOW: u8 = 4;

/// The state of a partition without controllers.
pub(crate) fn empty_state() -> PartitionState {
    let channel = PitChannelState {
        mode: 0,
        bcd: false,
        access: LOW_THEN_HIGH,
        gate: true,
        count: 0x1_0000,
        next_count: None,
        run: PitRun::Idle,
        write_low: None,
        read_high: false,
        latched_count: None,
        latched_status: None,
    };
    PartitionState {
        pic: PicState { primary: PicChipState::default(), secondary: PicChipState::default() },
        ioapic: IoapicState { id: 0, index: 0, levels: 0, entries: [1 << 16; IOAPIC_PINS] },
        pit: PitState { channels: [channel; 3], port61: 0, backlog: 0 },
        clock_ns: 0,
    }
}

/// The host's monotonic clock, which KVM's PIT counts by.
pub(crate) fn monotonic_ns() -> i64 {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the call fills the timespec; should it fail, zeroes are a valid timespec too.
    let now = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, now.as_mut_ptr());
        now.assume_init()
    };
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

/// The 8259 pair.
pub(crate) fn pic(primary: &kvm_irqchip, secondary: &kvm_irqchip) -> PicState {
    PicState { primary: pic_chip(primary), secondary: pic_chip(secondary) }
}

fn pic_chip(chip: &kvm_irqchip) -> PicChipState {
    // SAFETY: the chip was read as a PIC, and the member is all bytes.
    let s = unsafe { chip.chip.pic };
    PicChipState {
        lines: s.last_irr,
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        top_priority: s.priority_add & 7,
        vector_base: s.irq_base & !7,
        read_isr: s.read_reg_select != 0,
        poll: s.poll != 0,
        special_mask: s.special_mask != 0,
        // KVM counts the words it has seen.
        awaiting_icw: if s.init_state == 0 { 0 } else { s.init_state.min(3) + 1 },
        icw4_follows: s.init4 != 0,
        single: false,
        auto_eoi: s.auto_eoi != 0,
        rotate_on_auto_eoi: s.rotate_on_auto_eoi != 0,
        special_fully_nested: s.special_fully_nested_mode != 0,
        elcr: s.elcr,
    }
}

/// The 8259 pair for KVM.
pub(crate) fn kvm_pic(state: &PicState) -> Result<[kvm_irqchip; 2]> {
    Ok([
        kvm_pic_chip(&state.primary, KVM_IRQCHIP_PIC_MASTER, ELCR_MASKS[0])?,
        kvm_pic_chip(&state.secondary, KVM_IRQCHIP_PIC_SLAVE, ELCR_MASKS[1])?,
    ])
}

fn kvm_pic_chip(s: &PicChipState, chip_id: u32, elcr_mask: u8) -> Result<kvm_irqchip> {
    let awaited = match s.awaiting_icw {
        0 => 0,
        word @ 2..=4 => word - 1,
        other => return Err(impossible("PIC", "initialisation word", other.into())),
    };
    if s.top_priority > 7 || s.vector_base & 7 != 0 || s.elcr & !elcr_mask != 0 {
        return Err(impossible("PIC", "priority, vector or ELCR", s.elcr.into()));
    }
    let pic = kvm_pic_state {
        last_irr: s.lines,
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        priority_add: s.top_priority,
        irq_base: s.vector_base,
        read_reg_select: s.read_isr.into(),
        poll: s.poll.into(),
        special_mask: s.special_mask.into(),
        init_state: awaited,
        auto_eoi: s.auto_eoi.into(),
        rotate_on_auto_eoi: s.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: s.special_fully_nested.into(),
        init4: s.icw4_follows.into(),
        elcr: s.elcr,
        elcr_mask,
    };
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    chip.chip.pic = pic;
    Ok(chip)
}

/// The IOAPIC. KVM knows requests, not wires.
pub(crate) fn ioapic(chip: &kvm_irqchip) -> IoapicState {
    // SAFETY: the chip was read as an IOAPIC, and the member is all integers.
    let s = unsafe { chip.chip.ioapic };
    // SAFETY: as above.
    let entries = s.redirtbl.map(|entry| unsafe { entry.bits });
    IoapicState { id: (s.id & 0xF) as u8, index: s.ioregsel as u8, levels: s.irr, entries }
}

/// The IOAPIC for KVM.
pub(crate) fn kvm_ioapic(state: &IoapicState) -> Result<kvm_irqchip> {
    if state.id > 15 {
        return Err(impossible("IOAPIC", "ID", state.id.into()));
    }
    let mut s = kvm_ioapic_state {
        base_address: IOAPIC_BASE,
        ioregsel: u32::from(state.index),
        id: u32::from(state.id),
        ..kvm_ioapic_state::default()
    };
    for (pin, (to, from)) in s.redirtbl.iter_mut().zip(state.entries).enumerate() {
        to.bits = from;
        // KVM delivers each request that it is given. A high wire of an edge-triggered pin is none:
        // its edge is over.
        if from & LEVEL != 0 {
            s.irr |= state.levels & 1 << pin;
        }
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    chip.chip.ioapic = s;
    Ok(chip)
}

/// The PIT, at `now` on the monotonic clock.
pub(crate) fn pit(s: &kvm_pit_state2, now: i64) -> PitState {
    let channel = |index: usize| {
        let c = &s.channels[index];
        // KVM tells when a count was loaded of counters 1 and 2 only.
        let loaded = if index == 0 { now } else { c.count_load_time };
        pit_channel(c, now.saturating_sub(loaded).max(0))
    };
    let speaker = s.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
    PitState {
        channels: [channel(0), channel(1), channel(2)],
        port61: u8::from(s.channels[2].gate != 0) | u8::from(speaker) << 1,
        backlog: 0,
    }
}

fn pit_channel(c: &kvm_pit_channel_state, running_ns: i64) -> PitChannelState {
    let programmed = c.mode != UNPROGRAMMED;
    let ticks = i64::try_from(i128::from(running_ns) * PIT_HZ / 1_000_000_000).unwrap_or(i64::MAX);
    PitChannelState {
        // Modes 6 and 7 are 2 and 3.
        mode: match c.mode {
            UNPROGRAMMED => 0,
            mode if mode & 7 > 5 => mode & 3,
            mode => mode & 7,
        },
        bcd: c.bcd != 0,
        access: if matches!(c.rw_mode, LOW..=LOW_THEN_HIGH) { c.rw_mode } else { LOW_THEN_HIGH },
        gate: c.gate != 0,
        count: if c.count == 0 { 0x1_0000 } else { c.count.min(0x1_0000) },
        next_count: None,
        run: match (programmed, c.gate != 0) {
            (false, _) => PitRun::Idle,
            (true, true) => PitRun::Counting(ticks),
            (true, false) => PitRun::Held(0),
        },
        write_low: (c.write_state == HIGH_AFTER_LOW).then_some(c.write_latch),
        read_high: c.read_state == HIGH_AFTER_LOW || c.count_latched == HIGH,
        latched_count: (c.count_latched != 0).then_some(c.latched_count),
        latched_status: (c.status_latched != 0).then_some(c.status),
    }
}

/// The PIT for KVM.
pub(crate) fn kvm_pit(state: &PitState) -> Result<kvm_pit_state2> {
    let mut s = kvm_pit_state2::default();
    for (to, from) in s.channels.iter_mut().zip(&state.channels) {
        *to = kvm_pit_channel(from)?;
    }
    s.channels[2].gate = state.port61 & 1;
    if state.port61 & 2 != 0 {
        s.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    }
    Ok(s)
}

fn kvm_pit_channel(c: &PitChannelState) -> Result<kvm_pit_channel_state> {
    if c.mode > 5
        || !(LOW..=LOW_THEN_HIGH).contains(&c.access)
        || !(1..=0x1_0000).contains(&c.count)
    {
        return Err(impossible("PIT", "mode, access or count", c.count.into()));
    }
    // KVM starts to count afresh. A one-shot counter has only the rest to go.
    let count = c.next_count.unwrap_or(c.count);
    let count = match c.run {
        PitRun::Counting(done) if matches!(c.mode, 0 | 4) => {
            let left = i64::from(count) - done.max(0);
            if left > 0 { left as u32 } else { count }
        }
        _ => count,
    };
    if !(1..=0x1_0000).contains(&count) {
        return Err(impossible("PIT", "count", count.into()));
    }
    // KVM's names of the next byte and of the access modes are the same numbers.
    let next = c.access;
    Ok(kvm_pit_channel_state {
        count,
        latched_count: c.latched_count.unwrap_or(0),
        count_latched: match c.latched_count {
            None => 0,
            Some(_) if c.access == LOW_THEN_HIGH && c.read_high => HIGH,
            Some(_) => c.access,
        },
        status_latched: c.latched_status.is_some().into(),
        status: c.latched_status.unwrap_or(0),
        read_state: if c.read_high && c.latched_count.is_none() { HIGH_AFTER_LOW } else { next },
        write_state: if c.write_low.is_some() { HIGH_AFTER_LOW } else { next },
        write_latch: c.write_low.unwrap_or(0),
        rw_mode: c.access,
        mode: if c.run == PitRun::Idle && c.mode == 0 { UNPROGRAMMED } else { c.mode },
        bcd: c.bcd.into(),
        gate: c.gate.into(),
        count_load_time: 0,
    })
}

fn impossible(chip: &str, field: &str, value: u64) -> HypervisorError {
    HypervisorError::state(format!("saved {chip} state: {field} {value:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_pic() -> PicChipState {
        PicChipState {
            lines: 0x12,
            irr: 0x10,
            imr: 0xAB,
            isr: 4,
            top_priority: 3,
            vector_base: 0x30,
            read_isr: true,
            poll: false,
            special_mask: true,
            awaiting_icw: 3,
            icw4_follows: true,
            single: false,
            auto_eoi: true,
            rotate_on_auto_eoi: false,
            special_fully_nested: true,
            elcr: 0x20,
        }
    }

    #[test]
    fn a_pic_survives_the_way_to_kvm_and_back() {
        let secondary = PicChipState { elcr: 0x0E, awaiting_icw: 0, ..some_pic() };
        let state = PicState { primary: some_pic(), secondary };
        let [one, two] = kvm_pic(&state).unwrap();
        assert_eq!(pic(&one, &two), state);
    }

    #[test]
    fn impossible_pics_are_refused() {
        for bad in [
            PicChipState { awaiting_icw: 1, ..some_pic() },
            PicChipState { top_priority: 8, ..some_pic() },
            PicChipState { vector_base: 0x31, ..some_pic() },
            PicChipState { elcr: 1, ..some_pic() },
        ] {
            assert!(kvm_pic(&PicState { primary: bad, secondary: some_pic() }).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_level_triggered_pins_keep_their_requests() {
        let mut state = empty_state().ioapic;
        state.entries[4] = 0x31;
        state.entries[9] = 0x32 | LEVEL;
        state.levels = 1 << 4 | 1 << 9;
        let back = ioapic(&kvm_ioapic(&state).unwrap());
        assert_eq!(back.levels, 1 << 9);
        assert_eq!(back.entries, state.entries);
        assert!(kvm_ioapic(&IoapicState { id: 16, ..state }).is_err());
    }

    #[test]
    fn a_pit_counter_survives_but_for_its_phase() {
        let mut state = empty_state().pit;
        state.channels[0] = PitChannelState {
            mode: 2,
            count: 11932,
            run: PitRun::Counting(0),
            write_low: Some(0x34),
            ..state.channels[0]
        };
        state.channels[2] = PitChannelState {
            mode: 0,
            count: 50_000,
            run: PitRun::Counting(20_000),
            latched_count: Some(0x1234),
            read_high: true,
            ..state.channels[2]
        };
        state.port61 = 3;
        let kvm = kvm_pit(&state).unwrap();
        let back = pit(&kvm, 0);
        assert_eq!(back.channels[0], state.channels[0]);
        assert_eq!(back.port61, 3);
        let two = &back.channels[2];
        assert_eq!((two.count, two.latched_count, two.read_high), (30_000, Some(0x1234), true));
    }

    #[test]
    fn time_since_the_load_becomes_input_clocks() {
        let mut kvm = kvm_pit(&empty_state().pit).unwrap();
        kvm.channels[2].mode = 3;
        kvm.channels[2].gate = 1;
        kvm.channels[2].count_load_time = 1_000;
        assert_eq!(pit(&kvm, 1_000_001_000).channels[2].run, PitRun::Counting(1_193_182));
        assert_eq!(pit(&kvm, 0).channels[2].run, PitRun::Counting(0));
    }
}
