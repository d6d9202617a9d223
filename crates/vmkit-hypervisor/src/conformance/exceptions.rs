//! Exceptions: vector, error code, and where the saved RIP points.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure_eq};
use super::cpu::End;
use super::guest::{CODE2, DATA, Guest, Mode, STACK_RING3};
use super::recorder::Recorder;
use super::tables::{CODE64, CODE64_RING3, DATA_RING3, FREE, GDT, IDT};
use super::{Failure, Need, asm::asm};
use crate::x86::Cr0;
use crate::{Feature, Hypervisor, StateSet};

cases! { "exceptions":
    divide_error "Intel SDM vol. 3A §6.15, interrupt 0";
    breakpoint "Intel SDM vol. 3A §6.15, interrupt 3";
    overflow "Intel SDM vol. 3A §6.15, interrupt 4";
    bound_range "Intel SDM vol. 3A §6.15, interrupt 5";
    invalid_opcode "Intel SDM vol. 3A §6.15, interrupt 6";
    lock_without_memory_is_invalid "Intel SDM vol. 2A, LOCK";
    x87_with_task_switched "Intel SDM vol. 3A §6.15, interrupt 7";
    sse_with_task_switched "Intel SDM vol. 3A §6.15, interrupt 7";
    sse_with_em_is_invalid "Intel SDM vol. 3A §13.1";
    segment_not_present "Intel SDM vol. 3A §6.15, interrupt 11";
    stack_segment_not_present "Intel SDM vol. 3A §6.15, interrupt 12";
    noncanonical_stack "Intel SDM vol. 3A §6.15, interrupt 12";
    noncanonical_stack_at_a_call "Intel SDM vol. 3A §6.15, interrupt 12";
    noncanonical_data "Intel SDM vol. 3A §6.15, interrupt 13";
    selector_past_the_table "Intel SDM vol. 3A §6.15, interrupt 13";
    privileged_instruction_in_ring_3 "Intel SDM vol. 3A §6.15, interrupt 13";
    port_access_in_ring_3 "Intel SDM vol. 1 §19.5";
    software_interrupt "Intel SDM vol. 2A, INT";
    software_interrupt_through_a_privileged_gate "Intel SDM vol. 3A §6.12.1.1";
    vector_past_the_table "Intel SDM vol. 3A §6.12";
    gate_not_present "Intel SDM vol. 3A §6.15, interrupt 11";
    alignment_check_in_ring_3 "Intel SDM vol. 3A §6.15, interrupt 17";
    x87_error "Intel SDM vol. 3A §6.15, interrupt 16";
    sse_error "Intel SDM vol. 3A §6.15, interrupt 19" [Need::Feature(Feature::Sse2)];
    instruction_past_15_bytes "Intel SDM vol. 2A §2.3.11";
    double_fault "Intel SDM vol. 3A §6.15, interrupt 8";
    ist_stack "Intel SDM vol. 3A §6.14.5";
    the_saved_flags_resume "Intel SDM vol. 3A §6.8.3, 6.12";
    real_mode_exception "Intel SDM vol. 3B §20.1.4";
    a_handler_can_return "Intel SDM vol. 2A, IRET";
}

/// Runs `before`, then `instruction`, which is to raise `vector` with `error`. The saved RIP is to
/// be the instruction's, or the next one's if `after`.
fn expect(
    hypervisor: &dyn Hypervisor,
    mode: Mode,
    before: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    instruction: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    (vector, error, after): (u64, u64, bool),
) -> Result<Guest, Failure> {
    expect_in(Guest::new(hypervisor, mode, 1)?, before, instruction, (vector, error, after))
}

