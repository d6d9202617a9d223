//! Processor modes and the ways between them.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Failure;
use super::asm::{asm, assemble};
use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE2, DATA, Guest, Mode, STACK, TABLES};
use super::recorder::Recorder;
use super::tables::{CODE32, CODE64, DATA0, FREE, GDT, PML4};
use crate::x86::{Cr0, Cr4, Efer};
use crate::{Hypervisor, StateSet};

cases! { "modes":
    from_real_to_64_bit_mode "Intel SDM vol. 3A §10.8.5, 10.9.1";
    from_64_bit_mode_back_to_real "Intel SDM vol. 3A §10.8.5.4, 10.9.2";
    compatibility_mode "Intel SDM vol. 3A §3.2.1; vol. 1 §3.3.7.1";
    protected_mode_is_32_bit "Intel SDM vol. 1 §3.3.7.1";
    paging_of_32_bit "Intel SDM vol. 3A §4.3";
    paging_of_32_bit_with_large_pages "Intel SDM vol. 3A §4.3";
    paging_of_pae "Intel SDM vol. 3A §4.4";
    real_mode_limits "Intel SDM vol. 3B §20.1.1";
    unreal_mode "Intel SDM vol. 3A §10.9.2";
    virtual_8086_mode "Intel SDM vol. 3B §20.2";
}

