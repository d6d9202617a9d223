//! Paging: translations, faults with all their error codes, accessed and dirty bits, invalidation.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure_eq};
use super::cpu::Fault;
use super::guest::{CODE2, DATA, Guest, RAM, STACK_RING3, TABLES};
use super::recorder::Recorder;
use super::tables::{self, CODE64_RING3, DATA_RING3, IDT, LARGE_PAGE, PAGE, PD, PDPT};
use super::{Failure, Need, asm::asm};
use crate::x86::{Cr0, Cr4, Efer};
use crate::{Feature, Hypervisor, StateSet};

cases! { "paging":
    a_page_maps_any_frame "Intel SDM vol. 3A §4.5";
    page_of_2_mib "Intel SDM vol. 3A §4.5";
    page_of_1_gib "Intel SDM vol. 3A §4.5" [Need::Feature(Feature::Gbpages)];
    not_present "Intel SDM vol. 3A §4.7";
    read_only_for_the_supervisor "Intel SDM vol. 3A §4.6.1";
    without_wp_the_supervisor_writes "Intel SDM vol. 3A §4.6.1";
    not_present_for_the_user "Intel SDM vol. 3A §4.7";
    supervisor_page_for_the_user "Intel SDM vol. 3A §4.6.1";
    read_only_for_the_user "Intel SDM vol. 3A §4.6.1";
    rights_of_upper_levels_count "Intel SDM vol. 3A §4.6";
    no_execute "Intel SDM vol. 3A §4.6.1" [Need::Feature(Feature::Nx)];
    no_execute_is_reserved_without_nxe "Intel SDM vol. 3A §4.5, table 4-20" [Need::Feature(Feature::Nx)];
    reserved_bits "Intel SDM vol. 3A §4.7";
    smep "Intel SDM vol. 3A §4.6.1" [Need::Feature(Feature::Smep)];
    smap "Intel SDM vol. 3A §4.6.1" [Need::Feature(Feature::Smap)];
    a_page_at_two_addresses_goes_on_in_two "Intel SDM vol. 3A §4.5";
    code_follows_the_address_space "Intel SDM vol. 3A §4.10.4.1";
    a_jump_that_faulted_leads_to_its_target "Intel SDM vol. 3A §6.5, faults";
    what_the_supervisor_ran_is_no_code_of_the_users "Intel SDM vol. 3A §4.6.1";
    accessed_and_dirty "Intel SDM vol. 3A §4.8";
    an_entry_that_is_every_level_is_marked "Intel SDM vol. 3A §4.8";
    a_fault_sets_no_dirty_bit "Intel SDM vol. 3A §4.8";
    a_store_across_a_fault_stores_nothing "Intel SDM vol. 3A §6.5, faults";
    a_fetch_across_a_fault "Intel SDM vol. 3A §6.15, interrupt 14";
    a_handler_maps_the_page_and_returns "Intel SDM vol. 3A §4.10.4.3";
    invlpg "Intel SDM vol. 3A §4.10.4.1";
    invlpg_of_a_global_page "Intel SDM vol. 3A §4.10.4.1";
    cr3_flushes "Intel SDM vol. 3A §4.10.4.1";
    cr4_pge_flushes_global_pages "Intel SDM vol. 3A §4.10.4.1";
    tables_changed_by_the_host_between_runs "the contract: host writes are seen";
    cr3_set_by_the_host "the contract: Vcpu::set";
    user_code_cannot_reach_supervisor_tables "Intel SDM vol. 3A §4.6.1";
    implicit_accesses_are_the_supervisors "Intel SDM vol. 3A §4.6.1.1";
    a_bad_stack_is_a_double_fault "Intel SDM vol. 3A §6.15, interrupt 8";
}

/// The second GiB, in which a case maps pages of its own.
const VA: u64 = 0x4000_0000;
/// Its page table, for the first 2 MiB.
const PT: u64 = TABLES + 0x1000;
const NO_EXECUTE: u64 = 1 << 63;
const GLOBAL: u64 = 1 << 8;
const SUPERVISOR: u64 = PAGE & !4;
const READ_ONLY: u64 = PAGE & !2;
/// Frames for the pages.
const FRAME: u64 = 0x20_0000;

