//! Kicks: sticky, from any thread, none lost and none left over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use vmkit_device::IoFlow;
use vmkit_device::memory::{Bytes, MemoryRegionAddress};

use super::case::{cases, ensure, ensure_eq};
use super::cpu::Cpu;
use super::guest::{CODE, DATA, Guest};
use super::recorder::Recorder;
use super::{Failure, asm::asm};
use crate::{Hypervisor, StateSet, VcpuIo, VmExit};

cases! { "kicks":
    a_kick_before_the_run_ends_it "the contract: Kick is sticky";
    a_kick_ends_a_busy_loop "the contract: Vcpu::kick";
    a_kick_ends_a_hlt "the contract: HLT waits inside, a kick ends it";
    a_kicked_hlt_goes_on_waiting "the contract: HLT waits inside";
    kicks_coalesce "the contract: one run consumes all kicks before it returned";
    a_kick_from_a_callback "the contract: Kick is callable from any thread";
    a_kick_and_a_stop_at_once "the contract: both are reported";
    a_kick_outlives_its_vcpu "the contract: Kick is Clone";
    a_kick_never_splits_an_instruction "the contract: no instruction is half done";
    ten_thousand_kicks_and_none_lost "the contract: Kick is sticky";
    kicks_under_exit_load "the contract: Kick is sticky";
}

fn busy(hypervisor: &dyn Hypervisor) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; again: inc qword_ptr(DATA); jmp again; };
        Ok(())
    })?;
    Ok(guest)
}

fn stop_at_once(hypervisor: &dyn Hypervisor) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; again: inc ebx; stop; jmp again; };
        Ok(())
    })?;
    Ok(guest)
}

fn a_kick_before_the_run_ends_it(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = stop_at_once(hypervisor)?;
    let mut io = Recorder::new();
    guest.cpu.kick().kick();
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Kicked, "exit of the first run");
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE, "RIP");
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Stopped, "exit of the second run");
    Ok(())
}

fn later(delay: Duration, kick: crate::Kick) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(delay);
        kick.kick();
    })
}

/// Kicks once `ready` holds, or after seconds in which it did not come to hold: a guest on a busy host
/// may not have got far after any shorter time.
pub(super) fn kick_when(
    kick: crate::Kick,
    ready: impl Fn() -> bool + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let start = Instant::now();
        while !ready() && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(1));
        }
        kick.kick();
    })
}

fn joined(thread: thread::JoinHandle<()>) -> Result<(), Failure> {
    thread.join().map_err(|_| Failure::Wrong("a kicking thread panicked".into()))
}

fn a_kick_ends_a_busy_loop(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = busy(hypervisor)?;
    for _ in 0..3 {
        let before = guest.read_u64(DATA)?;
        let ram = guest.ram.clone();
        let kicker = kick_when(guest.cpu.kick(), move || {
            ram.read_obj::<u64>(MemoryRegionAddress(DATA)).is_ok_and(|now| now > before)
        });
        let start = Instant::now();
        ensure_eq!(guest.cpu.run(&mut Recorder::new())?, VmExit::Kicked, "exit");
        let took = start.elapsed();
        joined(kicker)?;
        ensure!(guest.read_u64(DATA)? > before, "the guest did nothing");
        ensure!(took < Duration::from_secs(20), "the kick took {took:?}");
    }
    Ok(())
}

/// Runs `cpu` and kicks it until it has `arrived`: how soon a guest gets somewhere is the host's business.
pub(super) fn kick_until(
    cpu: &mut Cpu,
    what: &str,
    mut arrived: impl FnMut(&mut Cpu) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let kicker = later(Duration::from_millis(10), cpu.kick());
        ensure_eq!(cpu.run(&mut Recorder::new())?, VmExit::Kicked, "exit");
        joined(kicker)?;
        if arrived(cpu)? {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(20), "{what}: not after many kicks");
    }
}

fn is_halted(cpu: &mut Cpu) -> Result<bool, Failure> {
    Ok(cpu.get(StateSet::MP)?.mp == crate::x86::MpState::Halted)
}

fn a_kick_ends_a_hlt(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; sti; hlt; stop; };
        Ok(())
    })?;
    kick_until(&mut guest.cpu, "the processor halts", is_halted)?;
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE + 2, "RIP is after HLT");
    Ok(())
}

fn a_kicked_hlt_goes_on_waiting(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; sti; hlt; stop; };
        Ok(())
    })?;
    kick_until(&mut guest.cpu, "the processor halts", is_halted)?;
    for _ in 0..3 {
        kick_until(&mut guest.cpu, "a kick", |_| Ok(true))?;
        ensure!(is_halted(&mut guest.cpu)?, "the processor halts no more after a kick");
    }
    Ok(())
}

fn kicks_coalesce(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = stop_at_once(hypervisor)?;
    let kick = guest.cpu.kick();
    for _ in 0..100 {
        kick.clone().kick();
    }
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Kicked, "exit of the first run");
    for round in 0..10 {
        ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Stopped, "exit of later run {round}");
    }
    Ok(())
}

