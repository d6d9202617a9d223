//! Guest memory: what is mapped, what is not, read-only mappings, and the dirty log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use vmkit_device::IoFlow;
use vmkit_device::memory::{
    Backing, Bytes, DirtyBitmap, GuestAddress, MemoryRegion, MemoryRegionAddress, region_at,
};

use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE, DATA, Guest, MMIO, Mode, RAM, best_model};
use super::recorder::{Access, Recorder};
use super::{Failure, asm::asm};
use crate::{Hypervisor, HypervisorError, MapAccess, MapId, VcpuIo, VmExit};

cases! { "memory":
    unmapped_memory_is_mmio "the contract: VcpuIo::mmio_read, mmio_write";
    a_mapping_appears_and_goes "the contract: Partition::map, unmap";
    a_region_can_be_mapped_elsewhere "the contract: Partition::map, unmap";
    host_writes_are_seen "the contract: Partition::map";
    read_only_memory_reads "the contract: MapAccess::WRITE";
    read_only_memory_hands_writes_over "the contract: MapAccess::WRITE";
    read_only_memory_executes "the contract: MapAccess";
    code_runs_from_a_mapping_made_later "the contract: Partition::map";
    the_host_rewrites_code_that_was_mapped_elsewhere "the contract: host writes are seen";
    impossible_mappings_are_refused "the contract: HypervisorError::Mapping";
    memory_above_4_gib "the contract: Partition::map";
    the_dirty_log_is_exact "the contract: Partition::take_dirty";
    the_dirty_log_forgets_what_it_told "the contract: Partition::take_dirty";
    the_dirty_log_sees_page_crossing_writes "the contract: Partition::take_dirty";
    the_dirty_log_sees_page_table_updates "Intel SDM vol. 3A §4.8";
    reads_are_not_dirty "the contract: Partition::take_dirty";
    an_untracked_mapping_has_no_dirty_log "the contract: Partition::take_dirty";
    remapping_while_running "the contract: map and unmap may be called while vCPUs run";
    an_unmapped_region_is_let_go "the contract: the partition keeps a region until unmap";
}

const PATTERN: u64 = 0x8877_6655_4433_2211;

fn region(bytes: u64) -> Result<Arc<MemoryRegion>, Failure> {
    Ok(Arc::new(region_at(GuestAddress(0), bytes, Backing::Memfd)?))
}

fn map(
    guest: &Guest,
    at: u64,
    region: &Arc<MemoryRegion>,
    access: MapAccess,
) -> Result<MapId, Failure> {
    Ok(guest.partition.map(GuestAddress(at), region.clone(), access)?)
}

/// Loads a program that reads 8 bytes at `at`, writes [`PATTERN`] there, and stops; again and again.
fn load_toucher(guest: &mut Guest, at: u64) -> Result<(), Failure> {
    guest.load(|a| {
        asm! { a;
            label again;
            mov rdi, at;
            mov rax, PATTERN;
        again:
            mov rbx, qword_ptr(rdi);
            mov qword_ptr(rdi), rax;
            stop;
            jmp again;
        };
        Ok(())
    })
}

fn unmapped_memory_is_mmio(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    load_toucher(&mut guest, RAM)?;
    let mut io = Recorder::answering([7]);
    guest.cpu.finish(&mut io)?;
    let want = [Access::Read(RAM, 8), Access::Write(RAM, 8, PATTERN)];
    ensure_eq!(io.log, want, "accesses to the first byte past RAM");
    ensure_eq!(guest.cpu.register(3)?, 7, "what was read");
    Ok(())
}

fn a_mapping_appears_and_goes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    load_toucher(&mut guest, MMIO)?;
    let region = region(0x2000)?;
    region.write_obj(0x1234_u64, MemoryRegionAddress(0))?;
    let mmio = [Access::Read(MMIO, 8), Access::Write(MMIO, 8, PATTERN)];
    let mut want = 0x1234;
    for _ in 0..3 {
        let mut io = Recorder::new();
        guest.cpu.finish(&mut io)?;
        ensure_eq!(io.log, mmio, "accesses before");
        let id = map(&guest, MMIO, &region, MapAccess::WRITE)?;
        let mut io = Recorder::new();
        guest.cpu.finish(&mut io)?;
        ensure_eq!(io.log, [], "accesses while mapped");
        ensure_eq!(guest.cpu.register(3)?, want, "what was read");
        want = PATTERN;
        ensure_eq!(region.read_obj::<u64>(MemoryRegionAddress(0))?, PATTERN, "memory");
        guest.partition.unmap(id)?;
    }
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    ensure_eq!(io.log, mmio, "accesses after");
    Ok(())
}

