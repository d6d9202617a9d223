//! Timers and the time-stamp counter: that they fire, and that their rates are the host's time.

use std::thread;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure, ensure_eq};
use super::controllers::{ioapic_route, pic_on};
use super::cpu::Cpu;
use super::guest::{CODE2, DATA, Guest};
use super::interrupts::{apic_on, apic_write, eoi};
use super::recorder::Recorder;
use super::{Failure, Need, asm::asm};
use crate::{Feature, Hypervisor, StateSet};

cases! { "timers":
    tsc_is_monotonic "Intel SDM vol. 3B §18.17";
    tsc_rate "the contract: Partition::tsc_khz";
    cpuid_tells_no_other_tsc_frequency "Intel SDM vol. 2A, CPUID leaf 15H";
    rdtscp_reads_tsc_aux "Intel SDM vol. 2B, RDTSCP" [Need::Feature(Feature::Rdtscp)];
    pit_interrupts_through_the_pic "8254, mode 2";
    pit_interrupts_through_the_ioapic "8254, mode 2; ACPI 6.5 §5.2.12.5";
    pit_counts_down "8254, counter latch";
    pit_channel_2_and_port_61 "8254, mode 0; PC/AT port 61h";
    lapic_one_shot "Intel SDM vol. 3A §11.5.4";
    lapic_one_shot_fires_once "Intel SDM vol. 3A §11.5.4";
    lapic_periodic "Intel SDM vol. 3A §11.5.4";
    lapic_counts_down "Intel SDM vol. 3A §11.5.4";
    lapic_divides "Intel SDM vol. 3A figure 11-10";
    lapic_masked_timer_is_silent "Intel SDM vol. 3A §11.5.1";
    tsc_deadline "Intel SDM vol. 3A §11.5.4.1" [Need::Feature(Feature::TscDeadline)];
    tsc_deadline_in_the_past "Intel SDM vol. 3A §11.5.4.1" [Need::Feature(Feature::TscDeadline)];
    tsc_deadline_disarmed "Intel SDM vol. 3A §11.5.4.1" [Need::Feature(Feature::TscDeadline)];
}

/// Bits 17 and 18 of the timer's local vector: periodic, and TSC deadline.
const PERIODIC: i32 = 1 << 17;
const DEADLINE: i32 = 2 << 17;
const VECTOR: u8 = 0x70;

/// Runs to the program's end; its value, and how long it took.
fn timed(cpu: &mut Cpu) -> Result<(u64, Duration), Failure> {
    let start = Instant::now();
    let value = cpu.finish(&mut Recorder::new())?;
    Ok((value, start.elapsed()))
}

/// A timer may not be early, and on a busy host not by much too late.
fn on_time(took: Duration, wanted: Duration) -> Result<(), Failure> {
    let (earliest, latest) = (wanted.mul_f64(0.9), wanted.mul_f64(1.5) + Duration::from_secs(2));
    ensure!(took >= earliest, "{wanted:?} took only {took:?}");
    ensure!(took <= latest, "{wanted:?} took {took:?}");
    Ok(())
}

/// On a busy host a tick may come late and the next one right behind it, before the guest has looked.
fn counted(ticks: u64, wanted: u64) -> Result<(), Failure> {
    ensure!((wanted..=wanted + 2).contains(&ticks), "{ticks} interrupts instead of {wanted}");
    Ok(())
}

/// A handler for `vector` that counts in EBX, does `acknowledge`, and returns.
fn count_handler(
    guest: &Guest,
    vector: u8,
    acknowledge: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Failure> {
    guest.load_at(CODE2, |a| {
        a.inc(ebx)?;
        acknowledge(a)?;
        a.iretq()
    })?;
    guest.gate(vector, CODE2)
}

/// Halts until the handler has counted to `count`.
fn halt_until(a: &mut CodeAssembler, count: i32) -> Result<(), IcedError> {
    asm! { a;
        label again, done;
    again:
        cli;
        cmp ebx, count;
        jae done;
        sti;
        hlt;
        jmp again;
    done:
        mov eax, ebx;
        stop;
    };
    Ok(())
}

fn tsc_is_monotonic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again, wrong, done;
            xor ebx, ebx;
            mov esi, 1000;
        again:
            rdtsc;
            shl rdx, 32;
            or rax, rdx;
            cmp rax, rbx;
            jb wrong;
            mov rbx, rax;
            dec esi;
            jnz again;
            xor eax, eax;
            jmp done;
        wrong:
            mov eax, 1;
        done:
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0, "steps backwards");
    Ok(())
}

