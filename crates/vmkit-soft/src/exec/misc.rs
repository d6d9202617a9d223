//! The rest of the integer set: exchanges with compare, flag instructions, decimal adjustments,
//! fences and hints.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::{ColdChoice, ColdFn, Ends, Next, OpRef};
use crate::cpu::flags::{AF, ARITHMETIC, CF, DF, OF, PF, SF, ZF};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Int, RAX, RBX, RCX, RDX, W8, W16, W32, W64, Width};

pub(super) fn nop(_: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    Ok(())
}

/// NOP as an operation of its own: common enough as padding.
pub(super) fn nop_op(cpu: &mut Cpu, op: OpRef) -> Next {
    op.next(cpu)
}

/// A fence orders the host's accesses, which are the guest's.
fn fence(_: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// PAUSE: lets another vCPU's thread run when there may be one.
fn pause(_: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    std::hint::spin_loop();
    Ok(())
}

/// CLFLUSH and kin: no cache to flush, but the address is checked like a load. Nothing is read: that
/// would be an access to a device (Intel SDM vol. 2A, CLFLUSH).
fn flush_line(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let linear = cpu.address_of(insn, 1, false)?;
    cpu.probe_load(linear, 1)
}

fn undefined(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    Err(cpu.ud())
}

/// Computes flags as CMP of `a` with `b` does.
fn compare<W: Width>(cpu: &mut Cpu, a: u64, b: u64) {
    let r = a.wrapping_sub(b) & W::MASK;
    W::carries(&mut cpu.flags, r, !a & b | (!a | b) & r);
}

fn cmpxchg_sized<W: Width>(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let expected = W::get(cpu, RAX as u8);
    let new = cpu.gpr(insn.op1_register());
    let old = if insn.op0_kind() == OpKind::Register {
        let old = cpu.gpr(insn.op0_register());
        if old == expected {
            cpu.set_gpr(insn.op0_register(), new);
        } else {
            // The destination is written in any case: a 32-bit one clears its upper half.
            cpu.set_gpr(insn.op0_register(), old);
        }
        old
    } else {
        // The memory is written in any case, so that one atomic update says it all.
        let linear = cpu.address_of(insn, W::BYTES, true)?;
        if insn.has_lock_prefix() {
            cpu.update_locked::<W>(linear, |old| if old == expected { new } else { old })?
        } else {
            let place = cpu.place::<W::Int>(linear)?;
            let old = cpu.read_place::<W::Int>(place, linear)?.widen();
            let stored = if old == expected { new } else { old };
            cpu.write_place(place, linear, W::Int::truncate(stored))?;
            old
        }
    };
    compare::<W>(cpu, expected, old);
    if old != expected {
        W::set(cpu, RAX as u8, old);
    }
    Ok(())
}

fn cmpxchg(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    match insn.op1_register().size() {
        1 => cmpxchg_sized::<W8>(cpu, insn),
        2 => cmpxchg_sized::<W16>(cpu, insn),
        4 => cmpxchg_sized::<W32>(cpu, insn),
        _ => cmpxchg_sized::<W64>(cpu, insn),
    }
}

fn cmpxchg8b(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let linear = cpu.address_of(insn, 8, true)?;
    let join = |cpu: &Cpu, high: usize, low: usize| {
        (cpu.regs[high] & 0xFFFF_FFFF) << 32 | cpu.regs[low] & 0xFFFF_FFFF
    };
    let expected = join(cpu, RDX, RAX);
    let new = join(cpu, RCX, RBX);
    let choose = |old| if old == expected { new } else { old };
    let old = if insn.has_lock_prefix() {
        cpu.update_locked::<W64>(linear, choose)?
    } else {
        let place = cpu.place::<u64>(linear)?;
        let old = cpu.read_place::<u64>(place, linear)?;
        cpu.write_place(place, linear, choose(old))?;
        old
    };
    set_zf(cpu, old == expected);
    if old != expected {
        W32::set(cpu, RAX as u8, old & 0xFFFF_FFFF);
        W32::set(cpu, RDX as u8, old >> 32);
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let linear = cpu.address_of(insn, 16, true)?;
    if linear & 15 != 0 {
        return Err(cpu.gp0());
    }
    let join = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = join(cpu.regs[RDX], cpu.regs[RAX]);
    let new = join(cpu.regs[RCX], cpu.regs[RBX]);
    let old = cpu.exchange_wide(linear, expected, new)?;
    set_zf(cpu, old == expected);
    if old != expected {
        W64::set(cpu, RAX as u8, old as u64);
        W64::set(cpu, RDX as u8, (old >> 64) as u64);
    }
    Ok(())
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    let flags = cpu.flags.arithmetic() & !ZF | if zf { ZF } else { 0 };
    cpu.flags.set_arithmetic(flags);
}

fn xadd_sized<W: Width>(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let b = cpu.gpr(insn.op1_register());
    let old = if insn.op0_kind() == OpKind::Register {
        cpu.gpr(insn.op0_register())
    } else {
        let linear = cpu.address_of(insn, W::BYTES, true)?;
        cpu.update_locked::<W>(linear, |old| old.wrapping_add(b) & W::MASK)?
    };
    let new = old.wrapping_add(b) & W::MASK;
    W::carries(&mut cpu.flags, new, old & b | (old | b) & !new);
    // The source first: if both are the same register, the sum stays.
    cpu.set_gpr(insn.op1_register(), old);
    if insn.op0_kind() == OpKind::Register {
        cpu.set_gpr(insn.op0_register(), new);
    }
    Ok(())
}

fn xadd(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    match insn.op1_register().size() {
        1 => xadd_sized::<W8>(cpu, insn),
        2 => xadd_sized::<W16>(cpu, insn),
        4 => xadd_sized::<W32>(cpu, insn),
        _ => xadd_sized::<W64>(cpu, insn),
    }
}

fn flag_bits(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    match insn.mnemonic() {
        Mnemonic::Clc => cpu.flags.set_cf(false),
        Mnemonic::Stc => cpu.flags.set_cf(true),
        Mnemonic::Cmc => {
            let cf = cpu.flags.cf();
            cpu.flags.set_cf(!cf);
        }
        Mnemonic::Cld => cpu.flags.rest &= !DF,
        _ => cpu.flags.rest |= DF,
    }
    Ok(())
}

fn lahf(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    let flags = cpu.flags.arithmetic() & !OF | 2;
    W8::set(cpu, crate::cpu::HIGH_BYTE, flags);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    let ah = W8::get(cpu, crate::cpu::HIGH_BYTE);
    let of = cpu.flags.arithmetic() & OF;
    cpu.flags.set_arithmetic(ah & (CF | PF | AF | ZF | SF) | of);
    Ok(())
}

fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    // The decoder names the operand [rBX + AL].
    let mask = match insn.memory_base().size() {
        2 => 0xFFFF,
        4 => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let offset = cpu.regs[RBX].wrapping_add(cpu.regs[RAX] & 0xFF) & mask;
    let seg = super::operand::segment_number(insn.memory_segment());
    let linear = cpu.linear(seg, offset, 1, false)?;
    let v = cpu.load::<u8>(linear)?.widen();
    W8::set(cpu, RAX as u8, v);
    Ok(())
}

/// SALC: AL is all ones if CF is set, else zero (undocumented).
fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    let v = if cpu.flags.cf() { 0xFF } else { 0 };
    W8::set(cpu, RAX as u8, v);
    Ok(())
}

/// Flags of a decimal adjustment: SF, ZF and PF from AL, CF and AF as given, OF clear.
fn decimal_flags(cpu: &mut Cpu, al: u64, cf: bool, af: bool) {
    cpu.flags.set_result_cf_of(W8::sext(al), cf, false);
    let flags = cpu.flags.arithmetic() | if af { AF } else { 0 };
    cpu.flags.set_arithmetic(flags & ARITHMETIC);
}

/// DAA and DAS (Intel SDM vol. 2A).
fn decimal_adjust(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let subtract = insn.mnemonic() == Mnemonic::Das;
    let old = W8::get(cpu, RAX as u8);
    let (old_cf, old_af) = (cpu.flags.cf(), cpu.flags.af());
    let mut al = old;
    let (mut cf, mut af) = (false, false);
    if old & 0xF > 9 || old_af {
        let (r, over) =
            if subtract { (al.wrapping_sub(6), al < 6) } else { (al + 6, al + 6 > 0xFF) };
        (al, cf, af) = (r & 0xFF, old_cf || over, true);
    }
    if old > 0x99 || old_cf {
        al = if subtract { al.wrapping_sub(0x60) } else { al + 0x60 } & 0xFF;
        cf = true;
    }
    W8::set(cpu, RAX as u8, al);
    decimal_flags(cpu, al, cf, af);
    Ok(())
}

/// AAA and AAS.
fn ascii_adjust(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let subtract = insn.mnemonic() == Mnemonic::Aas;
    let ax = W16::get(cpu, RAX as u8);
    let adjust = ax & 0xF > 9 || cpu.flags.af();
    let moved = match (adjust, subtract) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    W16::set(cpu, RAX as u8, moved & 0xFF0F);
    decimal_flags(cpu, moved & 0xF, adjust, adjust);
    Ok(())
}

fn aam(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let base = insn.immediate(0) & 0xFF;
    if base == 0 {
        return Err(cpu.raise(trap::DE));
    }
    let al = W8::get(cpu, RAX as u8);
    W16::set(cpu, RAX as u8, ((al / base) << 8) | (al % base));
    decimal_flags(cpu, al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let base = insn.immediate(0) & 0xFF;
    let ax = W16::get(cpu, RAX as u8);
    let al = (ax & 0xFF).wrapping_add((ax >> 8) * base) & 0xFF;
    W16::set(cpu, RAX as u8, al);
    decimal_flags(cpu, al, false, false);
    Ok(())
}

/// MOVNTI: a store.
fn movnti(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.gpr(insn.op1_register());
    cpu.write_operand(insn, 0, value)
}

/// The instructions of this module.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    use Mnemonic as M;
    let run: ColdFn = match insn.mnemonic() {
        M::Nop | M::Reservednop => nop,
        M::Endbr64 | M::Endbr32 => nop,
        M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2 => nop,
        M::Lfence | M::Sfence | M::Mfence => fence,
        M::Pause => pause,
        M::Clflush | M::Clflushopt | M::Clwb => flush_line,
        // RSM outside system management mode is undefined, and there is no such mode here.
        M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm => undefined,
        M::Cmpxchg => cmpxchg,
        M::Cmpxchg8b => cmpxchg8b,
        M::Cmpxchg16b => cmpxchg16b,
        M::Xadd => xadd,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => flag_bits,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Xlatb => xlat,
        M::Salc => salc,
        M::Daa | M::Das => decimal_adjust,
        M::Aaa | M::Aas => ascii_adjust,
        M::Aam => aam,
        M::Aad => aad,
        M::Movnti => movnti,
        _ => return None,
    };
    Some((run, Ends::No))
}

#[cfg(test)]
mod tests {
    use vmkit_hypervisor::{IoFlow, VcpuIo};

    use crate::cpu::trap::TrapKind;
    use crate::cpu::{RAX, RBX};
    use crate::testing::{Bench, MEMORY};

    /// Counts reads of devices.
    #[derive(Default)]
    struct Counter(u32);

    impl VcpuIo for Counter {
        fn pio_read(&mut self, _: u16, _: &mut [u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn mmio_read(&mut self, _: u64, _: &mut [u8]) -> IoFlow {
            self.0 += 1;
            IoFlow::Continue
        }
        fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
            IoFlow::Continue
        }
    }

    #[test]
    fn a_flushed_line_is_checked_and_not_read() {
        let mut bench = Bench::long();
        // clflush [rax]; clflush [rbx]; past the mapped GiB, the second faults.
        bench.load(0x8000, &[0x0F, 0xAE, 0x38, 0x0F, 0xAE, 0x3B]);
        bench.cpu.regs[RAX] = MEMORY;
        bench.cpu.regs[RBX] = 1 << 30;
        let mut counter = Counter::default();
        bench.cpu.lend_io(&mut counter);
        bench.cpu.shared.begin_looking(1000);
        bench.cpu.execute();
        bench.cpu.return_io();
        assert_eq!(bench.cpu.trap, TrapKind::Exception { vector: 14, error: Some(0) });
        assert_eq!((bench.cpu.rip, bench.cpu.control.cr2, counter.0), (0x8003, 1 << 30, 0));
    }
}
