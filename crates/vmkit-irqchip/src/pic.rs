//! The 8259A pair of a PC, cascaded on input 2, with the edge/level control registers of
//! PCI chipsets (Intel 8259A data sheet; Intel ICH data sheet, "8259 Interrupt Controllers").
//!
//! It decides which vector the processor gets; it never sees the processor. As in chipsets, ICW1's
//! LTIM and ICW4's buffered and 8085 modes have no effect. An edge stays latched when its wire
//! falls before the acknowledge: devices that pulse depend on it.

mod chip;

use crate::error::IrqchipError;
use crate::state::PicState;
use chip::Chip;

/// The input of the primary that the secondary drives.
const CASCADE: u8 = 2;

/// Inputs that can be level-triggered: not the timer, keyboard, cascade, clock and coprocessor.
const ELCR_BITS: [u8; 2] = [0xf8, 0xde];

/// The 8259A pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pic {
    primary: Chip,
    secondary: Chip,
}

impl Pic {
    /// Its ports: command and data of the primary, of the secondary, and ELCR1 and ELCR2.
    pub const PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];

    /// A pair as firmware leaves it: every input masked, edge-triggered.
    #[must_use]
    pub fn new() -> Self {
        Self { primary: Chip::new(true), secondary: Chip::new(false) }
    }

    /// Back to [`new`](Self::new), but the wires keep their levels.
    pub fn reset(&mut self) {
        self.primary.reset();
        self.secondary.reset();
        self.update_cascade();
    }

    /// Drives input `irq`, 0 to 15. Input 2 is the cascade and not connected.
    pub fn set_level(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.primary.set_line(irq, high),
            8..16 => {
                self.secondary.set_line(irq - 8, high);
                self.update_cascade();
            }
            _ => {}
        }
    }

    /// The INTR output: whether there is an interrupt to acknowledge.
    #[inline]
    #[must_use]
    pub fn output(&self) -> bool {
        self.primary.pending().is_some()
    }

    /// The interrupt acknowledge cycle: the vector of the pending interrupt, which is in service
    /// now. If there is none (any more), the spurious vector: that of input 7 of the chip that was
    /// asked last, with nothing in service there.
    pub fn acknowledge(&mut self) -> u8 {
        match self.primary.acknowledge() {
            Some(CASCADE) => {
                let input = self.secondary.acknowledge().unwrap_or(7);
                self.update_cascade();
                self.secondary.vector(input)
            }
            input => self.primary.vector(input.unwrap_or(7)),
        }
    }

    /// Reads a port. Ports that are not its own read as all ones.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.primary.read(port & 1 != 0),
            0xa0 | 0xa1 => self.secondary.read(port & 1 != 0),
            0x4d0 => self.primary.elcr,
            0x4d1 => self.secondary.elcr,
            _ => 0xff,
        };
        self.update_cascade();
        value
    }

    /// Writes a port.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.primary.write_command(value),
            0x21 => self.primary.write_data(value),
            0xa0 => self.secondary.write_command(value),
            0xa1 => self.secondary.write_data(value),
            0x4d0 => self.primary.set_elcr(value & ELCR_BITS[0]),
            0x4d1 => self.secondary.set_elcr(value & ELCR_BITS[1]),
            _ => {}
        }
        self.update_cascade();
    }

    /// Saves the state.
    #[must_use]
    pub fn save(&self) -> PicState {
        PicState { primary: self.primary.save(), secondary: self.secondary.save() }
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`IrqchipError::InvalidState`]; then nothing has changed.
    pub fn load(&mut self, state: &PicState) -> Result<(), IrqchipError> {
        let primary = Chip::from_state(true, &state.primary, ELCR_BITS[0])?;
        let secondary = Chip::from_state(false, &state.secondary, ELCR_BITS[1])?;
        *self = Self { primary, secondary };
        self.update_cascade();
        Ok(())
    }

    fn update_cascade(&mut self) {
        self.primary.set_line(CASCADE, self.secondary.pending().is_some());
    }
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for PicState {
    /// The state of [`Pic::new`].
    fn default() -> Self {
        Pic::new().save()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The initialisation that every PC operating system does, then all unmasked.
    fn initialised() -> Pic {
        let mut pic = Pic::new();
        init(&mut pic, 0x01);
        pic
    }

    fn init(pic: &mut Pic, icw4: u8) {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, icw4),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0),
            (0xa1, 0),
        ] {
            pic.write(port, value);
        }
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_level(irq, true);
        pic.set_level(irq, false);
    }

    #[test]
    fn nothing_comes_out_before_it_is_initialised_and_unmasked() {
        let mut pic = Pic::new();
        (0..16).for_each(|irq| pulse(&mut pic, irq));
        assert!(!pic.output());
        // Linux: mask all, initialise, mask again (init_8259A).
        init(&mut pic, 0x01);
        pic.write(0x21, 0xff);
        pic.write(0xa1, 0xff);
        pulse(&mut pic, 0);
        assert!(!pic.output());
        assert_eq!(pic.read(0x21), 0xff);
        pic.write(0x21, 0xfe);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x30);
    }

    #[test]
    fn linux_finds_the_chip_by_its_mask_register() {
        // probe_8259A writes ~(1 << 2) and reads it back.
        let mut pic = Pic::new();
        pic.write(0xa1, 0xff);
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), 0xfb);
    }

    #[test]
    fn a_lower_input_wins_and_holds_back_the_others_until_its_eoi() {
        let mut pic = initialised();
        pulse(&mut pic, 5);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        assert!(!pic.output());
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(0x20, 0x20);
        assert!(!pic.output());
        pic.write(0x20, 0x63);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn an_edge_is_delivered_once() {
        let mut pic = initialised();
        pic.set_level(4, true);
        pic.set_level(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0x20, 0x20);
        assert!(!pic.output());
        pic.set_level(4, true);
        assert!(!pic.output());
        pic.set_level(4, false);
        pic.set_level(4, true);
        assert!(pic.output());
    }

    #[test]
    fn a_level_is_delivered_again_until_it_goes_away() {
        let mut pic = initialised();
        pic.write(0x4d1, 0xff);
        assert_eq!((pic.read(0x4d0), pic.read(0x4d1)), (0, 0xde));
        pic.set_level(11, true);
        for _ in 0..3 {
            assert_eq!(pic.acknowledge(), 0x3b);
            assert!(!pic.output());
            pic.write(0xa0, 0x20);
            pic.write(0x20, 0x20);
        }
        pic.set_level(11, false);
        assert!(!pic.output());
    }

    #[test]
    fn a_request_that_vanishes_is_spurious() {
        let mut pic = initialised();
        pic.write(0x4d0, 0x20);
        pic.write(0x4d1, 0x08);
        pic.set_level(5, true);
        pic.set_level(5, false);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0, "a spurious interrupt is not in service");
        // The secondary's spurious interrupt is in service at the primary.
        pic.set_level(11, true);
        assert!(pic.output());
        pic.primary.acknowledge();
        pic.set_level(11, false);
        assert_eq!(pic.secondary.acknowledge(), None);
        assert_eq!((pic.read(0x20), pic.secondary.isr), (0x04, 0));
    }

    #[test]
    fn masking_between_request_and_acknowledge_is_spurious() {
        let mut pic = initialised();
        pulse(&mut pic, 3);
        pic.write(0x21, 0x08);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn priorities_rotate() {
        let mut pic = initialised();
        // Rotate on non-specific EOI: 0 becomes the lowest.
        pulse(&mut pic, 0);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        pulse(&mut pic, 0);
        pulse(&mut pic, 7);
        assert_eq!(pic.acknowledge(), 0x37);
        // Rotate on specific EOI: 7 is the lowest again.
        pic.write(0x20, 0xe7);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.write(0x20, 0x60);
        // Set priority: 3 lowest, so 4 is the highest.
        pic.write(0x20, 0xc3);
        for irq in [0, 1, 3, 4] {
            pulse(&mut pic, irq);
        }
        let order: Vec<u8> = (0..4)
            .map(|_| {
                let vector = pic.acknowledge();
                pic.write(0x20, 0x20);
                vector
            })
            .collect();
        assert_eq!(order, [0x34, 0x30, 0x31, 0x33]);
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service_and_can_rotate() {
        let mut pic = Pic::new();
        init(&mut pic, 0x03);
        pic.write(0x20, 0x80);
        pulse(&mut pic, 1);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x31);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x34, "1 is the lowest now");
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0);
    }

    #[test]
    fn special_mask_mode_lets_lower_inputs_through() {
        let mut pic = initialised();
        pulse(&mut pic, 3);
        pic.acknowledge();
        pic.write(0x21, 0x08);
        pulse(&mut pic, 5);
        assert!(!pic.output());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x35);
        // A non-specific EOI does not end what the mask hides.
        pic.write(0x20, 0x20);
        pic.write(0x20, 0x20);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x08);
        pic.write(0x20, 0x48);
        pulse(&mut pic, 5);
        assert!(!pic.output());
    }

    #[test]
    fn only_special_fully_nested_mode_nests_within_the_secondary() {
        for (icw4, nests) in [(0x01, false), (0x11, true)] {
            let mut pic = Pic::new();
            init(&mut pic, icw4);
            pulse(&mut pic, 12);
            assert_eq!(pic.acknowledge(), 0x3c);
            pulse(&mut pic, 9);
            assert_eq!(pic.output(), nests);
            pulse(&mut pic, 3);
            pulse(&mut pic, 14);
            if nests {
                assert_eq!(pic.acknowledge(), 0x39);
            }
            assert!(!pic.output());
        }
    }

    #[test]
    fn a_poll_acknowledges() {
        let mut pic = initialised();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pulse(&mut pic, 10);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x82);
        pic.write(0xa0, 0x0c);
        assert_eq!(pic.read(0xa0), 0x82);
        pic.write(0xa0, 0x0b);
        assert_eq!(pic.read(0xa0), 0x04);
        assert!(!pic.output());
    }

    #[test]
    fn initialisation_forgets_edges_but_not_levels() {
        let mut pic = initialised();
        pic.write(0x4d0, 0x20);
        pic.set_level(3, true);
        pic.set_level(5, true);
        init(&mut pic, 0x01);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x20);
        pic.set_level(5, false);
        assert!(!pic.output());
        pic.set_level(3, false);
        pic.set_level(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn an_initialisation_without_icw4_is_three_words() {
        let mut pic = Pic::new();
        for (port, value) in [(0x20, 0x10), (0x21, 0x50), (0x21, 0x04), (0x21, 0xfd)] {
            pic.write(port, value);
        }
        assert_eq!(pic.read(0x21), 0xfd);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x51);
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let mut pic = initialised();
        pulse(&mut pic, 5);
        let before = pic.clone();
        let good = pic.save();
        let mut bad = [good; 4];
        bad[0].primary.top_priority = 8;
        bad[1].secondary.vector_base = 0x33;
        bad[2].primary.awaiting_icw = 1;
        bad[3].secondary.elcr = 1;
        for state in bad {
            assert!(matches!(pic.load(&state), Err(IrqchipError::InvalidState { .. })));
            assert_eq!(pic, before);
        }
        assert_eq!(pic.load(&good), Ok(()));
        assert_eq!(pic, before);
    }
}
