//! Far RET and IRET (Intel SDM vol. 2; vol. 3A §6.8.6, §7.12, §21.2.2).

use iced_x86::{Code, Instruction, OpKind};
use vmkit_hypervisor::x86::{Cr4, Segment, SegmentAttributes};

use super::descriptor::null_segment;
use super::stack::Stack;
use super::task::Link;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, Mode, RSP, SS, flags};
use crate::mem::MODE_SUPERVISOR;

/// The stack that a return to an outer privilege level goes to.
struct Outer {
    segment: Segment,
    sp: u64,
}

/// RET far, with or without a number of bytes to release.
pub(super) fn ret(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let release = match insn.op_count() {
        0 => 0,
        _ if insn.op0_kind() == OpKind::Immediate16 => u64::from(insn.immediate16()),
        _ => 0,
    };
    let mut stack = Stack::current(cpu, 0);
    let rip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    stack.skip(release);
    if !cpu.protected() {
        return cpu.return_real(rip, selector, &stack);
    }
    let code = cpu.return_segment(selector)?;
    let rpl = (selector & 3) as u8;
    let mut outer = None;
    if rpl > cpu.cpl {
        // The outer stack holds the parameters as well.
        let mut to = cpu.pop_outer_stack(&mut stack, bytes, &code)?;
        to.sp = to.sp.wrapping_add(release);
        outer = Some(to);
    }
    cpu.check_target(&code, rip)?;
    cpu.finish_return(code, rip, &stack, outer);
    Ok(())
}

/// IRET, IRETD, IRETQ.
pub(super) fn iret(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    // Even an IRET that faults unblocks NMIs (Intel SDM vol. 3A §7.7.1).
    if std::mem::take(&mut cpu.nmi_masked) {
        // Another one may be waiting.
        cpu.shared.ask();
    }
    if cpu.mode.contains(Mode::V86) {
        return cpu.iret_v86(bytes);
    }
    if !cpu.protected() {
        return cpu.iret_real(bytes);
    }
    if cpu.flags.rest & flags::NT != 0 {
        if cpu.long_mode() {
            return Err(cpu.gp0());
        }
        return cpu.return_from_task();
    }
    cpu.iret_protected(bytes)
}

impl Cpu {
    fn return_real(&mut self, rip: u64, selector: u16, stack: &Stack) -> Result<(), Trap> {
        if rip > u64::from(self.segs[CS].limit) {
            return Err(self.gp0());
        }
        stack.commit(self);
        self.set_real_segment(CS, selector);
        self.rip = rip;
        self.update_mode();
        Ok(())
    }