fn expect_in(
    mut guest: Guest,
    before: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    instruction: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    (vector, error, after): (u64, u64, bool),
) -> Result<Guest, Failure> {
    let len = guest.load_at(CODE2, instruction)?;
    guest.write(CODE2 + len, &[0x0F, 0x0B])?;
    guest.load(|a| {
        before(a)?;
        a.jmp(CODE2)
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    let rip = if after { CODE2 + len } else { CODE2 };
    ensure_eq!((fault.vector, fault.error), (vector, error), "vector and error code");
    ensure_eq!(fault.rip, rip, "saved RIP");
    Ok(guest)
}

/// Goes to ring 3 by IRETQ, at [`CODE2`].
fn to_ring3(a: &mut CodeAssembler, flags: i32) -> Result<(), IcedError> {
    asm! { a;
        push i32::from(DATA_RING3);
        push STACK_RING3 as i32;
        push flags;
        push i32::from(CODE64_RING3);
        push CODE2 as i32;
        iretq;
    };
    Ok(())
}

/// Executes `instruction` in ring 3, where it is to fault.
fn expect_in_ring3(
    hypervisor: &dyn Hypervisor,
    flags: i32,
    instruction: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    (vector, error): (u64, u64),
) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load_at(CODE2, instruction)?;
    guest.load(|a| to_ring3(a, flags))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr0 |= Cr0::AM.bits())?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (vector, error), "vector and error code");
    ensure_eq!((fault.rip, fault.cs), (CODE2, CODE64_RING3.into()), "saved RIP and CS");
    Ok(())
}

fn nothing(_: &mut CodeAssembler) -> Result<(), IcedError> {
    Ok(())
}

fn divide_error(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let by_zero = |a: &mut CodeAssembler| {
        asm! { a; mov eax, 1; xor edx, edx; xor ecx, ecx; };
        Ok(())
    };
    expect(hypervisor, Mode::Long, by_zero, |a| a.div(ecx), (0, 0, false))?;
    let too_large = |a: &mut CodeAssembler| {
        asm! { a; mov eax, i32::MIN; cdq; mov ecx, -1; };
        Ok(())
    };
    expect(hypervisor, Mode::Long, too_large, |a| a.idiv(ecx), (0, 0, false)).map(drop)
}

fn breakpoint(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for mode in [Mode::Protected, Mode::Long] {
        expect(hypervisor, mode, nothing, |a| a.int3(), (3, 0, true))?;
    }
    Ok(())
}

fn overflow(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let overflowed = |a: &mut CodeAssembler| {
        asm! { a; mov al, 0x7F; add al, 1; };
        Ok(())
    };
    expect(hypervisor, Mode::Protected, overflowed, |a| a.into(), (4, 0, true)).map(drop)
}

fn bound_range(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let out_of_range = |a: &mut CodeAssembler| {
        asm! { a;
            mov dword_ptr(DATA), 10;
            mov dword_ptr(DATA + 4), 20;
            mov eax, 21;
        };
        Ok(())
    };
    let bound = |a: &mut CodeAssembler| a.bound(eax, dword_ptr(DATA));
    expect(hypervisor, Mode::Protected, out_of_range, bound, (5, 0, false)).map(drop)
}

fn invalid_opcode(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    expect(hypervisor, Mode::Long, nothing, |a| a.ud2(), (6, 0, false))?;
    // PUSH ES does not exist in 64-bit mode.
    expect(hypervisor, Mode::Long, nothing, |a| a.db(&[0x06]), (6, 0, false)).map(drop)
}

fn lock_without_memory_is_invalid(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // lock add eax, ecx
    expect(hypervisor, Mode::Long, nothing, |a| a.db(&[0xF0, 0x01, 0xC8]), (6, 0, false))?;
    // lock mov [rax], ecx
    expect(hypervisor, Mode::Long, nothing, |a| a.db(&[0xF0, 0x89, 0x08]), (6, 0, false)).map(drop)
}

fn set_cr0(a: &mut CodeAssembler, set: Cr0) -> Result<(), IcedError> {
    asm! { a; mov rax, cr0; or eax, set.bits() as i32; mov cr0, rax; };
    Ok(())
}

fn x87_with_task_switched(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for set in [Cr0::TS, Cr0::EM] {
        expect(hypervisor, Mode::Long, |a| set_cr0(a, set), |a| a.fninit(), (7, 0, false))?;
    }
    Ok(())
}

fn sse_with_task_switched(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| {
        set_cr0(a, Cr0::TS)?;
        a.mov(rsi, DATA)
    };
    let load = |a: &mut CodeAssembler| a.movups(xmm0, xmmword_ptr(rsi));
    expect(hypervisor, Mode::Long, before, load, (7, 0, false)).map(drop)
}

fn sse_with_em_is_invalid(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| {
        set_cr0(a, Cr0::EM)?;
        a.mov(rsi, DATA)
    };
    let load = |a: &mut CodeAssembler| a.movups(xmm0, xmmword_ptr(rsi));
    expect(hypervisor, Mode::Long, before, load, (6, 0, false)).map(drop)
}

