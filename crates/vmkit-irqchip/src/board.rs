//! The board of a PC: the 8259 pair, the IOAPIC and the 8254, and the wires between them and to the
//! devices. What leaves it, the 8259's INTR wire and messages to local APICs, is its owner's to
//! carry.

use crate::error::IrqchipError;
use crate::ioapic::Ioapic;
use crate::message::ApicMessage;
use crate::pic::Pic;
use crate::pit::Pit;
use crate::state::{IOAPIC_PINS, IoapicState, PicState, PitState};

/// The interrupt controllers and the timer that all processors of a PC share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Board {
    /// The 8259 pair.
    pub pic: Pic,
    /// The IOAPIC.
    pub ioapic: Ioapic,
    /// The 8254.
    pub pit: Pit,
}

impl Board {
    /// First address of the IOAPIC's registers; they take one page.
    pub const IOAPIC_BASE: u64 = 0xFEC0_0000;

    /// A board after reset.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where `address` is in the IOAPIC's registers, if it is there.
    #[inline]
    #[must_use]
    pub fn ioapic_offset(address: u64) -> Option<u64> {
        (address & !0xFFF == Self::IOAPIC_BASE).then_some(address & 0xFFF)
    }

    /// Whether `port` is one of the 8259 pair's or the 8254's.
    #[inline]
    #[must_use]
    pub fn has_port(port: u16) -> bool {
        Pic::PORTS.contains(&port) || Pit::PORTS.contains(&port)
    }

    /// Reads a port that the board [has](Self::has_port); others read as all ones.
    pub fn read_port(&mut self, port: u16, now: u64) -> u8 {
        if Pic::PORTS.contains(&port) { self.pic.read(port) } else { self.pit.read(port, now) }
    }

    /// Writes a port that the board [has](Self::has_port). The 8259's
    /// [output](Pic::output) and the 8254's [deadline](Pit::next_deadline) may have changed then.
    pub fn write_port(&mut self, port: u16, value: u8, now: u64) {
        if Pic::PORTS.contains(&port) {
            self.pic.write(port, value);
        } else {
            self.pit.write(port, value, now);
        }
    }

    /// Drives input `gsi` high or low: of the 8259 pair if it is an ISA interrupt, and of the IOAPIC.
    /// Input 0 is wired to pin 2 there, as firmware tables say (ACPI 6.5 §5.2.12.5). Inputs that do
    /// not exist are ignored.
    pub fn set_level(&mut self, gsi: u32, high: bool, sink: &mut dyn FnMut(ApicMessage) -> bool) {
        if gsi < 16 {
            self.pic.set_level(gsi as u8, high);
        }
        let pin = if gsi == 0 { 2 } else { gsi };
        if pin < IOAPIC_PINS as u32 {
            self.ioapic.set_level(pin as u8, high, sink);
        }
    }

    /// Lets the 8254 catch up with the clock and interrupt; when it wants to be called again.
    pub fn advance(&mut self, now: u64, sink: &mut dyn FnMut(ApicMessage) -> bool) -> Option<u64> {
        if self.pit.advance(now) {
            self.set_level(0, true, sink);
            self.set_level(0, false, sink);
        }
        self.pit.next_deadline()
    }

    /// Takes over saved states at `now`. Interrupts that a saver was in the midst of sending are sent
    /// by [`Ioapic::resample`].
    ///
    /// # Errors
    /// [`IrqchipError::InvalidState`]; then nothing has changed.
    pub fn load(
        &mut self,
        pic: &PicState,
        ioapic: &IoapicState,
        pit: &PitState,
        now: u64,
    ) -> Result<(), IrqchipError> {
        let mut next = self.clone();
        next.pic.load(pic)?;
        next.ioapic.load(ioapic)?;
        next.pit.load(pit, now)?;
        *self = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A board with ISA interrupt 0 unmasked in the 8259, and pin 2 going to vector 0x30.
    fn board() -> Board {
        let mut board = Board::new();
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)] {
            board.write_port(port, value, 0);
        }
        board.ioapic.write(0, &[0x14], &mut |_| true);
        board.ioapic.write(0x10, &0x30_u32.to_le_bytes(), &mut |_| true);
        board
    }

    #[test]
    fn the_timer_reaches_input_0_of_the_pair_and_pin_2() {
        let mut board = board();
        // Counter 0, mode 2, 1000 input clocks: 838 µs.
        for (port, value) in [(0x43, 0x34), (0x40, 0xE8), (0x40, 0x03)] {
            board.write_port(port, value, 0);
        }
        let next = board.advance(800_000, &mut |m| panic!("{m:?} is early"));
        assert!(!board.pic.output());
        let next = next.unwrap();
        assert!((830_000..850_000).contains(&next), "{next}");
        let mut sent = Vec::new();
        board.advance(next, &mut |m| {
            sent.push(m.vector);
            true
        });
        assert_eq!(sent, [0x30]);
        assert!(board.pic.output());
        assert_eq!(board.pic.acknowledge(), 0x20);
    }

    #[test]
    fn inputs_past_the_last_are_ignored() {
        let mut board = board();
        let before = board.clone();
        for gsi in [24, 255, 256, u32::MAX] {
            board.set_level(gsi, true, &mut |_| true);
        }
        assert_eq!(board, before);
    }

    #[test]
    fn its_ports_are_those_of_its_parts() {
        let ports: Vec<u16> = (0..=u16::MAX).filter(|port| Board::has_port(*port)).collect();
        let known = [0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xA0, 0xA1, 0x4D0, 0x4D1];
        assert_eq!(ports, known);
    }

    #[test]
    fn a_bad_part_changes_nothing() {
        let mut board = board();
        let before = board.clone();
        let (pic, ioapic) = (Pic::new().save(), Ioapic::new().save());
        let mut pit = Pit::new().save(0);
        pit.port61 = 0xFF;
        assert!(board.load(&pic, &ioapic, &pit, 0).is_err());
        assert_eq!(board, before);
    }
}