fn tsc_rate(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; again: rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; stop; jmp again; };
        Ok(())
    })?;
    let khz = f64::from(guest.partition.tsc_khz());
    ensure!(khz > 0.0, "the TSC's frequency is not told");
    // With the moments between which it was read: a host on other business may take long over that.
    let mut read = || -> Result<(Instant, u64, Instant), Failure> {
        let before = Instant::now();
        guest.cpu.finish(&mut Recorder::new())?;
        let after = Instant::now();
        Ok((before, guest.cpu.register(3)?, after))
    };
    read()?;
    let first = read()?;
    thread::sleep(Duration::from_millis(200));
    let second = read()?;
    let counted = (second.1 - first.1) as f64 / khz;
    let milliseconds = |took: Duration| took.as_secs_f64() * 1e3;
    let (least, most) = (milliseconds(second.0 - first.2), milliseconds(second.2 - first.0));
    let right = (0.9 * least..1.1 * most).contains(&counted);
    ensure!(right, "the TSC counted {counted:.1} ms in {least:.1} to {most:.1} ms");
    Ok(())
}

fn cpuid_tells_no_other_tsc_frequency(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; mov eax, 0x15; xor ecx, ecx; cpuid; stop; };
        Ok(())
    })?;
    let numerator = guest.cpu.finish(&mut Recorder::new())?;
    let state = guest.cpu.get(StateSet::GENERAL)?.general;
    // A ratio that guests could not compute with is not told.
    if numerator != 0 && state.rbx() != 0 && state.rcx() != 0 {
        let hz = state.rcx() * state.rbx() / numerator;
        ensure_eq!(hz / 1000, u64::from(guest.partition.tsc_khz()), "kHz by leaf 15H");
    }
    Ok(())
}

fn rdtscp_reads_tsc_aux(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov ecx, 0xC000_0103_u32;
            mov eax, 0x1234;
            xor edx, edx;
            wrmsr;
            rdtscp;
            mov eax, ecx;
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x1234, "ECX");
    Ok(())
}

/// Channel 0, low byte then high byte, `mode`, `count`.
fn pit_start(a: &mut CodeAssembler, mode: i32, count: i32) -> Result<(), IcedError> {
    let writes = [(0x43, 0x30 | mode << 1), (0x40, count & 0xFF), (0x40, count >> 8)];
    for (port, value) in writes {
        asm! { a; mov eax, value; out port, al; };
    }
    Ok(())
}

/// 5 ms of the PIT's 1,193,182 Hz.
const PIT_COUNT: i32 = 5966;
const PIT_PERIOD: Duration = Duration::from_millis(5);
const PIT_TICKS: u32 = 20;

fn pit_interrupts_through_the_pic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    count_handler(&guest, 0x30, |a| {
        asm! { a; mov eax, 0x20; out 0x20, al; };
        Ok(())
    })?;
    guest.load(|a| {
        apic_on(a)?;
        apic_write(a, 0x350, 0x700)?;
        pic_on(a, [0xFE, 0xFF])?;
        a.xor(ebx, ebx)?;
        pit_start(a, 2, PIT_COUNT)?;
        halt_until(a, PIT_TICKS as i32)
    })?;
    let (ticks, took) = timed(&mut guest.cpu)?;
    counted(ticks, u64::from(PIT_TICKS))?;
    on_time(took, PIT_PERIOD * PIT_TICKS)
}

fn pit_interrupts_through_the_ioapic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        // ISA interrupt 0 is input 2.
        ioapic_route(a, 2, VECTOR.into())?;
        a.xor(ebx, ebx)?;
        pit_start(a, 2, PIT_COUNT)?;
        halt_until(a, PIT_TICKS as i32)
    })?;
    let (ticks, took) = timed(&mut guest.cpu)?;
    counted(ticks, u64::from(PIT_TICKS))?;
    on_time(took, PIT_PERIOD * PIT_TICKS)
}

