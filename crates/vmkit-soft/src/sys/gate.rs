//! Delivery through the IDT: real mode, protected mode and IA-32e mode
//! (Intel SDM vol. 3A §7.11–7.14, §21.1.4; the operation of INT n in vol. 2A).
//!
//! Nothing of the processor changes before everything that can fault has been done, except memory on
//! the new stack and accessed bits.

use vmkit_hypervisor::x86::{Cr4, Segment};

use super::descriptor::{BUSY, Descriptor, TASK_GATE, TSS, null_segment};
use super::exception::{Event, Origin};
use super::stack::Stack;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, Mode, RSP, SS, flags};
use crate::mem::{MODE_SUPERVISOR, canonical};

/// Set in an error code that names an entry of the IDT.
const IDT: u32 = 2;

/// A gate of the IDT.
struct Gate {
    kind: u8,
    selector: u16,
    offset: u64,
    ist: u8,
}

impl Gate {
    /// An interrupt gate, not a trap gate: it clears IF.
    fn clears_if(&self) -> bool {
        self.kind & 1 == 0
    }
}

/// What an event leaves of RFLAGS in its handler.
fn handler_flags(rest: u64, clears_if: bool) -> u64 {
    let rest = rest & !(flags::TF | flags::NT | flags::VM | flags::RF);
    if clears_if { rest & !flags::IF } else { rest }
}

impl Cpu {
    /// Real-address mode: the vector table of far pointers (Intel SDM vol. 3A §21.1.4).
    pub(super) fn deliver_real(&mut self, event: Event) -> Result<(), Trap> {
        self.deliver_by_table(event.vector, self.idt.base, self.idt.limit, event.ext())?;
        self.flags.rest &= !(flags::IF | flags::TF | flags::RF | flags::AC);
        Ok(())
    }

    /// Pushes FLAGS, CS and IP and goes where the vector table at `base` says. RFLAGS is left alone.
    fn deliver_by_table(
        &mut self,
        vector: u8,
        base: u64,
        limit: u16,
        ext: u32,
    ) -> Result<(), Trap> {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(limit) {
            return Err(self.raise_with(trap::GP, u32::from(vector) << 3 | IDT | ext));
        }
        let at = base.wrapping_add(offset) & 0xFFFF_FFFF;
        let entry = self.load_as::<u32>(at, self.tlb_mode)?;
        let image = self.flags.all();
        let mut stack = Stack::current(self, ext);
        stack.push(self, 2, image)?;
        stack.push(self, 2, u64::from(self.segs[CS].selector))?;
        stack.push(self, 2, self.rip)?;
        stack.commit(self);
        self.set_real_segment(CS, (entry >> 16) as u16);
        self.rip = u64::from(entry & 0xFFFF);
        self.update_mode();
        Ok(())
    }

    /// Protected mode and virtual-8086 mode.
    pub(super) fn deliver_protected(&mut self, event: Event) -> Result<(), Trap> {
        if self.mode.contains(Mode::V86) && event.origin == Origin::Int {
            if self.redirected(event.vector)? {
                return self.deliver_v86(event.vector);
            }
            if self.iopl() < 3 {
                return Err(self.gp0());
            }
        }
        let gate = self.read_gate(&event, 8)?;
        if gate.kind == TASK_GATE {
            return self.deliver_by_task(gate.selector, &event);
        }
        let ext = event.ext();
        let (code, cpl) = self.handler_code(gate.selector, ext)?;
        let v86 = self.mode.contains(Mode::V86);
        if v86 && cpl != 0 {
            return Err(self.selector_fault(trap::GP, gate.selector, ext));
        }
        let bytes = if gate.kind & 8 != 0 { 4 } else { 2 };
        let image = self.pushed_flags(&event);
        let mut new_ss = self.segs[SS];
        let mut stack = Stack::current(self, ext);
        if cpl < self.cpl {
            let (selector, sp) = self.tss_stack(cpl, ext)?;
            new_ss = self.stack_descriptor(selector, cpl, trap::TS, ext)?;
            stack = Stack::new(self, new_ss, sp, cpl, u32::from(selector & 0xFFFC) | ext);
            if v86 {
                for seg in [GS, FS, DS, ES] {
                    stack.push(self, bytes, u64::from(self.segs[seg].selector))?;
                }
            }
            stack.push(self, bytes, u64::from(self.segs[SS].selector))?;
            stack.push(self, bytes, self.regs[RSP])?;
        }
        stack.push(self, bytes, image)?;
        stack.push(self, bytes, u64::from(self.segs[CS].selector))?;
        stack.push(self, bytes, self.rip)?;
        if let Some(error) = event.error {
            stack.push(self, bytes, u64::from(error))?;
        }
        if gate.offset > u64::from(code.limit) {
            return Err(self.raise_with(trap::GP, ext));
        }
        if v86 {
            for seg in [GS, FS, DS, ES] {
                self.segs[seg] = null_segment(0, 0);
            }
        }
        self.segs[SS] = new_ss;
        stack.commit(self);
        self.enter_handler(code, gate.offset, gate.clears_if());
        Ok(())
    }