/// A machine whose page number n at [`VA`] is mapped by `entries[n]`.
fn mapped(hypervisor: &dyn Hypervisor, entries: &[u64]) -> Result<Guest, Failure> {
    let guest = Guest::long(hypervisor)?;
    guest.write_u64(PDPT + 8, TABLES | PAGE)?;
    guest.write_u64(TABLES, PT | PAGE)?;
    for (page, entry) in (0..).zip(entries) {
        guest.write_u64(PT + page * 8, *entry)?;
    }
    Ok(guest)
}

/// Runs `body` and expects a page fault with `error`; CR2 is to be `address`.
fn faults(
    guest: &mut Guest,
    what: &str,
    error: u64,
    address: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Fault, Failure> {
    guest.load(body)?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    let reported = guest.cpu.get(StateSet::CONTROL)?.control.cr2;
    ensure_eq!((fault.vector, fault.error, reported), (14, error, address), "{what}");
    Ok(fault)
}

/// Runs `body` in ring 3 and expects a page fault.
fn user_faults(
    guest: &mut Guest,
    what: &str,
    error: u64,
    address: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Failure> {
    guest.load_at(CODE2, body)?;
    faults(guest, what, error, address, |a| to_ring3(a, CODE2)).map(drop)
}

fn to_ring3(a: &mut CodeAssembler, rip: u64) -> Result<(), IcedError> {
    asm! { a;
        push i32::from(DATA_RING3);
        push STACK_RING3 as i32;
        push 2;
        push i32::from(CODE64_RING3);
        push rip as i32;
        iretq;
    };
    Ok(())
}

fn read(address: u64) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a; mov rbx, address; mov eax, dword_ptr(rbx); stop; };
        Ok(())
    }
}

fn write(address: u64) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a; mov rbx, address; mov dword_ptr(rbx), 0x77; mov eax, dword_ptr(rbx); stop; };
        Ok(())
    }
}

fn jump(address: u64) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a; mov rbx, address; jmp rbx; };
        Ok(())
    }
}

/// Runs `body` to its end.
fn ends(
    guest: &mut Guest,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<u64, Failure> {
    guest.load(body)?;
    guest.cpu.finish(&mut Recorder::new())
}

fn a_page_maps_any_frame(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE, DATA | PAGE, FRAME | PAGE])?;
    guest.write_u32(FRAME + 0x10, 0x1111)?;
    guest.write_u32(DATA + 0x10, 0x2222)?;
    ensure_eq!(ends(&mut guest, read(VA + 0x10))?, 0x1111, "page 0");
    ensure_eq!(ends(&mut guest, read(VA + 0x1010))?, 0x2222, "page 1");
    ensure_eq!(ends(&mut guest, write(VA + 0x2010))?, 0x77, "page 2, the frame of page 0");
    ensure_eq!(ends(&mut guest, read(VA + 0x10))?, 0x77, "page 0 after writing to page 2");
    Ok(())
}

fn page_of_2_mib(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    guest.write_u64(TABLES + 8, FRAME | LARGE_PAGE)?;
    guest.write_u32(FRAME + 0x1F_FFFC, 0x1234)?;
    ensure_eq!(ends(&mut guest, read(VA + 0x20_0000 + 0x1F_FFFC))?, 0x1234, "its last word");
    Ok(())
}

fn page_of_1_gib(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    guest.write_u64(PDPT + 2 * 8, LARGE_PAGE)?;
    guest.write_u32(RAM - 4, 0x1234)?;
    ensure_eq!(ends(&mut guest, read(0x8000_0000 + RAM - 4))?, 0x1234, "a word in it");
    Ok(())
}

fn not_present(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    faults(&mut guest, "read", 0, VA + 0x123, read(VA + 0x123))?;
    faults(&mut guest, "write", 2, VA + 0x456, write(VA + 0x456))?;
    // With NXE a fetch says so.
    let fault = faults(&mut guest, "fetch", 0x10, VA + 0x789, jump(VA + 0x789))?;
    ensure_eq!(fault.rip, VA + 0x789, "saved RIP of the fetch");
    // Missing upper levels.
    let hole = 0x7FFF_1234_5678;
    faults(&mut guest, "read of a hole", 0, hole, read(hole))?;
    let high = 0xFFFF_8000_0000_1000;
    faults(&mut guest, "write to the upper half", 2, high, write(high)).map(drop)
}

