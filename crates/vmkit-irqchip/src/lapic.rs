//! A local APIC (Intel SDM vol. 3A chapter 11), one per vCPU: xAPIC and x2APIC.
//!
//! It accepts messages, ranks vectors, runs the timer and turns ICR writes into [`Ipi`]s. It never
//! touches the processor: an INIT, SIPI, NMI or SMI comes out as a [`CpuEvent`]. What the processor
//! asks at every instruction boundary, [`LocalApic::pending_vector`] and
//! [`LocalApic::next_deadline`], costs a few instructions.

mod base;
mod registers;
mod saved;
mod timer;
mod vectors;

use crate::message::{ApicMessage, CpuEvent, DeliveryMode, Ipi};
use crate::route::{ApicAddress, ApicMode};
use crate::time::TscClock;
use timer::Timer;
use vectors::VectorSet;

pub use base::{APIC_BASE_MSR, TSC_DEADLINE_MSR};

/// What distinguishes one local APIC from another, fixed at construction. Write it as
/// `LapicConfig { tsc, ..LapicConfig::new(id) }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicConfig {
    /// The APIC ID; its low eight bits are the xAPIC ID.
    pub id: u32,
    /// Whether this is the bootstrap processor.
    pub bsp: bool,
    /// Input clock of the timer in Hz, before the divider: what CPUID leaf 15h calls the crystal.
    pub timer_hz: u64,
    /// The guest's time stamp counter at reset.
    pub tsc: TscClock,
    /// Width of guest-physical addresses in bits, 32 to 52: bounds IA32_APIC_BASE.
    pub physical_bits: u8,
    /// Whether x2APIC mode exists (CPUID.01H:ECX bit 21).
    pub x2apic: bool,
    /// Whether TSC-deadline mode exists (CPUID.01H:ECX bit 24).
    pub tsc_deadline: bool,
    /// Whether EOI broadcasts can be suppressed (version register bit 24). Guests that do it need
    /// an IOAPIC with an EOI register.
    pub directed_eoi: bool,
    /// Comes out of reset with LINT0 open for the 8259 pair (ExtINT), as firmware would leave the
    /// bootstrap processor: guests that know no APIC get their interrupts.
    pub virtual_wire: bool,
}

impl LapicConfig {
    /// A local APIC with all features, a timer of 1 GHz and a TSC of 1 GHz. ID 0 is the bootstrap
    /// processor, and wired to the 8259 pair.
    #[must_use]
    pub fn new(id: u32) -> Self {
        Self {
            id,
            bsp: id == 0,
            timer_hz: 1_000_000_000,
            tsc: TscClock { hz: 1_000_000_000, offset: 0 },
            physical_bits: 46,
            x2apic: true,
            tsc_deadline: true,
            directed_eoi: false,
            virtual_wire: id == 0,
        }
    }
}

/// What the rest of the machine has to do after a register write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum LapicAction {
    /// Nothing.
    None,
    /// Send this interrupt.
    Ipi(Ipi),
    /// Tell the IOAPICs that this vector's service has ended.
    Eoi(u8),
}

/// An interrupt source inside the processor, with an entry in the local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalSource {
    /// The thermal sensor.
    Thermal,
    /// Overflow of a performance counter. The entry masks itself.
    Performance,
}

/// Entries of the local vector table, in the order of their registers from 0x320.
const LVT_TIMER: usize = 0;
const LVT_THERMAL: usize = 1;
const LVT_PERFORMANCE: usize = 2;
const LVT_LINT0: usize = 3;
const LVT_ERROR: usize = 5;

const LVT_MASKED: u32 = 1 << 16;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_EXTINT: u32 = 7 << 8;

const SVR_ENABLED: u32 = 1 << 8;
const SVR_SUPPRESS_EOI: u32 = 1 << 12;

/// Error status register bits (Intel SDM vol. 3A §11.5.3).
const ERROR_SEND_VECTOR: u8 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u8 = 1 << 6;
const ERROR_REGISTER: u8 = 1 << 7;

/// Vectors below this one cannot be delivered.
const FIRST_VECTOR: u8 = 16;

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    config: LapicConfig,
    tsc: TscClock,
    base: u64,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// The highest member of `irr`, or 0.
    requested: u8,
    /// The processor priority, from `tpr` and the highest member of `isr`.
    ppr: u8,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    pending_errors: u8,
    icr: u64,
    lvt: [u32; 6],
    timer: Timer,
    /// When the timer is to interrupt, or the end of time.
    wake: u64,
    lint: [bool; 2],
    extint: bool,
}

