//! Code that changes: by itself, by the host, by another mapping of the same page.

use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use vmkit_device::memory::{Bytes, MemoryRegionAddress};

use super::case::{cases, ensure_eq};
use super::guest::{CODE2, DATA, Guest, TABLES};
use super::kicks::kick_when;
use super::recorder::Recorder;
use super::tables::{LARGE_PAGE, PAGE, PDPT};
use super::{Failure, asm::asm};
use crate::{Hypervisor, VmExit};

cases! { "code":
    the_next_instruction_is_rewritten "Intel SDM vol. 3A §9.1.3";
    a_loop_rewrites_its_body "Intel SDM vol. 3A §9.1.3";
    a_subroutine_is_rewritten "Intel SDM vol. 3A §9.1.3";
    rewriting_through_another_address "Intel SDM vol. 3A §9.1.3, 12.6";
    a_string_store_rewrites_code "Intel SDM vol. 3A §9.1.3";
    port_input_rewrites_code "Intel SDM vol. 3A §9.1.3";
    an_instruction_across_pages_is_rewritten "Intel SDM vol. 3A §9.1.3";
    data_beside_code_may_be_written "Intel SDM vol. 3A §12.6";
    the_page_under_the_code_is_exchanged "Intel SDM vol. 3A §4.10.4";
    the_host_rewrites_code_between_runs "the contract: host writes are seen";
    the_host_rewrites_code_while_it_runs "the contract: host writes are seen after a kick";
    code_in_page_zero_and_at_the_end_of_ram "the contract: Partition::map";
}

/// `mov eax, 0; ret`, of which bytes 1 to 4 are the number.
const GIVE: [u8; 6] = [0xB8, 0, 0, 0, 0, 0xC3];

fn the_next_instruction_is_rewritten(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // mov byte [CODE2 + 9], 0x55 is 8 bytes; then mov eax, 0x11, whose number it rewrites.
    guest.load_at(CODE2, |a| {
        asm! { a; mov byte_ptr(CODE2 + 9), 0x55; mov eax, 0x11; stop; };
        Ok(())
    })?;
    guest.load(|a| a.jmp(CODE2))?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x55, "EAX");
    Ok(())
}