fn pit_counts_down(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; label again; };
        pit_start(a, 0, 0xFFFF)?;
        asm! { a;
        again:
            xor eax, eax;
            out 0x43, al;
            in_ al, 0x40;
            mov bl, al;
            in_ al, 0x40;
            mov bh, al;
            movzx eax, bx;
            stop;
            jmp again;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    // From before the first latch: a slow host may take long from there to the end of the run.
    let (start, first) = (Instant::now(), guest.cpu.finish(&mut io)?);
    thread::sleep(Duration::from_millis(10));
    let second = guest.cpu.finish(&mut io)?;
    let took = start.elapsed();
    ensure!(second < first, "the count went from {first} to {second}");
    let counted = Duration::from_nanos((first - second) * 1_000_000_000 / 1_193_182);
    // The count wraps after 55 ms; a host that is so slow proves nothing.
    if took < Duration::from_millis(50) {
        ensure!(counted <= took + Duration::from_millis(1), "{took:?} counted as {counted:?}");
        ensure!(counted >= Duration::from_millis(9), "10 ms counted as {counted:?}");
    }
    Ok(())
}

fn pit_channel_2_and_port_61(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again;
            // Gate on, speaker off; mode 0; 11932 counts are 10 ms.
            in_ al, 0x61;
            and al, 0xFC;
            or al, 1;
            out 0x61, al;
            mov al, 0xB0;
            out 0x43, al;
            mov eax, 11932;
            out 0x42, al;
            mov al, ah;
            out 0x42, al;
        again:
            in_ al, 0x61;
            test al, 0x20;
            jz again;
            stop;
        };
        Ok(())
    })?;
    let (_, took) = timed(&mut guest.cpu)?;
    on_time(took, Duration::from_millis(10))
}

/// What the local APIC's timer counts in a millisecond, divided by 1: what leaf 15H tells, or 1 GHz
/// where it is silent.
fn apic_khz(guest: &mut Guest) -> Result<i32, Failure> {
    guest.load(|a| {
        asm! { a; mov eax, 0x15; xor ecx, ecx; cpuid; mov eax, ecx; stop; };
        Ok(())
    })?;
    let hz = guest.cpu.finish(&mut Recorder::new())?;
    Ok(if hz == 0 { 1_000_000 } else { (hz / 1000) as i32 })
}

/// Divide by 1.
fn timer_start(a: &mut CodeAssembler, lvt: i32, count: i32) -> Result<(), IcedError> {
    apic_write(a, 0x3E0, 0xB)?;
    apic_write(a, 0x320, i32::from(VECTOR) | lvt)?;
    apic_write(a, 0x380, count)
}

fn lapic_one_shot(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        a.xor(ebx, ebx)?;
        timer_start(a, 0, khz * 50)?;
        halt_until(a, 1)
    })?;
    let (_, took) = timed(&mut guest.cpu)?;
    on_time(took, Duration::from_millis(50))
}

fn lapic_one_shot_fires_once(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        a.xor(ebx, ebx)?;
        timer_start(a, 0, khz)?;
        halt_until(a, 1)?;
        asm! { a; sti; mov ecx, dword_ptr(r15 + 0x390); mov eax, ebx; stop; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.finish(&mut io)?, 1, "interrupts");
    thread::sleep(Duration::from_millis(20));
    ensure_eq!(guest.cpu.finish(&mut io)?, 1, "interrupts later");
    ensure_eq!(guest.cpu.register(1)?, 0, "current count");
    Ok(())
}

fn lapic_periodic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        a.xor(ebx, ebx)?;
        timer_start(a, PERIODIC, khz * 5)?;
        halt_until(a, 20)
    })?;
    let (ticks, took) = timed(&mut guest.cpu)?;
    counted(ticks, 20)?;
    on_time(took, Duration::from_millis(100))
}

