//! Memory that vCPUs share: atomic instructions, and the order of loads and stores.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::asm;
use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE2, DATA, Guest};
use super::smp::{together, two};
use super::{Failure, Need};
use crate::{Feature, Hypervisor, StateSet};

cases! { "sharing":
    locked_adds_lose_nothing "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    exchanges_make_a_lock "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    compare_and_exchange_loses_nothing "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    compare_and_exchange_of_16_bytes "Intel SDM vol. 2A, CMPXCHG16B"
        [Need::Vcpus(2), Need::Feature(Feature::Cx16)];
    a_breakpoint_elsewhere_leaves_locks_whole "Intel SDM vol. 3A §9.1.2, vol. 3B §18.2"
        [Need::Vcpus(2)];
    a_breakpoint_elsewhere_leaves_16_bytes_whole "Intel SDM vol. 3A §9.1.2, vol. 3B §18.2"
        [Need::Vcpus(2), Need::Feature(Feature::Cx16)];
    locks_beside_code_exclude_each_other "Intel SDM vol. 3A §9.1.2"
        [Need::Vcpus(2), Need::Feature(Feature::Cx16)];
    locked_adds_across_lines_lose_nothing "Intel SDM vol. 3A §9.1.2.2" [Need::Vcpus(2)];
    stores_are_seen_in_order "Intel SDM vol. 3A §9.2.3.2" [Need::Vcpus(2)];
    mfence_orders_stores_and_loads "Intel SDM vol. 3A §9.2.3.4, vol. 2B, MFENCE" [Need::Vcpus(2)];
}