fn a_loop_rewrites_its_body(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // add ebx, imm8 at `patched`: 3 bytes, the last is the number, which counts down.
    guest.load(|a| {
        asm! { a;
            label again, patched;
            xor ebx, ebx;
            lea rsi, qword_ptr(patched);
            mov ecx, 100;
        again:
            mov byte_ptr(rsi + 2), cl;
        patched:
            add ebx, 1;
            dec ecx;
            jnz again;
            mov eax, ebx;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 5050, "the sum of 1 to 100");
    Ok(())
}

/// Calls [`GIVE`] at `at` twice, rewriting its number at `through` in between.
fn rewrite(guest: &mut Guest, at: u64, through: u64) -> Result<(), Failure> {
    guest.load(|a| {
        asm! { a;
            label again;
            mov rbx, at;
            mov rdi, through + 1;
            xor esi, esi;
            mov ecx, 1;
        again:
            mov dword_ptr(rdi), ecx;
            call rbx;
            add esi, eax;
            inc ecx;
            cmp ecx, 50;
            jbe again;
            mov eax, esi;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 1275, "the sum of 1 to 50");
    Ok(())
}

fn a_subroutine_is_rewritten(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    rewrite(&mut guest, CODE2, CODE2)
}

fn rewriting_through_another_address(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    // The second GiB shows the first one's RAM.
    guest.write_u64(PDPT + 8, TABLES | PAGE)?;
    guest.write_u64(TABLES, LARGE_PAGE)?;
    rewrite(&mut guest, CODE2, 0x4000_0000 + CODE2)
}

fn a_string_store_rewrites_code(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    guest.write(DATA, &[0xB8, 0x34, 0x12, 0, 0, 0xC3])?;
    guest.load(|a| {
        asm! { a;
            mov rbx, CODE2;
            call rbx;
            mov edi, CODE2 as u32;
            mov esi, DATA as u32;
            mov ecx, 6;
            cld;
            [rep] movsb;
            call rbx;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x1234, "EAX");
    Ok(())
}

fn port_input_rewrites_code(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    guest.load(|a| {
        asm! { a;
            mov rbx, CODE2;
            call rbx;
            mov edi, (CODE2 + 1) as u32;
            mov dx, 0x80_i32;
            cld;
            insd;
            call rbx;
            stop;
        };
        Ok(())
    })?;
    let end = guest.cpu.finish(&mut Recorder::answering([0x4321]))?;
    ensure_eq!(end, 0x4321, "EAX");
    Ok(())
}

fn an_instruction_across_pages_is_rewritten(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // The number is on the first page, on both, or on the second.
    for before in [5, 3, 1] {
        let mut guest = Guest::long(hypervisor)?;
        let at = CODE2 + 0x1000 - before;
        guest.write(at, &GIVE)?;
        rewrite(&mut guest, at, at)?;
    }
    Ok(())
}

fn data_beside_code_may_be_written(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    guest.load(|a| {
        asm! { a;
            label again;
            mov rbx, CODE2;
            mov edi, (CODE2 + 8) as u32;
            mov ecx, 1000;
        again:
            call rbx;
            inc dword_ptr(rdi);
            dec ecx;
            jnz again;
            mov eax, dword_ptr(rdi);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 1000, "the number beside the code");
    Ok(())
}

fn the_page_under_the_code_is_exchanged(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let (va, pt, frame) = (0x4000_0000_u64, TABLES + 0x1000, 0x20_0000_u64);
    guest.write_u64(PDPT + 8, TABLES | PAGE)?;
    guest.write_u64(TABLES, pt | PAGE)?;
    for (number, page) in (1_u8..).zip([frame, frame + 0x1000]) {
        guest.write(page, &[0xB8, number, 0, 0, 0, 0xC3])?;
    }
    guest.write_u64(pt, frame | PAGE)?;
    guest.load(|a| {
        asm! { a;
            label again;
            mov rbx, va;
            xor esi, esi;
            mov ecx, 20;
        again:
            call rbx;
            add esi, eax;
            mov rax, (frame + 0x1000) | PAGE;
            mov qword_ptr(pt), rax;
            invlpg byte_ptr(rbx);
            call rbx;
            shl eax, 8;
            add esi, eax;
            mov rax, frame | PAGE;
            mov qword_ptr(pt), rax;
            invlpg byte_ptr(rbx);
            dec ecx;
            jnz again;
            mov eax, esi;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 20 + (40 << 8), "20 times 1 and 2");
    Ok(())
}

fn the_host_rewrites_code_between_runs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    guest.load(|a| {
        asm! { a; label again; mov rbx, CODE2; again: call rbx; stop; jmp again; };
        Ok(())
    })?;
    for number in 1..20_u8 {
        guest.write(CODE2 + 1, &[number])?;
        ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, u64::from(number), "EAX");
    }
    Ok(())
}

fn the_host_rewrites_code_while_it_runs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(CODE2, &GIVE)?;
    guest.load(|a| {
        asm! { a; label again; mov rbx, CODE2; again: call rbx; mov dword_ptr(DATA), eax; jmp again; };
        Ok(())
    })?;
    for number in 1..10_u32 {
        let (kick, ram) = (guest.cpu.kick(), guest.ram.clone());
        let writer = thread::spawn(move || -> Result<(), Failure> {
            thread::sleep(Duration::from_millis(3));
            ram.write_obj(number, MemoryRegionAddress(CODE2 + 1))?;
            kick.kick();
            Ok(())
        });
        ensure_eq!(guest.cpu.run(&mut Recorder::new())?, VmExit::Kicked, "exit");
        writer.join().map_err(|_| Failure::Wrong("the writing thread panicked".into()))??;
        // After the kick everything is seen. How long once around takes depends on the host.
        guest.write_u32(DATA, 0)?;
        let ram = guest.ram.clone();
        let kicker = kick_when(guest.cpu.kick(), move || {
            ram.read_obj::<u32>(MemoryRegionAddress(DATA)).is_ok_and(|given| given == number)
        });
        ensure_eq!(guest.cpu.run(&mut Recorder::new())?, VmExit::Kicked, "exit");
        kicker.join().map_err(|_| Failure::Wrong("the kicking thread panicked".into()))?;
        ensure_eq!(guest.read_u32(DATA)?, number, "the number that the code gave last");
    }
    Ok(())
}

fn code_in_page_zero_and_at_the_end_of_ram(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // Its RET is the last byte there is.
    for (number, at) in (1_u8..).zip([0x10, super::guest::RAM - 6]) {
        guest.write(at, &[0xB8, number, 0, 0, 0, 0xC3])?;
        guest.load(|a| {
            asm! { a; mov rbx, at; call rbx; stop; };
            Ok(())
        })?;
        let mut io = Recorder::new();
        ensure_eq!(guest.cpu.finish(&mut io)?, u64::from(number), "the number at {at:#x}");
        ensure_eq!(io.log, [], "accesses");
    }
    Ok(())
}
