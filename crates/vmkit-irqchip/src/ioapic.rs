//! The IOAPIC: 24 input pins to interrupt messages (Intel 82093AA data sheet; Intel ICH data
//! sheet, "Advanced Programmable Interrupt Controller").
//!
//! Messages go to the `sink` that every call which can cause one takes, and which says whether a
//! local APIC took the message. Which local APIC it is for is not decided here.

use crate::error::IrqchipError;
use crate::message::{ApicMessage, DeliveryMode, destination};
use crate::state::{IOAPIC_PINS, IoapicState};

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;

/// Bits of a redirection entry that software writes: vector, modes, polarity, trigger, mask, and
/// 16 bits of destination, of which bits 55:49 extend the ID.
const WRITABLE: u64 = 0xffff_0000_0001_afff;

const PINS: u32 = (1 << IOAPIC_PINS) - 1;

/// Which IOAPIC it says to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoapicVersion {
    /// Version 0x11, the 82093AA: no EOI register.
    V11,
    /// Version 0x20, as in ICH chipsets: with an EOI register.
    V20,
}

/// An IOAPIC with 24 pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ioapic {
    version: IoapicVersion,
    id: u8,
    index: u8,
    levels: u32,
    entries: [u64; IOAPIC_PINS],
}

impl Ioapic {
    /// An IOAPIC of version 0x20 after reset: every pin masked.
    #[must_use]
    pub fn new() -> Self {
        Self::with_version(IoapicVersion::V20)
    }

    /// An IOAPIC of a given version after reset.
    #[must_use]
    pub fn with_version(version: IoapicVersion) -> Self {
        Self { version, id: 0, index: 0, levels: 0, entries: [MASKED; IOAPIC_PINS] }
    }

    /// Resets the registers. The wires keep their levels.
    pub fn reset(&mut self) {
        *self = Self { levels: self.levels, ..Self::with_version(self.version) };
    }

    /// Drives pin `pin`, 0 to 23. An edge on a masked pin is lost, as the data sheet says.
    pub fn set_level(&mut self, pin: u8, high: bool, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        let pin = usize::from(pin);
        let Some(&entry) = self.entries.get(pin) else {
            return;
        };
        let was_asserted = self.asserted(pin);
        self.levels = self.levels & !(1 << pin) | u32::from(high) << pin;
        if was_asserted || !self.asserted(pin) {
            return;
        }
        if is_level(entry) {
            self.serve(pin, sink);
        } else if entry & MASKED == 0 {
            send(entry, sink);
        }
    }