/// Both vCPUs run `body` `count` times, with RSI at [`DATA`].
fn both_repeat(
    hypervisor: &dyn Hypervisor,
    count: u32,
    body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let (mut guest, mut other) = two(hypervisor, repeat(count, &body), repeat(count, &body))?;
    together(&mut guest.cpu, &mut other)?;
    Ok(guest)
}
/// A number that nobody counts with: set when the first vCPU has done its part.
const DONE: u64 = DATA + 0x4000;
/// The first vCPU runs `first` `count` times and the second `second` for as long as that takes, with RSI at
/// `at`; how often the second did. With `watched`, the first has a breakpoint on data that nobody touches.
fn while_the_first_repeats(
    hypervisor: &dyn Hypervisor,
    (at, count, watched): (u64, u32, bool),
    first: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    second: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(Guest, u64), Failure> {
    let counted = |a: &mut CodeAssembler| {
        asm! { a; label again, other; mov esi, at as u32; mov ebp, count; };
        // The second goes first: from here to the end both run.
        asm! { a; other: cmp dword_ptr(DONE + 8), 0; je other; again: };
        first(a)?;
        asm! { a; dec ebp; jnz again; mov dword_ptr(DONE), 1; stop; };
        Ok(())
    };
    let endless = |a: &mut CodeAssembler| {
        asm! { a; label again; mov esi, at as u32; xor ebp, ebp; again: };
        second(a)?;
        asm! { a; inc ebp; mov dword_ptr(DONE + 8), ebp; cmp dword_ptr(DONE), 0; je again; stop; };
        Ok(())
    };
    let (mut guest, mut other) = two(hypervisor, counted, endless)?;
    if watched {
        guest.cpu.change(StateSet::DEBUG, |state| {
            state.debug.dr[0] = DATA + 0x8000;
            // Breakpoint 0, writes of 4 bytes.
            state.debug.dr7 = 0x400 | 2 | 0xD << 16;
        })?;
    }
    together(&mut guest.cpu, &mut other)?;
    Ok((guest, other.register(5)?))
}
/// A program that runs `body` `count` times: EBP counts.
fn repeat(
    count: u32,
    body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        asm! { a; label again; mov esi, DATA as u32; mov ebp, count; again: };
        body(a)?;
        asm! { a; dec ebp; jnz again; stop; };
        Ok(())
    }
}
const ROUNDS: u32 = 20_000;
fn locked_adds(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        [lock] add dword_ptr(rsi), 1;
        [lock] inc qword_ptr(rsi + 8);
        mov eax, 3;
        [lock] xadd dword_ptr(rsi + 16), eax;
        [lock] sub dword_ptr(rsi + 24), 1;
    };
    Ok(())
}
fn locked_adds_lose_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    sums_of_locked_adds(&both_repeat(hypervisor, ROUNDS, locked_adds)?, 2 * ROUNDS)
}
fn sums_of_locked_adds(guest: &Guest, rounds: u32) -> Result<(), Failure> {
    ensure_eq!(guest.read_u32(DATA)?, rounds, "LOCK ADD");
    ensure_eq!(guest.read_u64(DATA + 8)?, u64::from(rounds), "LOCK INC");
    ensure_eq!(guest.read_u32(DATA + 16)?, 3 * rounds, "LOCK XADD");
    ensure_eq!(guest.read_u32(DATA + 24)?, 0_u32.wrapping_sub(rounds), "LOCK SUB");
    Ok(())
}
/// [rsi]: the lock. [rsi + 64]: a counter that is not incremented atomically.
fn count_under_lock(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        label taken, free;
        nop;
    taken:
        mov eax, 1;
        xchg dword_ptr(rsi), eax;
        test eax, eax;
        jz free;
        pause;
        jmp taken;
    free:
        mov eax, dword_ptr(rsi + 64);
        inc eax;
        mov dword_ptr(rsi + 64), eax;
        mov dword_ptr(rsi), 0;
    };
    Ok(())
}
fn exchanges_make_a_lock(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = both_repeat(hypervisor, ROUNDS / 4, count_under_lock)?;
    ensure_eq!(guest.read_u32(DATA + 64)?, ROUNDS / 4 * 2, "increments under the lock");
    Ok(())
}
fn compare_and_exchange(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        label again;
        mov rax, qword_ptr(rsi);
    again:
        lea rcx, qword_ptr(rax + 1);
        [lock] cmpxchg qword_ptr(rsi), rcx;
        jne again;
    };
    Ok(())
}
fn compare_and_exchange_loses_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = both_repeat(hypervisor, ROUNDS, compare_and_exchange)?;
    ensure_eq!(guest.read_u64(DATA)?, u64::from(2 * ROUNDS), "increments");
    Ok(())
}
/// Both halves of the 16 bytes at RSI count; they must stay alike.
fn count_in_16_bytes(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a;
        label again;
        mov rax, qword_ptr(rsi);
        mov rdx, qword_ptr(rsi + 8);
    again:
        lea rbx, qword_ptr(rax + 1);
        lea rcx, qword_ptr(rdx + 1);
        [lock] cmpxchg16b xmmword_ptr(rsi);
        jne again;
    };
    Ok(())
}
fn compare_and_exchange_of_16_bytes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = both_repeat(hypervisor, ROUNDS / 2, count_in_16_bytes)?;
    let halves = (guest.read_u64(DATA)?, guest.read_u64(DATA + 8)?);
    ensure_eq!(halves, (u64::from(ROUNDS), u64::from(ROUNDS)), "both halves");
    Ok(())
}
const FEWER: u32 = ROUNDS / 4;
fn a_breakpoint_elsewhere_leaves_locks_whole(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let how = (DATA, FEWER, true);
    let (guest, others) = while_the_first_repeats(hypervisor, how, locked_adds, locked_adds)?;
    sums_of_locked_adds(&guest, FEWER + others as u32)?;
    let program = count_under_lock;
    let (guest, others) = while_the_first_repeats(hypervisor, how, program, program)?;
    ensure_eq!(guest.read_u32(DATA + 64)?, FEWER + others as u32, "increments under the lock");
    let program = compare_and_exchange;
    let (guest, others) = while_the_first_repeats(hypervisor, how, program, program)?;
    ensure_eq!(guest.read_u64(DATA)?, u64::from(FEWER) + others, "increments");
    Ok(())
}
fn a_breakpoint_elsewhere_leaves_16_bytes_whole(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let (how, program) = ((DATA, FEWER, true), count_in_16_bytes);
    let (guest, others) = while_the_first_repeats(hypervisor, how, program, program)?;
    let sum = u64::from(FEWER) + others;
    ensure_eq!((guest.read_u64(DATA)?, guest.read_u64(DATA + 8)?), (sum, sum), "both halves");
    Ok(())
}
fn locks_beside_code_exclude_each_other(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // One adds to both halves of 16 bytes, the other to the second of them, in the page of its code.
    let at = CODE2 + 0x800;
    let one_half = |a: &mut CodeAssembler| a.lock().inc(qword_ptr(rsi + 8));
    let how = (at, FEWER, false);
    let (guest, others) = while_the_first_repeats(hypervisor, how, count_in_16_bytes, one_half)?;
    let halves = (guest.read_u64(at)?, guest.read_u64(at + 8)?);
    ensure_eq!(halves, (FEWER.into(), u64::from(FEWER) + others), "both halves");
    Ok(())
}
fn locked_adds_across_lines_lose_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // Hosts may make a split lock slow on purpose: few rounds. The carry crosses the line.
    let guest = both_repeat(hypervisor, 300, |a| {
        asm! { a; [lock] add dword_ptr(rsi + 62), 0x8001; };
        Ok(())
    })?;
    ensure_eq!(guest.read_u32(DATA + 62)?, 600 * 0x8001, "sum");
    Ok(())
}
fn stores_are_seen_in_order(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // One stores a number to two places in this order; the other, reading in the reverse order, may
    // not see the second place ahead of the first.
    let (mut guest, mut other) = two(
        hypervisor,
        |a| {
            asm! { a;
                label again;
                mov esi, DATA as u32;
                xor ecx, ecx;
            again:
                inc ecx;
                mov dword_ptr(rsi), ecx;
                mov dword_ptr(rsi + 64), ecx;
                cmp ecx, ROUNDS as i32;
                jb again;
                xor eax, eax;
                stop;
            };
            Ok(())
        },
        |a| {
            asm! { a;
                label again, wrong, done;
                mov esi, DATA as u32;
            again:
                mov edx, dword_ptr(rsi + 64);
                mov ecx, dword_ptr(rsi);
                cmp ecx, edx;
                jb wrong;
                cmp edx, ROUNDS as i32;
                jb again;
                xor eax, eax;
                jmp done;
            wrong:
                mov eax, 1;
            done:
                stop;
            };
            Ok(())
        },
    )?;
    ensure_eq!(together(&mut guest.cpu, &mut other)?, (0, 0), "seen out of order");
    Ok(())
}
/// Round by round, each stores to its own place and then reads the other's: with MFENCE in between
/// they cannot both miss the other's store.
fn mfence_orders_stores_and_loads(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let rounds = 2000;
    let side = |own: i32, others: i32, result: i32| {
        move |a: &mut CodeAssembler| {
            asm! { a;
                label again, wait_for_other;
                mov esi, DATA as u32;
                xor ecx, ecx;
            again:
                inc ecx;
                // Meet at the start of the round.
                [lock] inc dword_ptr(rsi + 0x200);
                lea edx, dword_ptr(rcx + rcx);
            wait_for_other:
                cmp dword_ptr(rsi + 0x200), edx;
                jb wait_for_other;
                mov dword_ptr(rsi + own), ecx;
                mfence;
                mov eax, dword_ptr(rsi + others);
                mov dword_ptr(rsi + rcx * 4 + result), eax;
                cmp ecx, rounds;
                jb again;
                stop;
            };
            Ok(())
        }
    };
    let (first, second) = (side(0x0, 0x100, 0x1000), side(0x100, 0x0, 0x4000));
    let (mut guest, mut other) = two(hypervisor, first, second)?;
    together(&mut guest.cpu, &mut other)?;
    for round in 1..=rounds as u64 {
        let seen = [0x1000, 0x4000].map(|result| guest.read_u32(DATA + result + round * 4));
        let [first, second] = seen;
        let (first, second) = (u64::from(first?), u64::from(second?));
        ensure!(first >= round || second >= round, "round {round}: {first} and {second}");
    }
    Ok(())
}