fn read_only_for_the_supervisor(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | READ_ONLY])?;
    ensure_eq!(ends(&mut guest, read(VA))?, 0, "read");
    faults(&mut guest, "write", 3, VA, write(VA))?;
    ensure_eq!(guest.read_u32(FRAME)?, 0, "memory");
    Ok(())
}

fn without_wp_the_supervisor_writes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | READ_ONLY])?;
    guest.load(|a| {
        asm! { a;
            mov rbx, VA;
            mov rax, cr0;
            and rax, !(Cr0::WP.bits() as i32);
            mov cr0, rax;
            mov dword_ptr(rbx), 0x77;
            or rax, Cr0::WP.bits() as i32;
            mov cr0, rax;
            mov dword_ptr(rbx), 0x78;
        };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (14, 3), "write with WP again");
    ensure_eq!(guest.read_u32(FRAME)?, 0x77, "memory");
    Ok(())
}

fn not_present_for_the_user(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    user_faults(&mut guest, "read", 4, VA, read(VA))?;
    user_faults(&mut guest, "write", 6, VA, write(VA))?;
    user_faults(&mut guest, "fetch", 0x14, VA, jump(VA))
}

fn supervisor_page_for_the_user(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | SUPERVISOR])?;
    ensure_eq!(ends(&mut guest, write(VA))?, 0x77, "the supervisor's own access");
    user_faults(&mut guest, "read", 5, VA, read(VA))?;
    user_faults(&mut guest, "write", 7, VA, write(VA))?;
    user_faults(&mut guest, "fetch", 0x15, VA, jump(VA))
}

fn read_only_for_the_user(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | READ_ONLY])?;
    user_faults(&mut guest, "write", 7, VA + 8, write(VA + 8))?;
    // WP is no matter to the user.
    guest.load(|a| to_ring3(a, CODE2))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr0 &= !Cr0::WP.bits())?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (14, 7), "write without WP");
    Ok(())
}

fn rights_of_upper_levels_count(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    guest.write_u64(TABLES, PT | READ_ONLY)?;
    faults(&mut guest, "write, level 2 read-only", 3, VA, write(VA))?;
    guest.write_u64(TABLES, PT | SUPERVISOR)?;
    user_faults(&mut guest, "user's read, level 2 the supervisor's", 5, VA, read(VA))?;
    guest.write_u64(TABLES, PT | PAGE)?;
    guest.write_u64(PDPT + 8, TABLES | SUPERVISOR)?;
    user_faults(&mut guest, "user's read, level 3 the supervisor's", 5, VA, read(VA))?;
    guest.write_u64(PDPT + 8, TABLES | PAGE | NO_EXECUTE)?;
    faults(&mut guest, "fetch, level 3 no-execute", 0x11, VA, jump(VA)).map(drop)
}

fn no_execute(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE | NO_EXECUTE])?;
    ensure_eq!(ends(&mut guest, write(VA))?, 0x77, "data access");
    faults(&mut guest, "fetch", 0x11, VA, jump(VA))?;
    user_faults(&mut guest, "user's fetch", 0x15, VA, jump(VA))
}

fn no_execute_is_reserved_without_nxe(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE | NO_EXECUTE, 0])?;
    guest.load(read(VA))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.efer &= !Efer::NXE.bits())?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (14, 9), "read");
    guest.load(jump(VA + 0x1000))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.efer &= !Efer::NXE.bits())?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (14, 0), "fetch of what is not present");
    Ok(())
}

fn reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // An address past any processor's width, and a large page that is not aligned.
    let mut guest = mapped(hypervisor, &[FRAME | PAGE | 1 << 51])?;
    faults(&mut guest, "read", 9, VA, read(VA))?;
    faults(&mut guest, "write", 0xB, VA, write(VA))?;
    user_faults(&mut guest, "user's read", 0xD, VA, read(VA))?;
    guest.write_u64(TABLES + 8, FRAME | LARGE_PAGE | 1 << 13)?;
    let odd = VA + 0x20_0000;
    faults(&mut guest, "read of an odd large page", 9, odd, read(odd)).map(drop)
}

