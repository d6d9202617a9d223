//! Messages of the IOAPIC in KVM's form.

use kvm_bindings::kvm_msi;
use vmkit_irqchip::{ApicMessage, BROADCAST, DeliveryMode};

/// MSI data bit 14: asserted.
const ASSERT: u32 = 1 << 14;
/// MSI data bit 15: level-triggered.
const LEVEL: u32 = 1 << 15;
/// MSI address bit 2: the destination is logical.
const LOGICAL: u32 = 1 << 2;

/// The message for KVM, with destination bits 31:8 in `address_hi`. A broadcast is two messages: one
/// that xAPICs match, whose IDs have 8 bits, and one that x2APICs do.
pub(crate) fn kvm_messages(message: &ApicMessage) -> impl Iterator<Item = kvm_msi> {
    let mode = match message.mode {
        DeliveryMode::Fixed => 0,
        DeliveryMode::LowestPriority => 1,
        DeliveryMode::Smi => 2,
        DeliveryMode::Nmi => 4,
        DeliveryMode::Init => 5,
        DeliveryMode::Sipi => 6,
        DeliveryMode::ExtInt => 7,
    };
    let data =
        u32::from(message.vector) | mode << 8 | ASSERT | if message.level { LEVEL } else { 0 };
    let logical = if message.logical { LOGICAL } else { 0 };
    let (first, second) =
        if message.dest == BROADCAST { (0xFF, Some(BROADCAST)) } else { (message.dest, None) };
    [Some(first), second].into_iter().flatten().map(move |dest| kvm_msi {
        address_lo: 0xFEE0_0000 | (dest & 0xFF) << 12 | logical,
        address_hi: dest & !0xFF,
        data,
        ..kvm_msi::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(message: ApicMessage) -> Vec<(u32, u32, u32)> {
        kvm_messages(&message).map(|m| (m.address_lo, m.address_hi, m.data)).collect()
    }

    #[test]
    fn fields_are_where_the_manual_has_them() {
        let message = ApicMessage {
            dest: 0x1_03,
            logical: true,
            mode: DeliveryMode::LowestPriority,
            vector: 0x42,
            level: true,
        };
        assert_eq!(sent(message), [(0xFEE0_3004, 0x100, 0xC142)]);
        let edge = ApicMessage {
            dest: 1,
            logical: false,
            mode: DeliveryMode::Fixed,
            vector: 0x30,
            level: false,
        };
        assert_eq!(sent(edge), [(0xFEE0_1000, 0, 0x4030)]);
    }

    #[test]
    fn a_broadcast_is_for_both_kinds_of_local_apic() {
        let all = ApicMessage {
            dest: BROADCAST,
            logical: false,
            mode: DeliveryMode::Nmi,
            vector: 0,
            level: false,
        };
        assert_eq!(sent(all), [(0xFEEF_F000, 0, 0x4400), (0xFEEF_F000, 0xFFFF_FF00, 0x4400)]);
    }
}
