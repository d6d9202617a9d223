//! CPUID, MSRs and control registers: what the CPU model lists is there, anything else faults.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE, DATA, Guest};
use super::recorder::Recorder;
use super::{Failure, Need, asm::asm};
use crate::x86::{Cr0, Cr4, Efer};
use crate::{CpuidContext, CpuidResult, Feature, Hypervisor, StateSet};

cases! { "msrs":
    cpuid_is_the_models "the contract: CpuModel::cpuid";
    cpuid_apic_id "Intel SDM vol. 2A, CPUID leaf 1, EBX";
    cpuid_past_the_highest_leaf "Intel SDM vol. 2A, CPUID";
    cpuid_follows_osxsave_and_xcr0 "Intel SDM vol. 2A, CPUID leaves 1 and 0DH"
        [Need::Feature(Feature::Xsave)];
    an_unlisted_msr_faults "Intel SDM vol. 2B, RDMSR, WRMSR";
    listed_msrs_keep_what_is_written "Intel SDM vol. 4";
    addresses_in_msrs_are_canonical "Intel SDM vol. 2B, WRMSR";
    pat_takes_memory_types_only "Intel SDM vol. 3A §12.12.2" [Need::Feature(Feature::Pat)];
    efer_reserved_bits "Intel SDM vol. 3A §2.2.1";
    efer_lme_is_fixed_while_paging "Intel SDM vol. 3A §2.2.1";
    efer_bits_of_features_the_model_lacks "AMD APM vol. 2 §3.1.7";
    cr0_combinations "Intel SDM vol. 3A §2.5, vol. 2B, MOV CR";
    cr0_et_is_fixed "Intel SDM vol. 3A §2.5";
    cr3_reserved_bits "Intel SDM vol. 3A §4.5";
    cr4_reserved_bits "Intel SDM vol. 2B, MOV CR";
    cr0_and_cr4_above_bit_31 "Intel SDM vol. 2B, MOV CR";
    cr4_bits_of_features_the_model_lacks "Intel SDM vol. 3A §2.5";
    cr4_pae_is_fixed_in_long_mode "Intel SDM vol. 3A §4.1.2";
    cr8_reserved_bits "Intel SDM vol. 2B, MOV CR";
    absent_control_registers "Intel SDM vol. 2B, MOV CR";
    xsetbv_checks "Intel SDM vol. 2D, XSETBV" [Need::Feature(Feature::Xsave)];
    segment_base_msrs "Intel SDM vol. 3A §3.4.4.1";
    swapgs "Intel SDM vol. 2B, SWAPGS";
    fsgsbase "Intel SDM vol. 2B, RDFSBASE" [Need::Feature(Feature::Fsgsbase)];
    tsc_can_be_written "Intel SDM vol. 3B §18.17.3";
    tsc_adjust_follows_tsc "Intel SDM vol. 3B §18.17.3" [Need::Feature(Feature::TscAdjust)];
    rdtsc_is_privileged_with_tsd "Intel SDM vol. 2B, RDTSC";
    fast_strings_are_on_after_reset "Intel SDM vol. 4, IA32_MISC_ENABLE";
    misc_enable_takes_the_bits_of_real_processors "Intel SDM vol. 4, IA32_MISC_ENABLE";
    mtrrs_are_there "Intel SDM vol. 3A §12.11" [Need::Feature(Feature::Mtrr)];
}

const RBX: usize = 3;

