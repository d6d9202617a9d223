//! One 8259A.

use crate::error::IrqchipError;
use crate::state::PicChipState;

const CASCADE_BIT: u8 = 1 << super::CASCADE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chip {
    primary: bool,
    lines: u8,
    irr: u8,
    imr: u8,
    pub(super) isr: u8,
    top: u8,
    base: u8,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    awaiting_icw: u8,
    icw4_follows: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    pub(super) elcr: u8,
}

impl Chip {
    pub(super) fn new(primary: bool) -> Self {
        Self {
            primary,
            lines: 0,
            irr: 0,
            imr: 0xff,
            isr: 0,
            top: 0,
            base: 0,
            read_isr: false,
            poll: false,
            special_mask: false,
            awaiting_icw: 0,
            icw4_follows: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            elcr: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new(self.primary) };
        self.irr = self.lines & self.level_inputs();
    }

    /// Inputs whose request follows the wire. The cascade is one: it is high for as long as the
    /// secondary has something.
    fn level_inputs(&self) -> u8 {
        self.elcr | if self.primary { CASCADE_BIT } else { 0 }
    }

    pub(super) fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        let rises = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if self.level_inputs() & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rises {
            self.irr |= bit;
        }
    }

    pub(super) fn set_elcr(&mut self, value: u8) {
        let changed = self.elcr ^ value;
        self.elcr = value;
        self.irr = self.irr & !changed | self.lines & value & changed;
    }

    /// 0 for the input of highest priority, 7 for the lowest.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.top) & 7
    }

    /// The input of highest priority in a set.
    fn highest(&self, set: u8) -> Option<u8> {
        let ranked = set.rotate_right(self.top.into());
        (set != 0).then(|| (ranked.trailing_zeros() as u8).wrapping_add(self.top) & 7)
    }

    /// The input that interrupts.
    pub(super) fn pending(&self) -> Option<u8> {
        let input = self.highest(self.irr & !self.imr)?;
        if self.awaiting_icw != 0 {
            return None;
        }
        let blocked = self.highest(self.visible_service()).is_some_and(|serving| {
            let nests = self.special_fully_nested && self.primary && input == super::CASCADE;
            self.rank(serving) < self.rank(input) || serving == input && !nests
        });
        (!blocked).then_some(input)
    }

    /// What is in service, as far as special mask mode does not hide it.
    fn visible_service(&self) -> u8 {
        if self.special_mask { self.isr & !self.imr } else { self.isr }
    }

    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let input = self.pending()?;
        let bit = 1 << input;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.top = (input + 1) & 7;
        }
        self.irr &= !bit | self.level_inputs();
        Some(input)
    }

    pub(super) fn vector(&self, input: u8) -> u8 {
        self.base | input & 7
    }

    pub(super) fn read(&mut self, data: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.acknowledge().map_or(0, |input| 0x80 | input);
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    pub(super) fn write_command(&mut self, value: u8) {
        match value >> 3 & 3 {
            0 => self.operate(value >> 5, value & 7),
            1 => self.operate_special(value),
            _ => self.initialise(value),
        }
    }

    pub(super) fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows { 4 } else { 0 };
        self.awaiting_icw = match self.awaiting_icw {
            2 => {
                self.base = value & 0xf8;
                if self.single { after_icw3 } else { 3 }
            }
            3 => after_icw3,
            4 => {
                self.special_fully_nested = value & 1 << 4 != 0;
                self.auto_eoi = value & 1 << 1 != 0;
                0
            }
            _ => {
                self.imr = value;
                0
            }
        };
    }

    /// ICW1.
    fn initialise(&mut self, value: u8) {
        let icw4_follows = value & 1 != 0;
        *self = Self {
            lines: self.lines,
            elcr: self.elcr,
            base: self.base,
            irr: self.lines & self.level_inputs(),
            imr: 0,
            awaiting_icw: 2,
            icw4_follows,
            single: value & 1 << 1 != 0,
            auto_eoi: self.auto_eoi && icw4_follows,
            special_fully_nested: self.special_fully_nested && icw4_follows,
            ..Self::new(self.primary)
        };
    }

    /// OCW2: ends of interrupt and rotation.
    fn operate(&mut self, command: u8, input: u8) {
        let (rotate, specific, eoi) = (command & 4 != 0, command & 2 != 0, command & 1 != 0);
        if !eoi && !specific {
            self.rotate_on_auto_eoi = rotate;
            return;
        }
        let target = if specific { Some(input) } else { self.highest(self.visible_service()) };
        let Some(target) = target else {
            return;
        };
        if eoi {
            self.isr &= !(1 << target);
        }
        if rotate {
            self.top = (target + 1) & 7;
        }
    }

    /// OCW3: special mask mode, poll, which register reads.
    fn operate_special(&mut self, value: u8) {
        if value & 1 << 6 != 0 {
            self.special_mask = value & 1 << 5 != 0;
        }
        if value & 1 << 2 != 0 {
            self.poll = true;
        } else if value & 1 << 1 != 0 {
            self.read_isr = value & 1 != 0;
        }
    }

    pub(super) fn save(&self) -> PicChipState {
        PicChipState {
            lines: self.lines,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            top_priority: self.top,
            vector_base: self.base,
            read_isr: self.read_isr,
            poll: self.poll,
            special_mask: self.special_mask,
            awaiting_icw: self.awaiting_icw,
            icw4_follows: self.icw4_follows,
            single: self.single,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            special_fully_nested: self.special_fully_nested,
            elcr: self.elcr,
        }
    }

    pub(super) fn from_state(
        primary: bool,
        state: &PicChipState,
        elcr_bits: u8,
    ) -> Result<Self, IrqchipError> {
        let require = |field, value: u8, good: bool| {
            let error = IrqchipError::InvalidState { machine: "pic", field, value: value.into() };
            if good { Ok(value) } else { Err(error) }
        };
        let mut chip = Self {
            primary,
            lines: state.lines,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            top: require("top_priority", state.top_priority, state.top_priority < 8)?,
            base: require("vector_base", state.vector_base, state.vector_base & 7 == 0)?,
            read_isr: state.read_isr,
            poll: state.poll,
            special_mask: state.special_mask,
            awaiting_icw: require(
                "awaiting_icw",
                state.awaiting_icw,
                matches!(state.awaiting_icw, 0 | 2..=4),
            )?,
            icw4_follows: state.icw4_follows,
            single: state.single,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_fully_nested: state.special_fully_nested,
            elcr: require("elcr", state.elcr, state.elcr & !elcr_bits == 0)?,
        };
        let level = chip.level_inputs();
        chip.irr = chip.irr & !level | chip.lines & level;
        Ok(chip)
    }
}
