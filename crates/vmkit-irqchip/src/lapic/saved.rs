//! A local APIC to and from its saved state.

use super::base::{mode_of, reset_value};
use super::registers::{
    CURRENT_COUNT, DFR, DIVIDE, ESR, ICR_HIGH, ICR_LOW, ID, INITIAL_COUNT, IRR, ISR, LDR, LVT, PPR,
    SVR, TMR, TPR, VERSION, timer_mode, without_reserved_mode,
};
use super::timer::{DIVIDE_BITS, Mode, Timer};
use super::vectors::VectorSet;
use super::{FIRST_VECTOR, LVT_LINT0, LVT_REMOTE_IRR, LVT_TIMER, LapicConfig, LocalApic};
use crate::error::IrqchipError;
use crate::route::ApicMode;
use crate::state::{LapicPage, LapicState};

fn invalid(field: &'static str, value: impl Into<u64>) -> IrqchipError {
    IrqchipError::InvalidState { machine: "lapic", field, value: value.into() }
}

/// Fails if `value` has bits outside `allowed`.
fn check(field: &'static str, value: u32, allowed: u32) -> Result<u32, IrqchipError> {
    if value & !allowed != 0 { Err(invalid(field, value)) } else { Ok(value) }
}

impl LocalApic {
    /// Saves the state as of `now`.
    #[must_use]
    pub fn save(&mut self, now: u64) -> LapicState {
        self.settle(now);
        let mut page = LapicPage::new();
        let mut put = |index: usize, value: u32| page.set(index * 16, value);
        put(ID, self.id_register());
        put(VERSION, self.version_register());
        put(TPR, self.tpr.into());
        put(PPR, self.ppr.into());
        put(LDR, self.ldr_register());
        put(DFR, self.dfr);
        put(SVR, self.svr);
        for index in 0..8 {
            put(ISR + index, self.isr.register(index));
            put(TMR + index, self.tmr.register(index));
            put(IRR + index, self.irr.register(index));
        }
        put(ESR, self.esr);
        put(ICR_LOW, self.icr as u32);
        put(ICR_HIGH, (self.icr >> 32) as u32);
        for (entry, &value) in self.lvt.iter().enumerate() {
            put(LVT + entry, value);
        }
        put(INITIAL_COUNT, self.timer.initial());
        put(CURRENT_COUNT, self.timer.current(now));
        put(DIVIDE, self.timer.divide());
        let counting = self.timer.mode() != Mode::TscDeadline;
        LapicState {
            apic_base: self.base,
            registers: page,
            tsc_deadline: self.timer.deadline(),
            timer_remaining: self
                .timer
                .expiry()
                .filter(|_| counting)
                .map(|at| at.saturating_sub(now)),
            pending_errors: self.pending_errors,
            lint: self.lint,
            extint: self.extint,
        }
    }

    /// Takes over a saved state at `now`. What time remained then, remains now. The time stamp
    /// counter is not part of it: set it first ([`set_tsc`](Self::set_tsc)).
    ///
    /// # Errors
    /// [`IrqchipError`] if the state is another local APIC's or impossible; then nothing has
    /// changed.
    pub fn load(&mut self, state: &LapicState, now: u64) -> Result<(), IrqchipError> {
        let mut apic = Self::new(LapicConfig { ..self.config });
        apic.tsc = self.tsc;
        apic.take(state, now)?;
        *self = apic;
        Ok(())
    }

    fn take(&mut self, state: &LapicState, now: u64) -> Result<(), IrqchipError> {
        self.base = reset_value(self.config.bsp);
        let mode = mode_of(state.apic_base)
            .filter(|_| state.apic_base & !self.base_bits() == 0)
            .ok_or_else(|| invalid("apic_base", state.apic_base))?;
        self.base = state.apic_base;
        self.lint = state.lint;
        let get = |index: usize| state.registers.get(index * 16);
        if get(ID) != self.id_register() {
            let found = if mode == ApicMode::X2apic { get(ID) } else { get(ID) >> 24 };
            return Err(IrqchipError::ApicId { found, want: self.config.id });
        }
        self.tpr = check("tpr", get(TPR), 0xff)? as u8;
        self.update_ppr();
        if mode == ApicMode::Disabled {
            // CR8 still works. The other registers have their reset values, whatever the saver
            // has put there.
            return Ok(());
        }
        self.svr = check("svr", get(SVR), self.svr_bits())?;
        self.ldr = if mode == ApicMode::X2apic { 0 } else { get(LDR) & 0xff00_0000 };
        self.dfr = get(DFR) | 0x0fff_ffff;
        self.esr = check("esr", get(ESR), 0xff)?;
        self.pending_errors = state.pending_errors;
        self.icr = u64::from(get(ICR_HIGH)) << 32 | u64::from(get(ICR_LOW) & !(1 << 12));
        for entry in 0..self.lvt.len() {
            let read_only = 1 << 12 | LVT_REMOTE_IRR;
            let value = check("lvt", get(LVT + entry), self.lvt_bits(entry) | read_only)?;
            let kept = if entry == LVT_LINT0 { LVT_REMOTE_IRR } else { 0 };
            self.lvt[entry] = value & (self.lvt_bits(entry) | kept);
        }
        self.lvt[LVT_TIMER] = without_reserved_mode(self.lvt[LVT_TIMER]);
        for (set, first) in [(&mut self.isr, ISR), (&mut self.tmr, TMR), (&mut self.irr, IRR)] {
            *set = VectorSet::default();
            for index in 0..8 {
                // Savers that let a guest request an illegal vector do not make it deliverable.
                let illegal = if index == 0 { (1 << FIRST_VECTOR) - 1 } else { 0 };
                set.set_register(index, get(first + index) & !illegal);
            }
        }
        self.extint = state.extint;
        self.requested = self.irr.highest();
        self.update_ppr();
        self.take_timer(state, now)
    }

    fn take_timer(&mut self, state: &LapicState, now: u64) -> Result<(), IrqchipError> {
        let get = |index: usize| state.registers.get(index * 16);
        let (initial, current) = (get(INITIAL_COUNT), get(CURRENT_COUNT));
        let divide = check("divide", get(DIVIDE), DIVIDE_BITS)?;
        if current > initial {
            return Err(invalid("current_count", current));
        }
        let mut timer = Timer::new(self.config.timer_hz);
        timer.set_divide(divide, now);
        timer.set_mode(timer_mode(self.lvt[LVT_TIMER]));
        if timer.mode() == Mode::TscDeadline {
            timer.set_deadline(state.tsc_deadline, self.tsc, now);
        } else {
            timer.restore((initial, current), None, now);
            if let Some(ns) = state.timer_remaining {
                if initial == 0 || u128::from(ns) > timer.full_count() {
                    return Err(invalid("timer_remaining", ns));
                }
                timer.restore((initial, current), Some(ns), now);
            }
        }
        self.timer = timer;
        self.update_wake();
        Ok(())
    }
}
