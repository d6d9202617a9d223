//! The table of GSIs: which wire reaches which controller's input, and which GSI is which message.
//!
//! With split controllers the wires are not KVM's. The first GSIs then stand for the IOAPIC's pins, for
//! one purpose: KVM tells of the EOI of a vector only if a message of these GSIs could have sent it
//! (Linux, Documentation/virt/kvm/api.rst, KVM_CAP_SPLIT_IRQCHIP).

#![allow(unsafe_code, reason = "KVM's routes hold a union")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmkit_device::MsiRoute;
use vmkit_hypervisor::{EventFd, Msi};
use vmkit_irqchip::ApicMessage;

use crate::error::io_error;
use crate::interrupts::{GSIS, kvm_message};
use crate::partition::Shared;
use crate::split;

/// What the IOAPIC's pins send that are level-triggered.
pub(crate) type LevelPins = [Option<ApicMessage>; GSIS as usize];

/// GSIs that stand for the IOAPIC's pins: two for each, because KVM has two broadcasts.
pub(crate) const PIN_GSIS: u32 = 2 * GSIS;

/// The first GSIs.
enum Wires {
    /// KVM's controllers are behind them, always the same way.
    InKernel,
    /// The IOAPIC is elsewhere.
    Split(LevelPins),
}

struct Table {
    wires: Wires,
    /// Messages, by GSI.
    messages: BTreeMap<u32, Option<Msi>>,
}

/// The routes of a partition.
pub(crate) struct Routes(Mutex<Table>);

impl Routes {
    fn new(wires: Wires) -> Self {
        Self(Mutex::new(Table { wires, messages: BTreeMap::new() }))
    }

    /// Routes to controllers in the kernel, if there are any.
    pub(crate) fn in_kernel() -> Self {
        Self::new(Wires::InKernel)
    }

    /// Routes beside controllers that are split.
    pub(crate) fn split() -> Self {
        Self::new(Wires::Split([None; GSIS as usize]))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives KVM the routes as they are.
    pub(crate) fn start(&self, vm: &VmFd) -> io::Result<()> {
        self.lock().install(vm)
    }

    /// From now on KVM tells of the EOIs of what these pins send.
    pub(crate) fn watch_pins(&self, vm: &VmFd, pins: &LevelPins) -> io::Result<()> {
        let mut table = self.lock();
        let before = match &mut table.wires {
            Wires::Split(known) if known != pins => std::mem::replace(known, *pins),
            _ => return Ok(()),
        };
        let outcome = table.install(vm);
        if outcome.is_err() {
            table.wires = Wires::Split(before);
        }
        outcome
    }
}

impl Table {
    fn install(&self, vm: &VmFd) -> io::Result<()> {
        let mut entries: Vec<_> = match &self.wires {
            Wires::InKernel => wires().collect(),
            Wires::Split(pins) => level_pins(pins).collect(),
        };
        let messages = self.messages.iter();
        entries
            .extend(messages.filter_map(|(gsi, msi)| Some(message(*gsi, kvm_message((*msi)?)?))));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        vm.set_gsi_routing(&table).map_err(io_error)
    }

    /// A GSI that is free, from now on taken.
    fn take_gsi(&mut self) -> io::Result<u32> {
        let limit = PIN_GSIS..KVM_MAX_IRQ_ROUTES as u32 - PIN_GSIS;
        let free = limit.into_iter().find(|gsi| !self.messages.contains_key(gsi));
        let gsi = free.ok_or_else(|| io::Error::other("no GSI is free"))?;
        self.messages.insert(gsi, None);
        Ok(gsi)
    }
}

/// A wire's route to one input of a controller.
fn wire(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message(gsi: u32, message: kvm_msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address_lo;
    entry.u.msi.address_hi = message.address_hi;
    entry.u.msi.data = message.data;
    entry
}

fn level_pins(pins: &LevelPins) -> impl Iterator<Item = kvm_irq_routing_entry> {
    (0..).zip(pins).filter_map(|(gsi, pin)| Some((gsi, pin.as_ref()?))).flat_map(|(gsi, pin)| {
        let messages = split::kvm_messages(pin);
        (0..).zip(messages).map(move |(set, m)| message(gsi + set * GSIS, m))
    })
}

/// The wires: ISA interrupts reach the PICs, and the IOAPIC at the input of the same number, but for
/// the PIT's, which reaches input 2 there, as firmware tables say (ACPI 6.5 §5.2.12.5). Wire 2 is
/// where the second PIC hangs: nothing else drives it.
fn wires() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = |gsi| match gsi {
        2 | 16.. => None,
        0..8 => Some(wire(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
        _ => Some(wire(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
    };
    let ioapic = |gsi| match gsi {
        0 => Some(wire(0, KVM_IRQCHIP_IOAPIC, 2)),
        2 => None,
        _ => Some(wire(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
    };
    (0..GSIS).flat_map(move |gsi| pic(gsi).into_iter().chain(ioapic(gsi)))
}

/// A GSI that an eventfd fires as a message.
struct KvmMsiRoute {
    partition: Arc<Shared>,
    fd: EventFd,
    gsi: u32,
}

/// Has writes to `fd` send a message without leaving the kernel.
pub(crate) fn route_msi(partition: &Arc<Shared>, fd: &EventFd) -> io::Result<Box<dyn MsiRoute>> {
    let fd = fd.try_clone()?;
    let gsi = partition.routes.lock().take_gsi()?;
    let route = KvmMsiRoute { partition: partition.clone(), fd, gsi };
    // Should this fail, the route is dropped and its GSI free again.
    partition.vm.register_irqfd(&route.fd, gsi).map_err(io_error)?;
    Ok(Box::new(route))
}

impl MsiRoute for KvmMsiRoute {
    fn program(&self, message: Option<Msi>) -> io::Result<()> {
        let mut table = self.partition.routes.lock();
        let before = table.messages.insert(self.gsi, message).flatten();
        let outcome = table.install(&self.partition.vm);
        if outcome.is_err() {
            table.messages.insert(self.gsi, before);
        }
        outcome
    }
}

impl Drop for KvmMsiRoute {
    fn drop(&mut self) {
        if let Err(error) = self.partition.vm.unregister_irqfd(&self.fd, self.gsi) {
            log::debug!("irqfd of GSI {} was not attached: {error}", self.gsi);
        }
        let mut table = self.partition.routes.lock();
        if table.messages.remove(&self.gsi).flatten().is_some()
            && let Err(error) = table.install(&self.partition.vm)
        {
            log::error!("route of GSI {} could not be taken away: {error}", self.gsi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pit_reaches_ioapic_input_two_and_nothing_else_does() {
        // SAFETY: all of these entries are of controllers.
        let routes: Vec<_> =
            wires().map(|e| unsafe { (e.gsi, e.u.irqchip.irqchip, e.u.irqchip.pin) }).collect();
        let to = |chip, pin| {
            routes.iter().filter(|r| (r.1, r.2) == (chip, pin)).map(|r| r.0).collect::<Vec<_>>()
        };
        assert_eq!(to(KVM_IRQCHIP_IOAPIC, 2), [0]);
        assert_eq!(to(KVM_IRQCHIP_PIC_MASTER, 0), [0]);
        assert!(to(KVM_IRQCHIP_IOAPIC, 0).is_empty());
        assert_eq!(to(KVM_IRQCHIP_PIC_SLAVE, 1), [9]);
        assert_eq!(to(KVM_IRQCHIP_IOAPIC, 23), [23]);
    }
}
