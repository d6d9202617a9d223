//! String I/O: each element is one access, in order, and the registers count along.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure_eq};
use super::guest::{DATA, Guest, MMIO, Mode};
use super::recorder::{Access, Recorder};
use super::{Failure, asm::asm};
use crate::Hypervisor;

cases! { "strings":
    outs_of_each_width "Intel SDM vol. 2B, OUTS";
    outs_counts "Intel SDM vol. 2B, REP";
    outs_backwards "Intel SDM vol. 2B, OUTS";
    outs_elements_across_pages "Intel SDM vol. 2B, OUTS";
    outs_from_mmio "Intel SDM vol. 2B, OUTS";
    ins_of_each_width "Intel SDM vol. 2A, INS";
    ins_counts "Intel SDM vol. 2B, REP";
    ins_backwards "Intel SDM vol. 2A, INS";
    ins_elements_across_pages "Intel SDM vol. 2A, INS";
    ins_and_outs_use_es_and_ds "Intel SDM vol. 2A, INS; vol. 2B, OUTS";
    stos_to_mmio "Intel SDM vol. 2B, STOS";
    movs_from_mmio_to_memory "Intel SDM vol. 2B, MOVS";
    movs_from_memory_to_mmio "Intel SDM vol. 2B, MOVS";
    a_16_bit_count_uses_cx "Intel SDM vol. 2B, REP";
}

const PORT: u16 = 0x3F8;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// Runs `body` with RSI or RDI at `at`, RCX at `count` and DX at [`PORT`].
fn run(
    hypervisor: &dyn Hypervisor,
    at: u64,
    count: u64,
    data: &[(u64, Vec<u8>)],
    io: &mut Recorder,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for (at, bytes) in data {
        guest.write(*at, bytes)?;
    }
    guest.load(|a| {
        asm! { a;
            mov rsi, at;
            mov rdi, at;
            mov rcx, count;
            mov edx, u32::from(PORT);
        };
        body(a)?;
        asm! { a; stop; };
        Ok(())
    })?;
    guest.cpu.finish(io)?;
    Ok(guest)
}

fn counting(len: u8) -> Vec<u8> {
    (1..=len).collect()
}

fn out(len: usize, value: u64) -> Access {
    Access::Out(PORT, len, value)
}

fn outs_of_each_width(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, DATA, 0, &[(DATA, counting(7))], &mut io, |a| {
        asm! { a; cld; outsb; outsw; outsd; };
        Ok(())
    })?;
    ensure_eq!(io.log, [out(1, 1), out(2, 0x0302), out(4, 0x0706_0504)], "accesses");
    ensure_eq!(guest.cpu.register(RSI)?, DATA + 7, "RSI");
    Ok(())
}

fn outs_counts(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for count in [0_u64, 1, 2, 200] {
        let mut io = Recorder::new();
        let mut guest = run(hypervisor, DATA, count, &[(DATA, counting(200))], &mut io, |a| {
            asm! { a; cld; [rep] outsb; };
            Ok(())
        })?;
        let want: Vec<_> = (1..=count).map(|value| out(1, value)).collect();
        ensure_eq!(io.log, want, "accesses of REP OUTSB with RCX {count}");
        ensure_eq!(guest.cpu.register(RSI)?, DATA + count, "RSI after {count}");
        ensure_eq!(guest.cpu.register(RCX)?, 0, "RCX after {count}");
    }
    Ok(())
}

fn outs_backwards(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, DATA + 8, 3, &[(DATA, counting(12))], &mut io, |a| {
        asm! { a; std; [rep] outsd; cld; };
        Ok(())
    })?;
    let want = [out(4, 0x0C0B_0A09), out(4, 0x0807_0605), out(4, 0x0403_0201)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.cpu.register(RSI)?, DATA - 4, "RSI");
    Ok(())
}

fn outs_elements_across_pages(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let at = DATA + 0x1000 - 6;
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, at, 3, &[(at, counting(12))], &mut io, |a| {
        asm! { a; cld; [rep] outsd; };
        Ok(())
    })?;
    let want = [out(4, 0x0403_0201), out(4, 0x0807_0605), out(4, 0x0C0B_0A09)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.cpu.register(RSI)?, at + 12, "RSI");
    Ok(())
}

fn outs_from_mmio(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::answering([0x11, 0x22]);
    run(hypervisor, MMIO, 2, &[], &mut io, |a| {
        asm! { a; cld; [rep] outsb; };
        Ok(())
    })?;
    let want = [Access::Read(MMIO, 1), out(1, 0x11), Access::Read(MMIO + 1, 1), out(1, 0x22)];
    ensure_eq!(io.log, want, "accesses");
    Ok(())
}

fn ins_of_each_width(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, DATA, 0, &[], &mut io, |a| {
        asm! { a; cld; insb; insw; insd; };
        Ok(())
    })?;
    let want = [Access::In(PORT, 1), Access::In(PORT, 2), Access::In(PORT, 4)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.read::<8>(DATA)?, [1, 2, 3, 4, 5, 6, 7, 0], "memory");
    ensure_eq!(guest.cpu.register(RDI)?, DATA + 7, "RDI");
    Ok(())
}

