//! Port and memory-mapped I/O: width, direction, values, and accesses that straddle.

use iced_x86::code_asm::*;
use vmkit_device::{Doorbell, EventFd};

use super::case::{cases, ensure, ensure_eq};
use super::guest::{DATA, Guest, MMIO, RAM};
use super::recorder::{Access, Recorder};
use super::{Failure, Need, asm::asm};
use crate::Hypervisor;

cases! { "io":
    port_write_widths "Intel SDM vol. 2B, OUT";
    port_read_widths "Intel SDM vol. 2A, IN";
    mmio_write_widths "Intel SDM vol. 1 §19.3.1";
    mmio_read_widths "Intel SDM vol. 1 §19.3.1";
    mmio_reads_extend_as_the_instruction_says "Intel SDM vol. 2B, MOVZX, MOVSX";
    mmio_read_modify_write "Intel SDM vol. 2A, ADD, XCHG";
    mmio_unaligned "Intel SDM vol. 3A §9.1.1";
    mmio_across_pages "the contract: an access is of 1, 2, 4 or 8 bytes";
    ram_and_mmio_in_one_access "the contract: what is mapped is memory, the rest is MMIO";
    mmio_push_and_pop "Intel SDM vol. 2B, PUSH, POP";
    doorbells_ring_without_a_callback "the contract: Doorbells" [Need::Doorbells];
}

fn port_write_widths(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov eax, 0x8433_22F1_u32;
            out 0x80, al;
            out 0x81, ax;
            out 0x83, eax;
            mov dx, 0xCF8_i32;
            out dx, al;
            out dx, ax;
            out dx, eax;
            mov dx, 0xFFFF_i32;
            xor eax, eax;
            out dx, al;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let want = [
        Access::Out(0x80, 1, 0xF1),
        Access::Out(0x81, 2, 0x22F1),
        Access::Out(0x83, 4, 0x8433_22F1),
        Access::Out(0xCF8, 1, 0xF1),
        Access::Out(0xCF8, 2, 0x22F1),
        Access::Out(0xCF8, 4, 0x8433_22F1),
        Access::Out(0xFFFF, 1, 0),
    ];
    ensure_eq!(io.log, want, "port writes");
    Ok(())
}

fn port_read_widths(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rax, -1_i64;
            in_ al, 0x80;
            mov rbx, rax;
            mov rax, -1_i64;
            in_ ax, 0x81;
            mov rcx, rax;
            mov rax, -1_i64;
            in_ eax, 0x82;
            mov rsi, rax;
            mov dx, 0x510_i32;
            mov rax, -1_i64;
            in_ al, dx;
            mov rdi, rax;
            mov rax, -1_i64;
            in_ ax, dx;
            mov rbp, rax;
            mov rax, -1_i64;
            in_ eax, dx;
            mov r8, rax;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0, 0x8000, 0x8765_4321, 0x80, 0x7FFF, 0]);
    guest.cpu.finish(&mut io)?;
    let want = [
        Access::In(0x80, 1),
        Access::In(0x81, 2),
        Access::In(0x82, 4),
        Access::In(0x510, 1),
        Access::In(0x510, 2),
        Access::In(0x510, 4),
    ];
    ensure_eq!(io.log, want, "port reads");
    // Only a 32-bit result clears the upper half of RAX (Intel SDM vol. 1 §3.4.1.1).
    let got = [3, 1, 6, 7, 5, 8].map(|index| guest.cpu.register(index));
    let mut values = Vec::new();
    for value in got {
        values.push(value?);
    }
    let want = [
        0xFFFF_FFFF_FFFF_FF00,
        0xFFFF_FFFF_FFFF_8000,
        0x8765_4321,
        0xFFFF_FFFF_FFFF_FF80,
        0xFFFF_FFFF_FFFF_7FFF,
        0,
    ];
    ensure_eq!(values, want, "RAX after IN");
    Ok(())
}

