//! PC interrupt controllers and timers of vmkit as pure state machines: 8259, IOAPIC, local APIC, 8254.
//!
//! Nothing here has a thread, a lock or a clock. Whatever depends on time takes `now`, nanoseconds
//! of the VM clock; a machine with a timer says when it wants to be called (`next_deadline`) and
//! catches up in constant time when it is (`advance`). `now` never runs backwards.
//!
//! Everything a guest can write is hostile: any access is answered, none panics, loops without
//! bound or allocates.
//!
//! A [`Board`] and its owner wire them: device wires to [`Pic`] and [`Ioapic`], the messages of [`Ioapic`], of MSIs
//! ([`msi_to_message`]) and of ICR writes to [`LocalApic`]s ([`route`], [`route_ipi`]), the EOIs of
//! [`LocalApic`]s back to the [`Ioapic`], the ticks of [`Pit`] to input 0 of the pair and pin 2.
//!
//! ```
//! use vmkit_irqchip::{Ioapic, LapicAction, LapicConfig, LocalApic};
//!
//! let mut ioapic = Ioapic::new();
//! let mut lapic = LocalApic::new(LapicConfig::new(0));
//! // The guest enables its local APIC and routes pin 4, edge-triggered, to vector 0x24.
//! assert_eq!(lapic.write_mmio(0xf0, &0x1ff_u32.to_le_bytes(), 0), LapicAction::None);
//! ioapic.write(0x00, &[0x18], &mut |_| true);
//! ioapic.write(0x10, &0x24_u32.to_le_bytes(), &mut |_| true);
//! // A device pulls its wire.
//! ioapic.set_level(4, true, &mut |message| {
//!     let is_for_it = lapic.matches(message.dest, message.logical);
//!     if is_for_it {
//!         lapic.accept(&message);
//!     }
//!     is_for_it
//! });
//! // The processor, at an instruction boundary with interrupts on:
//! assert_eq!(lapic.pending_vector(), Some(0x24));
//! assert_eq!(lapic.acknowledge(), 0x24);
//! ```

mod board;
mod error;
mod ioapic;
mod lapic;
mod message;
mod pic;
mod pit;
mod route;
mod state;
mod time;

pub use board::Board;
pub use error::{ApicFault, IrqchipError};
pub use ioapic::{Ioapic, IoapicVersion};
pub use lapic::{
    APIC_BASE_MSR, LapicAction, LapicConfig, LocalApic, LocalSource, TSC_DEADLINE_MSR,
};
pub use message::{ApicMessage, BROADCAST, CpuEvent, DeliveryMode, Ipi, Shorthand, msi_to_message};
pub use pic::Pic;
pub use pit::{PIT_HZ, Pit};
pub use route::{ApicAddress, ApicMode, route, route_ipi};
pub use state::{
    IOAPIC_PINS, IoapicState, LapicPage, LapicState, PicChipState, PicState, PitChannelState,
    PitRun, PitState,
};
pub use time::TscClock;
