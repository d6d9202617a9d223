//! What the manuals leave undefined, entry by entry.
//!
//! Flags that an instruction always leaves undefined come from iced-x86's tables, which were made from
//! the same manuals. What depends on operands is here.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register, RflagsBits};
use vmkit_hypervisor::Vendor;

use super::super::case::{Case, Outcome};
use super::super::generate::memory_address;
use super::super::layout;
use super::latitude::Latitude;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;
const ALL: u64 = CF | PF | AF | ZF | SF | OF;
/// C0, C2 and C3 of the x87 status word.
const C023: u16 = 0x4500;

/// What `expected`, the host's outcome, does not decide.
pub(super) fn latitude(
    case: &Case,
    instruction: &Instruction,
    expected: &Outcome,
    host: Vendor,
) -> Latitude {
    let mut l = Latitude::default();
    // Linux tells user space that every address past its own is mapped (arch/x86/mm/fault.c,
    // sanitize_error_code; TASK_SIZE_MAX ends a page early): P of the error code is not the
    // processor's.
    if expected.raised(14) && expected.cr2 >= (1 << 47) - layout::PAGE {
        l.error |= 1;
    }
    // SDM vol. 3A §7.9 leaves open whether a misaligned access that also misses its page raises #AC
    // or #PF.
    l.any_fault = case.rflags & AC != 0;
    if instruction.is_invalid() {
        return l;
    }
    l.flags |= flags(case, instruction, expected);
    match instruction.mnemonic() {
        // SDM vol. 2B, SHLD and SHRD: with a count past the operand size the result is undefined.
        Mnemonic::Shld | Mnemonic::Shrd if count(case, instruction) > bits(instruction) => {
            destination(case, instruction, &mut l);
        }
        // SDM vol. 2A, BSF and BSR: with a zero source the destination is undefined; both vendors
        // leave it, but differ in whether a 32-bit one is zero-extended.
        Mnemonic::Bsf | Mnemonic::Bsr if expected.rflags & ZF != 0 && bits(instruction) == 32 => {
            l.gpr[number(instruction.op0_register())] |= !0 << 32;
        }
        // SDM vol. 2B, RCPPS and RSQRTPS: relative error up to 1.5 × 2^-12.
        Mnemonic::Rcpps
        | Mnemonic::Rcpss
        | Mnemonic::Rsqrtps
        | Mnemonic::Rsqrtss
        | Mnemonic::Vrcpps
        | Mnemonic::Vrcpss
        | Mnemonic::Vrsqrtps
        | Mnemonic::Vrsqrtss => l.approximate = Some(instruction.op0_register().number()),
        // SDM vol. 1 §8.3.10: transcendentals are within 1 ulp, each vendor in its own way; PE and
        // the rounding direction in C1 follow.
        Mnemonic::F2xm1
        | Mnemonic::Fyl2x
        | Mnemonic::Fyl2xp1
        | Mnemonic::Fsin
        | Mnemonic::Fcos
        | Mnemonic::Fsincos
        | Mnemonic::Fptan
        | Mnemonic::Fpatan => {
            l.st_ulps = 2;
            l.fsw |= 0x0220;
        }
        // The instruction and data pointers: when they are updated, and whether by instructions that
        // do not fault, differs (SDM vol. 1 §8.1.8; APM vol. 2 §11.5.2 saves them only with a
        // pending exception).
        Mnemonic::Fnstenv | Mnemonic::Fnsave => environment(case, instruction, &mut l),
        Mnemonic::Fxsave
        | Mnemonic::Fxsave64
        | Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64 => image(case, instruction, &mut l),
        // In which order a far return reads its frame and checks the selectors, and a call stores its
        // return address and checks its target, is the processor's affair, and with it which of two
        // faults comes (SDM vol. 3A §7.9 orders no exceptions of one instruction's execution).
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf | Mnemonic::Call => {
            (l.cr2, l.any_fault) = (0xFFF, true);
        }
        // So is which of its two operands CMPS reads first.
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => {
            (l.cr2, l.any_fault) = (!0, true);
        }
        // SDM vol. 2A, ENTER: the last step is a check that the new top of stack can be written; what
        // was pushed before it stays.
        Mnemonic::Enter if expected.rip == instruction.ip() => l.memory = true,
        // SDM vol. 2A, CMPXCHG, writes the destination back when the comparison fails, which
        // zero-extends a 32-bit register; AMD's processors leave it (APM vol. 3, CMPXCHG).
        Mnemonic::Cmpxchg
            if host == Vendor::Amd
                && expected.rflags & ZF == 0
                && instruction.op0_register().size() == 4 =>
        {
            l.gpr[number(instruction.op0_register())] |= !0 << 32;
        }
        // SDM vol. 3A §3.4.4 and APM vol. 2 §4.5.3: a null selector zeroes the base on Intel's
        // processors and AMD's since Zen 2, and leaves it on older ones.
        Mnemonic::Mov | Mnemonic::Pop | Mnemonic::Lfs | Mnemonic::Lgs
            if host == Vendor::Amd && instruction.op0_register().is_segment_register() =>
        {
            l.bases = !0;
        }
        _ => {}
    }
    // Instructions that move whole images touch their parts in an order of their own; a fault names
    // the part that came first and leaves what was stored before (SDM vol. 1 §13.7, XSAVE).
    if in_parts(instruction) && matches!(expected.vector, 12..=14) {
        (l.cr2, l.any_fault, l.memory) = (!0, true, true);
    }
    // SDM vol. 1 §3.4.1.1: the upper halves of the general registers are undefined once the processor
    // has left 64-bit mode.
    if expected.selectors.cs == layout::USER_CS32 {
        l.gpr.iter_mut().for_each(|ignored| *ignored |= !0 << 32);
    }
    if undefined_conditions(instruction) {
        l.fsw |= C023;
    }
    l
}