fn mmio_write_widths(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rax, 0x8877_6655_4433_2211_u64;
            mov rdi, MMIO;
            mov byte_ptr(rdi), al;
            mov byte_ptr(rdi + 1), ah;
            mov word_ptr(rdi + 2), ax;
            mov dword_ptr(rdi + 4), eax;
            mov qword_ptr(rdi + 8), rax;
            mov byte_ptr(rdi + 0x10), 0x80;
            mov word_ptr(rdi + 0x12), 0;
            mov dword_ptr(rdi + 0x14), -1;
            mov qword_ptr(rdi + 0x18), -2;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let want = [
        Access::Write(MMIO, 1, 0x11),
        Access::Write(MMIO + 1, 1, 0x22),
        Access::Write(MMIO + 2, 2, 0x2211),
        Access::Write(MMIO + 4, 4, 0x4433_2211),
        Access::Write(MMIO + 8, 8, 0x8877_6655_4433_2211),
        Access::Write(MMIO + 0x10, 1, 0x80),
        Access::Write(MMIO + 0x12, 2, 0),
        Access::Write(MMIO + 0x14, 4, 0xFFFF_FFFF),
        Access::Write(MMIO + 0x18, 8, u64::MAX - 1),
    ];
    ensure_eq!(io.log, want, "memory writes");
    Ok(())
}

fn mmio_read_widths(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rax, -1_i64;
            mov rbx, rax;
            mov rcx, rax;
            mov rsi, rax;
            mov rbp, rax;
            mov rdi, MMIO;
            mov bl, byte_ptr(rdi);
            mov ch, byte_ptr(rdi + 1);
            mov si, word_ptr(rdi + 2);
            mov ebp, dword_ptr(rdi + 4);
            mov r8, qword_ptr(rdi + 8);
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0, 0x80, 0x7FFF, 0xFEDC_BA98, 0x8877_6655_4433_2211]);
    guest.cpu.finish(&mut io)?;
    let want = [
        Access::Read(MMIO, 1),
        Access::Read(MMIO + 1, 1),
        Access::Read(MMIO + 2, 2),
        Access::Read(MMIO + 4, 4),
        Access::Read(MMIO + 8, 8),
    ];
    ensure_eq!(io.log, want, "memory reads");
    ensure_eq!(guest.cpu.register(3)?, 0xFFFF_FFFF_FFFF_FF00, "BL");
    ensure_eq!(guest.cpu.register(1)?, 0xFFFF_FFFF_FFFF_80FF, "CH");
    ensure_eq!(guest.cpu.register(6)?, 0xFFFF_FFFF_FFFF_7FFF, "SI");
    ensure_eq!(guest.cpu.register(5)?, 0xFEDC_BA98, "EBP");
    ensure_eq!(guest.cpu.register(8)?, 0x8877_6655_4433_2211, "R8");
    Ok(())
}

fn mmio_reads_extend_as_the_instruction_says(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rdi, MMIO;
            mov rbx, -1_i64;
            movzx ebx, byte_ptr(rdi);
            movsx rcx, byte_ptr(rdi);
            movzx esi, word_ptr(rdi);
            movsx r8, word_ptr(rdi);
            movsxd r9, dword_ptr(rdi);
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0x80, 0x80, 0x8000, 0x8000, 0x8000_0000]);
    guest.cpu.finish(&mut io)?;
    let want = [
        Access::Read(MMIO, 1),
        Access::Read(MMIO, 1),
        Access::Read(MMIO, 2),
        Access::Read(MMIO, 2),
        Access::Read(MMIO, 4),
    ];
    ensure_eq!(io.log, want, "memory reads");
    ensure_eq!(guest.cpu.register(3)?, 0x80, "MOVZX of a byte");
    ensure_eq!(guest.cpu.register(1)?, 0xFFFF_FFFF_FFFF_FF80, "MOVSX of a byte");
    ensure_eq!(guest.cpu.register(6)?, 0x8000, "MOVZX of a word");
    ensure_eq!(guest.cpu.register(8)?, 0xFFFF_FFFF_FFFF_8000, "MOVSX of a word");
    ensure_eq!(guest.cpu.register(9)?, 0xFFFF_FFFF_8000_0000, "MOVSXD");
    Ok(())
}