impl LocalApic {
    /// A local APIC after power-up: enabled in xAPIC mode, disabled by software.
    #[must_use]
    pub fn new(config: LapicConfig) -> Self {
        let mut apic = Self {
            config,
            tsc: config.tsc,
            base: 0,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            requested: 0,
            ppr: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            pending_errors: 0,
            icr: 0,
            lvt: [0; 6],
            timer: Timer::new(config.timer_hz),
            wake: u64::MAX,
            lint: [false; 2],
            extint: false,
        };
        apic.reset();
        apic
    }

    /// Power-up reset: all of [`init`](Self::init), and IA32_APIC_BASE.
    pub fn reset(&mut self) {
        self.base = base::reset_value(self.config.bsp);
        self.init();
    }

    /// What INIT does: every register but the ID and IA32_APIC_BASE takes its reset value
    /// (Intel SDM vol. 3A §11.4.7). x2APIC mode stays.
    pub fn init(&mut self) {
        self.irr = VectorSet::default();
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.requested = 0;
        self.ppr = 0;
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.esr = 0;
        self.pending_errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        if self.config.virtual_wire {
            self.lvt[LVT_LINT0] = LVT_EXTINT;
        }
        self.timer = Timer::new(self.config.timer_hz);
        self.wake = u64::MAX;
        self.extint = false;
    }

    /// Who this is to senders. Changes only with a register write or a reset.
    #[must_use]
    pub fn address(&self) -> ApicAddress {
        ApicAddress::new(self.mode(), self.config.id, self.ldr, self.dfr)
            .with_software_enable(self.is_software_enabled())
    }

    /// Whether a message to `dest` is for this local APIC.
    #[must_use]
    pub fn matches(&self, dest: u32, logical: bool) -> bool {
        self.address().matches(dest, logical)
    }

