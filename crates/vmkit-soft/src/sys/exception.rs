//! Exceptions and interrupts: what to deliver, and what becomes of a fault while delivering
//! (Intel SDM vol. 3A §7.15, interrupt 8).

use vmkit_hypervisor::x86::{Cr0, Pending};

use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, TrapKind, flags};

/// How the processor goes on after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Taken {
    /// At `cpu.rip`.
    Go,
    /// It does not: a triple fault.
    Shutdown,
    /// It does not: the instruction at `cpu.rip` is listed by the model, and lacking here.
    Unimplemented,
}

/// Where an event comes from: decides privilege checks and the EXT bit of error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// An interrupt or NMI.
    External,
    /// The processor found a condition (INT1 too).
    Processor,
    /// INT n.
    Int,
    /// INT3 or INTO: as INT n, but virtual-8086 mode does not intercept them.
    IntShort,
}

/// Something that goes through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub vector: u8,
    pub error: Option<u32>,
    pub origin: Origin,
}

impl Event {
    pub fn exception(vector: u8, error: Option<u32>) -> Self {
        Self { vector, error, origin: Origin::Processor }
    }

    pub fn external(vector: u8) -> Self {
        Self { vector, error: None, origin: Origin::External }
    }

    /// The program asked for it by an instruction.
    pub fn is_software(&self) -> bool {
        matches!(self.origin, Origin::Int | Origin::IntShort)
    }

    /// The EXT bit of an error code raised while delivering this.
    pub fn ext(&self) -> u32 {
        u32::from(!self.is_software())
    }

    /// An exception that a retry could avoid: reported with RF set, so that a code breakpoint on the
    /// instruction is not reported twice (Intel SDM vol. 3B §18.3.1.1).
    fn is_fault(&self) -> bool {
        self.origin == Origin::Processor
            && !matches!(self.vector, trap::DB | 2 | trap::BP | trap::OF | trap::DF | 18)
    }
}

/// Exceptions that make a double fault out of a second one.
#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

