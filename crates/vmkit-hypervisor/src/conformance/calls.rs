//! Ways into another privilege level or task: IRET, system calls, gates, task switches.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::asm;
use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE, CODE2, DATA, Guest, Mode, STACK_RING0, STACK_RING3};
use super::modes::{CODE3, RETFQ, far_jump_from_32, in_mode, raises};
use super::recorder::Recorder;
use super::tables::{
    CODE32, CODE32_RING3, CODE64, CODE64_RING3, DATA_RING3, DATA0, FREE, GDT, TSS,
};
use super::{Failure, Need};
use crate::x86::{Cr0, Efer};
use crate::{Feature, Hypervisor, StateSet};

cases! { "calls":
    iretq_to_ring_3_and_int_back "Intel SDM vol. 3A §6.14.4";
    iretq_to_32_bit_ring_3 "Intel SDM vol. 2A, IRET";
    popf_in_ring_3_keeps_if_and_iopl "Intel SDM vol. 2B, POPF";
    syscall_and_sysret "Intel SDM vol. 2B, SYSCALL, SYSRET" [Need::Feature(Feature::Syscall)];
    a_step_over_syscall_and_sysret_goes_by_tf_after_them "Intel SDM vol. 2B, SYSCALL, SYSRET"
        [Need::Feature(Feature::Syscall)];
    syscall_needs_sce "Intel SDM vol. 2B, SYSCALL" [Need::Feature(Feature::Syscall)];
    sysenter_and_sysexit "Intel SDM vol. 2B, SYSENTER, SYSEXIT" [Need::Feature(Feature::Sep)];
    sysenter_without_a_selector "Intel SDM vol. 2B, SYSENTER" [Need::Feature(Feature::Sep)];
    call_gate_of_64_bit "Intel SDM vol. 3A §5.8.3.1";
    call_gate_of_32_bit_copies_parameters "Intel SDM vol. 3A §5.8.5";
    a_task_switch_by_jump "Intel SDM vol. 3A §7.3";
}

