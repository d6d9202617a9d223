//! Several vCPUs: start-up, interrupts between them, changes they tell each other of.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmkit_device::memory::{Bytes, MemoryRegionAddress};
use vmkit_device::{IoFlow, MonotonicClock, Msi};

use super::asm::{asm, assemble};
use super::case::{cases, ensure, ensure_eq};
use super::cpu::{Cpu, End};
use super::guest::{APIC, CODE, CODE2, DATA, Guest, MMIO, Mode, TABLES};
use super::interrupts::{apic_on, apic_write, eoi};
use super::kicks::kick_until;
use super::recorder::Recorder;
use super::tables::{PAGE, PDPT};
use super::{Failure, Need};
use crate::x86::MpState;
use crate::{
    Hypervisor, HypervisorError, InterruptControllers, PartitionSpec, StateSet, VcpuIo, VmExit,
};

cases! { "smp":
    init_and_sipi_start_a_processor "Intel SDM vol. 3A §9.4.4" [Need::Vcpus(2)];
    a_started_processor_is_as_after_init "Intel SDM vol. 3A §10.1.1, table 10-1" [Need::Vcpus(2)];
    what_starts_a_processor_is_in_its_state "the contract: MpState" [Need::Vcpus(2)];
    init_stops_a_running_processor "Intel SDM vol. 3A §9.4.2" [Need::Vcpus(2)];
    a_kick_ends_the_wait_for_sipi "the contract: Vcpu::kick" [Need::Vcpus(2)];
    fixed_ipi "Intel SDM vol. 3A §11.6.1" [Need::Vcpus(2)];
    ipi_to_all_but_self "Intel SDM vol. 3A §11.6.1" [Need::Vcpus(2)];
    nmi_ipi "Intel SDM vol. 3A §11.6.1" [Need::Vcpus(2)];
    lowest_priority_msi_comes_once "Intel SDM vol. 3A §11.6.2.4" [Need::Vcpus(2)];
    tlb_shootdown "Intel SDM vol. 3A §4.10.5" [Need::Vcpus(2)];
    cross_modifying_code "Intel SDM vol. 3A §9.1.3" [Need::Vcpus(2)];
    a_misaligned_locked_access_is_atomic "Intel SDM vol. 3A §9.1.2.2" [Need::Vcpus(2)];
    locked_accesses_to_devices_wait_for_nobody "the contract: VcpuIo" [Need::Vcpus(2)];
    one_vcpus_kick_is_not_the_others "the contract: Vcpu::kick" [Need::Vcpus(2)];
    without_controllers_there_is_one_vcpu "the contract: InterruptControllers::None";
}

/// Runs a vCPU to the end of its program, on a thread of its own, while `other` runs on this one.
pub(super) fn together(first: &mut Cpu, second: &mut Cpu) -> Result<(u64, u64), Failure> {
    thread::scope(|scope| {
        let (first_kick, second_kick) = (first.kick(), second.kick());
        let running = scope.spawn(move || {
            let result = second.finish(&mut Recorder::new());
            if result.is_err() {
                first_kick.kick();
            }
            result
        });
        let first = first.finish(&mut Recorder::new());
        if first.is_err() {
            second_kick.kick();
        }
        let second = running.join();
        let second = second.map_err(|_| Failure::Wrong("a vCPU's thread panicked".into()))?;
        // The other's kick is the consequence, not the cause.
        match (first, second) {
            (Ok(first), Ok(second)) => Ok((first, second)),
            (Err(Failure::Wrong(text)), Err(cause)) if text.contains("Kicked") => Err(cause),
            (Err(cause), _) | (_, Err(cause)) => Err(cause),
        }
    })
}
/// Two running vCPUs with a program each, the second at [`CODE2`].
pub(super) fn two(
    hypervisor: &dyn Hypervisor,
    first: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    second: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(Guest, Cpu), Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Long, 2)?;
    guest.load_at(CODE2, second)?;
    guest.load(first)?;
    let other = guest.add_running_cpu(1, CODE2)?;
    Ok((guest, other))
}
/// Where the start-up vector of this module points.
const SIPI_PAGE: u32 = 0x30;
fn send_init_sipi(a: &mut CodeAssembler) -> Result<(), IcedError> {
    apic_on(a)?;
    apic_write(a, 0x310, 1 << 24)?;
    apic_write(a, 0x300, 0x4500)?;
    // Twice, as the MP specification has it: the second one finds a processor that runs.
    apic_write(a, 0x300, 0x4600 | SIPI_PAGE as i32)?;
    apic_write(a, 0x300, 0x4600 | SIPI_PAGE as i32)
}
fn init_and_sipi_start_a_processor(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Long, 2)?;
    let code = assemble(16, 0, |a| {
        asm! { a;
            mov ax, (DATA >> 4) as i32;
            mov ds, ax;
            mov ax, cs;
            mov word_ptr(2), ax;
            mov word_ptr(0), 0x55AA;
            out 0xF4, ax;
        };
        Ok(())
    })?;
    guest.write(u64::from(SIPI_PAGE) << 12, &code)?;
    guest.load(|a| {
        send_init_sipi(a)?;
        asm! { a;
            label again;
            mov esi, DATA as u32;
        again:
            pause;
            cmp word_ptr(rsi), 0x55AA;
            jne again;
            movzx eax, word_ptr(rsi + 2);
            stop;
        };
        Ok(())
    })?;
    let mut other = guest.add_cpu(1)?;
    let (first, second) = together(&mut guest.cpu, &mut other)?;
    let selector = u64::from(SIPI_PAGE) << 8;
    ensure_eq!((first, second & 0xFFFF), (selector, selector), "CS as both saw it");
    Ok(())
}

