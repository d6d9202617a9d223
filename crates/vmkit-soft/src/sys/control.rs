//! Control registers: what may be written when, and what a write does (Intel SDM vol. 3A §2.5, §5.4,
//! §10.8.5 for IA-32e mode; MOV to and from control registers in vol. 2B).

use iced_x86::{Instruction, Register};
use vmkit_hypervisor::x86::{Cr0, Cr4, Efer};
use vmkit_hypervisor::{CpuModel, Feature};

use super::descriptor::{BUSY, TSS16};
use crate::cpu::trap::Trap;
use crate::cpu::{CS, Cpu, RAX, RCX, RDX};
use crate::mem::canonical;

/// Bits of CR0 that exist.
const CR0_BITS: u64 = Cr0::all().bits();

/// The bits of CR4 that `model` has.
pub(super) fn cr4_bits(model: &CpuModel) -> u64 {
    [
        (Feature::Vme, Cr4::VME | Cr4::PVI),
        (Feature::Tsc, Cr4::TSD),
        (Feature::De, Cr4::DE),
        (Feature::Pse, Cr4::PSE),
        (Feature::Pae, Cr4::PAE),
        (Feature::Mce, Cr4::MCE),
        (Feature::Pge, Cr4::PGE),
        (Feature::Fxsr, Cr4::OSFXSR),
        (Feature::Sse, Cr4::OSXMMEXCPT),
        (Feature::Umip, Cr4::UMIP),
        (Feature::Fsgsbase, Cr4::FSGSBASE),
        (Feature::Pcid, Cr4::PCIDE),
        (Feature::Xsave, Cr4::OSXSAVE),
        (Feature::Smep, Cr4::SMEP),
        (Feature::Smap, Cr4::SMAP),
    ]
    .into_iter()
    .filter(|(feature, _)| model.has(*feature))
    .fold(Cr4::PCE, |bits, (_, more)| bits | more)
    .bits()
}

/// True if `value` is an XCR0 that `model` can have (Intel SDM vol. 1 §13.3).
pub(super) fn xcr0_valid(model: &CpuModel, value: u64) -> bool {
    let avx_without_sse = value & 6 == 4;
    value & 1 != 0 && value & !model.xcr0_mask() == 0 && !avx_without_sse
}

impl Cpu {
    /// All cached translations are void, global ones too.
    pub(super) fn flush_all(&mut self) {
        self.tlb.flush(true);
        self.translations_changed();
    }

    fn pae_paging(&self) -> bool {
        self.cr0().contains(Cr0::PG) && self.cr4().contains(Cr4::PAE) && !self.long_mode()
    }

    /// Writes CR0; false is #GP(0).
    pub(super) fn write_cr0(&mut self, value: u64) -> bool {
        if value >> 32 != 0 {
            return false;
        }
        let old = self.cr0();
        let new = Cr0::from_bits_retain(value & CR0_BITS | Cr0::ET.bits());
        let changed = old ^ new;
        if new.contains(Cr0::PG) && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
        {
            return false;
        }
        let mut efer = self.efer();
        if changed.contains(Cr0::PG) {
            let on = new.contains(Cr0::PG);
            if on && efer.contains(Efer::LME) {
                let tss16 = !self.tr.attributes.unusable()
                    && self.tr.attributes.kind() | BUSY == TSS16 | BUSY;
                if !self.cr4().contains(Cr4::PAE) || self.segs[CS].attributes.long() || tss16 {
                    return false;
                }
                efer |= Efer::LMA;
            } else if !on {
                if self.long64() || self.cr4().contains(Cr4::PCIDE) {
                    return false;
                }
                efer -= Efer::LMA;
            }
        }
        let pae = new.contains(Cr0::PG) && self.cr4().contains(Cr4::PAE);
        if pae
            && !efer.contains(Efer::LMA)
            && changed.intersects(Cr0::PG | Cr0::CD | Cr0::NW)
            && !self.load_pdptes()
        {
            return false;
        }
        self.control.cr0 = new.bits();
        self.control.efer = efer.bits();
        if changed.intersects(Cr0::PG | Cr0::WP | Cr0::PE) {
            self.flush_all();
        }
        self.update_mode();
        true
    }

    /// Writes CR3; false is #GP(0).
    pub(super) fn write_cr3(&mut self, value: u64) -> bool {
        let mut value = value;
        if self.long_mode() {
            if self.cr4().contains(Cr4::PCIDE) {
                // "Do not flush": a hint, and translations are not kept apart by PCID here.
                value &= !(1 << 63);
            }
            if value & !self.physical_mask & !0xFFF != 0 {
                return false;
            }
        } else {
            value &= 0xFFFF_FFFF;
        }
        let old = std::mem::replace(&mut self.control.cr3, value);
        if self.pae_paging() && !self.load_pdptes() {
            self.control.cr3 = old;
            return false;
        }
        // With PCIDs a guest may rely on translations of another PCID being gone only after it
        // said so; forgetting more is always allowed, but global ones stay.
        self.tlb.flush(false);
        self.translations_changed();
        true
    }