fn mmio_read_modify_write(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rdi, MMIO;
            mov eax, 5;
            add dword_ptr(rdi), eax;
            not byte_ptr(rdi + 4);
            or word_ptr(rdi + 8), 0x101;
            mov ebx, 0x1234_5678;
            xchg dword_ptr(rdi + 16), ebx;
            cmp qword_ptr(rdi + 24), 7;
            sete al;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0xFFFF_FFFF, 0x0F, 0x8000, 0x9ABC_DEF0, 7]);
    let end = guest.cpu.finish(&mut io)?;
    let want = [
        Access::Read(MMIO, 4),
        Access::Write(MMIO, 4, 4),
        Access::Read(MMIO + 4, 1),
        Access::Write(MMIO + 4, 1, 0xF0),
        Access::Read(MMIO + 8, 2),
        Access::Write(MMIO + 8, 2, 0x8101),
        Access::Read(MMIO + 16, 4),
        Access::Write(MMIO + 16, 4, 0x1234_5678),
        Access::Read(MMIO + 24, 8),
    ];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.cpu.register(3)?, 0x9ABC_DEF0, "what XCHG read");
    ensure_eq!(end & 0xFF, 1, "ZF of the comparison");
    Ok(())
}

/// The bytes that a list of accesses wrote, and the places that it read; each access must be of a
/// size that the contract allows.
#[allow(clippy::type_complexity, reason = "what was written and where it was read, once")]
fn bytes_of(log: &[Access]) -> Result<(Vec<(u64, u8)>, Vec<u64>), Failure> {
    let (mut written, mut read) = (Vec::new(), Vec::new());
    for access in log {
        match *access {
            Access::Write(at, len, value) => {
                ensure!(matches!(len, 1 | 2 | 4 | 8), "an access of {len} bytes");
                written.extend((at..).zip(value.to_le_bytes().into_iter().take(len)));
            }
            Access::Read(at, len) => {
                ensure!(matches!(len, 1 | 2 | 4 | 8), "an access of {len} bytes");
                read.extend(at..at + len as u64);
            }
            other => ensure!(false, "not a memory access: {other:x?}"),
        }
    }
    Ok((written, read))
}

const PATTERN: u64 = 0x8877_6655_4433_2211;

fn mmio_unaligned(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for offset in [1, 2, 3, 5, 7] {
        let at = MMIO + 0x100 + offset;
        let mut guest = Guest::long(hypervisor)?;
        guest.load(|a| {
            asm! { a;
                mov rdi, at;
                mov rax, PATTERN;
                mov word_ptr(rdi), ax;
                mov dword_ptr(rdi), eax;
                mov qword_ptr(rdi), rax;
                mov rbx, qword_ptr(rdi);
                stop;
            };
            Ok(())
        })?;
        let mut io = Recorder::new();
        guest.cpu.finish(&mut io)?;
        let (written, read) = bytes_of(&io.log)?;
        let bytes = PATTERN.to_le_bytes();
        let whole = |len: usize| (at..).zip(bytes.into_iter().take(len));
        let want: Vec<_> = whole(2).chain(whole(4)).chain(whole(8)).collect();
        ensure_eq!(written, want, "bytes written at {at:#x}");
        ensure_eq!(read, (at..at + 8).collect::<Vec<_>>(), "bytes read at {at:#x}");
        ensure_eq!(guest.cpu.register(3)?, 0x0807_0605_0403_0201, "what was read at {at:#x}");
    }
    Ok(())
}

