//! Descriptors in the GDT and LDT (Intel SDM vol. 3A §3.4.5, §3.5).

use vmkit_hypervisor::x86::{Segment, SegmentAttributes};

use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, TrapKind};
use crate::mem::MODE_SUPERVISOR;

/// Type of an available 16-bit TSS (Intel SDM vol. 3A table 3-2).
pub(super) const TSS16: u8 = 1;
pub(super) const LDT: u8 = 2;
pub(super) const CALL_GATE16: u8 = 4;
pub(super) const TASK_GATE: u8 = 5;
/// Type of an available 32-bit or 64-bit TSS.
pub(super) const TSS: u8 = 9;
pub(super) const CALL_GATE: u8 = 12;
/// Set in the type of a TSS in use.
pub(super) const BUSY: u8 = 2;

/// A descriptor and where it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// The selector that named it.
    pub selector: u16,
    pub raw: u64,
    /// The upper half of a 16-byte descriptor, else zero.
    pub high: u64,
    /// Linear address.
    pub at: u64,
}

impl Descriptor {
    pub fn attributes(&self) -> SegmentAttributes {
        SegmentAttributes((self.raw >> 40) as u32 & 0xF0FF)
    }

    pub fn dpl(&self) -> u8 {
        self.attributes().dpl()
    }

    pub fn present(&self) -> bool {
        self.attributes().present()
    }

    pub fn is_code(&self) -> bool {
        self.attributes().is_code()
    }

    /// Conforming, for a code segment.
    pub fn conforming(&self) -> bool {
        self.attributes().kind() & 4 != 0
    }

    pub fn is_writable_data(&self) -> bool {
        self.attributes().code_or_data() && self.attributes().kind() & 0xA == 2
    }

    /// Data, or code that can be read.
    pub fn is_readable(&self) -> bool {
        let attributes = self.attributes();
        attributes.code_or_data() && (!attributes.is_code() || attributes.kind() & 2 != 0)
    }

    /// The type of a system descriptor.
    pub fn system_kind(&self) -> Option<u8> {
        (!self.attributes().code_or_data()).then(|| self.attributes().kind())
    }

    /// The selector's RPL.
    pub fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }

    /// What a segment register holds after loading this with `selector`.
    pub fn segment(&self) -> Segment {
        let raw = self.raw;
        let limit = (raw & 0xFFFF | raw >> 32 & 0xF_0000) as u32;
        let granular = self.attributes().granular();
        Segment {
            selector: self.selector,
            base: raw >> 16 & 0xFF_FFFF | raw >> 56 << 24 | self.high << 32,
            limit: if granular { limit << 12 | 0xFFF } else { limit },
            attributes: self.attributes(),
        }
    }

    /// The selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// The offset of a gate, cut to 16 bits for a 16-bit gate.
    pub fn gate_offset(&self) -> u64 {
        let offset = self.raw & 0xFFFF | self.raw >> 32 & 0xFFFF_0000 | self.high << 32;
        if self.attributes().kind() & 8 == 0 { offset & 0xFFFF } else { offset }
    }
}

impl Cpu {
    /// Raises `vector` with a selector as its error code; `ext` is 1 while delivering an event that
    /// the program did not ask for (Intel SDM vol. 3A §7.13).
    pub(super) fn selector_fault(&mut self, vector: u8, selector: u16, ext: u32) -> Trap {
        self.raise_with(vector, u32::from(selector & 0xFFFC) | ext)
    }

    /// Where the descriptor of `selector` is, if `bytes` of it lie within its table.
    pub(super) fn descriptor_place(&self, selector: u16, bytes: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdt.base, u64::from(self.gdt.limit))
        } else if self.ldt.attributes.unusable() {
            return None;
        } else {
            (self.ldt.base, u64::from(self.ldt.limit))
        };
        let offset = u64::from(selector & 0xFFF8);
        (offset + bytes - 1 <= limit).then(|| self.wrap_linear(base.wrapping_add(offset)))
    }

    /// Reads the descriptor of `selector`; raises `vector` with it if it is past the table's end.
    pub(super) fn descriptor(
        &mut self,
        selector: u16,
        vector: u8,
        ext: u32,
    ) -> Result<Descriptor, Trap> {
        let Some(at) = self.descriptor_place(selector, 8) else {
            return Err(self.selector_fault(vector, selector, ext));
        };
        let raw = self.load_as::<u64>(at, MODE_SUPERVISOR)?;
        Ok(Descriptor { selector, raw, high: 0, at })
    }

    /// Reads the upper half of a system descriptor, where it has one: LDT, TSS and call gates in long
    /// mode (Intel SDM vol. 3A §3.5). Raises `vector` if that is past the table's end or malformed.
    pub(super) fn complete_system(
        &mut self,
        descriptor: &mut Descriptor,
        vector: u8,
        ext: u32,
    ) -> Result<(), Trap> {
        if !self.long_mode() {
            return Ok(());
        }
        if self.descriptor_place(descriptor.selector, 16).is_none() {
            return Err(self.selector_fault(vector, descriptor.selector, ext));
        }
        let high = self.load_as::<u64>(descriptor.at.wrapping_add(8), MODE_SUPERVISOR)?;
        // The second type field must be zero.
        if high >> 40 & 0x1F != 0 {
            return Err(self.selector_fault(vector, descriptor.selector, ext));
        }
        descriptor.high = high & 0xFFFF_FFFF;
        Ok(())
    }

    /// Sets the accessed bit of a code or data descriptor that is being loaded.
    pub(super) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Trap> {
        if descriptor.raw & 1 << 40 == 0 {
            descriptor.raw |= 1 << 40;
            self.store_as(
                descriptor.at.wrapping_add(5),
                (descriptor.raw >> 40) as u8,
                MODE_SUPERVISOR,
            )?;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor.
    pub(super) fn mark_busy(&mut self, at: u64, busy: bool) -> Result<(), Trap> {
        let place = at.wrapping_add(5);
        let access = self.load_as::<u8>(place, MODE_SUPERVISOR)?;
        let access = if busy { access | BUSY } else { access & !BUSY };
        self.store_as(place, access, MODE_SUPERVISOR)
    }

    /// Checks a stack segment for privilege level `cpl` and returns its descriptor, marked accessed.
    /// `vector` is #GP where a program loads SS, #TS where the processor does.
    pub(super) fn stack_descriptor(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
        ext: u32,
    ) -> Result<Segment, Trap> {
        if selector & 0xFFFC == 0 {
            return Err(self.raise_with(vector, ext));
        }
        let mut descriptor = self.descriptor(selector, vector, ext)?;
        if descriptor.rpl() != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.selector_fault(vector, selector, ext));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(trap::SS, selector, ext));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment())
    }

    /// True in IA-32e mode, 64-bit code or not.
    pub(super) fn long_mode(&self) -> bool {
        self.mode.contains(crate::cpu::Mode::LMA)
    }

    /// Runs `f`; a non-canonical address in it is `vector` with `error`.
    pub(super) fn non_canonical_is<T>(
        &mut self,
        vector: u8,
        error: u32,
        result: Result<T, Trap>,
    ) -> Result<T, Trap> {
        if result.is_err() && self.trap == TrapKind::NonCanonical {
            return Err(self.raise_with(vector, error));
        }
        result
    }
}

/// What a segment register holds after a null selector was loaded. For SS, `dpl` keeps the CPL.
pub(super) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attributes: SegmentAttributes(SegmentAttributes::UNUSABLE.0 | u32::from(dpl) << 5),
    }
}