/// Intel SDM vol. 3A table 7-4.
fn class_of(event: &Event) -> Class {
    if event.origin != Origin::Processor {
        return Class::Benign;
    }
    match event.vector {
        trap::DE | trap::TS | trap::NP | trap::SS | trap::GP => Class::Contributory,
        trap::PF => Class::PageFault,
        trap::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What is delivered when delivering `first` raised `second`: itself, #DF, or nothing (shutdown)
/// (Intel SDM vol. 3A table 7-5).
fn combine(first: &Event, second: Event) -> Option<Event> {
    let double = Some(Event::exception(trap::DF, Some(0)));
    match (class_of(first), class_of(&second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => double,
        _ => Some(second),
    }
}

impl Cpu {
    /// Delivers what `cpu.trap` holds, with `cpu.rip` at the instruction that did not complete (or,
    /// for a debug trap, at the one that follows). Clears `cpu.trap`.
    pub fn take_trap(&mut self) -> Taken {
        match self.event_of_trap() {
            Ok(Some(event)) => self.take(event),
            Ok(None) => Taken::Go,
            Err(taken) => taken,
        }
    }

    /// Delivers an interrupt from the local APIC or the 8259 pair. Wakes from HLT.
    pub fn take_interrupt(&mut self, vector: u8) -> Taken {
        self.take(Event::external(vector))
    }

    /// Delivers an NMI; others are held until IRET. Wakes from HLT.
    pub fn take_nmi(&mut self) -> Taken {
        self.nmi_masked = true;
        self.take(Event::external(2))
    }

    /// Delivers `cpu.injected`, if there is something, and clears it.
    pub fn take_injected(&mut self) -> Taken {
        match std::mem::take(&mut self.injected) {
            Pending::Exception(e) => self.take(Event::exception(e.vector, e.error_code)),
            Pending::Interrupt(i) => {
                let origin = if i.software { Origin::Int } else { Origin::External };
                self.take(Event { vector: i.vector, error: None, origin })
            }
            _ => Taken::Go,
        }
    }

    /// Takes what `cpu.trap` holds as an event.
    fn event_of_trap(&mut self) -> Result<Option<Event>, Taken> {
        match std::mem::take(&mut self.trap) {
            TrapKind::None => Ok(None),
            TrapKind::Exception { vector, error } => Ok(Some(Event::exception(vector, error))),
            // A stack access has already made #SS of it.
            TrapKind::NonCanonical => Ok(Some(Event::exception(trap::GP, Some(0)))),
            TrapKind::Unimplemented => Err(Taken::Unimplemented),
        }
    }

    /// Delivers `event`, and after it what a task gate on the way found wrong with the new task: that
    /// is the new task's, and comes before anything else that waits (Intel SDM vol. 3A table 8-1).
    fn take(&mut self, event: Event) -> Taken {
        let mut next = Ok(Some(event));
        loop {
            let taken = match next {
                Ok(Some(event)) => self.take_one(event),
                Ok(None) => return Taken::Go,
                Err(taken) => taken,
            };
            if taken != Taken::Go {
                return taken;
            }
            // Each task that is switched to is busy from then on, so this ends.
            next = self.event_of_trap();
        }
    }

    fn take_one(&mut self, first: Event) -> Taken {
        self.halted = false;
        self.inhibit = false;
        let mut event = first;
        // Each turn leads to delivery, or one step up the ladder to shutdown; a benign exception
        // while delivering another one can only be an #AC or #DB, which delivery never raises.
        for _ in 0..8 {
            if self.deliver(event).is_ok() {
                return Taken::Go;
            }
            let second = match self.event_of_trap() {
                Ok(Some(second)) => second,
                Ok(None) => return Taken::Go,
                Err(taken) => return taken,
            };
            event = match combine(&event, second) {
                Some(next) => next,
                None => return Taken::Shutdown,
            };
        }
        Taken::Shutdown
    }

    /// RFLAGS as an event pushes it.
    pub(super) fn pushed_flags(&self, event: &Event) -> u64 {
        let rflags = self.flags.all();
        if event.is_fault() {
            rflags | flags::RF
        } else if event.is_software() || !self.must_step() {
            // RF is only kept exact while something could look at it; after an instruction that
            // completed it is clear.
            rflags & !flags::RF
        } else {
            rflags
        }
    }

    /// Delivers `event` to its handler: all of it or nothing.
    pub(super) fn deliver(&mut self, event: Event) -> Result<(), Trap> {
        if !self.cr0().contains(Cr0::PE) {
            self.deliver_real(event)?;
        } else if self.long_mode() {
            self.deliver_long(event)?;
        } else {
            self.deliver_protected(event)?;
        }
        if event.vector == trap::DB && event.origin == Origin::Processor {
            self.entered_debug_handler();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(first: u8, second: u8) -> Option<u8> {
        combine(&Event::exception(first, Some(0)), Event::exception(second, Some(0)))
            .map(|e| e.vector)
    }

    #[test]
    fn two_faults_make_what_the_manual_says() {
        assert_eq!(vector(trap::GP, trap::NP), Some(trap::DF));
        assert_eq!(vector(trap::PF, trap::PF), Some(trap::DF));
        assert_eq!(vector(trap::PF, trap::GP), Some(trap::DF));
        assert_eq!(vector(trap::GP, trap::PF), Some(trap::PF));
        assert_eq!(vector(trap::UD, trap::GP), Some(trap::GP));
        assert_eq!(vector(trap::DF, trap::PF), None);
        assert_eq!(vector(trap::DF, trap::GP), None);
    }

    #[test]
    fn a_fault_while_delivering_an_interrupt_is_delivered_alone() {
        let second = Event::exception(trap::GP, Some(0));
        assert_eq!(combine(&Event::external(13), second), Some(second));
    }
}