/// SDM vol. 2, "FPU Flags Affected": all x87 computations and loads leave C0, C2 and C3 undefined,
/// but for comparisons, FXAM, the remainders and transcendentals that report through them, and what
/// loads the status word.
fn undefined_conditions(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::F2xm1
            | M::Fabs
            | M::Fadd
            | M::Faddp
            | M::Fbld
            | M::Fbstp
            | M::Fchs
            | M::Fdecstp
            | M::Fdiv
            | M::Fdivp
            | M::Fdivr
            | M::Fdivrp
            | M::Ffree
            | M::Fiadd
            | M::Fidiv
            | M::Fidivr
            | M::Fild
            | M::Fimul
            | M::Fincstp
            | M::Fist
            | M::Fistp
            | M::Fisttp
            | M::Fisub
            | M::Fisubr
            | M::Fld
            | M::Fld1
            | M::Fldl2e
            | M::Fldl2t
            | M::Fldlg2
            | M::Fldln2
            | M::Fldpi
            | M::Fldz
            | M::Fmul
            | M::Fmulp
            | M::Fnop
            | M::Fpatan
            | M::Frndint
            | M::Fscale
            | M::Fsqrt
            | M::Fst
            | M::Fstp
            | M::Fsub
            | M::Fsubp
            | M::Fsubr
            | M::Fsubrp
            | M::Fxch
            | M::Fxtract
            | M::Fyl2x
            | M::Fyl2xp1
            | M::Fnstcw
            | M::Fnstsw
            | M::Fcmovb
            | M::Fcmovbe
            | M::Fcmove
            | M::Fcmovnb
            | M::Fcmovnbe
            | M::Fcmovne
            | M::Fcmovnu
            | M::Fcmovu
    )
}

/// True for instructions whose memory operand is wider than one access: x87 environments and images,
/// those of the XSAVE family, and ten-byte numbers.
fn in_parts(instruction: &Instruction) -> bool {
    instruction.is_save_restore_instruction()
        || matches!(
            instruction.memory_size(),
            MemorySize::FpuEnv14
                | MemorySize::FpuEnv28
                | MemorySize::FpuState94
                | MemorySize::FpuState108
                | MemorySize::Float80
                | MemorySize::Bcd
        )
}

