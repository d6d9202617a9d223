//! The privileged half of the processor: modes, segments, descriptor tables, control transfers between
//! privilege levels, exceptions and interrupts, MSRs, debugging, port I/O, and the state that the
//! embedder reads and writes.
//!
//! Everything here runs rarely enough to work from an instruction's full decoding; nothing here runs
//! arithmetic or touches memory other than through `mem`.

mod back;
mod control;
mod debug;
mod descriptor;
mod exception;
mod flags;
mod gate;
mod info;
mod interrupt;
pub(crate) mod msr;
mod mtrr;
mod port;
mod reset;
mod segment;
mod stack;
mod state;
mod syscall;
mod tables;
mod task;
#[cfg(test)]
mod tests;
mod time;
mod transfer;
mod xsave;

pub(crate) use debug::Step;
pub(crate) use exception::Taken;
use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::{ColdChoice, ColdFn, Ends};

/// How a privileged or segment-related instruction is run; `None` if `insn` is neither.
///
/// What may change the mode, the flow, what may be fetched, or whether an interrupt is taken ends its
/// block.
pub(crate) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    use Mnemonic as M;
    let (ends, run): (Ends, ColdFn) = match insn.mnemonic() {
        M::Mov => return mov(insn),
        M::Push if segment::concerns_segment(insn, 0) => (Ends::No, segment::push),
        M::Pop if segment::concerns_segment(insn, 0) => (Ends::Yes, segment::pop),
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => (Ends::Yes, segment::load_far),
        M::Jmp if is_far(insn) => (Ends::Yes, transfer::jmp),
        M::Call if is_far(insn) => (Ends::Yes, transfer::call),
        M::Retf => (Ends::Yes, back::ret),
        M::Iret | M::Iretd | M::Iretq => (Ends::Yes, back::iret),
        M::Int => (Ends::Yes, interrupt::int),
        M::Int3 => (Ends::Yes, interrupt::int3),
        M::Into => (Ends::Yes, interrupt::into),
        M::Int1 => (Ends::Yes, interrupt::int1),
        M::Bound => (Ends::No, interrupt::bound),
        M::Syscall => (Ends::Yes, syscall::syscall),
        M::Sysret | M::Sysretq => (Ends::Yes, syscall::sysret),
        M::Sysenter => (Ends::Yes, syscall::sysenter),
        M::Sysexit | M::Sysexitq => (Ends::Yes, syscall::sysexit),
        M::Swapgs => (Ends::No, syscall::swapgs),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => (Ends::No, syscall::segment_base),
        M::Pushf | M::Pushfd | M::Pushfq => (Ends::No, flags::pushf),
        M::Popf | M::Popfd | M::Popfq => (Ends::Yes, flags::popf),
        M::Cli => (Ends::No, flags::cli),
        M::Sti => (Ends::Yes, flags::sti),
        M::Clac | M::Stac => (Ends::No, flags::set_ac),
        M::Hlt => (Ends::Yes, info::hlt),
        M::Cpuid => (Ends::No, info::cpuid),
        M::Rdtsc | M::Rdtscp => (Ends::No, info::rdtsc),
        M::Rdpmc => (Ends::No, info::rdpmc),
        M::Rdpid => (Ends::No, info::rdpid),
        M::Monitor => (Ends::No, info::monitor),
        M::Mwait => (Ends::Yes, info::mwait),
        M::Clts => (Ends::Yes, control::clts),
        M::Lmsw => (Ends::Yes, control::lmsw),
        M::Smsw => (Ends::No, control::smsw),
        M::Invlpg => (Ends::Yes, control::invlpg),
        M::Invpcid => (Ends::Yes, control::invpcid),
        M::Invd | M::Wbinvd | M::Wbnoinvd => (Ends::No, control::cache),
        M::Xsetbv => (Ends::Yes, control::xsetbv),
        M::Xgetbv => (Ends::No, xsave::xgetbv),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            (Ends::No, xsave::xsave)
        }
        M::Xrstor | M::Xrstor64 => (Ends::No, xsave::xrstor),
        M::Rdmsr => (Ends::No, msr::rdmsr),
        M::Wrmsr => (Ends::Yes, msr::wrmsr),
        M::Lgdt | M::Lidt => (Ends::No, tables::load_table),
        M::Sgdt | M::Sidt => (Ends::No, tables::store_table),
        M::Sldt | M::Str => (Ends::No, tables::store_selector),
        M::Lldt => (Ends::No, tables::lldt),
        M::Ltr => (Ends::No, tables::ltr),
        M::Lar => (Ends::No, tables::lar),
        M::Lsl => (Ends::No, tables::lsl),
        M::Verr | M::Verw => (Ends::No, tables::verify),
        M::Arpl => (Ends::No, tables::arpl),
        M::In => (Ends::Yes, port::input),
        M::Out => (Ends::Yes, port::output),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => (Ends::Yes, port::string),
        _ => return None,
    };
    Some((run, ends))
}

fn is_far(insn: &Instruction) -> bool {
    insn.is_jmp_far()
        || insn.is_jmp_far_indirect()
        || insn.is_call_far()
        || insn.is_call_far_indirect()
}

/// MOV to or from a segment, control or debug register.
fn mov(insn: &Instruction) -> Option<ColdChoice> {
    let special = |n: u32| {
        let register = insn.op_register(n);
        (insn.op_kind(n) == OpKind::Register).then_some((
            register.is_segment_register(),
            register.is_cr(),
            register.is_dr(),
        ))
    };
    match (special(0), special(1)) {
        (Some((true, _, _)), _) => Some((segment::mov_to, Ends::Yes)),
        (_, Some((true, _, _))) => Some((segment::mov_from, Ends::No)),
        (Some((_, true, _)), _) => Some((control::mov_to, Ends::Yes)),
        (_, Some((_, true, _))) => Some((control::mov_from, Ends::No)),
        (Some((_, _, true)), _) => Some((debug::mov_to, Ends::Yes)),
        (_, Some((_, _, true))) => Some((debug::mov_from, Ends::No)),
        _ => None,
    }
}