/// CPUID of each leaf and subleaf, as the guest reads it.
fn cpuid(guest: &mut Guest, leaves: &[(u32, u32)]) -> Result<Vec<CpuidResult>, Failure> {
    guest.load(|a| {
        asm! { a; mov edi, DATA as u32; };
        for (leaf, subleaf) in leaves {
            asm! { a;
                mov eax, *leaf;
                mov ecx, *subleaf;
                cpuid;
                mov dword_ptr(rdi), eax;
                mov dword_ptr(rdi + 4), ebx;
                mov dword_ptr(rdi + 8), ecx;
                mov dword_ptr(rdi + 12), edx;
                add edi, 16;
            };
        }
        asm! { a; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    let mut results = Vec::new();
    for (index, _) in (0..).zip(leaves) {
        let at = DATA + index * 16;
        results.push(CpuidResult {
            eax: guest.read_u32(at)?,
            ebx: guest.read_u32(at + 4)?,
            ecx: guest.read_u32(at + 8)?,
            edx: guest.read_u32(at + 12)?,
        });
    }
    Ok(results)
}

fn cpuid_is_the_models(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let plain = [0, 1, 2, 3, 5, 6, 8, 9, 0xA, 0xC, 0xE].map(|leaf| (leaf, 0));
    let nested = [(4, 0), (4, 1), (4, 2), (4, 3), (4, 4), (7, 0), (0xB, 0), (0xB, 1), (0xB, 2)];
    let xsave = [(0xD, 0), (0xD, 1), (0xD, 2)];
    let extended: Vec<_> = (0x8000_0000..=0x8000_0008_u32).map(|leaf| (leaf, 0)).collect();
    // Leaves 15H and 16H tell frequencies, which are not the model's.
    let leaves = [&plain[..], &nested, &xsave, &extended].concat();
    let context = CpuidContext::default();
    let model = guest.model.clone();
    for ((leaf, subleaf), got) in leaves.iter().zip(cpuid(&mut guest, &leaves)?) {
        let want = model.cpuid(*leaf, *subleaf, &context);
        ensure_eq!(got, want, "leaf {leaf:#x}, subleaf {subleaf}");
    }
    Ok(())
}

fn cpuid_apic_id(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let got = cpuid(&mut guest, &[(1, 0), (0xB, 0)])?;
    let ids: Vec<_> = got.iter().map(|r| (r.ebx >> 24, r.edx)).collect();
    ensure_eq!(ids.first().map(|id| id.0), Some(0), "initial APIC ID");
    ensure_eq!(ids.get(1).map(|id| id.1), Some(0), "x2APIC ID");
    Ok(())
}

fn cpuid_past_the_highest_leaf(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let got = cpuid(&mut guest, &[(0, 0)])?;
    let highest = got.first().map_or(0, |r| r.eax);
    let got = cpuid(&mut guest, &[(highest, 0), (highest + 1, 0), (0x3FFF_FFFF, 0)])?;
    let [last, next, far] = got.as_slice() else {
        return Err(Failure::Wrong("three leaves gave other than three answers".into()));
    };
    ensure_eq!((next, far), (last, last), "leaves past {highest:#x}");
    Ok(())
}

fn cpuid_follows_osxsave_and_xcr0(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mask = guest.model.xcr0_mask();
    guest.load(|a| {
        asm! { a;
            mov eax, 1;
            cpuid;
            mov esi, ecx;
            mov rax, cr4;
            or eax, Cr4::OSXSAVE.bits() as i32;
            mov cr4, rax;
            mov eax, 1;
            cpuid;
            mov edi, ecx;
            mov eax, mask as u32;
            xor edx, edx;
            xor ecx, ecx;
            xsetbv;
            mov eax, 0xD;
            xor ecx, ecx;
            cpuid;
            mov eax, ebx;
            stop;
        };
        Ok(())
    })?;
    let enabled = guest.cpu.finish(&mut Recorder::new())?;
    let osxsave = [6, 7].map(|register| guest.cpu.register(register).map(|v| v >> 27 & 1));
    let [before, after] = osxsave;
    ensure_eq!((before?, after?), (0, 1), "OSXSAVE before and after");
    ensure_eq!(enabled, u64::from(guest.model.xsave_bytes()), "size of the enabled components");
    Ok(())
}

/// Runs `body`, whose last instruction is to raise `vector` with error code 0.
fn faults(
    guest: &mut Guest,
    what: &str,
    vector: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Failure> {
    guest.load(|a| {
        body(a)?;
        // A value nobody stops with otherwise.
        asm! { a; mov eax, 0x600D; stop; };
        Ok(())
    })?;
    match guest.cpu.go(&mut Recorder::new())? {
        super::cpu::End::Fault(fault) => {
            ensure_eq!((fault.vector, fault.error), (vector, 0), "{what}: vector and error code");
            Ok(())
        }
        other => {
            Err(Failure::Wrong(format!("{what}: expected exception {vector}, got {other:x?}")))
        }
    }
}

fn wrmsr(index: u32, value: u64) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a;
            mov ecx, index;
            mov eax, value as u32;
            mov edx, (value >> 32) as u32;
            wrmsr;
        };
        Ok(())
    }
}

fn rdmsr(a: &mut CodeAssembler, index: u32) -> Result<(), IcedError> {
    asm! { a; mov ecx, index; rdmsr; shl rdx, 32; or rax, rdx; };
    Ok(())
}

/// The MSR's value after `value` was written.
fn written(guest: &mut Guest, index: u32, value: u64) -> Result<u64, Failure> {
    guest.load(|a| {
        wrmsr(index, value)(a)?;
        rdmsr(a, index)?;
        asm! { a; mov rbx, rax; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    guest.cpu.register(RBX)
}

fn an_unlisted_msr_faults(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for index in [0x1234_5678, 0x4000, 0xC000_1234] {
        faults(&mut guest, &format!("RDMSR of {index:#x}"), 13, |a| {
            asm! { a; mov ecx, index; rdmsr; };
            Ok(())
        })?;
        faults(&mut guest, &format!("WRMSR of {index:#x}"), 13, wrmsr(index, 0))?;
    }
    Ok(())
}

fn listed_msrs_keep_what_is_written(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let values = [
        (0x174, 0x30),
        (0x175, 0xFFFF_8000_0000_1000),
        (0x176, 0x7FFF_FFFF_F000),
        (0x277, 0x0007_0406_0007_0406),
        (0xC000_0081, 0x0018_0008_0000_0000),
        (0xC000_0082, 0xFFFF_FFFF_8100_0000),
        (0xC000_0084, 0x4_7700),
        (0xC000_0100, 0x1234_5678_9000),
        (0xC000_0101, 0xFFFF_8880_0000_0000),
        (0xC000_0102, 0x5000),
    ];
    for (index, value) in values {
        ensure_eq!(written(&mut guest, index, value)?, value, "MSR {index:#x}");
    }
    Ok(())
}

const NONCANONICAL: u64 = 0x8000_0000_0000;

fn addresses_in_msrs_are_canonical(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for index in [0xC000_0082, 0xC000_0100, 0xC000_0101, 0xC000_0102] {
        let what = format!("WRMSR of {index:#x}");
        faults(&mut guest, &what, 13, wrmsr(index, NONCANONICAL))?;
    }
    Ok(())
}

fn pat_takes_memory_types_only(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for value in [2, 3 << 8, 8 << 56] {
        faults(&mut guest, &format!("PAT of {value:#x}"), 13, wrmsr(0x277, value))?;
    }
    Ok(())
}

const EFER: u32 = 0xC000_0080;

fn efer_reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let running = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    for bit in [1, 7, 9, 20, 40, 63] {
        faults(&mut guest, &format!("EFER bit {bit}"), 13, wrmsr(EFER, running | 1 << bit))?;
    }
    ensure_eq!(written(&mut guest, EFER, running & !1)?, running & !1, "EFER without SCE");
    Ok(())
}

fn efer_lme_is_fixed_while_paging(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    faults(&mut guest, "clearing LME", 13, wrmsr(EFER, Efer::SCE.bits()))
}

fn efer_bits_of_features_the_model_lacks(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let model = super::guest::best_model(hypervisor);
    let lean = crate::CpuModel { features: model.features.without(Feature::Nx), ..model };
    let access = crate::MapAccess::WRITE;
    let mut guest = Guest::with(hypervisor, super::guest::Mode::Protected, 1, access, lean)?;
    faults(&mut guest, "NXE without NX", 13, wrmsr(EFER, Efer::NXE.bits()))
}

fn cr0_combinations(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let before = guest.cpu.get(StateSet::CONTROL)?.control.cr0;
    let bad =
        [("PG without PE", before & !Cr0::PE.bits()), ("NW without CD", before | Cr0::NW.bits())];
    for (what, value) in bad {
        faults(&mut guest, what, 13, |a| {
            asm! { a; mov rax, value; mov cr0, rax; };
            Ok(())
        })?;
    }
    Ok(())
}

fn cr0_et_is_fixed(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rax, cr0;
            and eax, !(Cr0::ET.bits() as i32);
            mov cr0, rax;
            mov rax, cr0;
            stop;
        };
        Ok(())
    })?;
    let after = guest.cpu.finish(&mut Recorder::new())?;
    ensure!(after & Cr0::ET.bits() != 0, "CR0 is {after:#x}");
    Ok(())
}

