//! RFLAGS to and from the stack, and the interrupt flag (Intel SDM vol. 2: PUSHF, POPF, CLI, STI;
//! vol. 3A §21.3 for the virtual interrupt flag).

use iced_x86::{Code, Instruction};
use vmkit_hypervisor::x86::Cr4;

use super::stack::Stack;
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Mode, flags};

fn bytes_of(insn: &Instruction) -> u64 {
    match insn.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

impl Cpu {
    /// Virtual-8086 mode with an IOPL that hides the real interrupt flag.
    fn v86_restricted(&self) -> bool {
        self.mode.contains(Mode::V86) && self.iopl() < 3
    }

    /// Sets what an instruction at privilege level `cpl` may set of RFLAGS from `image`, which has
    /// `bytes` bytes. `wide` are the flags past bit 15 that it sets beside AC and ID.
    pub(super) fn set_popped_flags(&mut self, image: u64, bytes: u64, cpl: u8, wide: u64) {
        let mut mask = flags::TF | flags::DF | flags::NT;
        if cpl == 0 {
            mask |= flags::IOPL;
        }
        if cpl <= self.iopl() {
            mask |= flags::IF;
        }
        if bytes > 2 {
            mask |= flags::AC | flags::ID | wide;
        }
        self.flags.rest = self.flags.rest & !(mask | flags::RF) | image & mask;
        self.flags.set_arithmetic(image);
        self.update_tlb_mode();
        self.interrupts_on();
    }

    /// After an instruction that may have set IF: an interrupt that waits for it is taken before the
    /// next one.
    pub(super) fn interrupts_on(&mut self) {
        if self.interrupt_waits && self.flags.rest & flags::IF != 0 {
            self.shared.ask();
        }
    }

    /// Raises #GP(0) if `image`, popped where VIF stands for IF, asks for what must be trapped.
    pub(super) fn check_virtual_if(&mut self, image: u64) -> Result<(), Trap> {
        let waiting = image & flags::IF != 0 && self.flags.rest & flags::VIP != 0;
        if waiting || image & flags::TF != 0 { Err(self.gp0()) } else { Ok(()) }
    }

    /// Sets FLAGS from `image` with VIF in place of IF.
    pub(super) fn set_virtual_flags(&mut self, image: u64) {
        let mask = flags::TF | flags::DF | flags::NT;
        let vif = if image & flags::IF != 0 { flags::VIF } else { 0 };
        self.flags.rest = self.flags.rest & !(mask | flags::VIF | flags::RF) | image & mask | vif;
        self.flags.set_arithmetic(image);
    }
}

/// PUSHF, PUSHFD, PUSHFQ.
pub(super) fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = bytes_of(insn);
    let mut image = cpu.flags.all() & !(flags::VM | flags::RF);
    if cpu.v86_restricted() {
        if !cpu.cr4().contains(Cr4::VME) || bytes != 2 {
            return Err(cpu.gp0());
        }
        let vif = cpu.flags.rest & flags::VIF != 0;
        image = image & !flags::IF | flags::IOPL | if vif { flags::IF } else { 0 };
    }
    let mut stack = Stack::current(cpu, 0);
    stack.push(cpu, bytes, image)?;
    stack.commit(cpu);
    Ok(())
}

/// POPF, POPFD, POPFQ.
pub(super) fn popf(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = bytes_of(insn);
    let restricted = cpu.v86_restricted();
    if restricted && (!cpu.cr4().contains(Cr4::VME) || bytes != 2) {
        return Err(cpu.gp0());
    }
    let mut stack = Stack::current(cpu, 0);
    let image = stack.pop(cpu, bytes)?;
    if restricted {
        cpu.check_virtual_if(image)?;
        cpu.set_virtual_flags(image);
    } else {
        cpu.set_popped_flags(image, bytes, cpu.cpl, 0);
    }
    stack.commit(cpu);
    Ok(())
}

/// Which flag CLI and STI work on; `None` is #GP(0).
fn interrupt_flag(cpu: &Cpu) -> Option<u64> {
    if cpu.iopl() >= cpu.cpl {
        return Some(flags::IF);
    }
    let extension = if cpu.mode.contains(Mode::V86) { Cr4::VME } else { Cr4::PVI };
    (cpu.cpl == 3 && cpu.cr4().contains(extension)).then_some(flags::VIF)
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    match interrupt_flag(cpu) {
        Some(flag) => cpu.flags.rest &= !flag,
        None => return Err(cpu.gp0()),
    }
    Ok(())
}

/// STI: interrupts wait for one more instruction, if they were off.
pub(super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    match interrupt_flag(cpu) {
        Some(flags::IF) => {
            cpu.inhibit |= cpu.flags.rest & flags::IF == 0;
            cpu.flags.rest |= flags::IF;
            cpu.interrupts_on();
        }
        Some(flag) if cpu.flags.rest & flags::VIP == 0 => cpu.flags.rest |= flag,
        _ => return Err(cpu.gp0()),
    }
    Ok(())
}

/// CLAC, STAC.
pub(super) fn set_ac(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    if insn.mnemonic() == iced_x86::Mnemonic::Stac {
        cpu.flags.rest |= flags::AC;
    } else {
        cpu.flags.rest &= !flags::AC;
    }
    cpu.update_tlb_mode();
    Ok(())
}