fn to_ring3(a: &mut CodeAssembler, selector: u16, rip: u64, flags: i32) -> Result<(), IcedError> {
    asm! { a;
        push i32::from(DATA_RING3);
        push STACK_RING3 as i32;
        push flags;
        push i32::from(selector);
        push rip as i32;
        iretq;
    };
    Ok(())
}
fn iretq_to_ring_3_and_int_back(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    super::tables::gate(&guest.ram, Mode::Long, 0x80, CODE3, 3)?;
    // The handler stops with the selectors and stack it found.
    guest.load_at(CODE3, |a| {
        asm! { a; mov ebx, cs; mov ecx, ss; mov rdx, rsp; mov eax, dword_ptr(rsp + 8); stop; iretq; };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| {
        asm! { a; mov esi, cs; mov edi, ss; int 0x80; mov eax, cs; int 0x80; };
        Ok(())
    })?;
    guest.load(|a| to_ring3(a, CODE64_RING3, CODE2, 0x202))?;
    let mut io = Recorder::new();
    for round in 0..2 {
        let saved_cs = guest.cpu.finish(&mut io)?;
        ensure_eq!(saved_cs, u64::from(CODE64_RING3), "saved CS in round {round}");
        ensure_eq!(guest.cpu.register(3)?, u64::from(CODE64), "CS of the handler");
        ensure_eq!(guest.cpu.register(1)?, 0, "SS of the handler");
        ensure_eq!(guest.cpu.register(2)?, STACK_RING0 - 40, "RSP of the handler");
    }
    ensure_eq!(guest.cpu.register(6)?, u64::from(CODE64_RING3), "CS in ring 3");
    ensure_eq!(guest.cpu.register(7)?, u64::from(DATA_RING3), "SS in ring 3");
    Ok(())
}
fn iretq_to_32_bit_ring_3(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    // inc eax as 0x40; ud2
    guest.write(CODE2, &[0xB8, 7, 0, 0, 0, 0x40, 0x0F, 0x0B])?;
    guest.load(|a| to_ring3(a, CODE32_RING3, CODE2, 2))?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    let want = (6, CODE2 + 6, u64::from(CODE32_RING3));
    ensure_eq!((fault.vector, fault.rip, fault.cs), want, "vector, RIP and CS");
    ensure_eq!(guest.cpu.register(0)?, 8, "EAX");
    Ok(())
}
fn popf_in_ring_3_keeps_if_and_iopl(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    guest.load_at(CODE2, |a| {
        // CF and IOPL on, IF off: only CF is for ring 3 to change.
        asm! { a; push 0x3003; popfq; pushfq; pop rbx; ud2; };
        Ok(())
    })?;
    guest.load(|a| to_ring3(a, CODE64_RING3, CODE2, 0x202))?;
    raises(&mut guest, "the end", 6, 0)?;
    ensure_eq!(guest.cpu.register(3)?, 0x203, "flags");
    Ok(())
}
fn write_msr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    asm! { a;
        mov ecx, index;
        mov eax, value as u32;
        mov edx, (value >> 32) as u32;
        wrmsr;
    };
    Ok(())
}
fn syscall_and_sysret(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    guest.load_at(CODE3, |a| {
        asm! { a;
            mov ebx, cs;
            mov ebp, ss;
            pushfq;
            pop rsi;
            stop;
            sysretq;
        };
        Ok(())
    })?;
    let len = guest.load_at(CODE2, |a| {
        asm! { a; std; mov eax, 1; syscall; };
        Ok(())
    })?;
    guest.load_at(CODE2 + len, |a| {
        asm! { a; mov r8d, cs; mov r9d, ss; pushfq; pop r10; ud2; };
        Ok(())
    })?;
    guest.load(|a| {
        write_msr(a, 0xC000_0081, u64::from(CODE32_RING3) << 48 | u64::from(CODE64) << 32)?;
        write_msr(a, 0xC000_0082, CODE3)?;
        // Masks DF and IF.
        write_msr(a, 0xC000_0084, 0x600)?;
        to_ring3(a, CODE64_RING3, CODE2, 0x202)
    })?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let general = guest.cpu.get(StateSet::GENERAL)?.general;
    let [_, rcx_, _, rbx_, _, rbp_, rsi_, .., r11_, _, _, _, _] = general.gpr;
    ensure_eq!((rbx_, rbp_), (u64::from(CODE64), u64::from(DATA0)), "CS and SS");
    ensure_eq!(rcx_, CODE2 + len, "RCX: where to return");
    ensure_eq!((r11_, rsi_), (0x602, 0x002), "R11 and flags");
    let fault = guest.cpu.fault(&mut io)?;
    ensure_eq!(
        (fault.vector, fault.cs),
        (6, u64::from(CODE64_RING3)),
        "vector and CS after SYSRET"
    );
    let selectors = (guest.cpu.register(8)?, guest.cpu.register(9)?);
    let want = (u64::from(CODE64_RING3), u64::from(DATA_RING3));
    ensure_eq!(selectors, want, "CS and SS after SYSRET");
    ensure_eq!(guest.cpu.register(10)?, 0x602, "flags after SYSRET");
    Ok(())
}
fn a_step_over_syscall_and_sysret_goes_by_tf_after_them(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    const TF: u64 = 0x100;
    // The second time, the kernel is stepped too.
    for (mask, traps) in [(TF, &[][..]), (0, &[CODE3, CODE3 + 1])] {
        let mut guest = in_mode(hypervisor, Mode::Long)?;
        guest.load_at(CODE3, |a| {
            asm! { a; nop; sysretq; };
            Ok(())
        })?;
        guest.load_at(CODE2, |a| {
            asm! { a; syscall; nop; nop; ud2; };
            Ok(())
        })?;
        guest.load(|a| {
            write_msr(a, 0xC000_0081, u64::from(CODE32_RING3) << 48 | u64::from(CODE64) << 32)?;
            write_msr(a, 0xC000_0082, CODE3)?;
            write_msr(a, 0xC000_0084, mask)?;
            to_ring3(a, CODE64_RING3, CODE2, 2 | TF as i32)
        })?;
        let mut io = Recorder::new();
        // SYSCALL is of two bytes. SYSRET restores TF and traps at once, before the NOP.
        let after = [CODE2 + 2, CODE2 + 3, CODE2 + 4];
        for &rip in traps.iter().chain(&after) {
            let fault = guest.cpu.fault(&mut io)?;
            ensure_eq!((fault.vector, fault.rip), (1, rip), "vector and RIP, FMASK {mask:#x}");
        }
    }
    Ok(())
}
fn syscall_needs_sce(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    guest.load(|a| a.syscall())?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.efer &= !Efer::SCE.bits())?;
    raises(&mut guest, "SYSCALL without SCE", 6, 0)
}
fn sysenter_and_sysexit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    guest.load_at(CODE3, |a| {
        asm! { a;
            mov ebx, cs;
            mov ebp, ss;
            mov rsi, rsp;
            stop;
            mov edx, (CODE2 + 0x100) as u32;
            mov ecx, STACK_RING3 as u32;
            sysexitq;
        };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| a.sysenter())?;
    guest.load_at(CODE2 + 0x100, |a| {
        asm! { a; mov r8d, cs; mov r9, rsp; ud2; };
        Ok(())
    })?;
    guest.load(|a| {
        write_msr(a, 0x174, CODE64.into())?;
        write_msr(a, 0x175, STACK_RING0 - 0x800)?;
        write_msr(a, 0x176, CODE3)?;
        to_ring3(a, CODE64_RING3, CODE2, 0x202)
    })?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let selectors = (guest.cpu.register(3)?, guest.cpu.register(5)?);
    ensure_eq!(selectors, (u64::from(CODE64), u64::from(DATA0)), "CS and SS");
    ensure_eq!(guest.cpu.register(6)?, STACK_RING0 - 0x800, "RSP");
    let flags = guest.cpu.get(StateSet::GENERAL)?.general.rflags;
    ensure_eq!(flags & 0x200, 0, "IF");
    let fault = guest.cpu.fault(&mut io)?;
    ensure_eq!(
        (fault.vector, fault.cs),
        (6, u64::from(CODE64_RING3)),
        "vector and CS after SYSEXIT"
    );
    ensure_eq!(guest.cpu.register(9)?, STACK_RING3, "RSP after SYSEXIT");
    Ok(())
}
fn sysenter_without_a_selector(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    guest.load_at(CODE2, |a| a.sysenter())?;
    guest.load(|a| {
        write_msr(a, 0x174, 0)?;
        to_ring3(a, CODE64_RING3, CODE2, 2)
    })?;
    raises(&mut guest, "SYSENTER", 13, 0)
}
/// A pointer for a far call: offset and selector.
fn put_far_pointer(guest: &Guest, at: u64, offset: u32, selector: u16) -> Result<(), Failure> {
    guest.write_u32(at, offset)?;
    guest.write(at + 4, &selector.to_le_bytes())
}
fn call_gate_of_64_bit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Long)?;
    let gate =
        CODE3 & 0xFFFF | u64::from(CODE64) << 16 | 0xEC00 << 32 | (CODE3 >> 16 & 0xFFFF) << 48;
    guest.write_u64(GDT + u64::from(FREE), gate)?;
    guest.write_u64(GDT + u64::from(FREE) + 8, 0)?;
    put_far_pointer(&guest, DATA, 0, FREE | 3)?;
    guest.load_at(CODE3, |a| {
        asm! { a; mov ebx, cs; mov rsi, rsp; stop; db &RETFQ; };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| {
        a.call(fword_ptr(DATA))?;
        asm! { a; mov r8d, cs; mov r9, rsp; ud2; };
        Ok(())
    })?;
    guest.load(|a| to_ring3(a, CODE64_RING3, CODE2, 2))?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    ensure_eq!(guest.cpu.register(3)?, u64::from(CODE64), "CS");
    // SS, RSP, CS, RIP.
    ensure_eq!(guest.cpu.register(6)?, STACK_RING0 - 32, "RSP");
    raises(&mut guest, "the end", 6, 0)?;
    let back = (guest.cpu.register(8)?, guest.cpu.register(9)?);
    ensure_eq!(back, (u64::from(CODE64_RING3), STACK_RING3), "CS and RSP after RETF");
    Ok(())
}
/// IRETD to ring 3 of 32-bit protected mode.
fn to_ring3_of_32_bit(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        push i32::from(DATA_RING3);
        push STACK_RING3 as i32;
        push 2;
        push i32::from(CODE32_RING3);
        push CODE2 as i32;
        iretd;
    };
    Ok(())
}
fn call_gate_of_32_bit_copies_parameters(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    // Two parameters.
    let gate =
        CODE3 & 0xFFFF | u64::from(CODE32) << 16 | 0xEC02 << 32 | (CODE3 >> 16 & 0xFFFF) << 48;
    guest.write_u64(GDT + u64::from(FREE), gate)?;
    guest.load_at(CODE3, |a| {
        asm! { a;
            mov ebx, dword_ptr(esp + 8);
            mov ecx, dword_ptr(esp + 12);
            mov esi, esp;
            mov eax, cs;
            stop;
            retf_1 8;
        };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| {
        asm! { a; push 0x11; push 0x22; };
        // call FREE | 3 : 0
        a.db(&[0x9A, 0, 0, 0, 0])?;
        a.db(&(FREE | 3).to_le_bytes())?;
        asm! { a; mov edi, esp; mov edx, cs; ud2; };
        Ok(())
    })?;
    guest.load(to_ring3_of_32_bit)?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.finish(&mut io)?, u64::from(CODE32), "CS");
    ensure_eq!((guest.cpu.register(3)?, guest.cpu.register(1)?), (0x22, 0x11), "parameters");
    // SS, ESP, two parameters, CS, EIP.
    ensure_eq!(guest.cpu.register(6)?, STACK_RING0 - 24, "ESP");
    raises(&mut guest, "the end", 6, 0)?;
    let back = (guest.cpu.register(2)?, guest.cpu.register(7)?);
    ensure_eq!(back, (u64::from(CODE32_RING3), STACK_RING3), "CS and ESP after RETF");
    Ok(())
}
fn a_task_switch_by_jump(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    let task = DATA + 0x800;
    // An available 32-bit TSS.
    let descriptor = 0x67 | (task & 0xFF_FFFF) << 16 | 0x89 << 40;
    guest.write_u64(GDT + u64::from(FREE), descriptor)?;
    // CR3, EIP, EFLAGS, then EAX to EDI, then the segments.
    let words = [(0x20, CODE2 as u32), (0x24, 2), (0x28, 0x1234), (0x34, 0x5678)];
    for (offset, value) in words {
        guest.write_u32(task + offset, value)?;
    }
    guest.write_u32(task + 0x38, 0x7_F000)?;
    for (offset, selector) in [(0x48, DATA0), (0x4C, CODE32), (0x50, DATA0), (0x54, DATA0)] {
        guest.write_u32(task + offset, selector.into())?;
    }
    guest.load_at(CODE2, |a| {
        asm! { a; mov esi, cr0; str cx; stop; };
        Ok(())
    })?;
    guest.load(|a| {
        asm! { a; mov ebp, 0x4321; };
        far_jump_from_32(a, FREE, 0)
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x1234, "EAX");
    ensure_eq!(guest.cpu.register(3)?, 0x5678, "EBX");
    ensure_eq!(guest.cpu.register(4)?, 0x7_F000, "ESP");
    ensure_eq!(guest.cpu.register(1)? & 0xFFFF, u64::from(FREE), "TR");
    ensure!(guest.cpu.register(6)? & Cr0::TS.bits() != 0, "CR0.TS is clear");
    ensure_eq!(guest.read_u32(TSS + 0x3C)?, 0x4321, "EBP in the old TSS");
    // EIP after the jump: 5 bytes of MOV, 7 of JMP.
    ensure_eq!(guest.read_u32(TSS + 0x20)?, CODE as u32 + 12, "EIP in the old TSS");
    let busy = |guest: &Guest, selector: u64| -> Result<u64, Failure> {
        Ok(guest.read_u64(GDT + selector)? >> 40 & 0xF)
    };
    ensure_eq!(busy(&guest, FREE.into())?, 0xB, "type of the new TSS");
    let old = busy(&guest, super::tables::TSS_SELECTOR.into())?;
    ensure_eq!(old, 9, "type of the old TSS");
    Ok(())
}