/// A guest of two processors whose first starts the second, which stops at once.
fn starts_another(hypervisor: &dyn Hypervisor) -> Result<Guest, Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Long, 2)?;
    // OUT STOP_PORT, AL is the first instruction.
    guest.write(u64::from(SIPI_PAGE) << 12, &[0xE6, 0xF4])?;
    guest.load(|a| {
        send_init_sipi(a)?;
        asm! { a; stop; };
        Ok(())
    })?;
    Ok(guest)
}

fn a_started_processor_is_as_after_init(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = starts_another(hypervisor)?;
    let mut other = guest.add_cpu(1)?;
    together(&mut guest.cpu, &mut other)?;
    let state = other.get(StateSet::all())?;
    ensure_eq!(state.general.rip, 2, "RIP");
    ensure_eq!(state.general.rflags, 2, "RFLAGS");
    let cs_value = state.segments.cs;
    let want = (SIPI_PAGE as u16) << 8;
    ensure_eq!((cs_value.selector, cs_value.base), (want, u64::from(want) << 4), "CS");
    ensure_eq!(state.control.cr0 & !0x6000_0000, 0x10, "CR0");
    ensure_eq!((state.control.cr4, state.control.efer), (0, 0), "CR4 and EFER");
    ensure_eq!(state.mp, MpState::Runnable, "MP state");
    Ok(())
}

fn what_starts_a_processor_is_in_its_state(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = starts_another(hypervisor)?;
    // It has not run when they come, as when all vCPUs are stopped for a snapshot.
    let mut other = guest.add_cpu(1)?;
    guest.cpu.finish(&mut Recorder::new())?;
    let state = other.get(StateSet::all())?;
    let selector = (SIPI_PAGE as u16) << 8;
    ensure_eq!((state.mp, state.segments.cs.selector), (MpState::Runnable, selector), "state");
    // Another goes on from there.
    let twin = Guest::new(hypervisor, Mode::Long, 2)?;
    twin.write(u64::from(SIPI_PAGE) << 12, &[0xE6, 0xF4])?;
    let mut other = twin.add_cpu(1)?;
    other.set(StateSet::all(), &state)?;
    other.finish(&mut Recorder::new())?;
    ensure_eq!(other.get(StateSet::GENERAL)?.general.rip, 2, "RIP");
    Ok(())
}
fn init_stops_a_running_processor(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            apic_on(a)?;
            apic_write(a, 0x310, 1 << 24)?;
            asm! { a; label again; mov esi, DATA as u32; again: cmp dword_ptr(rsi), 0; je again; };
            apic_write(a, 0x300, 0x4500)?;
            asm! { a; stop; };
            Ok(())
        },
        |a| {
            asm! { a; label again; mov esi, DATA as u32; again: inc dword_ptr(rsi); jmp again; };
            Ok(())
        },
    )?;
    let kick = other.kick();
    let exit = thread::scope(|scope| -> Result<VmExit, Failure> {
        let running = scope.spawn(|| other.run(&mut Recorder::new()));
        let first = guest.cpu.finish(&mut Recorder::new());
        // Two readings alike: it does not count any more.
        let start = Instant::now();
        let read = || guest.ram.read_obj::<u32>(MemoryRegionAddress(DATA));
        let mut stopped = false;
        while !stopped && start.elapsed() < Duration::from_secs(20) {
            let before = read()?;
            thread::sleep(Duration::from_millis(20));
            stopped = read()? == before;
        }
        kick.kick();
        let exit = running.join().map_err(|_| Failure::Wrong("a vCPU's thread panicked".into()))?;
        first?;
        ensure!(stopped, "the vCPU runs on after INIT");
        exit
    })?;
    ensure_eq!(exit, VmExit::Kicked, "exit");
    // It may just not have had its turn when it was read twice.
    kick_until(&mut other, "the processor waits for a start-up IPI", |other| {
        Ok(other.get(StateSet::MP)?.mp == MpState::WaitForSipi)
    })
}

