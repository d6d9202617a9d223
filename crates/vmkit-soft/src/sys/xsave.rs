//! XSAVE and its kin (Intel SDM vol. 1 chapter 13): x87, SSE and AVX state in one area.

use iced_x86::{Code, Instruction, Mnemonic};
use vmkit_hypervisor::Feature;
use vmkit_hypervisor::x86::{Cr0, Cr4};

use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, RAX, RCX, RDX};
use crate::fpu::Fpu;
use crate::sse::{MXCSR_MASK, MXCSR_RESET};

/// State components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// XCOMP_BV: the compacted format.
const COMPACTED: u64 = 1 << 63;

/// Offsets in the area.
const MXCSR_AT: usize = 24;
const ST_AT: usize = 32;
const XMM_AT: usize = 160;
const HEADER_AT: usize = 512;
/// The AVX component, in either format: nothing comes between.
const AVX_AT: usize = 576;
const AREA: usize = 832;

/// An area of all components in the standard format.
pub(super) type Area = [u8; AREA];

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.iter().skip(at).take(8).rev().fold(0, |acc, &b| acc << 8 | u64::from(b))
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()) {
        *to = from;
    }
}

impl Cpu {
    /// The components that are not in their initial state.
    fn in_use(&self) -> u64 {
        let low = self.vectors.iter().any(|v| v.0[0] | v.0[1] != 0);
        let high = self.vectors.iter().any(|v| v.0[2] | v.0[3] != 0);
        let x87 = self.fpu != Fpu::new();
        u64::from(x87) | if low { SSE } else { 0 } | if high { AVX } else { 0 }
    }

    /// All components in the standard format, header zero.
    pub(super) fn xsave_area(&self) -> Area {
        let mut area = [0; AREA];
        area[..HEADER_AT].copy_from_slice(&self.fxsave_image());
        for (i, vector) in self.vectors.iter().enumerate() {
            put(&mut area, AVX_AT + 16 * i, vector.0[2]);
            put(&mut area, AVX_AT + 16 * i + 8, vector.0[3]);
        }
        area
    }

    /// Sets `components` from `area`, or to their initial state where `present` lacks them. `count`
    /// vector registers are set.
    pub(super) fn load_xsave_area(
        &mut self,
        area: &Area,
        components: u64,
        present: u64,
        count: usize,
    ) {
        let mut image = [0; HEADER_AT];
        image.copy_from_slice(&area[..HEADER_AT]);
        if components & X87 != 0 {
            if present & X87 != 0 {
                self.load_x87_image(&image);
            } else {
                self.fpu = Fpu::new();
            }
        }
        if components & SSE != 0 {
            if present & SSE == 0 {
                image = [0; HEADER_AT];
            }
            self.load_sse_image(&image, count);
        }
        if components & AVX != 0 {
            for (i, vector) in self.vectors.iter_mut().enumerate().take(count) {
                let has = present & AVX != 0;
                let get = |at: usize| if has { word(area, at) } else { 0 };
                vector.0[2] = get(AVX_AT + 16 * i);
                vector.0[3] = get(AVX_AT + 16 * i + 8);
            }
        }
    }

    /// What XSAVE and XRSTOR check first; returns the components asked for.
    fn xsave_checks(&mut self) -> Result<u64, Trap> {
        if !self.cr4().contains(Cr4::OSXSAVE) {
            return Err(self.ud());
        }
        if self.cr0().contains(Cr0::TS) {
            return Err(self.raise(trap::NM));
        }
        let asked = self.regs[RDX] << 32 | self.regs[RAX] & 0xFFFF_FFFF;
        Ok(asked & self.control.xcr0)
    }

    fn xsave_address(&mut self, insn: &Instruction, write: bool) -> Result<u64, Trap> {
        let at = self.address_of(insn, AVX_AT as u64, write)?;
        if at & 63 != 0 { Err(self.gp0()) } else { Ok(at) }
    }

    /// Vector registers that the mode has.
    fn vector_count(&self) -> usize {
        if self.long64() { 16 } else { 8 }
    }

    /// Stores `area[from..to]` at its place.
    fn store_piece(&mut self, at: u64, area: &Area, from: usize, to: usize) -> Result<(), Trap> {
        let linear = self.wrap_linear(at.wrapping_add(from as u64));
        self.store_bytes(linear, &area[from..to], self.tlb_mode)
    }
}

/// The bytes that pieces of the area for `components` reach to.
fn reach(components: u64) -> usize {
    if components & AVX != 0 { AREA } else { AVX_AT }
}