fn a_region_can_be_mapped_elsewhere(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let region = region(0x1000)?;
    for at in [MMIO, MMIO + 0x5000, RAM] {
        region.write_obj(at, MemoryRegionAddress(0))?;
        let id = map(&guest, at, &region, MapAccess::WRITE)?;
        load_toucher(&mut guest, at)?;
        let mut io = Recorder::new();
        guest.cpu.finish(&mut io)?;
        ensure_eq!(io.log, [], "accesses at {at:#x}");
        ensure_eq!(guest.cpu.register(3)?, at, "what was read");
        guest.partition.unmap(id)?;
    }
    Ok(())
}

fn host_writes_are_seen(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    load_toucher(&mut guest, DATA)?;
    for value in 1..5 {
        guest.write_u64(DATA, value)?;
        guest.cpu.finish(&mut Recorder::new())?;
        ensure_eq!(guest.cpu.register(3)?, value, "what the guest read");
        ensure_eq!(guest.read_u64(DATA)?, PATTERN, "what the host reads");
    }
    Ok(())
}

fn read_only(hypervisor: &dyn Hypervisor) -> Result<(Guest, Arc<MemoryRegion>), Failure> {
    let guest = Guest::long(hypervisor)?;
    let region = region(0x2000)?;
    region.write_obj(0x1234_u64, MemoryRegionAddress(0))?;
    map(&guest, MMIO, &region, MapAccess::empty())?;
    Ok((guest, region))
}

fn read_only_memory_reads(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, _region) = read_only(hypervisor)?;
    guest.load(|a| {
        asm! { a; mov edi, MMIO as u32; mov eax, dword_ptr(rdi); stop; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.finish(&mut io)?, 0x1234, "what was read");
    ensure_eq!(io.log, [], "accesses");
    Ok(())
}

fn read_only_memory_hands_writes_over(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, region) = read_only(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov edi, MMIO as u32;
            mov eax, 0x5555_5555;
            mov dword_ptr(rdi), eax;
            mov byte_ptr(rdi + 9), al;
            mov eax, dword_ptr(rdi);
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.finish(&mut io)?, 0x1234, "what was read after writing");
    let want = [Access::Write(MMIO, 4, 0x5555_5555), Access::Write(MMIO + 9, 1, 0x55)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(region.read_obj::<u128>(MemoryRegionAddress(0))?, 0x1234, "memory");
    Ok(())
}

fn read_only_memory_executes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, region) = read_only(hypervisor)?;
    // mov eax, 0x77; out 0xF4, eax
    region.write_slice(&[0xB8, 0x77, 0, 0, 0, 0xE7, 0xF4], MemoryRegionAddress(0x100))?;
    guest.load(|a| a.jmp(MMIO + 0x100))?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x77, "the end");
    Ok(())
}

fn code_runs_from_a_mapping_made_later(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; mov ebx, MMIO as u32; again: call rbx; jmp again; };
        Ok(())
    })?;
    for value in 1..4_u8 {
        let region = region(0x1000)?;
        // mov eax, value; out 0xF4, eax; ret
        region.write_slice(&[0xB8, value, 0, 0, 0, 0xE7, 0xF4, 0xC3], MemoryRegionAddress(0))?;
        let id = map(&guest, MMIO, &region, MapAccess::WRITE)?;
        ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, u64::from(value), "the code's value");
        // Past the RET, so that the code page is left before it goes.
        guest.cpu.jump(CODE + 7)?;
        guest.partition.unmap(id)?;
    }
    Ok(())
}

fn the_host_rewrites_code_that_was_mapped_elsewhere(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let region = region(0x1000)?;
    // mov eax, value; out 0xF4, eax; jmp to the beginning
    region.write_slice(&[0xB8, 0, 0, 0, 0, 0xE7, 0xF4, 0xEB, 0xF7], MemoryRegionAddress(0))?;
    let mut value = 0_u8;
    for at in [MMIO, MMIO + 0x5000, RAM] {
        let id = map(&guest, at, &region, MapAccess::WRITE)?;
        guest.load(|a| {
            asm! { a; mov ebx, at as u32; jmp rbx; };
            Ok(())
        })?;
        for _ in 0..2 {
            value += 1;
            region.write_obj(value, MemoryRegionAddress(1))?;
            let got = guest.cpu.finish(&mut Recorder::new())?;
            ensure_eq!(got, u64::from(value), "the code's value at {at:#x}");
        }
        guest.cpu.jump(CODE)?;
        guest.partition.unmap(id)?;
    }
    Ok(())
}

