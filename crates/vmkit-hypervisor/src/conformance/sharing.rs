//! Memory that vCPUs share: atomic instructions, and the order of loads and stores.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::asm;
use super::case::{cases, ensure, ensure_eq};
use super::guest::{DATA, Guest};
use super::smp::{together, two};
use super::{Failure, Need};
use crate::{Feature, Hypervisor};

cases! { "sharing":
    locked_adds_lose_nothing "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    exchanges_make_a_lock "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    compare_and_exchange_loses_nothing "Intel SDM vol. 3A §9.1.2" [Need::Vcpus(2)];
    compare_and_exchange_of_16_bytes "Intel SDM vol. 2A, CMPXCHG16B"
        [Need::Vcpus(2), Need::Feature(Feature::Cx16)];
    locked_adds_across_lines_lose_nothing "Intel SDM vol. 3A §9.1.2.2" [Need::Vcpus(2)];
    stores_are_seen_in_order "Intel SDM vol. 3A §9.2.3.2" [Need::Vcpus(2)];
    mfence_orders_stores_and_loads "Intel SDM vol. 3A §9.2.3.4, vol. 2B, MFENCE" [Need::Vcpus(2)];
}

/// Both vCPUs run `body` `count` times: EBX counts.
fn both_repeat(
    hypervisor: &dyn Hypervisor,
    count: u32,
    body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let program = |a: &mut CodeAssembler| {
        asm! { a; label again; mov esi, DATA as u32; mov ebp, count; again: };
        body(a)?;
        asm! { a; dec ebp; jnz again; stop; };
        Ok(())
    };
    let (mut guest, mut other) = two(hypervisor, program, program)?;
    together(&mut guest.cpu, &mut other)?;
    Ok(guest)
}
const ROUNDS: u32 = 20_000;
fn locked_adds_lose_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = both_repeat(hypervisor, ROUNDS, |a| {
        asm! { a;
            [lock] add dword_ptr(rsi), 1;
            [lock] inc qword_ptr(rsi + 8);
            mov eax, 3;
            [lock] xadd dword_ptr(rsi + 16), eax;
            [lock] sub dword_ptr(rsi + 24), 1;
        };
        Ok(())
    })?;
    ensure_eq!(guest.read_u32(DATA)?, 2 * ROUNDS, "LOCK ADD");
    ensure_eq!(guest.read_u64(DATA + 8)?, u64::from(2 * ROUNDS), "LOCK INC");
    ensure_eq!(guest.read_u32(DATA + 16)?, 6 * ROUNDS, "LOCK XADD");
    ensure_eq!(guest.read_u32(DATA + 24)?, 0_u32.wrapping_sub(2 * ROUNDS), "LOCK SUB");
    Ok(())
}
fn exchanges_make_a_lock(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // [rsi]: the lock. [rsi + 64]: a counter that is not incremented atomically.
    let guest = both_repeat(hypervisor, ROUNDS / 4, |a| {
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
    })?;
    ensure_eq!(guest.read_u32(DATA + 64)?, ROUNDS / 4 * 2, "increments under the lock");
    Ok(())
}
fn compare_and_exchange_loses_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = both_repeat(hypervisor, ROUNDS, |a| {
        asm! { a;
            label again;
            mov rax, qword_ptr(rsi);
        again:
            lea rcx, qword_ptr(rax + 1);
            [lock] cmpxchg qword_ptr(rsi), rcx;
            jne again;
        };
        Ok(())
    })?;
    ensure_eq!(guest.read_u64(DATA)?, u64::from(2 * ROUNDS), "increments");
    Ok(())
}
fn compare_and_exchange_of_16_bytes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // Both halves count; they must stay alike.
    let guest = both_repeat(hypervisor, ROUNDS / 2, |a| {
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
    })?;
    let halves = (guest.read_u64(DATA)?, guest.read_u64(DATA + 8)?);
    ensure_eq!(halves, (u64::from(ROUNDS), u64::from(ROUNDS)), "both halves");
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
