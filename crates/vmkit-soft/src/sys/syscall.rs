//! The fast ways into the kernel and back: SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, and the bases
//! of FS and GS (Intel SDM vol. 2; AMD APM vol. 3 for SYSCALL outside 64-bit mode).

use iced_x86::{Code, Instruction, Mnemonic};
use vmkit_hypervisor::Vendor;
use vmkit_hypervisor::x86::{Cr0, Cr4, Efer, Segment};

use crate::cpu::trap::Trap;
use crate::cpu::{CS, Cpu, FS, GS, RCX, RDX, RSP, SS, flags};
use crate::mem::canonical;

/// R11.
const R11: usize = 11;

impl Cpu {
    /// Flat code and stack segments at privilege level `dpl`; 64-bit code if `long`.
    fn set_flat_segments(&mut self, cs: u16, ss: u16, dpl: u8, long: bool) {
        let code = if long { Segment::code64(cs) } else { Segment::code32(cs) };
        self.segs[CS] = code.with_dpl(dpl);
        self.segs[SS] = Segment::data(ss).with_dpl(dpl);
        self.update_mode();
    }

    fn need_sce(&mut self) -> Result<(), Trap> {
        // Intel processors know SYSCALL in 64-bit mode only.
        let here = self.long64() || self.model.vendor == Vendor::Amd;
        if here && self.efer().contains(Efer::SCE) { Ok(()) } else { Err(self.ud()) }
    }
}

/// SYSCALL.
pub(super) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_sce()?;
    let star = cpu.msrs.star;
    let cs = (star >> 32) as u16 & 0xFFFC;
    cpu.regs[RCX] = cpu.rip;
    if cpu.long_mode() {
        let rflags = cpu.flags.all() & !flags::RF;
        cpu.regs[R11] = rflags;
        cpu.rip = if cpu.long64() { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.flags.set_all(rflags & !cpu.msrs.fmask);
        cpu.set_flat_segments(cs, cs.wrapping_add(8), 0, true);
    } else {
        cpu.regs[RCX] &= 0xFFFF_FFFF;
        cpu.rip = star & 0xFFFF_FFFF;
        cpu.flags.rest &= !(flags::IF | flags::RF | flags::VM);
        cpu.set_flat_segments(cs, cs.wrapping_add(8), 0, false);
    }
    cpu.step_by_new_tf();
    Ok(())
}

/// SYSRET.
pub(super) fn sysret(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_sce()?;
    if !cpu.cr0().contains(Cr0::PE) {
        return Err(cpu.gp0());
    }
    cpu.need_cpl0()?;
    let long = insn.code() == Code::Sysretq;
    let rip = cpu.regs[RCX];
    if long && !canonical(rip) {
        return Err(cpu.gp0());
    }
    if cpu.long_mode() {
        let rflags = cpu.regs[R11] & 0x3C_7FD7;
        cpu.flags.set_all(rflags);
    } else {
        cpu.flags.rest |= flags::IF;
    }
    let base = (cpu.msrs.star >> 48) as u16;
    cpu.rip = if long { rip } else { rip & 0xFFFF_FFFF };
    let cs = if long { base.wrapping_add(16) } else { base };
    cpu.set_flat_segments(cs, base.wrapping_add(8), 3, long);
    cpu.interrupts_on();
    cpu.step_by_new_tf();
    Ok(())
}

/// SYSENTER.
pub(super) fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    let long = cpu.long_mode();
    if long && cpu.model.vendor == Vendor::Amd {
        return Err(cpu.ud());
    }
    let cs = cpu.msrs.sysenter_cs as u16 & 0xFFFC;
    if !cpu.cr0().contains(Cr0::PE) || cs == 0 {
        return Err(cpu.gp0());
    }
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    cpu.flags.rest &= !(flags::VM | flags::IF | flags::RF);
    cpu.regs[RSP] = cpu.msrs.sysenter_esp & mask;
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    cpu.set_flat_segments(cs, cs.wrapping_add(8), 0, long);
    Ok(())
}

/// SYSEXIT.
pub(super) fn sysexit(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    if cpu.long_mode() && cpu.model.vendor == Vendor::Amd {
        return Err(cpu.ud());
    }
    let cs = cpu.msrs.sysenter_cs as u16 & 0xFFFC;
    if !cpu.cr0().contains(Cr0::PE) || cs == 0 {
        return Err(cpu.gp0());
    }
    cpu.need_cpl0()?;
    let (rip, rsp) = (cpu.regs[RDX], cpu.regs[RCX]);
    let long = insn.code() == Code::Sysexitq;
    if long && !(canonical(rip) && canonical(rsp)) {
        return Err(cpu.gp0());
    }
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    cpu.rip = rip & mask;
    cpu.regs[RSP] = rsp & mask;
    let cs = cs.wrapping_add(if long { 32 } else { 16 });
    cpu.set_flat_segments(cs, cs.wrapping_add(8), 3, long);
    Ok(())
}

/// SWAPGS.
pub(super) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if !cpu.long64() {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let base = cpu.segs[GS].base;
    cpu.set_segment_base(GS, cpu.msrs.kernel_gs_base);
    cpu.msrs.kernel_gs_base = base;
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(super) fn segment_base(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    if !cpu.long64() || !cpu.cr4().contains(Cr4::FSGSBASE) {
        return Err(cpu.ud());
    }
    let seg = match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => FS,
        _ => GS,
    };
    if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        cpu.set_gpr(insn.op0_register(), cpu.segs[seg].base);
        return Ok(());
    }
    let base = cpu.gpr(insn.op0_register());
    if !canonical(base) {
        return Err(cpu.gp0());
    }
    cpu.set_segment_base(seg, base);
    Ok(())
}