fn cr3_reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for bit in [51, guest.model.physical_bits, 63] {
        faults(&mut guest, &format!("CR3 bit {bit}"), 13, |a| {
            asm! { a; mov rax, cr3; mov rcx, 1_u64 << bit; or rax, rcx; mov cr3, rax; };
            Ok(())
        })?;
    }
    Ok(())
}

/// Sets a bit in CR4.
fn set_cr4(bits: u64) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a; mov rax, cr4; mov rcx, bits; or rax, rcx; mov cr4, rax; };
        Ok(())
    }
}

fn cr4_reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for bit in [15, 19, 30, 31] {
        faults(&mut guest, &format!("CR4 bit {bit}"), 13, set_cr4(1 << bit))?;
    }
    Ok(())
}

fn cr0_and_cr4_above_bit_31(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for bit in [32, 63] {
        faults(&mut guest, &format!("CR0 bit {bit}"), 13, |a| {
            asm! { a; mov rax, cr0; mov rcx, 1_u64 << bit; or rax, rcx; mov cr0, rax; };
            Ok(())
        })?;
        faults(&mut guest, &format!("CR4 bit {bit}"), 13, set_cr4(1 << bit))?;
    }
    Ok(())
}

fn cr4_bits_of_features_the_model_lacks(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    use Feature::{Fsgsbase, Pcid, Smap, Smep, Umip, Xsave};
    let bits = [
        (Pcid, Cr4::PCIDE),
        (Smep, Cr4::SMEP),
        (Smap, Cr4::SMAP),
        (Fsgsbase, Cr4::FSGSBASE),
        (Xsave, Cr4::OSXSAVE),
        (Umip, Cr4::UMIP),
    ];
    let model = super::guest::best_model(hypervisor);
    let lean = crate::CpuModel {
        features: model.features.intersection(crate::CpuModel::x86_64_v1().features),
        ..model
    };
    let access = crate::MapAccess::WRITE;
    let mut guest = Guest::with(hypervisor, super::guest::Mode::Long, 1, access, lean)?;
    for (feature, bit) in bits {
        if !guest.model.has(feature) {
            faults(&mut guest, &format!("{bit:?}"), 13, set_cr4(bit.bits()))?;
        }
    }
    Ok(())
}