fn lapic_counts_down(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    guest.load(|a| {
        apic_on(a)?;
        timer_start(a, 1 << 16, khz * 2000)?;
        asm! { a; label again; again: mov eax, dword_ptr(r15 + 0x390); stop; jmp again; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    // From before the first reading: a slow host may take long from there to the end of the run.
    let (start, first) = (Instant::now(), guest.cpu.finish(&mut io)?);
    thread::sleep(Duration::from_millis(50));
    let (second, took) = (guest.cpu.finish(&mut io)?, start.elapsed());
    ensure!(first <= (khz * 2000) as u64 && second < first, "from {first} to {second}");
    let counted = Duration::from_micros((first - second) * 1000 / khz as u64);
    ensure!(counted <= took + Duration::from_millis(5), "{took:?} counted as {counted:?}");
    ensure!(counted >= Duration::from_millis(45), "50 ms counted as {counted:?}");
    Ok(())
}

fn lapic_divides(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        a.xor(ebx, ebx)?;
        // Divide by 16: 64 ms.
        apic_write(a, 0x3E0, 3)?;
        apic_write(a, 0x320, VECTOR.into())?;
        apic_write(a, 0x380, khz * 4)?;
        halt_until(a, 1)
    })?;
    let (_, took) = timed(&mut guest.cpu)?;
    on_time(took, Duration::from_millis(64))
}

fn lapic_masked_timer_is_silent(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let khz = apic_khz(&mut guest)?;
    guest.load(|a| {
        apic_on(a)?;
        timer_start(a, 1 << 16, khz)?;
        asm! { a; label again; sti; again: mov eax, dword_ptr(r15 + 0x390); test eax, eax; jnz again; nop; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new()).map(drop)
}

/// Arms the deadline `ticks` from now.
fn deadline_in(a: &mut CodeAssembler, ticks: u64) -> Result<(), IcedError> {
    asm! { a;
        rdtsc;
        shl rdx, 32;
        or rax, rdx;
        mov rcx, ticks;
        add rax, rcx;
        mov rdx, rax;
        shr rdx, 32;
        mov ecx, 0x6E0;
        wrmsr;
    };
    Ok(())
}

fn tsc_deadline(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let ticks = u64::from(guest.partition.tsc_khz()) * 50;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        apic_write(a, 0x320, i32::from(VECTOR) | DEADLINE)?;
        asm! { a; mfence; xor ebx, ebx; };
        deadline_in(a, ticks)?;
        asm! { a; rdmsr; mov dword_ptr(DATA), eax; mov dword_ptr(DATA + 4), edx; };
        halt_until(a, 1)?;
        asm! { a; mov ecx, 0x6E0; rdmsr; or eax, edx; stop; };
        Ok(())
    })?;
    let (_, took) = timed(&mut guest.cpu)?;
    on_time(took, Duration::from_millis(50))?;
    ensure!(guest.read_u64(DATA)? != 0, "the deadline reads 0 while armed");
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0, "the deadline after it fired");
    Ok(())
}

fn tsc_deadline_in_the_past(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        apic_write(a, 0x320, i32::from(VECTOR) | DEADLINE)?;
        asm! { a; mfence; xor ebx, ebx; mov ecx, 0x6E0; mov eax, 1; xor edx, edx; wrmsr; };
        halt_until(a, 1)
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 1, "interrupts");
    Ok(())
}

fn tsc_deadline_disarmed(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for _ in 0..5 {
        let (in_time, interrupts) = disarmed(hypervisor)?;
        if in_time {
            ensure_eq!(interrupts, 0, "interrupts after disarming");
            return Ok(());
        }
    }
    Err(Failure::Wrong("the host is too slow to disarm a timer of 100 ms".into()))
}

/// Arms the deadline and disarms it. Whether that was in time, and how many interrupts came.
fn disarmed(hypervisor: &dyn Hypervisor) -> Result<(bool, u64), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let ticks = u64::from(guest.partition.tsc_khz()) * 100;
    count_handler(&guest, VECTOR, eoi)?;
    guest.load(|a| {
        apic_on(a)?;
        apic_write(a, 0x320, i32::from(VECTOR) | DEADLINE)?;
        asm! { a; mfence; xor ebx, ebx; };
        deadline_in(a, ticks)?;
        asm! { a; xor eax, eax; xor edx, edx; wrmsr; sti; stop; nop; mov eax, ebx; stop; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    let start = Instant::now();
    guest.cpu.finish(&mut io)?;
    let in_time = start.elapsed() < Duration::from_millis(80);
    thread::sleep(Duration::from_millis(150));
    Ok((in_time, guest.cpu.finish(&mut io)?))
}