    /// Writes CR4; false is #GP(0).
    pub(super) fn write_cr4(&mut self, value: u64) -> bool {
        if value & !cr4_bits(&self.model) != 0 {
            return false;
        }
        let old = self.cr4();
        let new = Cr4::from_bits_retain(value);
        let changed = old ^ new;
        if self.long_mode() && !new.contains(Cr4::PAE) {
            return false;
        }
        if changed.contains(Cr4::PCIDE)
            && new.contains(Cr4::PCIDE)
            && (!self.long_mode() || self.control.cr3 & 0xFFF != 0)
        {
            return false;
        }
        self.control.cr4 = value;
        let reload = Cr4::PAE | Cr4::PSE | Cr4::PGE | Cr4::SMEP;
        if self.pae_paging() && changed.intersects(reload) && !self.load_pdptes() {
            self.control.cr4 = old.bits();
            return false;
        }
        if changed.intersects(reload | Cr4::SMAP | Cr4::PCIDE | Cr4::LA57 | Cr4::PKE) {
            self.flush_all();
        }
        self.update_mode();
        true
    }

    /// Writes EFER; false is #GP(0).
    pub(super) fn write_efer(&mut self, value: u64) -> bool {
        let old = self.efer();
        let new = Efer::from_bits_retain(value & !Efer::LMA.bits());
        if value & !(efer_bits(&self.model) | Efer::LMA.bits()) != 0
            || (old ^ new).contains(Efer::LME) && self.cr0().contains(Cr0::PG)
        {
            return false;
        }
        self.control.efer = new.bits() | old.bits() & Efer::LMA.bits();
        if (old ^ new).contains(Efer::NXE) {
            self.flush_all();
        }
        self.update_mode();
        true
    }
}

/// The bits of EFER that `model` lets the guest write.
pub(super) fn efer_bits(model: &CpuModel) -> u64 {
    [(Feature::Syscall, Efer::SCE), (Feature::LongMode, Efer::LME), (Feature::Nx, Efer::NXE)]
        .into_iter()
        .filter(|(feature, _)| model.has(*feature))
        .fold(0, |bits, (_, more)| bits | more.bits())
}

fn gp_unless(cpu: &mut Cpu, fine: bool) -> Result<(), Trap> {
    if fine { Ok(()) } else { Err(cpu.gp0()) }
}

/// MOV to a control register.
pub(super) fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let value = cpu.gpr(insn.op1_register());
    let fine = match insn.op0_register() {
        Register::CR0 => cpu.write_cr0(value),
        Register::CR2 => {
            cpu.control.cr2 = value;
            true
        }
        Register::CR3 => cpu.write_cr3(value),
        Register::CR4 => cpu.write_cr4(value),
        Register::CR8 if value & !0xF == 0 => {
            cpu.shared.apic().set_cr8(value as u8);
            // A lower priority may let an interrupt in that waits.
            cpu.shared.ask();
            true
        }
        Register::CR8 => false,
        _ => return Err(cpu.ud()),
    };
    gp_unless(cpu, fine)
}

/// MOV from a control register.
pub(super) fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let value = match insn.op1_register() {
        Register::CR0 => cpu.control.cr0,
        Register::CR2 => cpu.control.cr2,
        Register::CR3 => cpu.control.cr3,
        Register::CR4 => cpu.control.cr4,
        Register::CR8 => u64::from(cpu.shared.apic().cr8()),
        _ => return Err(cpu.ud()),
    };
    cpu.set_gpr(insn.op0_register(), value);
    Ok(())
}

/// CLTS.
pub(super) fn clts(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    cpu.control.cr0 &= !Cr0::TS.bits();
    cpu.update_mode();
    Ok(())
}

/// LMSW: PE can be set, not cleared.
pub(super) fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let value = cpu.read_operand(insn, 0)? & 0xF;
    let cr0 = cpu.control.cr0;
    let fine = cpu.write_cr0(cr0 & !0xE | value);
    gp_unless(cpu, fine)
}

/// SMSW.
pub(super) fn smsw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.check_umip()?;
    cpu.write_operand(insn, 0, cpu.control.cr0)
}

/// XSETBV.
pub(super) fn xsetbv(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if !cpu.cr4().contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let value = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xFFFF_FFFF;
    if cpu.regs[RCX] as u32 != 0 || !xcr0_valid(&cpu.model, value) {
        return Err(cpu.gp0());
    }
    cpu.control.xcr0 = value;
    cpu.update_mode();
    Ok(())
}

/// INVLPG.
pub(super) fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    // The address is not checked: no access is made.
    let seg = crate::exec::operand::segment_number(insn.memory_segment());
    let base = cpu.seg_base.get(seg).copied().unwrap_or(0);
    let linear = cpu.wrap_linear(cpu.offset_of(insn).wrapping_add(base));
    cpu.tlb.flush_page(linear);
    cpu.translations_changed();
    Ok(())
}

/// INVPCID (Intel SDM vol. 2A).
pub(super) fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let kind = cpu.gpr(insn.op0_register());
    let at = cpu.address_of(insn, 16, false)?;
    let pcid = cpu.load::<u64>(at)?;
    let linear = cpu.load::<u64>(cpu.wrap_linear(at.wrapping_add(8)))?;
    let enabled = cpu.cr4().contains(Cr4::PCIDE);
    let bad = kind > 3
        || pcid & !0xFFF != 0
        || kind == 0 && !canonical(linear)
        || kind < 2 && !enabled && pcid != 0;
    if bad {
        return Err(cpu.gp0());
    }
    match kind {
        0 => cpu.tlb.flush_page(cpu.wrap_linear(linear)),
        2 => cpu.tlb.flush(true),
        _ => cpu.tlb.flush(false),
    }
    cpu.translations_changed();
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: caches are coherent here.
pub(super) fn cache(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()
}