fn cr4_pae_is_fixed_in_long_mode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    faults(&mut guest, "clearing PAE", 13, |a| {
        asm! { a; mov rax, cr4; and eax, !(Cr4::PAE.bits() as i32); mov cr4, rax; };
        Ok(())
    })
}

fn cr8_reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    faults(&mut guest, "CR8 of 16", 13, |a| {
        asm! { a; mov eax, 16; mov cr8, rax; };
        Ok(())
    })
}

fn absent_control_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    faults(&mut guest, "MOV from CR1", 6, |a| a.db(&[0x0F, 0x20, 0xC8]))?;
    faults(&mut guest, "MOV to CR5", 6, |a| a.db(&[0x0F, 0x22, 0xE8]))
}

fn xsetbv_checks(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let xsetbv = |index: u32, value: u64, osxsave: bool| {
        move |a: &mut CodeAssembler| {
            if osxsave {
                set_cr4(Cr4::OSXSAVE.bits())(a)?;
            }
            asm! { a;
                mov ecx, index;
                mov eax, value as u32;
                mov edx, (value >> 32) as u32;
                xsetbv;
            };
            Ok(())
        }
    };
    faults(&mut guest, "XSETBV without OSXSAVE", 6, xsetbv(0, 1, false))?;
    faults(&mut guest, "XCR0 without x87", 13, xsetbv(0, 2, true))?;
    faults(&mut guest, "XCR0 with AVX without SSE", 13, xsetbv(0, 5, true))?;
    faults(&mut guest, "a component nobody has", 13, xsetbv(0, 1 | 1 << 62, true))?;
    faults(&mut guest, "XCR1", 13, xsetbv(1, 1, true))
}