fn with_cr4(guest: &mut Guest, set: Cr4) -> Result<(), Failure> {
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr4 |= set.bits())
}

fn smep(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // The program itself must be the supervisor's.
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    guest.write_u64(PD, LARGE_PAGE & !4)?;
    guest.load(jump(VA))?;
    with_cr4(&mut guest, Cr4::SMEP)?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (14, 0x11), "fetch");
    guest.load(write(VA))?;
    with_cr4(&mut guest, Cr4::SMEP)?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x77, "data access");
    Ok(())
}

fn smap(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    guest.write_u64(PD, LARGE_PAGE & !4)?;
    guest.write_u64(PD + 8, FRAME | LARGE_PAGE & !4)?;
    for (what, error) in [("read", 1), ("write", 3)] {
        if what == "read" {
            guest.load(read(VA))?;
        } else {
            guest.load(write(VA))?;
        }
        with_cr4(&mut guest, Cr4::SMAP)?;
        let fault = guest.cpu.fault(&mut Recorder::new())?;
        ensure_eq!((fault.vector, fault.error), (14, error), "{what}");
    }
    guest.load(|a| {
        asm! { a; mov rbx, VA; stac; mov dword_ptr(rbx), 0x55; mov eax, dword_ptr(rbx); clac; stop; };
        asm! { a; mov dword_ptr(rbx), 0x66; };
        Ok(())
    })?;
    with_cr4(&mut guest, Cr4::SMAP)?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.finish(&mut io)?, 0x55, "access after STAC");
    let fault = guest.cpu.fault(&mut io)?;
    ensure_eq!((fault.vector, fault.error), (14, 3), "write after CLAC");
    Ok(())
}

const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;

/// One page of code at two addresses, with another page behind each.
fn a_page_at_two_addresses_goes_on_in_two(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // add eax, 1; ret
    let (one, sixteen) = ([0x83, 0xC0, 1, 0xC3], [0x83, 0xC0, 16, 0xC3]);
    // What is in the page from an offset to its end, what begins the two others, and what the calls add.
    type Variant<'a> = (&'a str, u64, &'a [u8], &'a [u8], &'a [u8], u64);
    let variants: [Variant<'_>; 4] = [
        ("a jump to the next page", 0xFF0, &[0xE9, 0x0B, 0, 0, 0], &one, &sixteen, 17),
        ("the next instruction in the next page", 0xFFF, &[0x90], &one, &sixteen, 17),
        // add eax, imm32, whose upper half is in the next page.
        ("an instruction across", 0xFFD, &[5, 1, 0], &[0, 0, 0xC3], &[1, 0, 0xC3], 0x1_0002),
        // The same behind a short jump.
        (
            "a jump to an instruction across",
            0xFF0,
            &[
                0xEB, 0x0B, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 5, 1,
                0,
            ],
            &[0, 0, 0xC3],
            &[1, 0, 0xC3],
            0x1_0002,
        ),
    ];
    for (what, at, tail, first, second, sum) in variants {
        let frames = [FRAME, FRAME + 0x1000, FRAME, FRAME + 0x2000].map(|frame| frame | PAGE);
        let mut guest = mapped(hypervisor, &frames)?;
        for (place, bytes) in [(at, tail), (0x1000, first), (0x2000, second)] {
            guest.write(FRAME + place, bytes)?;
        }
        guest.load(|a| {
            asm! { a;
                label again;
                xor eax, eax;
                mov ecx, 3;
                mov rbx, VA + at;
                mov rdx, VA + 0x2000 + at;
            again:
                call rbx;
                call rdx;
                dec ecx;
                jnz again;
                stop;
            };
            Ok(())
        })?;
        ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 3 * sum, "{what}");
    }
    Ok(())
}

