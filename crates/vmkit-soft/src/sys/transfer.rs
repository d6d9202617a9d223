//! Far JMP and CALL in every mode, through call gates and task gates too (JMP and CALL in Intel SDM
//! vol. 2A; vol. 3A §6.8).

use iced_x86::{Code, Instruction, OpKind};
use vmkit_hypervisor::x86::Segment;

use super::descriptor::{CALL_GATE, CALL_GATE16, Descriptor, TASK_GATE, TSS, TSS16, null_segment};
use super::stack::Stack;
use super::task::Link;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, RSP, SS};
use crate::mem::canonical;

/// A far pointer and the operand size in bytes.
struct Target {
    selector: u16,
    offset: u64,
    bytes: u64,
}

fn target(cpu: &mut Cpu, insn: &Instruction) -> Result<Target, Trap> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => Ok(Target {
            selector: insn.far_branch_selector(),
            offset: u64::from(insn.far_branch16()),
            bytes: 2,
        }),
        OpKind::FarBranch32 => Ok(Target {
            selector: insn.far_branch_selector(),
            offset: u64::from(insn.far_branch32()),
            bytes: 4,
        }),
        _ => {
            let bytes = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                _ => 8,
            };
            let (selector, offset) = cpu.far_pointer(insn, bytes)?;
            Ok(Target { selector, offset, bytes })
        }
    }
}

/// JMP far.
pub(super) fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let target = target(cpu, insn)?;
    cpu.transfer(&target, false)
}

/// CALL far.
pub(super) fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let target = target(cpu, insn)?;
    cpu.transfer(&target, true)
}

impl Cpu {
    fn transfer(&mut self, target: &Target, call: bool) -> Result<(), Trap> {
        if !self.protected() {
            return self.transfer_real(target, call);
        }
        let selector = target.selector;
        if selector & 0xFFFC == 0 {
            return Err(self.gp0());
        }
        let descriptor = self.descriptor(selector, trap::GP, 0)?;
        let long = self.long_mode();
        match descriptor.system_kind() {
            None if descriptor.is_code() => self.transfer_code(descriptor, target, call),
            Some(CALL_GATE) => self.transfer_gate(descriptor, call),
            Some(CALL_GATE16) if !long => self.transfer_gate(descriptor, call),
            Some(TASK_GATE) if !long => self.transfer_task_gate(&descriptor, call),
            Some(TSS | TSS16) if !long => {
                if descriptor.dpl() < self.cpl.max(descriptor.rpl()) {
                    return Err(self.selector_fault(trap::GP, selector, 0));
                }
                self.switch_task(selector, link(call), 0)
            }
            _ => Err(self.selector_fault(trap::GP, selector, 0)),
        }
    }

    fn transfer_real(&mut self, target: &Target, call: bool) -> Result<(), Trap> {
        let mut stack = Stack::current(self, 0);
        if call {
            stack.push(self, target.bytes, u64::from(self.segs[CS].selector))?;
            stack.push(self, target.bytes, self.rip)?;
        }
        if target.offset > u64::from(self.segs[CS].limit) {
            return Err(self.gp0());
        }
        stack.commit(self);
        self.set_real_segment(CS, target.selector);
        self.rip = target.offset;
        self.update_mode();
        Ok(())
    }

    /// To a code segment of the same privilege level.
    fn transfer_code(
        &mut self,
        mut code: Descriptor,
        target: &Target,
        call: bool,
    ) -> Result<(), Trap> {
        let selector = code.selector;
        let allowed = if code.conforming() {
            code.dpl() <= self.cpl
        } else {
            code.rpl() <= self.cpl && code.dpl() == self.cpl
        };
        if !allowed {
            return Err(self.selector_fault(trap::GP, selector, 0));
        }
        self.check_code(&code)?;
        let mut stack = Stack::current(self, 0);
        if call {
            stack.push(self, target.bytes, u64::from(self.segs[CS].selector))?;
            stack.push(self, target.bytes, self.rip)?;
        }
        self.mark_accessed(&mut code)?;
        let segment = self.code_segment(&code, self.cpl);
        self.check_target(&segment, target.offset)?;
        stack.commit(self);
        self.segs[CS] = segment;
        self.rip = target.offset;
        self.update_mode();
        Ok(())
    }

    /// Presence, and the combination of L and D.
    pub(super) fn check_code(&mut self, code: &Descriptor) -> Result<(), Trap> {
        if self.long_mode() && code.attributes().long() && code.attributes().big() {
            return Err(self.selector_fault(trap::GP, code.selector, 0));
        }
        if !code.present() {
            return Err(self.selector_fault(trap::NP, code.selector, 0));
        }
        Ok(())
    }