/// A writable data segment of ring 0 that is not present.
const ABSENT: u64 = 0x00CF_1300_0000_FFFF;

fn with_descriptor(hypervisor: &dyn Hypervisor, descriptor: u64) -> Result<Guest, Failure> {
    let guest = Guest::long(hypervisor)?;
    guest.write_u64(GDT + u64::from(FREE), descriptor)?;
    Ok(guest)
}

fn segment_not_present(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = with_descriptor(hypervisor, ABSENT)?;
    let before = |a: &mut CodeAssembler| a.mov(eax, u32::from(FREE));
    expect_in(guest, before, |a| a.mov(ds, eax), (11, FREE.into(), false)).map(drop)
}

fn stack_segment_not_present(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = with_descriptor(hypervisor, ABSENT)?;
    let before = |a: &mut CodeAssembler| a.mov(eax, u32::from(FREE));
    expect_in(guest, before, |a| a.mov(ss, eax), (12, FREE.into(), false)).map(drop)
}

fn noncanonical_stack(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| a.mov(rbp, 0x8000_0000_0000_0000_u64);
    let load = |a: &mut CodeAssembler| a.mov(rax, qword_ptr(rbp));
    expect(hypervisor, Mode::Long, before, load, (12, 0, false)).map(drop)
}

fn noncanonical_stack_at_a_call(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| {
        asm! { a;
            mov ebx, CODE2 as u32;
            mov edi, DATA as u32;
            mov qword_ptr(rdi), rbx;
            mov rsp, 0x8000_0000_0000_0000_u64;
        };
        Ok(())
    };
    type Call = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let calls: [Call; 3] = [|a| a.call(CODE2), |a| a.call(rbx), |a| a.call(qword_ptr(rdi))];
    for call in calls {
        let guest = Guest::long(hypervisor)?;
        // The handler of #SS needs a stack: IST 1.
        guest.write(IDT + 12 * 16 + 4, &[1])?;
        expect_in(guest, before, call, (12, 0, false))?;
    }
    Ok(())
}

fn noncanonical_data(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| a.mov(rbx, 0x0000_8000_0000_0000_u64);
    let load = |a: &mut CodeAssembler| a.mov(rax, qword_ptr(rbx));
    expect(hypervisor, Mode::Long, before, load, (13, 0, false))?;
    let store = |a: &mut CodeAssembler| a.mov(byte_ptr(rbx), al);
    expect(hypervisor, Mode::Long, before, store, (13, 0, false)).map(drop)
}

fn selector_past_the_table(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| a.mov(eax, 0x1003);
    expect(hypervisor, Mode::Long, before, |a| a.mov(es, eax), (13, 0x1000, false)).map(drop)
}

fn privileged_instruction_in_ring_3(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    expect_in_ring3(hypervisor, 2, |a| a.hlt(), (13, 0))?;
    expect_in_ring3(hypervisor, 2, |a| a.mov(rax, cr0), (13, 0))?;
    expect_in_ring3(hypervisor, 2, |a| a.cli(), (13, 0))
}

fn port_access_in_ring_3(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    expect_in_ring3(hypervisor, 2, |a| a.out(0x80, al), (13, 0))?;
    // With IOPL 3 it is allowed.
    let mut guest = Guest::long(hypervisor)?;
    guest.load_at(CODE2, |a| {
        asm! { a; mov eax, 0x55; stop; };
        Ok(())
    })?;
    guest.load(|a| to_ring3(a, 0x3002))?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x55, "with IOPL 3");
    Ok(())
}

fn software_interrupt(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for mode in [Mode::Protected, Mode::Long] {
        expect(hypervisor, mode, nothing, |a| a.int(0x80), (0x80, 0, true))?;
    }
    Ok(())
}

fn software_interrupt_through_a_privileged_gate(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    expect_in_ring3(hypervisor, 2, |a| a.int(0x80), (13, 0x80 * 8 + 2))
}