fn ins_counts(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for count in [0_u64, 1, 2, 200] {
        let mut io = Recorder::new();
        let mut guest = run(hypervisor, DATA, count, &[], &mut io, |a| {
            asm! { a; cld; [rep] insb; };
            Ok(())
        })?;
        let want = vec![Access::In(PORT, 1); count as usize];
        ensure_eq!(io.log, want, "accesses of REP INSB with RCX {count}");
        let memory = guest.read::<201>(DATA)?;
        for (at, (byte, value)) in memory.iter().zip(1..=201).enumerate() {
            let want = if value <= count { value } else { 0 };
            ensure_eq!(u64::from(*byte), want, "byte {at} after {count}");
        }
        ensure_eq!(guest.cpu.register(RDI)?, DATA + count, "RDI after {count}");
        ensure_eq!(guest.cpu.register(RCX)?, 0, "RCX after {count}");
    }
    Ok(())
}

fn ins_backwards(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, DATA + 4, 3, &[], &mut io, |a| {
        asm! { a; std; [rep] insw; cld; };
        Ok(())
    })?;
    ensure_eq!(io.log, [Access::In(PORT, 2); 3], "accesses");
    ensure_eq!(guest.read::<6>(DATA)?, [5, 6, 3, 4, 1, 2], "memory");
    ensure_eq!(guest.cpu.register(RDI)?, DATA - 2, "RDI");
    Ok(())
}

fn ins_elements_across_pages(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let at = DATA + 0x1000 - 6;
    let mut io = Recorder::new();
    let guest = run(hypervisor, at, 3, &[], &mut io, |a| {
        asm! { a; cld; [rep] insd; };
        Ok(())
    })?;
    ensure_eq!(io.log, [Access::In(PORT, 4); 3], "accesses");
    ensure_eq!(guest.read::<12>(at)?.to_vec(), counting(12), "memory");
    Ok(())
}

fn ins_and_outs_use_es_and_ds(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Real, 1)?;
    guest.write(0x9_0010, b"D")?;
    guest.write(0xA_0010, b"E")?;
    guest.load(|a| {
        asm! { a;
            mov ax, 0xA000_u32 as i32;
            mov es, ax;
            mov si, 0x10;
            mov di, 0x20;
            mov dx, i32::from(PORT);
            cld;
            outsb;
            dec si;
            // OUTSB with an ES override.
            db &[0x26, 0x6E];
            insb;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([b'x'.into()]);
    guest.cpu.finish(&mut io)?;
    let want = [out(1, b'D'.into()), out(1, b'E'.into()), Access::In(PORT, 1)];
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.read::<1>(0xA_0020)?, [b'x'], "memory at ES:DI");
    Ok(())
}

fn stos_to_mmio(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let mut guest = run(hypervisor, MMIO, 3, &[], &mut io, |a| {
        asm! { a; mov eax, 0x8000_0001_u32; cld; [rep] stosd; };
        Ok(())
    })?;
    let want = [0, 4, 8].map(|offset| Access::Write(MMIO + offset, 4, 0x8000_0001));
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.cpu.register(RDI)?, MMIO + 12, "RDI");
    ensure_eq!(guest.cpu.register(RCX)?, 0, "RCX");
    Ok(())
}

fn movs_from_mmio_to_memory(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    let guest = run(hypervisor, MMIO, 3, &[], &mut io, |a| {
        asm! { a; mov rdi, DATA; cld; [rep] movsw; };
        Ok(())
    })?;
    let want = [0, 2, 4].map(|offset| Access::Read(MMIO + offset, 2));
    ensure_eq!(io.log, want, "accesses");
    ensure_eq!(guest.read::<6>(DATA)?.to_vec(), counting(6), "memory");
    Ok(())
}

fn movs_from_memory_to_mmio(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut io = Recorder::new();
    run(hypervisor, MMIO, 2, &[(DATA, counting(16))], &mut io, |a| {
        asm! { a; mov rsi, DATA; cld; [rep] movsq; };
        Ok(())
    })?;
    let want = [
        Access::Write(MMIO, 8, 0x0807_0605_0403_0201),
        Access::Write(MMIO + 8, 8, 0x100F_0E0D_0C0B_0A09),
    ];
    ensure_eq!(io.log, want, "accesses");
    Ok(())
}

fn a_16_bit_count_uses_cx(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::new(hypervisor, Mode::Real, 1)?;
    guest.write(DATA, &counting(3))?;
    guest.load(|a| {
        asm! { a;
            mov ecx, 0x1_0002;
            xor esi, esi;
            mov dx, i32::from(PORT);
            cld;
            [rep] outsb;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    guest.cpu.finish(&mut io)?;
    ensure_eq!(io.log, [out(1, 1), out(1, 2)], "accesses");
    ensure_eq!(guest.cpu.register(RCX)?, 0x1_0000, "ECX");
    Ok(())
}