fn impossible_mappings_are_refused(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::long(hypervisor)?;
    let region = region(0x2000)?;
    let refused = |at: u64| {
        let result = guest.partition.map(GuestAddress(at), region.clone(), MapAccess::WRITE);
        matches!(result, Err(HypervisorError::Mapping { .. }))
    };
    ensure!(refused(0), "a mapping over RAM was taken");
    ensure!(refused(RAM - 0x1000), "a mapping over the end of RAM was taken");
    ensure!(refused(MMIO + 0x10), "a mapping that is not page-aligned was taken");
    let unmapped = guest.partition.unmap(MapId(0xDEAD));
    ensure!(matches!(unmapped, Err(HypervisorError::Mapping { .. })), "unmapping: {unmapped:?}");
    let id = map(&guest, MMIO, &region, MapAccess::WRITE)?;
    guest.partition.unmap(id)?;
    ensure!(guest.partition.unmap(id).is_err(), "a mapping was taken away twice");
    Ok(())
}

fn memory_above_4_gib(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let region = region(0x1000)?;
    let at = 0x2_0000_0000_u64;
    map(&guest, at, &region, MapAccess::WRITE)?;
    // The second GiB shows it, by a table of its own.
    let table = super::guest::TABLES;
    guest.write_u64(super::tables::PDPT + 8, table | super::tables::PAGE)?;
    guest.write_u64(table, at | super::tables::LARGE_PAGE)?;
    load_toucher(&mut guest, 0x4000_0000)?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    ensure_eq!(io.log, [], "accesses");
    ensure_eq!(region.read_obj::<u64>(MemoryRegionAddress(0))?, PATTERN, "memory");
    Ok(())
}

/// A machine with a tracked region at [`MMIO`] and a program that writes a byte to each of `offsets`.
fn tracked(
    hypervisor: &dyn Hypervisor,
    offsets: &[u64],
) -> Result<(Guest, Arc<MemoryRegion>, MapId), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let region = region(0x10_0000)?;
    let id = map(&guest, MMIO, &region, MapAccess::WRITE | MapAccess::TRACK_DIRTY)?;
    guest.load(|a| {
        asm! { a; label again; again: };
        for offset in offsets {
            asm! { a; mov edi, (MMIO + offset) as u32; mov byte_ptr(rdi), 1; };
        }
        asm! { a; stop; jmp again; };
        Ok(())
    })?;
    Ok((guest, region, id))
}

fn dirty(guest: &Guest, id: MapId) -> Result<Vec<u64>, Failure> {
    let mut bitmap = DirtyBitmap::for_bytes(0x10_0000);
    guest.partition.take_dirty(id, &mut bitmap)?;
    Ok(bitmap.pages().collect())
}

fn pages(of: &[u64]) -> Vec<u64> {
    of.to_vec()
}

fn the_dirty_log_is_exact(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let offsets = [0x3000, 0x3FFF, 0x5123, 0x4_0000, 0xF_F000];
    let (mut guest, _region, id) = tracked(hypervisor, &offsets)?;
    ensure_eq!(dirty(&guest, id)?, pages(&[]), "pages before the first write");
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(dirty(&guest, id)?, pages(&[3, 5, 0x40, 0xFF]), "pages after the writes");
    Ok(())
}

fn the_dirty_log_forgets_what_it_told(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, _region, id) = tracked(hypervisor, &[0x2000, 0x7000])?;
    for round in 0..3 {
        guest.cpu.finish(&mut Recorder::new())?;
        ensure_eq!(dirty(&guest, id)?, pages(&[2, 7]), "pages in round {round}");
        ensure_eq!(dirty(&guest, id)?, pages(&[]), "pages of the second call in round {round}");
    }
    // What a bitmap holds already stays.
    guest.cpu.finish(&mut Recorder::new())?;
    let mut bitmap = DirtyBitmap::for_bytes(0x10_0000);
    bitmap.mark(9);
    guest.partition.take_dirty(id, &mut bitmap)?;
    ensure_eq!(bitmap.pages().collect::<Vec<_>>(), [2, 7, 9], "pages merged");
    Ok(())
}