    /// The 32-bit APIC ID.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// Whether the guest has set the software enable bit (SVR bit 8).
    #[must_use]
    pub fn is_software_enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }

    /// Takes a message that is for this local APIC. An event is for the processor to act on.
    pub fn accept(&mut self, message: &ApicMessage) -> Option<CpuEvent> {
        if self.mode() == ApicMode::Disabled {
            return None;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.is_software_enabled() {
                    self.request(message.vector, message.level);
                }
                None
            }
            DeliveryMode::ExtInt => {
                self.extint |= self.is_software_enabled();
                None
            }
            DeliveryMode::Smi => Some(CpuEvent::Smi),
            DeliveryMode::Nmi => Some(CpuEvent::Nmi),
            DeliveryMode::Init => Some(CpuEvent::Init),
            DeliveryMode::Sipi => Some(CpuEvent::Sipi(message.vector)),
        }
    }

    /// The vector that is to interrupt the processor: the highest requested one, if its class is
    /// above the processor priority.
    #[inline]
    #[must_use]
    pub fn pending_vector(&self) -> Option<u8> {
        (self.requested & 0xf0 > self.ppr & 0xf0).then_some(self.requested)
    }

    /// The processor takes the pending vector: it is in service now. The spurious vector if there
    /// is none.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.pending_vector() else {
            return self.svr as u8;
        };
        self.irr.remove(vector);
        self.requested = self.irr.highest();
        self.isr.insert(vector);
        self.update_ppr();
        vector
    }

    /// Whether the processor may take an interrupt from the 8259 pair: LINT0 is open for it, an
    /// ExtINT message came, or there is no local APIC in the way. The caller also asks the pair
    /// whether it has one ([`Pic::output`](crate::Pic::output)), and wires it to the bootstrap
    /// processor only, as boards do.
    #[inline]
    #[must_use]
    pub fn accepts_extint(&self) -> bool {
        self.extint
            || self.lvt[LVT_LINT0] & (LVT_MASKED | LVT_EXTINT) == LVT_EXTINT
            || self.mode() == ApicMode::Disabled
    }

    /// The processor took an interrupt from the 8259 pair.
    pub fn extint_acknowledged(&mut self) {
        self.extint = false;
    }

    /// Ends the service of the highest vector in service. Returns it if the IOAPICs are to be
    /// told: it was level-triggered and the guest has not suppressed that.
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = self.isr.highest();
        if vector == 0 {
            return None;
        }
        self.isr.remove(vector);
        self.update_ppr();
        let lint0 = &mut self.lvt[LVT_LINT0];
        if *lint0 & LVT_REMOTE_IRR != 0 && *lint0 as u8 == vector {
            *lint0 &= !LVT_REMOTE_IRR;
            self.serve_lint0_level();
        }
        let broadcast = self.tmr.contains(vector) && self.svr & SVR_SUPPRESS_EOI == 0;
        broadcast.then_some(vector)
    }

    /// CR8: the class of the task priority, 0 to 15.
    #[must_use]
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// Writes CR8: bits 3:0 become the class of the task priority.
    pub fn set_cr8(&mut self, value: u8) {
        self.set_tpr(value << 4);
    }

    /// The processor priority: the measure for lowest-priority arbitration.
    #[must_use]
    pub fn processor_priority(&self) -> u8 {
        self.ppr
    }

    /// Drives the input LINT0 or LINT1 (`pin` 0 or 1). An ExtINT entry needs no drive, see
    /// [`accepts_extint`](Self::accepts_extint).
    pub fn set_lint(&mut self, pin: usize, high: bool) -> Option<CpuEvent> {
        let level = self.lint.get_mut(pin)?;
        let rises = high && !*level;
        *level = high;
        let entry = LVT_LINT0 + pin;
        if !rises || self.mode() == ApicMode::Disabled {
            return None;
        }
        if pin == 0 && self.lvt[entry] & (LVT_LEVEL | LVT_EXTINT) == LVT_LEVEL {
            self.serve_lint0_level();
            return None;
        }
        self.deliver_local(entry)
    }

    /// Raises an interrupt of the processor's own.
    pub fn signal(&mut self, source: LocalSource) -> Option<CpuEvent> {
        let entry = match source {
            LocalSource::Thermal => LVT_THERMAL,
            LocalSource::Performance => LVT_PERFORMANCE,
        };
        let event = self.deliver_local(entry);
        if source == LocalSource::Performance {
            self.lvt[entry] |= LVT_MASKED;
        }
        event
    }

    /// When [`advance`](Self::advance) is to be called, because the timer will interrupt.
    #[inline]
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        (self.wake != u64::MAX).then_some(self.wake)
    }

    /// Catches up with the clock: requests the timer's vector if the timer expired.
    #[inline]
    pub fn advance(&mut self, now: u64) {
        if now >= self.wake {
            self.settle(now);
        }
    }

    /// Replaces the guest's time stamp counter: it was written, or its offset was. An armed
    /// deadline moves accordingly.
    pub fn set_tsc(&mut self, tsc: TscClock, now: u64) {
        self.settle(now);
        self.tsc = tsc;
        self.timer.set_deadline(self.timer.deadline(), tsc, now);
        self.update_wake();
    }

    /// [`advance`](Self::advance) also for a masked timer: before its registers are looked at.
    fn settle(&mut self, now: u64) {
        if self.timer.advance(now) {
            self.deliver_local(LVT_TIMER);
        }
        self.update_wake();
    }

    fn update_wake(&mut self) {
        let masked = self.lvt[LVT_TIMER] & LVT_MASKED != 0;
        self.wake = self.timer.expiry().filter(|_| !masked).unwrap_or(u64::MAX);
    }

    /// Puts a vector into the IRR.
    fn request(&mut self, vector: u8, level: bool) {
        if vector < FIRST_VECTOR {
            self.error(ERROR_RECEIVE_VECTOR);
            return;
        }
        self.irr.insert(vector);
        self.requested = self.requested.max(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
    }

    fn deliver_local(&mut self, entry: usize) -> Option<CpuEvent> {
        let lvt = self.lvt[entry];
        if lvt & LVT_MASKED != 0 {
            return None;
        }
        // The timer's and the error entry's mode bits read as 0: fixed.
        match lvt >> 8 & 7 {
            0 => {
                self.request(lvt as u8, false);
                None
            }
            2 => Some(CpuEvent::Smi),
            4 => Some(CpuEvent::Nmi),
            5 => Some(CpuEvent::Init),
            _ => None,
        }
    }

    /// A level-triggered fixed interrupt on LINT0, unless masked or in service already.
    fn serve_lint0_level(&mut self) {
        let lvt = self.lvt[LVT_LINT0];
        let open = lvt & (LVT_MASKED | LVT_REMOTE_IRR | LVT_LEVEL | LVT_EXTINT) == LVT_LEVEL;
        if open && self.lint[0] {
            self.lvt[LVT_LINT0] |= LVT_REMOTE_IRR;
            self.request(lvt as u8, false);
        }
    }

    /// Records an error; the first since the last write of the ESR interrupts.
    fn error(&mut self, bit: u8) {
        let first = self.pending_errors == 0;
        self.pending_errors |= bit;
        if first {
            self.deliver_local(LVT_ERROR);
        }
    }

    fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
        self.update_ppr();
    }

    /// Intel SDM vol. 3A §11.8.3.1.
    fn update_ppr(&mut self) {
        let service = self.isr.highest() & 0xf0;
        self.ppr = if self.tpr & 0xf0 >= service { self.tpr } else { service };
    }
}
