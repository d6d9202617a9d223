//! Descriptor tables, page tables and handlers of the cases' machine, and the state a program starts
//! in.

use vmkit_device::memory::{Bytes, MemoryRegion, MemoryRegionAddress};

use super::Failure;
use super::guest::{APIC, CODE, DATA, FAULT_PORT, IOAPIC, Mode, STACK, STACK_IST1, STACK_RING0};
use crate::VcpuState;
use crate::x86::{Cr0, Cr4, DescriptorTable, Efer, Segment, SegmentAttributes};

/// The GDT, 32 descriptors.
pub(super) const GDT: u64 = 0x500;
/// The TSS.
pub(super) const TSS: u64 = 0x600;
const TSS_LIMIT: u32 = 0x67;
/// Page tables: level 4, level 3, level 2 of the first GiB, level 2 of the fourth.
pub(super) const PML4: u64 = 0x1000;
pub(super) const PDPT: u64 = 0x2000;
pub(super) const PD: u64 = 0x3000;
const PD_CONTROLLERS: u64 = 0x4000;
/// The IDT, 256 gates.
pub(super) const IDT: u64 = 0x5000;
/// The handlers that report, 16 bytes each.
const STUBS: u64 = 0x6000;

/// Selectors. The order suits SYSCALL, SYSRET and 64-bit SYSEXIT.
pub(super) const CODE64: u16 = 0x08;
pub(super) const DATA0: u16 = 0x10;
pub(super) const CODE32_RING3: u16 = 0x18 | 3;
pub(super) const DATA_RING3: u16 = 0x20 | 3;
pub(super) const CODE64_RING3: u16 = 0x28 | 3;
pub(super) const CODE32: u16 = 0x30;
pub(super) const TSS_SELECTOR: u16 = 0x38;
/// The first descriptor that is free for a case; the GDT has room up to 0xF8.
pub(super) const FREE: u16 = 0x48;

const DESCRIPTORS: [u64; 7] = [
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
    0x00CF_9B00_0000_FFFF,
];

/// Present, writable, user, accessed, dirty.
pub(super) const PAGE: u64 = 0x67;
/// The same, and no lower level.
pub(super) const LARGE_PAGE: u64 = PAGE | 0x80;

/// Exceptions that push an error code (Intel SDM vol. 3A §6.15).
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

fn put(ram: &MemoryRegion, at: u64, value: u64) -> Result<(), Failure> {
    Ok(ram.write_slice(&value.to_le_bytes(), MemoryRegionAddress(at))?)
}

/// Writes everything a program in `mode` needs.
pub(super) fn write(ram: &MemoryRegion, mode: Mode) -> Result<(), Failure> {
    for (index, descriptor) in (0..).zip(DESCRIPTORS) {
        put(ram, GDT + index * 8, descriptor)?;
    }
    // A busy 32- or 64-bit TSS; the upper half of a 64-bit one is zero.
    let tss = u64::from(TSS_LIMIT) | (TSS & 0xFF_FFFF) << 16 | 0x8B << 40;
    put(ram, GDT + u64::from(TSS_SELECTOR), tss)?;
    if mode == Mode::Long {
        put(ram, TSS + 4, STACK_RING0)?;
        put(ram, TSS + 0x24, STACK_IST1)?;
    } else {
        put(ram, TSS + 4, u64::from(DATA0) << 32 | STACK_RING0)?;
    }
    // The I/O bitmap is past the limit: no port for ring 3.
    put(ram, TSS + 0x60, u64::from(TSS_LIMIT + 1) << 48)?;

    put(ram, PML4, PDPT | PAGE)?;
    put(ram, PDPT, PD | PAGE)?;
    put(ram, PDPT + 3 * 8, PD_CONTROLLERS | PAGE)?;
    for entry in 0..512 {
        put(ram, PD + entry * 8, entry << 21 | LARGE_PAGE)?;
    }
    for controller in [APIC, IOAPIC] {
        let entry = controller >> 21 & 0x1FF;
        // Uncacheable, as firmware would have it.
        put(ram, PD_CONTROLLERS + entry * 8, controller & !0x1F_FFFF | LARGE_PAGE | 0x18)?;
    }
    for vector in 0..=255 {
        let at = STUBS + u64::from(vector) * 16;
        ram.write_slice(&stub(vector, mode), MemoryRegionAddress(at))?;
        gate(ram, mode, vector, at, 0)?;
    }
    Ok(())
}