    /// Checks the code segment that a return goes to.
    fn return_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        if selector & 0xFFFC == 0 {
            return Err(self.gp0());
        }
        let mut code = self.descriptor(selector, trap::GP, 0)?;
        let rpl = code.rpl();
        let fits = if code.conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
        if !code.is_code() || rpl < self.cpl || !fits {
            return Err(self.selector_fault(trap::GP, selector, 0));
        }
        self.check_code(&code)?;
        self.mark_accessed(&mut code)?;
        Ok(code.segment())
    }

    /// Pops and checks SP and SS.
    fn pop_outer_stack(
        &mut self,
        stack: &mut Stack,
        bytes: u64,
        code: &Segment,
    ) -> Result<Outer, Trap> {
        let sp = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let rpl = (code.selector & 3) as u8;
        let to_long = self.long_mode() && code.attributes.long();
        if selector & 0xFFFC == 0 && to_long && rpl < 3 && (selector & 3) as u8 == rpl {
            return Ok(Outer { segment: null_segment(selector, rpl), sp });
        }
        let segment = self.stack_descriptor(selector, rpl, trap::GP, 0)?;
        Ok(Outer { segment, sp })
    }

    fn finish_return(&mut self, code: Segment, rip: u64, stack: &Stack, outer: Option<Outer>) {
        let before = self.cpl;
        match outer {
            None => stack.commit(self),
            Some(outer) => {
                let to_long = self.long_mode() && code.attributes.long();
                self.regs[RSP] = if to_long {
                    outer.sp
                } else if outer.segment.attributes.big() {
                    outer.sp & 0xFFFF_FFFF
                } else {
                    self.regs[RSP] & !0xFFFF | outer.sp & 0xFFFF
                };
                self.segs[SS] = outer.segment;
            }
        }
        self.segs[CS] = code;
        self.rip = rip;
        self.update_mode();
        if self.cpl > before {
            self.drop_inner_segments();
        }
    }

    fn iret_real(&mut self, bytes: u64) -> Result<(), Trap> {
        let mut stack = Stack::current(self, 0);
        let rip = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let image = stack.pop(self, bytes)?;
        self.return_real(rip, selector, &stack)?;
        self.set_popped_flags(image, bytes, 0, flags::RF);
        Ok(())
    }

    /// IRET in virtual-8086 mode (Intel SDM vol. 3A §21.3.2, for IOPL below 3 with CR4.VME).
    fn iret_v86(&mut self, bytes: u64) -> Result<(), Trap> {
        let virtual_if = self.iopl() < 3;
        if virtual_if && (!self.cr4().contains(Cr4::VME) || bytes != 2) {
            return Err(self.gp0());
        }
        let mut stack = Stack::current(self, 0);
        let rip = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let image = stack.pop(self, bytes)?;
        if virtual_if {
            self.check_virtual_if(image)?;
        }
        self.return_real(rip, selector, &stack)?;
        if virtual_if {
            self.set_virtual_flags(image);
        } else {
            self.set_popped_flags(image, bytes, 3, flags::RF);
        }
        Ok(())
    }

    fn iret_protected(&mut self, bytes: u64) -> Result<(), Trap> {
        let cpl = self.cpl;
        let long64 = self.long64();
        let mut stack = Stack::current(self, 0);
        let rip = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let image = stack.pop(self, bytes)?;
        if image & flags::VM != 0 && cpl == 0 && bytes == 4 && !self.long_mode() {
            return self.enter_v86(rip, selector, image, stack);
        }
        let code = self.return_segment(selector)?;
        let mut outer = None;
        // 64-bit code always returns with a stack.
        if (selector & 3) as u8 > cpl || long64 {
            outer = Some(self.pop_outer_stack(&mut stack, bytes, &code)?);
        }
        self.check_target(&code, rip)?;
        self.finish_return(code, rip, &stack, outer);
        let virtual_flags = if cpl == 0 { flags::VIF | flags::VIP } else { 0 };
        self.set_popped_flags(image, bytes, cpl, flags::RF | virtual_flags);
        Ok(())
    }

    /// IRETD from privilege level 0 to virtual-8086 mode.
    fn enter_v86(
        &mut self,
        rip: u64,
        selector: u16,
        image: u64,
        mut stack: Stack,
    ) -> Result<(), Trap> {
        let sp = stack.pop(self, 4)?;
        let mut selectors = [0; 6];
        for seg in [SS, ES, DS, FS, GS] {
            selectors[seg] = stack.pop(self, 4)? as u16;
        }
        selectors[CS] = selector;
        // A virtual-8086 code segment ends at 0xFFFF.
        if rip > 0xFFFF {
            return Err(self.gp0());
        }
        for (segment, selector) in self.segs.iter_mut().zip(selectors) {
            *segment = Segment { attributes: SegmentAttributes(0xF3), ..Segment::real(selector) };
        }
        self.regs[RSP] = sp;
        self.rip = rip;
        self.flags.set_all(image);
        self.update_mode();
        self.interrupts_on();
        Ok(())
    }

    /// IRET with NT set: back to the task that the TSS links to.
    fn return_from_task(&mut self) -> Result<(), Trap> {
        let at = self.tr.base;
        let selector = self.load_as::<u16>(at, MODE_SUPERVISOR)?;
        self.switch_task(selector, Link::Return, 0)
    }
}