/// The same address holds other code in another address space: at once after the load of CR3, which
/// is in that page itself, and in what is called later.
fn code_follows_the_address_space(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    let other = second_tables(&guest)?;
    // mov cr3, rax; jmp over what differs in length; add edx, 1 or 0x10; ret
    guest.write(FRAME, &[0x0F, 0x22, 0xD8, 0xEB, 1, 0x90, 0x83, 0xC2, 1, 0xC3])?;
    guest.write(
        FRAME + 0x1000,
        &[0x0F, 0x22, 0xD8, 0xEB, 3, 0x90, 0x90, 0x90, 0x83, 0xC2, 0x10, 0xC3],
    )?;
    // jmp; add edx, 0x100 or 0x1000; ret
    guest.write(FRAME + 0x100, &[0xEB, 1, 0x90, 0x81, 0xC2, 0, 1, 0, 0, 0xC3])?;
    guest.write(FRAME + 0x1100, &[0xEB, 2, 0x90, 0x90, 0x81, 0xC2, 0, 0x10, 0, 0, 0xC3])?;
    guest.load(|a| {
        asm! { a;
            label again;
            mov rsi, cr3;
            mov rdi, other;
            mov rbx, VA;
            mov rbp, VA + 0x100;
            xor edx, edx;
            mov ecx, 3;
        again:
            call rbp;
            mov rax, rdi;
            call rbx;
            call rbp;
            mov rax, rsi;
            call rbx;
            dec ecx;
            jnz again;
            mov eax, edx;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 3 * 0x1111, "what the calls add");
    Ok(())
}

/// The handler that maps the target is in the page of the jump.
fn a_jump_that_faulted_leads_to_its_target(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    // jmp to the next page, where there is inc edx; ret
    guest.write(FRAME, &[0xE9, 0xFB, 0x0F, 0, 0])?;
    guest.write(FRAME + 0x1000, &[0xFF, 0xC2, 0xC3])?;
    guest.load_at(FRAME + 0x100, |a| {
        asm! { a;
            mov rax, (FRAME + 0x1000) | PAGE;
            mov qword_ptr(PT + 8), rax;
            inc ecx;
            add rsp, 8;
            iretq;
        };
        Ok(())
    })?;
    guest.gate(14, VA + 0x100)?;
    let value = ends(&mut guest, |a| {
        asm! { a;
            xor ecx, ecx;
            xor edx, edx;
            mov rbx, VA;
            call rbx;
            call rbx;
            call rbx;
            mov eax, edx;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(value, 3, "calls that came to the target");
    ensure_eq!(guest.cpu.register(1)?, 1, "faults");
    Ok(())
}

fn what_the_supervisor_ran_is_no_code_of_the_users(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | SUPERVISOR])?;
    guest.write(FRAME, &[0xC3])?;
    guest.load_at(CODE2, jump(VA))?;
    faults(&mut guest, "fetch", 0x15, VA, |a| {
        asm! { a; mov rbx, VA; call rbx; call rbx; };
        to_ring3(a, CODE2)
    })
    .map(drop)
}

fn accessed_and_dirty(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let clean = PAGE & !(ACCESSED | DIRTY);
    let mut guest = mapped(hypervisor, &[FRAME | clean, FRAME | clean])?;
    guest.write_u64(PDPT + 8, TABLES | clean)?;
    guest.write_u64(TABLES, PT | clean)?;
    let bits = |guest: &Guest, at: u64| -> Result<u64, Failure> {
        Ok(guest.read_u64(at)? & (ACCESSED | DIRTY))
    };
    ends(&mut guest, read(VA))?;
    let after_read = [bits(&guest, PDPT + 8)?, bits(&guest, TABLES)?, bits(&guest, PT)?];
    ensure_eq!(after_read, [ACCESSED; 3], "after reading: levels 3, 2, 1");
    ensure_eq!(bits(&guest, PT + 8)?, 0, "the page nobody touched");
    ends(&mut guest, write(VA))?;
    let after_write = [bits(&guest, PDPT + 8)?, bits(&guest, TABLES)?, bits(&guest, PT)?];
    let want = [ACCESSED, ACCESSED, ACCESSED | DIRTY];
    ensure_eq!(after_write, want, "after writing: levels 3, 2, 1");
    // A write that comes first sets both; so does a read-modify-write after a read.
    ends(&mut guest, write(VA + 0x1000))?;
    ensure_eq!(bits(&guest, PT + 8)?, ACCESSED | DIRTY, "after writing at once");
    Ok(())
}

fn an_entry_that_is_every_level_is_marked(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // The last entry of the top table leads back to it: the walk meets it four times.
    let at = tables::PML4 + 511 * 8;
    guest.write_u64(at, tables::PML4 | PAGE & !0x60)?;
    guest.load(|a| {
        asm! { a; mov rbx, -8_i64; mov byte_ptr(rbx + 7), 0; mov rax, qword_ptr(rbx); stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(guest.read_u64(at)?, tables::PML4 | PAGE, "the entry");
    Ok(())
}

fn a_fault_sets_no_dirty_bit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let clean = READ_ONLY & !(ACCESSED | DIRTY);
    let mut guest = mapped(hypervisor, &[FRAME | clean])?;
    faults(&mut guest, "write", 3, VA, write(VA))?;
    ensure_eq!(guest.read_u64(PT)? & DIRTY, 0, "dirty bit");
    Ok(())
}

fn a_store_across_a_fault_stores_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE, (FRAME + 0x1000) | READ_ONLY])?;
    guest.write_u64(FRAME + 0xFF8, 0x1122_3344_5566_7788)?;
    let fault = faults(&mut guest, "write across", 3, VA + 0x1000, |a| {
        asm! { a; mov rbx, VA + 0xFFC; mov qword_ptr(rbx), -1; stop; };
        Ok(())
    })?;
    ensure_eq!(fault.cs, 8, "CS");
    ensure_eq!(guest.read_u64(FRAME + 0xFF8)?, 0x1122_3344_5566_7788, "the first page");
    // The same of a page that is not there.
    guest.write_u64(PT + 8, 0)?;
    faults(&mut guest, "write into a hole", 2, VA + 0x1000, |a| {
        asm! { a; mov rbx, VA + 0xFFE; mov dword_ptr(rbx), -1; stop; };
        Ok(())
    })?;
    ensure_eq!(guest.read_u64(FRAME + 0xFF8)?, 0x1122_3344_5566_7788, "the first page again");
    Ok(())
}

fn a_fetch_across_a_fault(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    // mov eax, imm32, of which three bytes are there.
    guest.write(FRAME + 0xFFD, &[0xB8, 1, 2])?;
    let at = VA + 0xFFD;
    let fault = faults(&mut guest, "fetch", 0x10, VA + 0x1000, jump(at))?;
    ensure_eq!(fault.rip, at, "saved RIP");
    Ok(())
}

fn a_handler_maps_the_page_and_returns(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    guest.load_at(CODE2, |a| {
        asm! { a;
            mov rax, FRAME | PAGE;
            mov qword_ptr(PT), rax;
            inc ecx;
            // The error code.
            add rsp, 8;
            iretq;
        };
        Ok(())
    })?;
    guest.gate(14, CODE2)?;
    guest.write_u32(FRAME + 4, 0x4321)?;
    let value = ends(&mut guest, |a| {
        asm! { a; xor ecx, ecx; mov rbx, VA; mov edx, dword_ptr(rbx + 4); mov eax, edx; stop; };
        Ok(())
    })?;
    ensure_eq!(value, 0x4321, "what was read in the end");
    ensure_eq!(guest.cpu.register(1)?, 1, "faults");
    Ok(())
}

/// Reads a page, gives it another frame, does `flush`, reads again; the value is the second one.
fn remap(
    hypervisor: &dyn Hypervisor,
    flags: u64,
    flush: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | flags])?;
    guest.write_u32(FRAME, 0x1111)?;
    guest.write_u32(FRAME + 0x1000, 0x2222)?;
    guest.load(|a| {
        asm! { a;
            mov rbx, VA;
            mov ecx, dword_ptr(rbx);
            mov rax, (FRAME + 0x1000) | flags;
            mov qword_ptr(PT), rax;
        };
        flush(a)?;
        asm! { a; mov eax, dword_ptr(rbx); stop; };
        Ok(())
    })?;
    with_cr4(&mut guest, Cr4::PGE)?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x2222, "the second read");
    ensure_eq!(guest.cpu.register(1)?, 0x1111, "the first read");
    Ok(())
}