fn segment_base_msrs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write_u32(DATA + 0x10, 0x1111)?;
    guest.write_u32(DATA + 0x1010, 0x2222)?;
    guest.load(|a| {
        wrmsr(0xC000_0100, DATA)(a)?;
        wrmsr(0xC000_0101, DATA + 0x1000)(a)?;
        // mov ebx, fs:[0x10]; mov ecx, gs:[0x10]
        a.db(&[0x64, 0x8B, 0x1C, 0x25, 0x10, 0, 0, 0])?;
        a.db(&[0x65, 0x8B, 0x0C, 0x25, 0x10, 0, 0, 0])?;
        asm! { a; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(guest.cpu.register(RBX)?, 0x1111, "FS:[10h]");
    ensure_eq!(guest.cpu.register(1)?, 0x2222, "GS:[10h]");
    let segments = guest.cpu.get(StateSet::SEGMENTS)?.segments;
    ensure_eq!((segments.fs.base, segments.gs.base), (DATA, DATA + 0x1000), "bases of the state");
    Ok(())
}

fn swapgs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        wrmsr(0xC000_0101, 0x1000)(a)?;
        wrmsr(0xC000_0102, 0xFFFF_8000_0000_2000)(a)?;
        a.swapgs()?;
        rdmsr(a, 0xC000_0101)?;
        a.mov(rbx, rax)?;
        rdmsr(a, 0xC000_0102)?;
        asm! { a; stop; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x1000, "KERNEL_GS_BASE");
    ensure_eq!(guest.cpu.register(RBX)?, 0xFFFF_8000_0000_2000, "GS_BASE");
    Ok(())
}

fn fsgsbase(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    faults(&mut guest, "without CR4.FSGSBASE", 6, |a| a.rdfsbase(rax))?;
    guest.load(|a| {
        set_cr4(Cr4::FSGSBASE.bits())(a)?;
        asm! { a;
            mov rbx, 0x1234_5678_9ABC_u64;
            wrgsbase rbx;
            mov ecx, 0x55;
            wrfsbase ecx;
            rdgsbase rbx;
            rdfsbase rax;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x55, "FS base");
    ensure_eq!(guest.cpu.register(RBX)?, 0x1234_5678_9ABC, "GS base");
    Ok(())
}

fn tsc_can_be_written(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let start = 1_u64 << 52;
    guest.load(|a| {
        wrmsr(0x10, start)(a)?;
        asm! { a; rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    let read = guest.cpu.register(RBX)?;
    ensure!(read >= start && read - start < 1 << 40, "RDTSC read {read:#x} after {start:#x}");
    Ok(())
}

fn tsc_adjust_follows_tsc(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    ensure_eq!(written(&mut guest, 0x3B, 0x1000)?, 0x1000, "TSC_ADJUST");
    guest.load(|a| {
        asm! { a; rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; };
        wrmsr(0x3B, 1 << 52)(a)?;
        asm! { a; rdtsc; shl rdx, 32; or rax, rdx; sub rax, rbx; mov rbx, rax; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    let moved = guest.cpu.register(RBX)?;
    let want = (1_u64 << 52) - 0x1000;
    ensure!(moved >= want && moved - want < 1 << 40, "the TSC moved by {moved:#x}");
    Ok(())
}

fn rdtsc_is_privileged_with_tsd(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    use super::tables::{CODE64_RING3, DATA_RING3};
    let mut guest = Guest::long(hypervisor)?;
    guest.load_at(super::guest::CODE2, |a| a.rdtsc())?;
    faults(&mut guest, "RDTSC in ring 3", 13, |a| {
        set_cr4(Cr4::TSD.bits())(a)?;
        // Ring 0 may.
        asm! { a;
            rdtsc;
            push i32::from(DATA_RING3);
            push super::guest::STACK_RING3 as i32;
            push 2;
            push i32::from(CODE64_RING3);
            push super::guest::CODE2 as i32;
            iretq;
        };
        Ok(())
    })?;
    let fault_rip = guest.cpu.get(StateSet::GENERAL)?.general.rip;
    ensure!(fault_rip < CODE, "the handler is at {fault_rip:#x}");
    Ok(())
}

fn fast_strings_are_on_after_reset(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; mov ecx, 0x1A0; rdmsr; and eax, 1; stop; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 1, "bit 0 of IA32_MISC_ENABLE");
    Ok(())
}

fn misc_enable_takes_the_bits_of_real_processors(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    // Thermal control, SpeedStep, the limit of CPUID; no execute-disable.
    const BITS: u64 = 1 << 3 | 1 << 16 | 1 << 22 | 1 << 34;
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov ecx, 0x1A0;
            rdmsr;
            // Performance monitoring, which is read-only, is as it was.
            or eax, BITS as u32;
            or edx, (BITS >> 32) as u32;
            wrmsr;
            rdmsr;
            mov ebx, eax;
            mov esi, edx;
            stop;
        };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    let value = guest.cpu.register(6)? << 32 | guest.cpu.register(RBX)?;
    ensure_eq!(value & BITS, BITS, "bits of IA32_MISC_ENABLE");
    Ok(())
}

fn mtrrs_are_there(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        rdmsr(a, 0xFE)?;
        asm! { a; stop; };
        Ok(())
    })?;
    let capabilities = guest.cpu.finish(&mut Recorder::new())?;
    ensure!(capabilities & 0xFF <= 8, "MTRRCAP tells {} variable ranges", capabilities & 0xFF);
    ensure_eq!(written(&mut guest, 0x2FF, 0xC06)?, 0xC06, "default type");
    ensure_eq!(written(&mut guest, 0x200, 0xC000_0000)?, 0xC000_0000, "base of range 0");
    ensure_eq!(written(&mut guest, 0x268, 0x0606_0606_0606_0606)?, 0x0606_0606_0606_0606, "fixed");
    faults(&mut guest, "a default type that does not exist", 13, wrmsr(0x2FF, 0xC02))
}