fn a_kick_ends_the_wait_for_sipi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::new(hypervisor, Mode::Long, 2)?;
    let mut other = guest.add_cpu(1)?;
    let kick = other.kick();
    let kicker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        kick.kick();
    });
    let exit = other.run(&mut Recorder::new())?;
    kicker.join().map_err(|_| Failure::Wrong("the kicking thread panicked".into()))?;
    ensure_eq!(exit, VmExit::Kicked, "exit");
    ensure_eq!(other.get(StateSet::MP)?.mp, MpState::WaitForSipi, "MP state");
    Ok(())
}

/// vCPU 0 sends by an ICR of `icr`; vCPU 1, halted, is to get `vector`.
fn ipi(hypervisor: &dyn Hypervisor, icr: i32, vector: u64) -> Result<(), Failure> {
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            apic_on(a)?;
            asm! { a; label again; mov esi, DATA as u32; again: cmp dword_ptr(rsi), 1; jne again; };
            apic_write(a, 0x310, 1 << 24)?;
            apic_write(a, 0x300, icr)?;
            asm! { a; sti; nop; nop; xor eax, eax; stop; };
            Ok(())
        },
        |a| {
            apic_on(a)?;
            asm! { a; label again; mov esi, DATA as u32; mov dword_ptr(rsi), 1; sti; again: hlt; jmp again; };
            Ok(())
        },
    )?;
    let (first, second) = thread::scope(|scope| {
        let running = scope.spawn(|| other.go(&mut Recorder::new()));
        let first = guest.cpu.go(&mut Recorder::new());
        (first, running.join())
    });
    let second = second.map_err(|_| Failure::Wrong("a vCPU's thread panicked".into()))??;
    ensure_eq!(first?, End::Stop(0), "the sender's end");
    ensure!(
        matches!(second, End::Fault(f) if f.vector == vector),
        "the receiver's end: {second:x?}"
    );
    Ok(())
}
fn fixed_ipi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    ipi(hypervisor, 0x4051, 0x51)
}
fn ipi_to_all_but_self(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    ipi(hypervisor, 0xC_4052, 0x52)
}
fn nmi_ipi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    ipi(hypervisor, 0x4400, 2)
}
fn lowest_priority_msi_comes_once(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // Both in the flat logical group 3, both off at first: requests stay in IRR.
    let program = |bit: i32| {
        move |a: &mut CodeAssembler| {
            apic_on(a)?;
            apic_write(a, 0xE0, -1)?;
            apic_write(a, 0xD0, bit << 24)?;
            asm! { a; stop; };
            Ok(())
        }
    };
    let (mut guest, mut other) = two(hypervisor, program(1), program(2))?;
    together(&mut guest.cpu, &mut other)?;
    for vector in [0x61, 0x71, 0x81, 0x91] {
        // Logical, redirection hint, lowest priority.
        guest.interrupts.signal_msi(Msi { address: APIC | 3 << 12 | 0xC, data: 0x100 | vector });
        let register = 0x200 + (vector as usize >> 5) * 16;
        let mut requested = 0;
        for cpu in [&mut guest.cpu, &mut other] {
            let lapic = cpu.get(StateSet::LAPIC)?.lapic;
            let bits = lapic.map_or(0, |lapic| lapic.registers.get(register));
            requested += bits >> (vector & 31) & 1;
        }
        ensure_eq!(requested, 1, "local APICs that got vector {vector:#x}");
    }
    Ok(())
}
fn tlb_shootdown(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // vCPU 1 reads a page over and over; vCPU 0 gives the page another frame, sends an IPI whose
    // handler does INVLPG and says so; after that vCPU 1 must see the new frame only.
    let va = 0x4000_0000_u64;
    let (frame, pt) = (0x20_0000_u64, TABLES + 0x1000);
    let rounds = 50;
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            apic_on(a)?;
            apic_write(a, 0x310, 1 << 24)?;
            asm! { a;
                label again, ready, acknowledged, seen;
                mov esi, DATA as u32;
            ready:
                cmp dword_ptr(rsi + 8), 0;
                je ready;
                mov ecx, 1;
            again:
                // Frame number `ecx` holds the number `ecx`.
                mov eax, ecx;
                shl eax, 12;
                add eax, (frame | PAGE) as i32;
                mov qword_ptr(pt), rax;
            };
            apic_write(a, 0x300, 0x4051)?;
            asm! { a;
            acknowledged:
                cmp dword_ptr(rsi), ecx;
                jne acknowledged;
                // What vCPU 1 reads from here on is new: let it report once more.
                mov dword_ptr(rsi + 16), ecx;
            seen:
                cmp dword_ptr(rsi + 24), ecx;
                jne seen;
                inc ecx;
                cmp ecx, rounds;
                jbe again;
                xor eax, eax;
                stop;
            };
            Ok(())
        },
        |a| {
            apic_on(a)?;
            asm! { a;
                label again, wrong, done;
                mov esi, DATA as u32;
                mov rbx, va;
                mov dword_ptr(rsi + 8), 1;
                sti;
            again:
                mov edx, dword_ptr(rsi + 16);
                mov eax, dword_ptr(rbx);
                cmp eax, edx;
                jb wrong;
                mov dword_ptr(rsi + 24), edx;
                cmp edx, rounds;
                jb again;
                xor eax, eax;
                jmp done;
            wrong:
                mov eax, 1;
                mov dword_ptr(rsi + 24), edx;
            done:
                cli;
                stop;
            };
            Ok(())
        },
    )?;
    guest.write_u64(PDPT + 8, TABLES | PAGE)?;
    guest.write_u64(TABLES, pt | PAGE)?;
    guest.write_u64(pt, frame | PAGE)?;
    for number in 0..=rounds as u64 {
        guest.write_u64(frame + (number << 12), number)?;
    }
    let handler = CODE2 + 0x1000;
    guest.load_at(handler, |a| {
        a.invlpg(byte_ptr(rbx))?;
        asm! { a; inc dword_ptr(rsi); };
        eoi(a)?;
        a.iretq()
    })?;
    guest.gate(0x51, handler)?;
    ensure_eq!(together(&mut guest.cpu, &mut other)?, (0, 0), "a stale translation was used");
    Ok(())
}
fn a_misaligned_locked_access_is_atomic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // vCPU 0 counts in four bytes; vCPU 1 stores to the last of them, and looks whether that stays.
    const ROUNDS: u32 = 100_000;
    let (started, done) = (DATA + 0x40, DATA + 0x80);
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            asm! { a;
                label again, wait;
                mov esi, DATA as u32;
                mov ecx, ROUNDS;
            wait:
                pause;
                cmp dword_ptr(started), 1;
                jne wait;
            again:
                [lock] inc dword_ptr(rsi + 1);
                dec ecx;
                jne again;
                mov dword_ptr(done), 1;
                xor eax, eax;
                stop;
            };
            Ok(())
        },
        |a| {
            asm! { a;
                label again, later, kept;
                mov esi, DATA as u32;
                xor eax, eax;
                mov dword_ptr(started), 1;
            again:
                inc ecx;
                mov byte_ptr(rsi + 4), cl;
                // What undoes the store comes some time after it.
                mov edx, 20;
            later:
                dec edx;
                jne later;
                cmp byte_ptr(rsi + 4), cl;
                je kept;
                inc eax;
            kept:
                cmp dword_ptr(done), 1;
                jne again;
                stop;
            };
            Ok(())
        },
    )?;
    let (_, lost) = together(&mut guest.cpu, &mut other)?;
    ensure_eq!(lost, 0, "plain stores that a locked access undid");
    ensure_eq!(guest.read_u32(DATA + 1)? & 0xFF_FFFF, ROUNDS, "the count");
    Ok(())
}
/// Answers a read of memory once the other one has been asked too.
struct Meeting {
    tell: Sender<()>,
    told: Receiver<()>,
    met: bool,
}
impl VcpuIo for Meeting {
    fn pio_read(&mut self, _: u16, _: &mut [u8]) -> IoFlow {
        IoFlow::Continue
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        IoFlow::Stop
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        // An other end that is gone is one that does not come.
        let _ = self.tell.send(());
        self.met = self.told.recv_timeout(Duration::from_secs(20)).is_ok();
        data.fill(0);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}
fn locked_accesses_to_devices_wait_for_nobody(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // One that waits inside for the other's to end cannot heed what the other's callback asks of it.
    let program = |a: &mut CodeAssembler| {
        asm! { a; mov esi, MMIO as u32; [lock] inc dword_ptr(rsi); stop; };
        Ok(())
    };
    let (mut guest, mut other) = two(hypervisor, program, program)?;
    let (first, second) = (mpsc::channel(), mpsc::channel());
    let mut ours = Meeting { tell: first.0, told: second.1, met: false };
    let mut its = Meeting { tell: second.0, told: first.1, met: false };
    let (exit, other_exit) = thread::scope(|scope| {
        let running = scope.spawn(|| other.run(&mut its));
        let exit = guest.cpu.run(&mut ours);
        (exit, running.join())
    });
    let other_exit = other_exit.map_err(|_| Failure::Wrong("a vCPU's thread panicked".into()))?;
    ensure_eq!((exit?, other_exit?), (VmExit::Stopped, VmExit::Stopped), "how they ended");
    ensure!(ours.met && its.met, "one waited for the other");
    Ok(())
}
fn cross_modifying_code(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // vCPU 0 rewrites an instruction that vCPU 1 executes: `mov eax, number`. Per round: it parks
    // vCPU 1 in a loop, stores the number, lets it go on through CPUID, and compares the result.
    let patched = CODE2 + 0x800;
    let rounds = 200;
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            asm! { a;
                label again, answer, wrong, done;
                mov esi, DATA as u32;
                mov ecx, 1;
            again:
                mov dword_ptr(patched + 1), ecx;
                mov dword_ptr(rsi), ecx;
            answer:
                cmp dword_ptr(rsi + 8), ecx;
                jne answer;
                cmp dword_ptr(rsi + 16), ecx;
                jne wrong;
                inc ecx;
                cmp ecx, rounds;
                jbe again;
                xor eax, eax;
                jmp done;
            wrong:
                mov eax, ecx;
            done:
                mov dword_ptr(rsi), -1;
                stop;
            };
            Ok(())
        },
        |a| {
            asm! { a;
                label again, go_on, done;
                mov esi, DATA as u32;
                xor edi, edi;
            again:
                mov edi, dword_ptr(rsi + 8);
            go_on:
                cmp dword_ptr(rsi), -1;
                je done;
                cmp dword_ptr(rsi), edi;
                je go_on;
                mov ebp, dword_ptr(rsi);
                cmp ebp, -1;
                je done;
                xor eax, eax;
                cpuid;
                mov ebx, patched as u32;
                call rbx;
                mov dword_ptr(rsi + 16), eax;
                mov dword_ptr(rsi + 8), ebp;
                jmp again;
            done:
                xor eax, eax;
                stop;
            };
            Ok(())
        },
    )?;
    // mov eax, 0; ret
    guest.write(patched, &[0xB8, 0, 0, 0, 0, 0xC3])?;
    ensure_eq!(together(&mut guest.cpu, &mut other)?, (0, 0), "the round with the old number");
    Ok(())
}
fn one_vcpus_kick_is_not_the_others(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let program = |a: &mut CodeAssembler| {
        asm! { a; mov eax, 5; stop; };
        Ok(())
    };
    let (mut guest, mut other) = two(hypervisor, program, program)?;
    other.kick().kick();
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 5, "vCPU 0's end");
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE + 7, "vCPU 0's RIP");
    ensure_eq!(other.run(&mut Recorder::new())?, VmExit::Kicked, "vCPU 1's exit");
    ensure_eq!(other.finish(&mut Recorder::new())?, 5, "vCPU 1's end");
    Ok(())
}

/// Nothing could start a second one.
fn without_controllers_there_is_one_vcpu(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut spec = PartitionSpec::new(2, Arc::new(MonotonicClock::new()));
    spec.interrupt_controllers = InterruptControllers::None;
    match hypervisor.create(&spec) {
        // A backend of one vCPU refuses any two.
        Err(HypervisorError::Unsupported(_) | HypervisorError::VcpuIndex(2)) => Ok(()),
        Err(other) => Err(other.into()),
        Ok(_) => Err(Failure::Wrong("two vCPUs without interrupt controllers were made".into())),
    }
}