fn invlpg(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    remap(hypervisor, PAGE, |a| a.invlpg(byte_ptr(rbx)))?;
    // Of any address in the page.
    remap(hypervisor, PAGE, |a| a.invlpg(byte_ptr(rbx + 0xABC)))
}

fn invlpg_of_a_global_page(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    remap(hypervisor, PAGE | GLOBAL, |a| a.invlpg(byte_ptr(rbx)))
}

fn cr3_flushes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    remap(hypervisor, PAGE, |a| {
        asm! { a; mov rax, cr3; mov cr3, rax; };
        Ok(())
    })
}

fn cr4_pge_flushes_global_pages(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    remap(hypervisor, PAGE | GLOBAL, |a| {
        asm! { a;
            mov rax, cr4;
            xor eax, Cr4::PGE.bits() as i32;
            mov cr4, rax;
            xor eax, Cr4::PGE.bits() as i32;
            mov cr4, rax;
        };
        Ok(())
    })
}

fn tables_changed_by_the_host_between_runs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // What the guest has to flush, the host has not: an entry that was not present.
    let mut guest = mapped(hypervisor, &[])?;
    faults(&mut guest, "read", 0, VA, read(VA))?;
    guest.write_u32(FRAME, 0x55)?;
    guest.write_u64(PT, FRAME | PAGE)?;
    ensure_eq!(ends(&mut guest, read(VA))?, 0x55, "read of the page that is there now");
    Ok(())
}