    /// What CS is to hold: the descriptor with the new privilege level as RPL.
    pub(super) fn code_segment(&self, code: &Descriptor, cpl: u8) -> Segment {
        let mut segment = code.segment();
        segment.selector = segment.selector & !3 | u16::from(cpl);
        segment
    }

    /// Raises #GP(0) if `rip` is outside `code`.
    pub(super) fn check_target(&mut self, code: &Segment, rip: u64) -> Result<(), Trap> {
        let inside = if self.long_mode() && code.attributes.long() {
            canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if inside { Ok(()) } else { Err(self.gp0()) }
    }

    fn transfer_gate(&mut self, mut gate: Descriptor, call: bool) -> Result<(), Trap> {
        let long = self.long_mode();
        let selector = gate.selector;
        if gate.dpl() < self.cpl.max(gate.rpl()) {
            return Err(self.selector_fault(trap::GP, selector, 0));
        }
        if !gate.present() {
            return Err(self.selector_fault(trap::NP, selector, 0));
        }
        self.complete_system(&mut gate, trap::GP, 0)?;
        let selector = gate.gate_selector();
        if selector & 0xFFFC == 0 {
            return Err(self.gp0());
        }
        let mut code = self.descriptor(selector, trap::GP, 0)?;
        let jmp_to_other = !call && !code.conforming() && code.dpl() != self.cpl;
        let not_long = long && (!code.attributes().long() || code.attributes().big());
        if !code.is_code() || code.dpl() > self.cpl || jmp_to_other || not_long {
            return Err(self.selector_fault(trap::GP, selector, 0));
        }
        if !code.present() {
            return Err(self.selector_fault(trap::NP, selector, 0));
        }
        let bytes = match (long, gate.attributes().kind() & 8) {
            (true, _) => 8,
            (false, 0) => 2,
            (false, _) => 4,
        };
        let inner = call && !code.conforming() && code.dpl() < self.cpl;
        let cpl = if inner { code.dpl() } else { self.cpl };
        let mut new_ss = self.segs[SS];
        let mut stack = Stack::current(self, 0);
        if inner {
            (new_ss, stack) = self.inner_stack(cpl)?;
            stack.push(self, bytes, u64::from(self.segs[SS].selector))?;
            stack.push(self, bytes, self.regs[RSP])?;
            if !long {
                self.copy_parameters(&mut stack, &gate, bytes)?;
            }
        }
        if call {
            stack.push(self, bytes, u64::from(self.segs[CS].selector))?;
            stack.push(self, bytes, self.rip)?;
        }
        self.mark_accessed(&mut code)?;
        let segment = self.code_segment(&code, cpl);
        self.check_target(&segment, gate.gate_offset())?;
        self.segs[SS] = new_ss;
        stack.commit(self);
        self.segs[CS] = segment;
        self.rip = gate.gate_offset();
        self.update_mode();
        Ok(())
    }

    /// The stack that the TSS names for an inner privilege level.
    fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, Stack), Trap> {
        if self.long_mode() {
            let sp = self.tss_pointer(4 + u64::from(cpl) * 8, 0)?;
            return Ok((null_segment(u16::from(cpl), cpl), Stack::flat(self, sp, cpl, 0)));
        }
        let (selector, sp) = self.tss_stack(cpl, 0)?;
        let segment = self.stack_descriptor(selector, cpl, trap::TS, 0)?;
        let error = u32::from(selector & 0xFFFC);
        Ok((segment, Stack::new(self, segment, sp, cpl, error)))
    }

    /// Copies the parameters of a call to the new stack, in the order they are in.
    fn copy_parameters(
        &mut self,
        stack: &mut Stack,
        gate: &Descriptor,
        bytes: u64,
    ) -> Result<(), Trap> {
        let old = Stack::current(self, 0);
        for n in (0..gate.raw >> 32 & 0x1F).rev() {
            let value = old.peek(self, n * bytes, bytes)?;
            stack.push(self, bytes, value)?;
        }
        Ok(())
    }

    fn transfer_task_gate(&mut self, gate: &Descriptor, call: bool) -> Result<(), Trap> {
        if gate.dpl() < self.cpl.max(gate.rpl()) {
            return Err(self.selector_fault(trap::GP, gate.selector, 0));
        }
        if !gate.present() {
            return Err(self.selector_fault(trap::NP, gate.selector, 0));
        }
        self.switch_task(gate.gate_selector(), link(call), 0)
    }
}

fn link(call: bool) -> Link {
    if call { Link::Nest } else { Link::Leave }
}