/// Kicks from inside a callback; the second port also stops.
struct Kicker {
    kick: crate::Kick,
    calls: u32,
}

impl VcpuIo for Kicker {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn pio_write(&mut self, port: u16, _: &[u8]) -> IoFlow {
        self.calls += 1;
        self.kick.kick();
        if port == 0x81 { IoFlow::Stop } else { IoFlow::Continue }
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

fn a_kick_from_a_callback(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; again: out 0x80, al; jmp again; };
        Ok(())
    })?;
    let mut io = Kicker { kick: guest.cpu.kick(), calls: 0 };
    for calls in 1..=3 {
        ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Kicked, "exit");
        ensure_eq!(io.calls, calls, "accesses before the run ended");
        // OUT is complete.
        ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE + 2, "RIP");
    }
    Ok(())
}

fn a_kick_and_a_stop_at_once(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; out 0x81, al; stop; };
        Ok(())
    })?;
    let mut io = Kicker { kick: guest.cpu.kick(), calls: 0 };
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Stopped, "exit of the first run");
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE + 2, "RIP");
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Kicked, "exit of the second run");
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Stopped, "exit of the third run");
    Ok(())
}

fn a_kick_outlives_its_vcpu(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::long(hypervisor)?;
    let kick = guest.cpu.kick();
    drop(guest);
    kick.kick();
    Ok(())
}

fn a_kick_never_splits_an_instruction(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // Two counters that one vCPU moves together: seen at each kick, they may be one apart, by the
    // instruction that RIP says.
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; xor ebx, ebx; xor ecx, ecx; again: inc rbx; inc rcx; jmp again; };
        Ok(())
    })?;
    for round in 0..50 {
        let kicker = later(Duration::from_micros(200 + round * 37 % 500), guest.cpu.kick());
        ensure_eq!(guest.cpu.run(&mut Recorder::new())?, VmExit::Kicked, "exit");
        joined(kicker)?;
        let general = guest.cpu.get(StateSet::GENERAL)?.general;
        let ahead = general.rbx() - general.rcx();
        // After INC RBX, 4 + 3 bytes in.
        ensure_eq!(ahead, u64::from(general.rip == CODE + 7), "RBX ahead at {:#x}", general.rip);
    }
    Ok(())
}

/// Another thread kicks `kicks` times; each time it waits until the kick was seen, then kicks again at once. A
/// lost kick would leave both waiting, until the watchdog ends the run.
fn hammer(guest: &mut Guest, io: &mut dyn VcpuIo, kicks: u64) -> Result<(), Failure> {
    let (sent, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let over = Arc::new(AtomicBool::new(false));
    let kick = guest.cpu.kick();
    let hammering = {
        let (sent, seen, over) = (sent.clone(), seen.clone(), over.clone());
        thread::spawn(move || {
            for number in 1..=kicks {
                sent.store(number, Ordering::SeqCst);
                kick.kick();
                let mut spins = 0_u32;
                while seen.load(Ordering::SeqCst) < number && !over.load(Ordering::SeqCst) {
                    spins += 1;
                    if spins > 100 {
                        thread::yield_now();
                    }
                }
            }
        })
    };
    let mut outcome = Ok(());
    for number in 1..=kicks {
        outcome = guest.cpu.run(io).and_then(|exit| {
            ensure_eq!(exit, VmExit::Kicked, "exit number {number}");
            let sent = sent.load(Ordering::SeqCst);
            ensure_eq!(sent, number, "kicks sent when run number {number} ended");
            Ok(())
        });
        if outcome.is_err() {
            break;
        }
        seen.store(number, Ordering::SeqCst);
    }
    over.store(true, Ordering::SeqCst);
    joined(hammering)?;
    outcome
}

/// Ends with a program that stops: a kick left over would end its run before.
fn nothing_left_over(guest: &mut Guest) -> Result<(), Failure> {
    guest.load(|a| {
        asm! { a; mov eax, 9; stop; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 9, "the end of a run without kicks");
    Ok(())
}

fn ten_thousand_kicks_and_none_lost(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = busy(hypervisor)?;
    // On one processor each kick costs both threads a time slice.
    let alone = thread::available_parallelism().is_ok_and(|count| count.get() == 1);
    hammer(&mut guest, &mut Recorder::new(), if alone { 500 } else { 10_000 })?;
    nothing_left_over(&mut guest)
}

/// Accesses that cost nothing but an exit.
struct Quiet;

impl VcpuIo for Quiet {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

fn kicks_under_exit_load(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; again: out 0x80, al; in_ al, 0x80; jmp again; };
        Ok(())
    })?;
    let alone = thread::available_parallelism().is_ok_and(|count| count.get() == 1);
    hammer(&mut guest, &mut Quiet, if alone { 200 } else { 2_000 })?;
    nothing_left_over(&mut guest)
}