    /// IA-32e mode: 64-bit gates only, and the stack always pushed (Intel SDM vol. 3A §7.14).
    pub(super) fn deliver_long(&mut self, event: Event) -> Result<(), Trap> {
        let ext = event.ext();
        let gate = self.read_gate(&event, 16)?;
        let (code, cpl) = self.handler_code(gate.selector, ext)?;
        let sp = if gate.ist != 0 {
            self.tss_pointer(0x1C + u64::from(gate.ist) * 8, ext)?
        } else if cpl < self.cpl {
            self.tss_pointer(4 + u64::from(cpl) * 8, ext)?
        } else {
            self.regs[RSP]
        };
        if !canonical(gate.offset) {
            return Err(self.raise_with(trap::GP, ext));
        }
        let image = self.pushed_flags(&event);
        let mut stack = Stack::flat(self, sp & !0xF, cpl, ext);
        stack.push(self, 8, u64::from(self.segs[SS].selector))?;
        stack.push(self, 8, self.regs[RSP])?;
        stack.push(self, 8, image)?;
        stack.push(self, 8, u64::from(self.segs[CS].selector))?;
        stack.push(self, 8, self.rip)?;
        if let Some(error) = event.error {
            stack.push(self, 8, u64::from(error))?;
        }
        if cpl != self.cpl {
            self.segs[SS] = null_segment(u16::from(cpl), cpl);
        }
        stack.commit(self);
        self.enter_handler(code, gate.offset, gate.clears_if());
        Ok(())
    }

    fn enter_handler(&mut self, code: Segment, offset: u64, clears_if: bool) {
        self.flags.rest = handler_flags(self.flags.rest, clears_if);
        self.segs[CS] = code;
        self.rip = offset;
        self.update_mode();
    }

    /// Reads and checks the gate of `event`; entries are `bytes` long.
    fn read_gate(&mut self, event: &Event, bytes: u64) -> Result<Gate, Trap> {
        let error = u32::from(event.vector) << 3 | IDT | event.ext();
        let offset = u64::from(event.vector) * bytes;
        if offset + bytes - 1 > u64::from(self.idt.limit) {
            return Err(self.raise_with(trap::GP, error));
        }
        let at = self.wrap_linear(self.idt.base.wrapping_add(offset));
        let raw = self.load_as::<u64>(at, MODE_SUPERVISOR)?;
        let high = match bytes {
            16 => self.load_as::<u64>(at.wrapping_add(8), MODE_SUPERVISOR)?,
            _ => 0,
        };
        let entry = Descriptor { selector: 0, raw, high, at };
        let kind = entry.system_kind();
        let known = match kind {
            Some(14 | 15) => true,
            Some(TASK_GATE | 6 | 7) => bytes == 8,
            _ => false,
        };
        if !known || event.is_software() && entry.dpl() < self.cpl {
            return Err(self.raise_with(trap::GP, error));
        }
        if !entry.present() {
            return Err(self.raise_with(trap::NP, error));
        }
        Ok(Gate {
            kind: kind.unwrap_or(0),
            selector: entry.gate_selector(),
            offset: entry.gate_offset(),
            ist: if bytes == 16 { (raw >> 32 & 7) as u8 } else { 0 },
        })
    }