fn vector_past_the_table(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load_at(CODE2, |a| a.int(0x80))?;
    guest.load(|a| a.jmp(CODE2))?;
    guest.cpu.change(StateSet::SEGMENTS, |state| state.segments.idt.limit = 0x1FF)?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (13, 0x80 * 8 + 2), "vector and error code");
    ensure_eq!(fault.rip, CODE2, "saved RIP");
    Ok(())
}

fn gate_not_present(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::long(hypervisor)?;
    guest.write(IDT + 0x80 * 16 + 5, &[0x0E])?;
    expect_in(guest, nothing, |a| a.int(0x80), (11, 0x80 * 8 + 2, false)).map(drop)
}

fn alignment_check_in_ring_3(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let unaligned = |a: &mut CodeAssembler| a.mov(eax, dword_ptr(DATA + 1));
    expect_in_ring3(hypervisor, 0x4_0002, unaligned, (17, 0))
}

fn x87_error(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| {
        asm! { a;
            fninit;
            mov dword_ptr(DATA), 0x37B;
            fldcw word_ptr(DATA);
            fld1;
            fldz;
            fdivp st1, st0;
        };
        Ok(())
    };
    expect(hypervisor, Mode::Long, before, |a| a.wait(), (16, 0, false)).map(drop)
}

fn sse_error(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let before = |a: &mut CodeAssembler| {
        asm! { a;
            mov dword_ptr(DATA), 0x1D80;
            ldmxcsr dword_ptr(DATA);
            mov eax, 1;
            cvtsi2sd xmm0, eax;
            xorps xmm1, xmm1;
        };
        Ok(())
    };
    let divide = |a: &mut CodeAssembler| a.divsd(xmm0, xmm1);
    expect(hypervisor, Mode::Long, before, divide, (19, 0, false)).map(drop)
}

fn instruction_past_15_bytes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let long = |a: &mut CodeAssembler| {
        a.db(&[0x66; 15])?;
        a.db(&[0x90])
    };
    expect(hypervisor, Mode::Long, nothing, long, (13, 0, false)).map(drop)
}

fn double_fault(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // #GP whose gate is not present: #NP on the way is a second contributory exception.
    let mut guest = Guest::long(hypervisor)?;
    guest.write(IDT + 13 * 16 + 5, &[0x0E])?;
    guest.load(|a| {
        asm! { a; mov rbx, 0x0000_8000_0000_0000_u64; mov rax, qword_ptr(rbx); };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (8, 0), "vector and error code");
    ensure_eq!(fault.cs, u64::from(CODE64), "saved CS");
    Ok(())
}

fn ist_stack(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::long(hypervisor)?;
    guest.write(IDT + 6 * 16 + 4, &[1])?;
    let mut guest = expect_in(guest, nothing, |a| a.ud2(), (6, 0, false))?;
    // SS, RSP, RFLAGS, CS, RIP, and the handler's two.
    let top = guest.cpu.get(StateSet::GENERAL)?.general.rsp();
    ensure_eq!(top, super::guest::STACK_IST1 - 7 * 8, "RSP");
    Ok(())
}

fn the_saved_flags_resume(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; stc; std; sti; ud2; };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    // IF, DF, CF and the fixed bit; a fault saves RF too (Intel SDM vol. 3A §6.8.3).
    ensure_eq!(fault.rflags & !0x1_0000, 0x603, "saved flags");
    let inside = guest.cpu.get(StateSet::GENERAL)?.general.rflags;
    ensure_eq!(inside & 0x1_0300, 0, "IF, TF, RF in the handler");
    Ok(())
}

fn real_mode_exception(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Real, 1)?;
    guest.load(|a| {
        asm! { a; xor cx, cx; div cx; };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.rip, fault.cs), (0, 2, 0x1000), "vector, IP and CS");
    Ok(())
}

fn a_handler_can_return(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for mode in [Mode::Real, Mode::Protected, Mode::Long] {
        let mut guest = Guest::new(hypervisor, mode, 1)?;
        guest.load(|a| {
            asm! { a; mov ebx, 5; int 0x40; inc ebx; mov eax, ebx; stop; };
            Ok(())
        })?;
        let mut io = Recorder::new();
        ensure_eq!(guest.cpu.fault(&mut io)?.vector, 0x40, "vector in {mode:?}");
        let end = guest.cpu.go(&mut io)?;
        ensure_eq!(end, End::Stop(6), "what follows IRET in {mode:?}");
    }
    Ok(())
}