pub(super) fn in_mode(hypervisor: &dyn Hypervisor, mode: Mode) -> Result<Guest, Failure> {
    Guest::new(hypervisor, mode, 1)
}
/// The next run ends in exception `vector` with `error`.
pub(super) fn raises(
    guest: &mut Guest,
    what: &str,
    vector: u64,
    error: u64,
) -> Result<(), Failure> {
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (vector, error), "{what}: vector and error code");
    Ok(())
}
/// A far return of 64 bits.
pub(super) const RETFQ: [u8; 2] = [0x48, 0xCB];
pub(super) const CODE3: u64 = CODE2 + 0x1000;
/// Far jump with 32-bit offset, in 16-bit code.
fn far_jump_from_16(a: &mut CodeAssembler, selector: u16, offset: u64) -> Result<(), IcedError> {
    a.db(&[0x66, 0xEA])?;
    a.db(&(offset as u32).to_le_bytes())?;
    a.db(&selector.to_le_bytes())
}
/// The same in 32-bit code.
pub(super) fn far_jump_from_32(
    a: &mut CodeAssembler,
    selector: u16,
    offset: u64,
) -> Result<(), IcedError> {
    a.db(&[0xEA])?;
    a.db(&(offset as u32).to_le_bytes())?;
    a.db(&selector.to_le_bytes())
}
fn enter_long_mode(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        mov eax, cr4;
        or eax, Cr4::PAE.bits() as i32;
        mov cr4, eax;
        mov eax, PML4 as u32;
        mov cr3, eax;
        mov ecx, 0xC000_0080_u32;
        rdmsr;
        or eax, Efer::LME.bits() as i32;
        wrmsr;
        mov eax, cr0;
        or eax, Cr0::PG.bits() as u32 as i32;
        mov cr0, eax;
    };
    Ok(())
}
fn from_real_to_64_bit_mode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Real)?;
    // The fixture's real-mode machine has no 64-bit tables but the GDT and the page tables.
    let protected = assemble(32, CODE2, |a| {
        asm! { a; mov eax, u32::from(DATA0); mov ds, eax; mov ss, eax; mov esp, STACK as u32; };
        enter_long_mode(a)?;
        far_jump_from_32(a, CODE64, CODE3)
    })?;
    let long = assemble(64, CODE3, |a| {
        asm! { a;
            mov rax, 0x1_2345_6789_u64;
            shr rax, 4;
            push rax;
            pop rbx;
            mov eax, ebx;
            stop;
        };
        Ok(())
    })?;
    guest.write(CODE2, &protected)?;
    guest.write(CODE3, &long)?;
    guest.load(|a| {
        asm! { a; mov eax, cr0; or eax, Cr0::PE.bits() as i32; mov cr0, eax; };
        far_jump_from_16(a, CODE32, CODE2)
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x1234_5678, "the end in 64-bit mode");
    let state = guest.cpu.get(StateSet::SEGMENTS | StateSet::CONTROL)?;
    let want = (Efer::LME | Efer::LMA).bits();
    ensure_eq!(state.control.efer & want, want, "EFER");
    ensure!(state.segments.cs.attributes.long(), "CS is not a 64-bit segment");
    Ok(())
}
fn from_64_bit_mode_back_to_real(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    // A 16-bit code segment at CODE3.
    let code16 = 0x0000_9B00_0000_FFFF | (CODE3 & 0xFF_FFFF) << 16;
    guest.write_u64(GDT + u64::from(FREE), code16)?;
    let data16 = 0x0000_9300_0000_FFFF_u64;
    guest.write_u64(GDT + u64::from(FREE) + 8, data16)?;
    let compatibility = assemble(32, CODE2, |a| {
        asm! { a;
            mov eax, cr0;
            and eax, 0x7FFF_FFFF;
            mov cr0, eax;
            mov ecx, 0xC000_0080_u32;
            rdmsr;
            and eax, !(Efer::LME.bits() as i32);
            wrmsr;
            mov eax, u32::from(FREE + 8);
            mov ds, eax;
            mov ss, eax;
        };
        far_jump_from_32(a, FREE, 0)
    })?;
    let sixteen = assemble(16, 0, |a| {
        asm! { a; mov eax, cr0; and eax, -2; mov cr0, eax; };
        // jmp CODE3 >> 4 : 0x80
        a.db(&[0xEA, 0x80, 0])?;
        a.db(&((CODE3 >> 4) as u16).to_le_bytes())
    })?;
    let real = assemble(16, 0x80, |a| {
        asm! { a;
            mov ax, (DATA >> 4) as i32;
            mov ds, ax;
            mov word_ptr(4), 0x77;
            movzx eax, word_ptr(4);
            stop;
        };
        Ok(())
    })?;
    guest.write(CODE2, &compatibility)?;
    guest.write(CODE3, &sixteen)?;
    guest.write(CODE3 + 0x80, &real)?;
    guest.load(|a| {
        asm! { a; push i32::from(CODE32); push CODE2 as i32; db &RETFQ; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x77, "the end in real mode");
    ensure_eq!(guest.read_u32(DATA + 4)?, 0x77, "memory at DS:4");
    let control = guest.cpu.get(StateSet::CONTROL)?.control;
    ensure_eq!(control.cr0 & (Cr0::PE | Cr0::PG).bits(), 0, "CR0.PE and CR0.PG");
    ensure_eq!(control.efer & (Efer::LME | Efer::LMA).bits(), 0, "EFER");
    Ok(())
}
fn compatibility_mode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    // 0x40 is INC EAX here, and a prefix in 64-bit mode; addresses wrap at 4 GiB.
    let code = assemble(32, CODE2, |a| {
        asm! { a; mov eax, 5; };
        a.db(&[0x40])?;
        asm! { a;
            mov ebx, 0xFFFF_FFFF_u32;
            mov dword_ptr(ebx + (DATA + 1) as u32), eax;
            push eax;
            pop ecx;
            stop;
        };
        Ok(())
    })?;
    guest.write(CODE2, &code)?;
    guest.load(|a| {
        asm! { a; push i32::from(CODE32); push CODE2 as i32; db &RETFQ; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 6, "EAX");
    ensure_eq!(guest.read_u32(DATA)?, 6, "memory");
    ensure_eq!(guest.cpu.register(1)?, 6, "what was pushed and popped");
    Ok(())
}
fn protected_mode_is_32_bit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    guest.load(|a| {
        asm! { a;
            mov ebx, 0xFFFF_FFF0_u32;
            mov dword_ptr(ebx + (DATA + 0x10) as u32), 9;
            mov ax, -1;
            inc ax;
            pushad;
            mov edx, esp;
            popad;
            mov eax, dword_ptr(DATA as u32);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 9, "memory, by an address that wraps");
    ensure_eq!(guest.cpu.register(4)?, STACK, "ESP");
    Ok(())
}
/// Present, writable, user, accessed, dirty: entries of 32 bits.
const ENTRY: u32 = 0x67;
fn paging_of_32_bit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    let (directory, low, own) = (TABLES, TABLES + 0x1000, TABLES + 0x2000);
    guest.write_u32(directory, low as u32 | ENTRY)?;
    guest.write_u32(directory + 0x300 * 4, own as u32 | ENTRY)?;
    for page in 0..1024_u32 {
        guest.write_u32(low + u64::from(page) * 4, page << 12 | ENTRY)?;
    }
    guest.write_u32(own, DATA as u32 | (ENTRY & !0x60))?;
    guest.load(|a| {
        asm! { a;
            mov eax, directory as u32;
            mov cr3, eax;
            mov eax, cr0;
            or eax, Cr0::PG.bits() as u32 as i32;
            mov cr0, eax;
            mov ebx, 0xC000_0000_u32;
            mov dword_ptr(ebx + 8), 0x123;
            mov eax, dword_ptr(DATA as u32 + 8);
            stop;
            mov eax, dword_ptr(ebx + 0x1000);
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x123, "memory by another address");
    ensure_eq!(guest.read_u32(own)? & 0x60, 0x60, "accessed and dirty bits");
    raises(&mut guest, "a page that is not there", 14, 0)?;
    ensure_eq!(guest.cpu.get(StateSet::CONTROL)?.control.cr2, 0xC000_1000, "CR2");
    Ok(())
}
fn paging_of_32_bit_with_large_pages(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    guest.write_u32(TABLES, ENTRY | 0x80)?;
    guest.write_u32(TABLES + 0x300 * 4, ENTRY | 0x80)?;
    guest.load(|a| {
        asm! { a;
            mov eax, TABLES as u32;
            mov cr3, eax;
            mov eax, cr4;
            or eax, Cr4::PSE.bits() as i32;
            mov cr4, eax;
            mov eax, cr0;
            or eax, Cr0::PG.bits() as u32 as i32;
            mov cr0, eax;
            mov dword_ptr(0xC000_0000_u32 + DATA as u32), 0x456;
            mov eax, dword_ptr(DATA as u32);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x456, "memory by another address");
    Ok(())
}
fn paging_of_pae(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    let (pointers, low, high) = (TABLES, TABLES + 0x1000, TABLES + 0x2000);
    guest.write_u64(pointers, low | 1)?;
    guest.write_u64(pointers + 3 * 8, high | 1)?;
    for page in 0..2_u64 {
        guest.write_u64(low + page * 8, page << 21 | 0xE7)?;
    }
    guest.write_u64(high, 0xE7)?;
    guest.load(|a| {
        asm! { a;
            mov eax, pointers as u32;
            mov cr3, eax;
            mov eax, cr4;
            or eax, Cr4::PAE.bits() as i32;
            mov cr4, eax;
            mov eax, cr0;
            or eax, Cr0::PG.bits() as u32 as i32;
            mov cr0, eax;
            mov dword_ptr(0xC000_0000_u32 + DATA as u32), 0x789;
            mov eax, dword_ptr(DATA as u32);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x789, "memory by another address");
    Ok(())
}
fn real_mode_limits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Real)?;
    guest.load(|a| {
        asm! { a; mov bx, 0xFFFF_u32 as i32; mov al, byte_ptr(bx); mov ax, word_ptr(bx); };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    // mov bx, imm16: 3 bytes; mov al, [bx]: 2.
    ensure_eq!((fault.vector, fault.rip), (13, 5), "a word at 0xFFFF: vector and IP");
    guest.load(|a| {
        asm! { a; mov ebx, 0x1_0000; mov al, byte_ptr(ebx); };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.rip), (13, 6), "a byte at 0x10000: vector and IP");
    Ok(())
}
fn unreal_mode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Real)?;
    guest.write(0x20_0000, &[0x5A])?;
    guest.load(|a| {
        asm! { a;
            // A flat segment, loaded in protected mode, keeps its limit in real mode.
            mov eax, cr0;
            or eax, 1;
            mov cr0, eax;
            mov bx, i32::from(DATA0);
            mov ds, bx;
            and eax, -2;
            mov cr0, eax;
            mov ebx, 0x20_0000;
            movzx eax, byte_ptr(ebx);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x5A, "memory at 2 MiB");
    Ok(())
}
fn virtual_8086_mode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    // At 2000h:0. Interrupts and ports are not for it with IOPL 0: CLI faults.
    let code = assemble(16, 0, |a| {
        asm! { a; mov ax, (DATA >> 4) as i32; mov ds, ax; mov word_ptr(6), 0x99; mov bx, cs; cli; };
        Ok(())
    })?;
    guest.write(CODE2, &code)?;
    guest.load(|a| {
        asm! { a;
            // GS, FS, DS, ES, SS, ESP, EFLAGS with VM, CS, EIP.
            push 0; push 0; push 0; push 0;
            push 0x7000; push 0x100;
            push 0x2_0002;
            push (CODE2 >> 4) as i32;
            push 0;
            iretd;
        };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (13, 0), "vector and error code of CLI");
    let (rip, cs_value) = (code.len() as u64 - 1, CODE2 >> 4);
    ensure_eq!((fault.rip, fault.cs), (rip, cs_value), "IP and CS");
    ensure!(fault.rflags & 0x2_0000 != 0, "saved flags are {:#x}", fault.rflags);
    ensure_eq!(guest.read_u32(DATA + 6)? & 0xFFFF, 0x99, "memory at DS:6");
    let state = guest.cpu.get(StateSet::SEGMENTS | StateSet::GENERAL)?;
    ensure_eq!(state.segments.ds.selector, 0, "DS in the handler");
    ensure_eq!(state.general.rflags & 0x2_0000, 0, "VM in the handler");
    ensure_eq!(state.general.rbx() & 0xFFFF, cs_value, "CS as the program saw it");
    Ok(())
}