    /// A local APIC has ended the service of `vector`: pins that waited for it are free again, and
    /// interrupt again if they are still asserted.
    pub fn eoi(&mut self, vector: u8, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        for pin in 0..IOAPIC_PINS {
            let entry = &mut self.entries[pin];
            if *entry & REMOTE_IRR != 0 && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                self.serve(pin, sink);
            }
        }
    }

    /// Whether an EOI of `vector` would mean anything here.
    #[must_use]
    pub fn awaits_eoi(&self, vector: u8) -> bool {
        self.entries.iter().any(|&entry| entry & REMOTE_IRR != 0 && entry as u8 == vector)
    }

    /// Whether any pin waits for an EOI.
    #[must_use]
    pub fn awaits_any_eoi(&self) -> bool {
        self.entries.iter().any(|&entry| entry & REMOTE_IRR != 0)
    }

    /// The message that pin `pin` sends while it is asserted, masked or not: an owner whose local
    /// APICs tell of chosen EOIs only (KVM's) chooses by it. `None` if the pin is edge-triggered.
    #[must_use]
    pub fn level_message(&self, pin: usize) -> Option<ApicMessage> {
        self.entries.get(pin).filter(|entry| is_level(**entry)).and_then(|entry| message(*entry))
    }

    /// Reads at `offset` from its base. What is no register reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0x00 => u32::from(self.index),
            0x10 => self.read_register(),
            _ => 0,
        };
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = value.to_le_bytes().get(index).copied().unwrap_or(0);
        }
    }

    /// Writes at `offset` from its base. The window takes whole 32-bit words only.
    pub fn write(&mut self, offset: u64, data: &[u8], sink: &mut dyn FnMut(ApicMessage) -> bool) {
        match (offset, data) {
            (0x00, &[index, ..]) => self.index = index,
            (0x10, &[a, b, c, d, ..]) => {
                self.write_register(u32::from_le_bytes([a, b, c, d]), sink);
            }
            (0x40, &[vector, ..]) if self.version == IoapicVersion::V20 => self.eoi(vector, sink),
            _ => {}
        }
    }

    /// Delivers every level-triggered pin that is asserted and not in service. Call it after
    /// [`load`](Self::load), because a saver can be in the midst of that, or when what no local APIC
    /// took may be taken now.
    pub fn resample(&mut self, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        for pin in 0..IOAPIC_PINS {
            self.serve(pin, sink);
        }
    }

    /// Saves the state.
    #[must_use]
    pub fn save(&self) -> IoapicState {
        IoapicState { id: self.id, index: self.index, levels: self.levels, entries: self.entries }
    }

    /// Takes over a saved state. Bits of entries that do not exist are dropped. No pin makes an
    /// edge.
    ///
    /// # Errors
    /// [`IrqchipError::InvalidState`]; then nothing has changed.
    pub fn load(&mut self, state: &IoapicState) -> Result<(), IrqchipError> {
        let invalid =
            |field, value| Err(IrqchipError::InvalidState { machine: "ioapic", field, value });
        if state.id > 0xf {
            return invalid("id", state.id.into());
        }
        if state.levels & !PINS != 0 {
            return invalid("levels", state.levels.into());
        }
        let entries = state.entries.map(|entry| settled(entry & (WRITABLE | REMOTE_IRR)));
        let (id, index, levels) = (state.id, state.index, state.levels);
        *self = Self { version: self.version, id, index, levels, entries };
        Ok(())
    }

    /// Whether the pin's wire is asserted. Wires carry assertion, not voltage: the polarity bit is
    /// stored and means nothing, so that a table that calls a line active-low (as ACPI does of PCI's
    /// INTx) and a device that drives it high agree. KVM's IOAPIC does the same.
    fn asserted(&self, pin: usize) -> bool {
        self.levels & 1 << pin != 0
    }

    /// Sends what a level-triggered pin owes. Remote IRR is set when a local APIC accepts the
    /// interrupt (82093AA §3.2.4): where none does, no EOI would ever free the pin.
    fn serve(&mut self, pin: usize, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        let entry = self.entries[pin];
        let owes = is_level(entry) && entry & (MASKED | REMOTE_IRR) == 0 && self.asserted(pin);
        if owes && send(entry, sink) {
            self.entries[pin] |= REMOTE_IRR;
        }
    }

    fn read_register(&self) -> u32 {
        let version = match self.version {
            IoapicVersion::V11 => 0x11,
            IoapicVersion::V20 => 0x20,
        };
        match self.index {
            // The ID, and the arbitration ID that follows it.
            0 | 2 => u32::from(self.id) << 24,
            1 => (IOAPIC_PINS as u32 - 1) << 16 | version,
            index => {
                self.entry_of(index).map_or(0, |(pin, shift)| (self.entries[pin] >> shift) as u32)
            }
        }
    }

    fn write_register(&mut self, value: u32, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        if self.index == 0 {
            self.id = (value >> 24) as u8 & 0xf;
        } else if let Some((pin, shift)) = self.entry_of(self.index) {
            let half = 0xffff_ffff << shift & WRITABLE;
            let value = u64::from(value) << shift & half;
            self.entries[pin] = settled(self.entries[pin] & !half | value);
            self.serve(pin, sink);
        }
    }

    /// The pin and the bit offset of the half of its entry that a register index names.
    fn entry_of(&self, index: u8) -> Option<(usize, u32)> {
        let word = usize::from(index.checked_sub(0x10)?);
        (word < 2 * IOAPIC_PINS).then_some((word / 2, if word % 2 == 0 { 0 } else { 32 }))
    }
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for IoapicState {
    /// The state of [`Ioapic::new`].
    fn default() -> Self {
        Ioapic::new().save()
    }
}

fn mode_of(entry: u64) -> Option<DeliveryMode> {
    DeliveryMode::from_message_bits((entry >> 8) as u32)
}

/// Whether a pin keeps interrupting while asserted. SMI, NMI, INIT and ExtINT are edges whatever
/// their trigger bit says.
fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && mode_of(entry).is_some_and(DeliveryMode::is_vectored)
}

/// Remote IRR has no meaning for edges. Operating systems clear a stuck one by switching the pin
/// to edge and back.
fn settled(entry: u64) -> u64 {
    if is_level(entry) { entry } else { entry & !REMOTE_IRR }
}

fn message(entry: u64) -> Option<ApicMessage> {
    Some(ApicMessage {
        dest: destination((entry >> 56) as u32, (entry >> 49) as u32),
        logical: entry & LOGICAL != 0,
        mode: mode_of(entry)?,
        vector: entry as u8,
        level: is_level(entry),
    })
}