fn number(register: Register) -> usize {
    if register.is_gpr() { register.full_register().number() } else { 0 }
}

/// Operand size in bits of the first operand.
fn bits(instruction: &Instruction) -> u64 {
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    bytes as u64 * 8
}

/// The count of a shift or rotate, masked as the processor masks it (SDM vol. 2B, SAL).
fn count(case: &Case, instruction: &Instruction) -> u64 {
    let last = instruction.op_count().saturating_sub(1);
    let raw = match instruction.op_kind(last) {
        OpKind::Immediate8 => u64::from(instruction.immediate8()),
        OpKind::Register => case.gpr[1],
        _ => 1,
    };
    raw & if bits(instruction) == 64 { 63 } else { 31 }
}

fn flags(case: &Case, instruction: &Instruction, expected: &Outcome) -> u64 {
    use Mnemonic as M;
    // SDM vol. 2A, DIV: all flags are undefined; a #DE shows what the attempt left.
    if expected.raised(0) {
        return ALL;
    }
    // A fault leaves all flags as they were; repeated CMPS and SCAS define all of theirs.
    if !matches!(expected.vector, 1 | 3 | 14) || expected.rip == instruction.ip() {
        return 0;
    }
    let count = || count(case, instruction);
    match instruction.mnemonic() {
        // SDM vol. 2B, SAL/SAR/SHL/SHR: a zero count changes nothing; OF is defined for 1; CF of
        // SHL and SHR is undefined from the operand size on; AF is undefined.
        M::Shl | M::Sal | M::Shr | M::Sar => {
            let many = count() >= bits(instruction) && instruction.mnemonic() != M::Sar;
            shifted(count(), AF) | if many { CF } else { 0 }
        }
        // SDM vol. 2B, RCL/RCR/ROL/ROR: OF is defined for 1.
        M::Rol | M::Ror | M::Rcl | M::Rcr => shifted(count(), 0),
        // SDM vol. 2B, SHLD and SHRD.
        M::Shld | M::Shrd if count() > bits(instruction) => ALL,
        M::Shld | M::Shrd => shifted(count(), AF),
        _ => iced(instruction.rflags_undefined()),
    }
}

fn shifted(count: u64, always: u64) -> u64 {
    match count {
        0 => 0,
        1 => always,
        _ => always | OF,
    }
}

fn iced(bits: u32) -> u64 {
    [
        (RflagsBits::OF, OF),
        (RflagsBits::SF, SF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::AF, AF),
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
    ]
    .iter()
    .filter(|(theirs, _)| bits & theirs != 0)
    .fold(0, |all, (_, ours)| all | ours)
}

/// The first operand is undefined.
fn destination(case: &Case, instruction: &Instruction, l: &mut Latitude) {
    if instruction.op0_kind() == OpKind::Register {
        l.gpr[number(instruction.op0_register())] = !0;
    } else if let Some(at) = memory_address(case, instruction) {
        l.bytes.push((at, bits(instruction) / 8));
    }
}

/// FIP, FCS, FOP, FDP, FDS of an x87 environment (SDM vol. 1 §8.1.10): everything behind the tag word.
fn environment(case: &Case, instruction: &Instruction, l: &mut Latitude) {
    let Some(at) = memory_address(case, instruction) else { return };
    let field = if matches!(instruction.memory_size().size(), 14 | 94) { 2 } else { 4 };
    l.bytes.push((at.wrapping_add(3 * field), 4 * field));
}

/// FOP, FIP, FDP and MXCSR_MASK of an FXSAVE image and the parts that software owns (SDM vol. 1
/// §10.5.1), and of an XSAVE header the components in their initial state (SDM vol. 1 §13.6:
/// whether the processor tracks them is its own affair).
fn image(case: &Case, instruction: &Instruction, l: &mut Latitude) {
    let Some(at) = memory_address(case, instruction) else { return };
    l.bytes.push((at.wrapping_add(6), 18));
    l.bytes.push((at.wrapping_add(28), 4));
    l.bytes.push((at.wrapping_add(416), 96));
}