/// XSAVE, XSAVEOPT, XSAVEC (and their 64-bit forms).
pub(super) fn xsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let asked = cpu.xsave_checks()?;
    let at = cpu.xsave_address(insn, true)?;
    cpu.fp_leave();
    let compact = insn.mnemonic() == Mnemonic::Xsavec || insn.mnemonic() == Mnemonic::Xsavec64;
    let optimised = compact || matches!(insn.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let mut in_use = cpu.in_use();
    if compact && cpu.mxcsr != MXCSR_RESET {
        in_use |= SSE;
    }
    // What is written: all asked for, or only what is not in its initial state.
    let written = if optimised { asked & in_use } else { asked };
    cpu.probe_store(at, reach(if compact { written } else { asked }))?;

    let mut area = cpu.xsave_area();
    if !is_wide(insn) {
        cut_pointers(&mut area);
    }
    let mut old = [0; 8];
    cpu.load_bytes(cpu.wrap_linear(at.wrapping_add(HEADER_AT as u64)), &mut old, cpu.tlb_mode)?;
    let kept = if compact { 0 } else { u64::from_le_bytes(old) & !asked };
    put(&mut area, HEADER_AT, kept | asked & in_use);
    put(&mut area, HEADER_AT + 8, COMPACTED | asked);

    let count = cpu.vector_count();
    if written & X87 != 0 {
        cpu.store_piece(at, &area, 0, MXCSR_AT)?;
        cpu.store_piece(at, &area, ST_AT, XMM_AT)?;
    }
    let mxcsr = if compact { written & SSE } else { asked & (SSE | AVX) };
    if mxcsr != 0 {
        cpu.store_piece(at, &area, MXCSR_AT, ST_AT)?;
    }
    if written & SSE != 0 {
        cpu.store_piece(at, &area, XMM_AT, XMM_AT + 16 * count)?;
    }
    if written & AVX != 0 {
        cpu.store_piece(at, &area, AVX_AT, AVX_AT + 16 * count)?;
    }
    cpu.store_piece(at, &area, HEADER_AT, HEADER_AT + if compact { 16 } else { 8 })
}

/// Outside the 64-bit form the x87 instruction and data pointers are 32 bits and a selector, which is
/// always zero.
fn cut_pointers(area: &mut Area) {
    area[12..16].fill(0);
    area[20..24].fill(0);
}

fn is_wide(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Xsave64_mem | Code::Xsaveopt64_mem | Code::Xsavec64_mem | Code::Xrstor64_mem
    )
}

/// XRSTOR.
pub(super) fn xrstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let asked = cpu.xsave_checks()?;
    let at = cpu.xsave_address(insn, false)?;
    let mut area: Area = [0; AREA];
    cpu.load_bytes(at, &mut area[..AVX_AT], cpu.tlb_mode)?;
    let (present, format) = (word(&area, HEADER_AT), word(&area, HEADER_AT + 8));
    let compact = format & COMPACTED != 0;
    let xcr0 = cpu.control.xcr0;
    let mut reserved = word(&area, HEADER_AT + 16);
    let fine = if compact {
        for i in 3..8 {
            reserved |= word(&area, HEADER_AT + 8 * i);
        }
        let listed = format & !COMPACTED;
        cpu.model.has(Feature::Xsavec) && listed & !xcr0 == 0 && present & !listed == 0
    } else {
        format == 0 && present & !xcr0 == 0
    };
    let loads_mxcsr = if compact { asked & present & SSE } else { asked & (SSE | AVX) } != 0;
    let mxcsr = word(&area, MXCSR_AT) as u32;
    if !fine || reserved != 0 || loads_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    if asked & present & AVX != 0 {
        let high = cpu.wrap_linear(at.wrapping_add(AVX_AT as u64));
        cpu.load_bytes(high, &mut area[AVX_AT..], cpu.tlb_mode)?;
    }
    if !is_wide(insn) {
        cut_pointers(&mut area);
    }
    cpu.load_xsave_area(&area, asked, present, cpu.vector_count());
    if loads_mxcsr {
        cpu.set_mxcsr(mxcsr)?;
    } else if compact && asked & SSE != 0 {
        cpu.set_mxcsr(MXCSR_RESET)?;
    }
    Ok(())
}

/// XGETBV.
pub(super) fn xgetbv(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if !cpu.cr4().contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    let value = match cpu.regs[RCX] as u32 {
        0 => cpu.control.xcr0,
        1 if cpu.model.has(Feature::Xgetbv1) => cpu.control.xcr0 & cpu.in_use(),
        _ => return Err(cpu.gp0()),
    };
    cpu.set_edx_eax(value);
    Ok(())
}