fn mmio_across_pages(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for before in 1..8_u64 {
        let at = MMIO + 0x1000 - before;
        let mut guest = Guest::long(hypervisor)?;
        guest.load(|a| {
            asm! { a;
                mov rdi, at;
                mov rax, PATTERN;
                mov qword_ptr(rdi), rax;
                mov rbx, qword_ptr(rdi);
                stop;
            };
            Ok(())
        })?;
        let mut io = Recorder::new();
        guest.cpu.finish(&mut io)?;
        let (written, read) = bytes_of(&io.log)?;
        let want: Vec<_> = (at..).zip(PATTERN.to_le_bytes()).collect();
        ensure_eq!(written, want, "bytes written at {at:#x}");
        ensure_eq!(read, (at..at + 8).collect::<Vec<_>>(), "bytes read at {at:#x}");
        ensure_eq!(guest.cpu.register(3)?, 0x0807_0605_0403_0201, "what was read at {at:#x}");
    }
    Ok(())
}

fn ram_and_mmio_in_one_access(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // The first three bytes are the last of RAM.
    let at = RAM - 3;
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rdi, at;
            mov rbx, qword_ptr(rdi);
            mov rax, PATTERN;
            mov qword_ptr(rdi), rax;
            stop;
        };
        Ok(())
    })?;
    guest.write(at, &[0xA1, 0xA2, 0xA3])?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let (written, read) = bytes_of(&io.log)?;
    ensure_eq!(read, (RAM..RAM + 5).collect::<Vec<_>>(), "bytes read by callback");
    ensure_eq!(guest.cpu.register(3)?, 0x0504_0302_01A3_A2A1, "what was read");
    let bytes = PATTERN.to_le_bytes();
    let want: Vec<_> = (RAM..).zip(bytes.into_iter().skip(3)).collect();
    ensure_eq!(written, want, "bytes written by callback");
    ensure_eq!(guest.read::<3>(at)?, [0x11, 0x22, 0x33], "bytes written to memory");
    Ok(())
}

fn mmio_push_and_pop(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write_u64(DATA, PATTERN)?;
    guest.load(|a| {
        asm! { a;
            mov rdi, MMIO;
            mov rsi, DATA;
            push qword_ptr(rdi);
            pop rax;
            push qword_ptr(rsi);
            pop qword_ptr(rdi + 8);
            mov rbx, rax;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0x0123_4567_89AB_CDEF]);
    guest.cpu.finish(&mut io)?;
    let want = [Access::Read(MMIO, 8), Access::Write(MMIO + 8, 8, PATTERN)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.cpu.register(3)?, 0x0123_4567_89AB_CDEF, "what PUSH read");
    Ok(())
}

fn doorbells_ring_without_a_callback(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let Some(doorbells) = guest.partition.doorbells() else {
        return Err(Failure::Wrong("the capabilities promise doorbells, there are none".into()));
    };
    guest.load(|a| {
        asm! { a;
            label again;
            mov rdi, MMIO;
            mov eax, 7;
        again:
            mov dword_ptr(rdi), eax;
            mov dword_ptr(rdi + 4), eax;
            out 0x80, al;
            stop;
            jmp again;
        };
        Ok(())
    })?;
    let by_value = |value| Doorbell::Mmio { address: MMIO, width: 4, value: Some(value) };
    let port = Doorbell::Pio { port: 0x80, width: 1, value: None };
    let (right, wrong, any) = (EventFd::new(0)?, EventFd::new(0)?, EventFd::new(0)?);
    doorbells.add(by_value(7), &right)?;
    doorbells.add(by_value(8), &wrong)?;
    doorbells.add(port, &any)?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    ensure_eq!(io.log, [Access::Write(MMIO + 4, 4, 7)], "accesses beside the doorbells");
    // Reading would wait for a bell that did not ring.
    wrong.write(100)?;
    let rung = (right.read()?, wrong.read()?, any.read()?);
    ensure_eq!(rung, (1, 100, 1), "bells, the one of another value with 100 of our own");
    doorbells.remove(by_value(7), &right)?;
    doorbells.remove(port, &any)?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    let want = [Access::Write(MMIO, 4, 7), Access::Write(MMIO + 4, 4, 7), Access::Out(0x80, 1, 7)];
    ensure_eq!(io.log, want, "accesses when the doorbells are gone");
    Ok(())
}