/// A handler: pushes an error code unless the processor did, pushes the vector, reports, and returns
/// when it is run again.
fn stub(vector: u8, mode: Mode) -> Vec<u8> {
    let mut code = Vec::new();
    if !has_error_code(vector) || mode == Mode::Real {
        // push 0
        code.extend([0x6A, 0]);
    }
    // push vector; out FAULT_PORT, al
    code.extend([0x6A, vector, 0xE6, FAULT_PORT as u8]);
    match mode {
        // add rsp, 16; iretq
        Mode::Long => code.extend([0x48, 0x83, 0xC4, 16, 0x48, 0xCF]),
        // add esp, 8; iretd
        Mode::Protected => code.extend([0x83, 0xC4, 8, 0xCF]),
        // add sp, 4; iret
        Mode::Real => code.extend([0x83, 0xC4, 4, 0xCF]),
    }
    code
}

/// Has `vector` go to `handler`, by an interrupt gate that ring `dpl` may use in INT.
pub(super) fn gate(
    ram: &MemoryRegion,
    mode: Mode,
    vector: u8,
    handler: u64,
    dpl: u64,
) -> Result<(), Failure> {
    let vector = u64::from(vector);
    let target = |selector: u16| {
        let rights = 0x8E00 | dpl << 13;
        handler & 0xFFFF | u64::from(selector) << 16 | rights << 32 | (handler >> 16 & 0xFFFF) << 48
    };
    match mode {
        Mode::Long => put(ram, IDT + vector * 16, target(CODE64)),
        Mode::Protected => put(ram, IDT + vector * 8, target(CODE32)),
        Mode::Real => {
            let word = (handler as u32).to_le_bytes();
            Ok(ram.write_slice(&word, MemoryRegionAddress(vector * 4))?)
        }
    }
}

/// The state of vCPU `index` before its first instruction.
pub(super) fn start_state(mode: Mode, index: u32) -> VcpuState {
    let mut state = VcpuState::default();
    let (segments, control) = (&mut state.segments, &mut state.control);
    let data = match mode {
        Mode::Real => Segment::real((DATA >> 4) as u16),
        _ => Segment::data(DATA0),
    };
    (segments.ds, segments.es, segments.fs, segments.gs) = (data, data, data, data);
    segments.ss = if mode == Mode::Real { Segment::real(0) } else { data };
    segments.gdt = DescriptorTable { base: GDT, limit: 0xFF };
    segments.ldt =
        Segment { selector: 0, base: 0, limit: 0, attributes: SegmentAttributes::UNUSABLE };
    let tr = SegmentAttributes(0x8B);
    segments.tr = Segment { selector: TSS_SELECTOR, base: TSS, limit: TSS_LIMIT, attributes: tr };
    state.general.rip = CODE;
    state.general.set_rsp(STACK - u64::from(index) * 0x2000);
    let protected = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE;
    match mode {
        Mode::Real => {
            segments.cs = Segment::real((CODE >> 4) as u16);
            segments.cs.attributes = SegmentAttributes(0x9B);
            segments.idt = DescriptorTable { base: 0, limit: 0x3FF };
            control.cr0 = Cr0::ET.bits();
            state.general.rip = 0;
            state.general.set_rsp(0xF000);
        }
        Mode::Protected => {
            segments.cs = Segment::code32(CODE32);
            segments.idt = DescriptorTable { base: IDT, limit: 0x7FF };
            control.cr0 = protected.bits();
            control.cr4 = (Cr4::OSFXSR | Cr4::OSXMMEXCPT).bits();
        }
        Mode::Long => {
            segments.cs = Segment::code64(CODE64);
            segments.idt = DescriptorTable { base: IDT, limit: 0xFFF };
            control.cr0 = (protected | Cr0::WP | Cr0::PG).bits();
            control.cr3 = PML4;
            control.cr4 = (Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT).bits();
            control.efer = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
        }
    }
    state
}