/// A second set of tables, that shares all but the case's own: there is the frame after [`FRAME`] at
/// [`VA`]. Returns its root.
fn second_tables(guest: &Guest) -> Result<u64, Failure> {
    let [pml4, pdpt, pd, pt] = [8, 9, 10, 11].map(|page| TABLES + page * 0x1000);
    guest.write_u64(pml4, pdpt | PAGE)?;
    guest.write_u64(pdpt, PD | PAGE)?;
    guest.write_u64(pdpt + 8, pd | PAGE)?;
    guest.write_u64(pd, pt | PAGE)?;
    guest.write_u64(pt, (FRAME + 0x1000) | PAGE)?;
    Ok(pml4)
}

fn cr3_set_by_the_host(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[FRAME | PAGE])?;
    guest.write_u32(FRAME, 0x1111)?;
    guest.write_u32(FRAME + 0x1000, 0x2222)?;
    ensure_eq!(ends(&mut guest, read(VA))?, 0x1111, "by the first tables");
    let other = second_tables(&guest)?;
    guest.load(read(VA))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr3 = other)?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x2222, "by the second tables");
    Ok(())
}

fn user_code_cannot_reach_supervisor_tables(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // The first 2 MiB in small pages: all for the user but the page tables.
    let mut guest = mapped(hypervisor, &[])?;
    let low = TABLES + 0x2000;
    for page in 0..512_u64 {
        let at = page << 12;
        let flags = if at < 0x6000 { SUPERVISOR } else { PAGE };
        guest.write_u64(low + page * 8, at | flags)?;
    }
    guest.write_u64(PD, low | PAGE)?;
    user_faults(&mut guest, "write to the IDT", 7, IDT + 0x10, write(IDT + 0x10))?;
    user_faults(&mut guest, "read of the PML4", 5, tables::PML4, read(tables::PML4))
}

fn implicit_accesses_are_the_supervisors(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // Loading a segment in ring 3 reads the GDT, which only the supervisor may read.
    let mut guest = mapped(hypervisor, &[])?;
    let low = TABLES + 0x2000;
    for page in 0..512_u64 {
        let flags = if page == 0 { SUPERVISOR } else { PAGE };
        guest.write_u64(low + page * 8, page << 12 | flags)?;
    }
    guest.write_u64(PD, low | PAGE)?;
    user_faults(&mut guest, "read of the GDT", 5, tables::GDT, |a| {
        asm! { a;
            mov eax, u32::from(DATA_RING3);
            mov es, eax;
            mov eax, dword_ptr(tables::GDT);
        };
        Ok(())
    })
}

fn a_bad_stack_is_a_double_fault(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = mapped(hypervisor, &[])?;
    // The double fault has a stack of its own.
    guest.write(IDT + 8 * 16 + 4, &[1])?;
    guest.load(|a| {
        asm! { a; mov rsp, VA + 0x800; ud2; };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (8, 0), "vector and error code");
    let reported = guest.cpu.get(StateSet::CONTROL)?.control.cr2;
    ensure_eq!(reported, VA + 0x7F8, "CR2");
    Ok(())
}
