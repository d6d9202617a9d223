//! Interrupt messages: what travels from an IOAPIC, a device's MSI or an ICR to local APICs.
//!
//! A message is already normalised: an 8-bit broadcast (`0xFF`) is [`BROADCAST`], and the
//! trigger mode of messages that are always edges is edge.

use vmkit_device::Msi;

/// The destination that every enabled local APIC matches.
pub const BROADCAST: u32 = u32::MAX;

/// How a message is to be taken by its destination (Intel SDM vol. 3A §11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeliveryMode {
    /// The vector, to all destinations.
    Fixed,
    /// The vector, to the one destination of lowest priority.
    LowestPriority,
    /// A system management interrupt.
    Smi,
    /// A non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT; the vector is ignored.
    Init,
    /// Start-up: the vector is the page to start at.
    Sipi,
    /// The vector comes from the 8259 pair, by an acknowledge cycle.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes the three-bit field of an RTE or an MSI's data. `None` for the reserved values 3
    /// and 6.
    #[must_use]
    pub fn from_message_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }

    /// Whether the vector goes into an IRR: fixed and lowest priority.
    #[must_use]
    pub fn is_vectored(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApicMessage {
    /// An APIC ID, or a logical set; [`BROADCAST`] for all.
    pub dest: u32,
    /// Whether `dest` is logical.
    pub logical: bool,
    /// How it is to be taken.
    pub mode: DeliveryMode,
    /// The vector.
    pub vector: u8,
    /// Level-triggered: its EOI is to be told to the IOAPICs.
    pub level: bool,
}

/// Whom an IPI goes to, if not to its message's destination (Intel SDM vol. 3A §11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shorthand {
    /// The message's destination.
    None,
    /// Every local APIC, the sender's too.
    All,
    /// Every local APIC but the sender's.
    AllButSelf,
}

/// An interprocessor interrupt. (One that the sender addresses to itself by shorthand or through
/// SELF IPI never gets here: the local APIC takes it at once.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipi {
    /// Whom it goes to.
    pub shorthand: Shorthand,
    /// What arrives.
    pub message: ApicMessage,
}

/// What a message means to the processor behind the local APIC, beyond its IRR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuEvent {
    /// Reset to the wait-for-SIPI state. When the processor does it, it calls
    /// `LocalApic::init`.
    Init,
    /// Start at `vector << 12`, if waiting for it.
    Sipi(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A system management interrupt.
    Smi,
}

/// Widens an 8-bit destination with its seven extended bits; `0xFF` alone is the broadcast.
pub(crate) fn destination(low: u32, extended: u32) -> u32 {
    match (low & 0xff) | (extended & 0x7f) << 8 {
        0xff => BROADCAST,
        id => id,
    }
}

/// Decodes a message-signalled interrupt (Intel SDM vol. 3A §11.11), with the 15-bit destination
/// IDs that paravirtual guests use (address bits 11:5 are destination bits 14:8).
///
/// `None` if it is none: an address outside `0xFEEx_xxxx`, a reserved delivery mode, or the
/// deassertion of a level.
#[must_use]
pub fn msi_to_message(msi: Msi) -> Option<ApicMessage> {
    if msi.address >> 20 != 0xfee {
        return None;
    }
    let address = msi.address as u32;
    let level = msi.data & 1 << 15 != 0;
    if level && msi.data & 1 << 14 == 0 {
        return None;
    }
    let mode = match DeliveryMode::from_message_bits(msi.data >> 8)? {
        // The redirection hint asks for one destination out of several.
        DeliveryMode::Fixed if address & 1 << 3 != 0 => DeliveryMode::LowestPriority,
        mode => mode,
    };
    Some(ApicMessage {
        dest: destination(address >> 12, address >> 5),
        logical: address & 1 << 2 != 0,
        mode,
        vector: msi.data as u8,
        level: level && mode.is_vectored(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(address: u64, data: u32) -> Option<ApicMessage> {
        msi_to_message(Msi { address, data })
    }

    #[test]
    fn an_msi_decodes_to_its_fields() {
        assert_eq!(
            msi(0xfee0_3004, 0x0141),
            Some(ApicMessage {
                dest: 3,
                logical: true,
                mode: DeliveryMode::LowestPriority,
                vector: 0x41,
                level: false
            })
        );
        assert_eq!(msi(0xfee0_1000, 0xc030).map(|m| (m.level, m.dest)), Some((true, 1)));
        assert_eq!(msi(0xfee0_1008, 0x30).map(|m| m.mode), Some(DeliveryMode::LowestPriority));
    }

    #[test]
    fn an_msi_reaches_apic_ids_above_254_by_the_extended_bits() {
        assert_eq!(msi(0xfee2_c020, 0x30).map(|m| m.dest), Some(0x12c));
        assert_eq!(msi(0xfeef_f000, 0x30).map(|m| m.dest), Some(BROADCAST));
        assert_eq!(msi(0xfeef_f020, 0x30).map(|m| m.dest), Some(0x1ff));
    }

    #[test]
    fn what_is_no_msi_is_none() {
        assert_eq!(msi(0xfed0_0000, 0x30), None);
        assert_eq!(msi(0x1_fee0_0000, 0x30), None);
        assert_eq!(msi(0xfee0_0000, 0x330), None);
        assert_eq!(msi(0xfee0_0000, 0x8030), None);
    }
}
