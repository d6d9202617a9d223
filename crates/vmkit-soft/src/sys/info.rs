//! What the processor tells about itself and the time, and waiting: CPUID, RDTSC, RDPMC, RDPID, HLT,
//! MONITOR, MWAIT.

use iced_x86::{Instruction, Mnemonic, Register};
use vmkit_hypervisor::CpuidContext;
use vmkit_hypervisor::x86::Cr4;
use vmkit_irqchip::ApicMode;

use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, RAX, RBX, RCX, RDX};
use crate::partition::APIC_HZ;

/// CPUID.1:EDX: there is a local APIC, and it is on.
const APIC: u32 = 1 << 9;

impl Cpu {
    /// Puts a 64-bit answer into EDX:EAX.
    pub(super) fn set_edx_eax(&mut self, value: u64) {
        self.regs[RAX] = value & 0xFFFF_FFFF;
        self.regs[RDX] = value >> 32;
    }

    fn cpuid_context(&self) -> CpuidContext {
        CpuidContext {
            apic_id: self.index,
            vcpus: self.partition.vcpu_limit(),
            tsc_khz: self.partition.tsc_khz(),
            apic_hz: APIC_HZ,
            osxsave: self.cr4().contains(Cr4::OSXSAVE),
            xcr0: self.control.xcr0,
        }
    }
}

/// CPUID.
pub(super) fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    let (leaf, subleaf) = (cpu.regs[RAX] as u32, cpu.regs[RCX] as u32);
    let mut answer = cpu.model.cpuid(leaf, subleaf, &cpu.cpuid_context());
    if leaf == 1 && cpu.shared.apic().mode() == ApicMode::Disabled {
        answer.edx &= !APIC;
    }
    cpu.regs[RAX] = u64::from(answer.eax);
    cpu.regs[RBX] = u64::from(answer.ebx);
    cpu.regs[RCX] = u64::from(answer.ecx);
    cpu.regs[RDX] = u64::from(answer.edx);
    Ok(())
}

/// RDTSC, RDTSCP.
pub(super) fn rdtsc(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    if cpu.cpl > 0 && cpu.cr4().contains(Cr4::TSD) {
        return Err(cpu.gp0());
    }
    let tsc = cpu.tsc();
    cpu.set_edx_eax(tsc);
    if insn.mnemonic() == Mnemonic::Rdtscp {
        cpu.regs[RCX] = cpu.msrs.tsc_aux;
    }
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.set_gpr(insn.op0_register(), cpu.msrs.tsc_aux);
    Ok(())
}

/// RDPMC: no model lists a counter, so every index is one too many.
pub(super) fn rdpmc(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    Err(cpu.gp0())
}

/// HLT.
pub(super) fn hlt(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    cpu.halted = true;
    Ok(())
}

/// MONITOR: the address must be readable.
pub(super) fn monitor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    if cpu.cpl > 0 {
        return Err(cpu.ud());
    }
    if cpu.regs[RCX] as u32 != 0 {
        return Err(cpu.gp0());
    }
    let offset = match insn.mnemonic() {
        Mnemonic::Monitor if insn.op0_register() == Register::AX => cpu.regs[RAX] & 0xFFFF,
        Mnemonic::Monitor if insn.op0_register() == Register::EAX => cpu.regs[RAX] & 0xFFFF_FFFF,
        _ => cpu.regs[RAX],
    };
    let seg = crate::exec::operand::segment_number(insn.memory_segment());
    let linear = cpu.linear(seg, offset, 1, false)?;
    cpu.load::<u8>(linear).map(drop)
}

/// MWAIT: it may end for any reason, so it ends at once.
pub(super) fn mwait(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if cpu.cpl > 0 {
        return Err(cpu.ud());
    }
    // ECX bit 0, "interrupts break the wait even if masked", is the only extension.
    if cpu.regs[RCX] as u32 & !1 != 0 {
        return Err(cpu.gp0());
    }
    std::thread::yield_now();
    Ok(())
}