/// Whether it was accepted.
fn send(entry: u64, sink: &mut dyn FnMut(ApicMessage) -> bool) -> bool {
    message(entry).is_some_and(sink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::BROADCAST;

    /// A sink that takes everything.
    fn into(sent: &mut Vec<ApicMessage>) -> impl FnMut(ApicMessage) -> bool {
        |message| {
            sent.push(message);
            true
        }
    }

    struct Board {
        ioapic: Ioapic,
        sent: Vec<ApicMessage>,
    }

    impl Board {
        fn new() -> Self {
            Self { ioapic: Ioapic::new(), sent: Vec::new() }
        }

        fn write(&mut self, index: u8, value: u32) {
            self.ioapic.write(0, &[index], &mut |_| true);
            self.ioapic.write(0x10, &value.to_le_bytes(), &mut into(&mut self.sent));
        }

        fn read(&mut self, index: u8) -> u32 {
            let mut data = [0; 4];
            self.ioapic.write(0, &[index], &mut |_| true);
            self.ioapic.read(0x10, &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&mut self, pin: u8, high: bool) -> usize {
            self.ioapic.set_level(pin, high, &mut into(&mut self.sent));
            std::mem::take(&mut self.sent).len()
        }

        fn eoi(&mut self, vector: u8) -> usize {
            self.ioapic.eoi(vector, &mut into(&mut self.sent));
            std::mem::take(&mut self.sent).len()
        }
    }

    #[test]
    fn it_says_what_it_is() {
        let mut board = Board::new();
        assert_eq!(board.read(1), 0x0017_0020);
        board.write(0, 0xff00_0000);
        assert_eq!((board.read(0), board.read(2)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(board.read(0x10), 0x0001_0000);
        assert_eq!(board.read(0x40), 0);
    }

    #[test]
    fn read_only_and_reserved_bits_are_not_written() {
        let mut board = Board::new();
        board.write(0x10, 0xffff_ffff);
        board.write(0x11, 0xffff_ffff);
        assert_eq!(board.read(0x10), 0x0001_afff);
        assert_eq!(board.read(0x11), 0xffff_0000);
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_when_masked() {
        let mut board = Board::new();
        board.write(0x14, 0x0001_0830);
        board.write(0x15, 0x0100_0000);
        assert_eq!(board.set(2, true), 0);
        board.write(0x14, 0x0000_0830);
        assert!(board.sent.is_empty());
        assert_eq!(board.set(2, true), 0);
        assert_eq!(board.set(2, false), 0);
        board.ioapic.set_level(2, true, &mut into(&mut board.sent));
        let expected = ApicMessage {
            dest: 1,
            logical: true,
            mode: DeliveryMode::Fixed,
            vector: 0x30,
            level: false,
        };
        assert_eq!(board.sent, [expected]);
        board.sent.clear();
        assert_eq!(board.eoi(0x30), 0);
    }

    #[test]
    fn a_level_waits_for_its_eoi_and_comes_again_while_asserted() {
        let mut board = Board::new();
        board.write(0x24, 0x0000_8042);
        assert_eq!(board.set(10, true), 1);
        assert_eq!(board.read(0x24), 0x0000_c042);
        assert_eq!((board.set(10, false), board.set(10, true)), (0, 0));
        assert_eq!((board.eoi(0x41), board.eoi(0x42)), (0, 1));
        board.set(10, false);
        assert!(board.ioapic.awaits_any_eoi());
        assert_eq!(board.eoi(0x42), 0);
        assert!(!board.ioapic.awaits_any_eoi());
        assert_eq!(board.read(0x24), 0x0000_8042);
        assert_eq!(board.set(10, true), 1);
    }

    #[test]
    fn a_level_pin_tells_its_message_masked_or_not() {
        let mut board = Board::new();
        board.write(0x24, 0x0001_8042);
        board.write(0x25, 0x0300_0000);
        let expected = ApicMessage {
            dest: 3,
            logical: false,
            mode: DeliveryMode::Fixed,
            vector: 0x42,
            level: true,
        };
        assert_eq!(board.ioapic.level_message(10), Some(expected));
        board.write(0x24, 0x0000_0042);
        assert_eq!(board.ioapic.level_message(10), None);
        assert_eq!(board.ioapic.level_message(24), None);
    }

    #[test]
    fn a_level_that_no_local_apic_took_is_not_in_service() {
        let mut board = Board::new();
        board.write(0x24, 0x0000_8042);
        let mut refused = 0;
        let refuse = &mut |_| {
            refused += 1;
            false
        };
        board.ioapic.set_level(10, true, refuse);
        board.ioapic.resample(refuse);
        assert_eq!(refused, 2);
        assert_eq!(board.read(0x24), 0x0000_8042);
        assert!(!board.ioapic.awaits_any_eoi());
        board.write(0x24, 0x0000_8042);
        assert_eq!(std::mem::take(&mut board.sent).len(), 1);
        assert_eq!(board.read(0x24), 0x0000_c042);
        // What comes again at the EOI can be refused, too.
        board.ioapic.eoi(0x42, &mut |_| false);
        assert_eq!(board.read(0x24), 0x0000_8042);
    }

    #[test]
    fn unmasking_an_asserted_level_delivers_it() {
        let mut board = Board::new();
        board.write(0x24, 0x0001_8042);
        assert_eq!(board.set(10, true), 0);
        board.write(0x24, 0x0000_8042);
        assert_eq!(std::mem::take(&mut board.sent).len(), 1);
        // Masking and unmasking does not deliver what is in service.
        board.write(0x24, 0x0001_8042);
        board.write(0x24, 0x0000_8042);
        assert!(board.sent.is_empty());
        // Masked while in service: the EOI frees the pin, the unmasking delivers.
        board.write(0x24, 0x0001_8042);
        assert_eq!(board.eoi(0x42), 0);
        board.write(0x24, 0x0000_8042);
        assert_eq!(board.sent.len(), 1);
    }

    #[test]
    fn the_eoi_register_works_and_is_of_version_20_only() {
        for (version, again) in [(IoapicVersion::V20, 1), (IoapicVersion::V11, 0)] {
            let mut board = Board { ioapic: Ioapic::with_version(version), sent: Vec::new() };
            board.write(0x24, 0x0000_8042);
            board.set(10, true);
            let sent = &mut board.sent;
            board.ioapic.write(0x40, &0x42_u32.to_le_bytes(), &mut into(sent));
            assert_eq!(board.sent.len(), again);
        }
    }

    #[test]
    fn a_switch_to_edge_and_back_frees_a_stuck_pin() {
        let mut board = Board::new();
        board.write(0x24, 0x0000_8042);
        board.set(10, true);
        board.sent.clear();
        // Linux's __eoi_ioapic_pin: mask and make edge, then restore.
        board.write(0x24, 0x0001_0042);
        board.write(0x24, 0x0000_8042);
        assert_eq!(board.sent.len(), 1);
    }

    #[test]
    fn polarity_is_stored_and_ignored() {
        let mut board = Board::new();
        board.write(0x1a, 0x0000_a055);
        assert_eq!(board.read(0x1a) & 0x2000, 0x2000);
        assert_eq!(board.set(5, true), 1);
        assert_eq!(board.set(5, false), 0);
        assert_eq!(board.eoi(0x55), 0);
    }

    #[test]
    fn nmi_and_the_like_are_edges_whatever_their_trigger_bit() {
        let mut board = Board::new();
        for mode in [2, 4, 5, 7] {
            board.write(0x1a, 0x8000 | mode << 8);
            board.ioapic.set_level(5, true, &mut into(&mut board.sent));
            assert!(matches!(board.sent[..], [ApicMessage { level: false, .. }]));
            board.sent.clear();
            assert_eq!(board.set(5, false), 0);
            assert_eq!(board.read(0x1a) & 0x4000, 0);
        }
        board.write(0x1a, 0x300);
        assert_eq!(board.set(5, true), 0);
    }

    #[test]
    fn destinations_widen_and_broadcast() {
        let mut board = Board::new();
        board.write(0x1a, 0x55);
        for (high, dest) in [(0xff00_0000, BROADCAST), (0xff02_0000, 0x1ff), (0x0302_0000, 0x103)] {
            board.write(0x1b, high);
            board.ioapic.set_level(5, true, &mut into(&mut board.sent));
            assert_eq!(board.sent.pop().map(|m| m.dest), Some(dest));
            board.set(5, false);
        }
    }

    #[test]
    fn odd_accesses_are_answered() {
        let mut board = Board::new();
        let mut data = [0xaa; 16];
        board.ioapic.read(0x10, &mut data);
        board.ioapic.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 16]);
        for len in 0..16 {
            board.ioapic.write(0x10, &data[..len], &mut |_| true);
            board.ioapic.write(0x40, &data[..len], &mut |_| true);
            board.ioapic.read(0, &mut data[..len]);
        }
        assert_eq!(board.set(24, true) + board.set(255, true), 0);
    }

    #[test]
    fn a_restored_wire_makes_no_edge_and_a_pending_level_is_resampled() {
        let mut board = Board::new();
        board.write(0x14, 0x30);
        board.set(2, true);
        let mut other = Board::new();
        let mut state = board.ioapic.save();
        assert_eq!(other.ioapic.load(&state), Ok(()));
        assert_eq!(other.set(2, true), 0);
        state.entries[3] = 0x8033;
        state.levels |= 1 << 3;
        assert_eq!(other.ioapic.load(&state), Ok(()));
        let sent = &mut other.sent;
        other.ioapic.resample(&mut into(sent));
        assert_eq!(other.sent.len(), 1);
        state.levels = 1 << 24;
        let before = other.ioapic.clone();
        assert!(other.ioapic.load(&state).is_err());
        assert_eq!(other.ioapic, before);
    }
}
