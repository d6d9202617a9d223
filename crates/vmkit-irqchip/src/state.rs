//! Saved states: plain data, neutral between backends, untrusted on the way in.
//!
//! Each machine's `save` makes one and its `load` checks one. The types follow the architectural
//! registers (and are rich enough for the state blocks of an in-kernel interrupt chip), so that a
//! machine saved by one backend continues on another. Times are relative: what was running keeps
//! what it had left, whatever the clock of the loading machine shows.

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The 8259A pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// The chip at port 0x20, inputs 0 to 7.
    pub primary: PicChipState,
    /// The chip at port 0xA0, inputs 8 to 15.
    pub secondary: PicChipState,
}

/// One 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicChipState {
    /// The input wires, one bit each.
    pub lines: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The input of highest priority, 0 to 7: 0 unless rotated.
    pub top_priority: u8,
    /// Vector of input 0: a multiple of 8.
    pub vector_base: u8,
    /// Reads of the command port give the ISR, not the IRR (OCW3).
    pub read_isr: bool,
    /// The next read is a poll (OCW3).
    pub poll: bool,
    /// Special mask mode (OCW3).
    pub special_mask: bool,
    /// The initialisation word that is awaited: 0 for none, or 2, 3, 4.
    pub awaiting_icw: u8,
    /// An ICW4 follows in this initialisation (ICW1 bit 0).
    pub icw4_follows: bool,
    /// No ICW3 follows in this initialisation (ICW1 bit 1).
    pub single: bool,
    /// Automatic end of interrupt (ICW4).
    pub auto_eoi: bool,
    /// Rotate at automatic end of interrupt (OCW2).
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode (ICW4).
    pub special_fully_nested: bool,
    /// Edge/level control register: 1 is level.
    pub elcr: u8,
}

/// Number of input pins of an IOAPIC.
pub const IOAPIC_PINS: usize = 24;

/// The IOAPIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// The ID register's ID, 0 to 15.
    pub id: u8,
    /// The index register.
    pub index: u8,
    /// The input wires, one bit each: asserted or not. A saver that knows only requests puts those
    /// here.
    pub levels: u32,
    /// Redirection table entries, with delivery status (always 0) and remote IRR.
    pub entries: [u64; IOAPIC_PINS],
}

/// The 8254 and port 0x61.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The three counters.
    pub channels: [PitChannelState; 3],
    /// Port 0x61 bits 3:0 as written: gate of counter 2, speaker data, check enables.
    pub port61: u8,
    /// Rising edges of output 0 that are owed to the interrupt controllers.
    pub backlog: u32,
}

/// One counter of the 8254.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannelState {
    /// Mode, 0 to 5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// Access: 1 low byte, 2 high byte, 3 low then high.
    pub access: u8,
    /// The gate input.
    pub gate: bool,
    /// The count in use, 1 to 65,536.
    pub count: u32,
    /// A count that was written and waits for the end of the cycle or for a trigger.
    pub next_count: Option<u32>,
    /// What the counter does.
    pub run: PitRun,
    /// The low byte of a count, its high byte awaited.
    pub write_low: Option<u8>,
    /// The next read gives the high byte.
    pub read_high: bool,
    /// A latched count.
    pub latched_count: Option<u16>,
    /// A latched status.
    pub latched_status: Option<u8>,
}

/// What a counter of the 8254 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PitRun {
    /// It waits for a count or, in modes 1 and 5, for a trigger.
    Idle,
    /// It counts and has done so for this many input clocks (1,193,182 Hz); -1 just after the
    /// write, because a count is loaded by the clock that follows.
    Counting(i64),
    /// Its gate (or a half-written count) holds it after this many input clocks.
    Held(i64),
}

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The registers, as they read, in architectural layout.
    pub registers: LapicPage,
    /// IA32_TSC_DEADLINE; 0 if not armed.
    pub tsc_deadline: u64,
    /// Nanoseconds until the one-shot or periodic timer expires, if the saver knows that better
    /// than the current-count register says it. Without it, a count of 0 means that the timer is
    /// stopped (a saver whose periodic timer reads 0 at the end of its period says `Some(0)`).
    pub timer_remaining: Option<u64>,
    /// Errors seen since the error status register was last written.
    pub pending_errors: u8,
    /// Levels of the inputs LINT0 and LINT1.
    pub lint: [bool; 2],
    /// An ExtINT message waits to be acknowledged.
    pub extint: bool,
}

/// The register page of a local APIC: 64 registers of 32 bits, 16 bytes apart.
///
/// The ID register holds the 8-bit ID in bits 31:24 in xAPIC mode and when disabled, and all 32
/// bits in x2APIC mode. The 64-bit ICR of x2APIC mode is at 0x300 (low) and 0x310 (high).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicPage([u32; 64]);

impl LapicPage {
    /// Bytes of the page that hold registers.
    pub const LEN: usize = 1024;

    /// A page of zeroes.
    #[must_use]
    pub const fn new() -> Self {
        Self([0; 64])
    }

    /// The register at byte `offset` (rounded down to 16); 0 beyond the page.
    #[must_use]
    pub fn get(&self, offset: usize) -> u32 {
        self.0.get(offset / 16).copied().unwrap_or(0)
    }

    /// Sets the register at byte `offset` (rounded down to 16). Beyond the page: nothing.
    pub fn set(&mut self, offset: usize, value: u32) {
        if let Some(register) = self.0.get_mut(offset / 16) {
            *register = value;
        }
    }

    /// The page as the bytes the architecture lays out.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        for (slot, register) in bytes.chunks_exact_mut(16).zip(self.0) {
            slot[..4].copy_from_slice(&register.to_le_bytes());
        }
        bytes
    }

    /// The registers out of such bytes; what lies between registers is dropped.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut page = Self::new();
        for (slot, register) in bytes.chunks_exact(16).zip(&mut page.0) {
            *register = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
        }
        page
    }
}

impl Default for LapicPage {
    fn default() -> Self {
        Self::new()
    }
}

// serde's derive knows arrays up to 32 elements.
impl Serialize for LapicPage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(self.0.len())?;
        for register in &self.0 {
            tuple.serialize_element(register)?;
        }
        tuple.end()
    }
}

impl<'de> Deserialize<'de> for LapicPage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Page;
        impl<'de> Visitor<'de> for Page {
            type Value = LapicPage;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("64 registers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LapicPage, A::Error> {
                let mut page = LapicPage::new();
                for (index, register) in page.0.iter_mut().enumerate() {
                    *register = seq
                        .next_element()?
                        .ok_or_else(|| A::Error::invalid_length(index, &self))?;
                }
                Ok(page)
            }
        }
        deserializer.deserialize_tuple(64, Page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_page_survives_bytes_and_serde() {
        let mut page = LapicPage::new();
        page.set(0x80, 0x20);
        page.set(0x3e0, 0xb);
        page.set(0x400, 7);
        let bytes = page.to_bytes();
        assert_eq!((bytes[0x80], bytes[0x3e0]), (0x20, 0xb));
        assert_eq!(LapicPage::from_bytes(&bytes), page);
        let encoded = postcard::to_stdvec(&page).unwrap();
        assert_eq!(postcard::from_bytes::<LapicPage>(&encoded).unwrap(), page);
        assert!(postcard::from_bytes::<LapicPage>(&encoded[1..]).is_err());
        assert_eq!((page.get(0x80), page.get(0x400)), (0x20, 0));
    }
}