    /// Checks a handler's code segment; returns it as CS will hold it, and the privilege level.
    fn handler_code(&mut self, selector: u16, ext: u32) -> Result<(Segment, u8), Trap> {
        if selector & 0xFFFC == 0 {
            return Err(self.raise_with(trap::GP, ext));
        }
        let mut code = self.descriptor(selector, trap::GP, ext)?;
        if !code.is_code() || code.dpl() > self.cpl {
            return Err(self.selector_fault(trap::GP, selector, ext));
        }
        if !code.present() {
            return Err(self.selector_fault(trap::NP, selector, ext));
        }
        if self.long_mode() && (!code.attributes().long() || code.attributes().big()) {
            return Err(self.selector_fault(trap::GP, selector, ext));
        }
        self.mark_accessed(&mut code)?;
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let mut segment = code.segment();
        segment.selector = selector & !3 | u16::from(cpl);
        Ok((segment, cpl))
    }

    /// The stack that the TSS names for privilege level `cpl` (Intel SDM vol. 3A §8.2.1, §8.6).
    pub(super) fn tss_stack(&mut self, cpl: u8, ext: u32) -> Result<(u16, u64), Trap> {
        let wide = self.tr.attributes.kind() & 8 != 0;
        let (at, bytes) =
            if wide { (4 + u64::from(cpl) * 8, 8) } else { (2 + u64::from(cpl) * 4, 4) };
        if self.tr.attributes.unusable() || at + bytes - 1 > u64::from(self.tr.limit) {
            return Err(self.selector_fault(trap::TS, self.tr.selector, ext));
        }
        let at = self.tr.base.wrapping_add(at) & 0xFFFF_FFFF;
        if wide {
            let sp = self.load_as::<u32>(at, MODE_SUPERVISOR)?;
            let ss = self.load_as::<u16>(at.wrapping_add(4), MODE_SUPERVISOR)?;
            Ok((ss, u64::from(sp)))
        } else {
            let both = self.load_as::<u32>(at, MODE_SUPERVISOR)?;
            Ok(((both >> 16) as u16, u64::from(both & 0xFFFF)))
        }
    }

    /// A stack pointer of the 64-bit TSS, at `offset`.
    pub(super) fn tss_pointer(&mut self, offset: u64, ext: u32) -> Result<u64, Trap> {
        let known = self.tr.attributes.kind() | BUSY == TSS | BUSY;
        if !known || self.tr.attributes.unusable() || offset + 7 > u64::from(self.tr.limit) {
            return Err(self.selector_fault(trap::TS, self.tr.selector, ext));
        }
        let sp = self.load_as::<u64>(self.tr.base.wrapping_add(offset), MODE_SUPERVISOR)?;
        if !canonical(sp) {
            return Err(self.raise_with(trap::SS, ext));
        }
        Ok(sp)
    }

    /// Virtual-8086 mode with CR4.VME: the TSS sends INT `vector` to the program's own handler
    /// (Intel SDM vol. 3A §21.3).
    fn redirected(&mut self, vector: u8) -> Result<bool, Trap> {
        if !self.cr4().contains(Cr4::VME) {
            return Ok(false);
        }
        if self.tr.attributes.kind() & 8 == 0 || self.tr.limit < 103 {
            return Err(self.gp0());
        }
        let map = self.load_as::<u16>(self.tr.base.wrapping_add(102), MODE_SUPERVISOR)?;
        // The 32 bytes before the I/O map.
        let Some(at) = u64::from(map).checked_sub(32).map(|at| at + u64::from(vector / 8)) else {
            return Err(self.gp0());
        };
        if at > u64::from(self.tr.limit) {
            return Err(self.gp0());
        }
        let bits = self.load_as::<u8>(self.tr.base.wrapping_add(at), MODE_SUPERVISOR)?;
        Ok(bits >> (vector % 8) & 1 == 0)
    }

    /// A redirected INT n: through the program's vector table at 0. With IOPL below 3, the pushed
    /// image shows VIF as IF.
    fn deliver_v86(&mut self, vector: u8) -> Result<(), Trap> {
        let before = self.flags.rest;
        let virtual_if = self.iopl() < 3;
        if virtual_if {
            let vif = before & flags::VIF != 0;
            self.flags.rest = before & !flags::IF | flags::IOPL | if vif { flags::IF } else { 0 };
        }
        let delivered = self.deliver_by_table(vector, 0, 0x3FF, 0);
        self.flags.rest = before;
        delivered?;
        let cleared = if virtual_if { flags::VIF } else { flags::IF };
        self.flags.rest &= !(cleared | flags::TF | flags::NT | flags::RF);
        Ok(())
    }

    /// IOPL.
    pub(super) fn iopl(&self) -> u8 {
        ((self.flags.rest & flags::IOPL) >> 12) as u8
    }
}