fn the_dirty_log_sees_page_crossing_writes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, _region, id) = tracked(hypervisor, &[])?;
    guest.load(|a| {
        asm! { a; mov edi, (MMIO + 0x3FFD) as u32; mov qword_ptr(rdi), -1; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(dirty(&guest, id)?, pages(&[3, 4]), "pages");
    Ok(())
}

fn the_dirty_log_sees_page_table_updates(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // A page table in the tracked region, whose entry gets its accessed and dirty bits.
    let (mut guest, region, id) = tracked(hypervisor, &[])?;
    region.write_obj(DATA | 0x7, MemoryRegionAddress(0x6000))?;
    guest.write_u64(super::tables::PD + 8 * 8, (MMIO + 0x6000) | super::tables::PAGE)?;
    guest.load(|a| {
        asm! { a; mov edi, 0x100_0000; mov dword_ptr(rdi), 1; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(region.read_obj::<u64>(MemoryRegionAddress(0x6000))?, DATA | 0x67, "entry");
    ensure_eq!(dirty(&guest, id)?, pages(&[6]), "pages");
    Ok(())
}

fn reads_are_not_dirty(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, region, id) = tracked(hypervisor, &[])?;
    // add eax, [rip] and the like would hide it: executing counts as reading too.
    region.write_slice(&[0xB8, 1, 0, 0, 0, 0xE7, 0xF4], MemoryRegionAddress(0x8000))?;
    guest.load(|a| {
        asm! { a;
            mov edi, (MMIO + 0x4000) as u32;
            mov eax, dword_ptr(rdi);
            mov ebx, (MMIO + 0x8000) as u32;
            jmp rbx;
        };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(dirty(&guest, id)?, pages(&[]), "pages");
    Ok(())
}

fn an_untracked_mapping_has_no_dirty_log(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::with(hypervisor, Mode::Long, 1, MapAccess::WRITE, best_model(hypervisor))?;
    let mut bitmap = DirtyBitmap::for_bytes(RAM);
    ensure!(guest.partition.take_dirty(guest.map, &mut bitmap).is_err(), "it gave a log");
    ensure!(guest.partition.take_dirty(MapId(0xDEAD), &mut bitmap).is_err(), "no such mapping");
    Ok(())
}

/// Counts reads of MMIO, and answers them with ones.
struct Reads {
    mmio: Arc<AtomicU64>,
}

impl VcpuIo for Reads {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        self.mmio.fetch_add(1, Ordering::SeqCst);
        data.fill(0xFF);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

/// The guest reads a place over and over, counts how often it found memory there, and how often
/// nothing; anything else it finds is wrong.
fn remapping_while_running(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again, absent, wrong;
            mov edi, MMIO as u32;
            xor ebx, ebx;
        again:
            mov eax, dword_ptr(rdi);
            cmp eax, -1;
            je absent;
            cmp eax, 0x1234;
            jne wrong;
            inc qword_ptr(DATA);
            jmp again;
        absent:
            inc qword_ptr(DATA + 8);
            jmp again;
        wrong:
            mov dword_ptr(DATA + 16), 1;
            jmp again;
        };
        Ok(())
    })?;
    let region = region(0x1000)?;
    region.write_obj(0x1234_u32, MemoryRegionAddress(0))?;
    let (mmio, over) = (Arc::new(AtomicU64::new(0)), AtomicBool::new(false));
    let kick = guest.cpu.kick();
    let partition = guest.partition.clone();
    let ram = guest.ram.clone();
    let Guest { cpu, .. } = &mut guest;
    let outcome = thread::scope(|scope| {
        let (mmio, over, region) = (mmio.clone(), &over, &region);
        let changer = scope.spawn(move || -> Result<(), Failure> {
            let progress = |at: u64, from: u64| -> Result<(), Failure> {
                while !over.load(Ordering::SeqCst)
                    && ram.read_obj::<u64>(MemoryRegionAddress(at))? <= from
                {
                    thread::sleep(Duration::from_micros(50));
                }
                Ok(())
            };
            for _ in 0..50 {
                let id = partition.map(GuestAddress(MMIO), region.clone(), MapAccess::WRITE)?;
                progress(DATA, ram.read_obj(MemoryRegionAddress(DATA))?)?;
                partition.unmap(id)?;
                // Not one read may find memory from here on; two absences prove it was left.
                let present = ram.read_obj::<u64>(MemoryRegionAddress(DATA))?;
                progress(DATA + 8, ram.read_obj::<u64>(MemoryRegionAddress(DATA + 8))? + 1)?;
                let later = ram.read_obj::<u64>(MemoryRegionAddress(DATA))?;
                // The one that was read before unmap and counted after it.
                ensure!(later - present <= 1, "{} reads after unmap", later - present);
            }
            kick.kick();
            Ok(())
        });
        let run = cpu.run(&mut Reads { mmio });
        over.store(true, Ordering::SeqCst);
        let changer = changer.join();
        ensure_eq!(run?, VmExit::Kicked, "exit");
        changer.map_err(|_| Failure::Wrong("the mapping thread panicked".into()))?
    });
    // The kick is sent only by a thread that ran to its end; else the watchdog's ended the run.
    outcome?;
    ensure_eq!(guest.read_u32(DATA + 16)?, 0, "reads of something else");
    ensure!(mmio.load(Ordering::SeqCst) > 0, "no read of MMIO");
    Ok(())
}

fn an_unmapped_region_is_let_go(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let region = region(0x1000)?;
    let id = map(&guest, MMIO, &region, MapAccess::WRITE)?;
    ensure!(Arc::strong_count(&region) > 1, "a mapped region is not kept");
    load_toucher(&mut guest, MMIO)?;
    guest.cpu.finish(&mut Recorder::new())?;
    guest.partition.unmap(id)?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(Arc::strong_count(&region), 1, "owners after unmap");
    Ok(())
}
