//! What single instructions need so that a random state does more than fault: sane counts for string
//! instructions, divisors, branch targets, frames to return through, images to restore.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use vmkit_hypervisor::{Feature, FeatureSet};

use super::super::case::Case;
use super::super::layout::{CODE, CODE_LEN, DATA, LINE, USER_CS, USER_CS32, USER_SS};
use super::super::rng::Rng;
use super::encode::Encoded;
use super::{operands, state, values};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// Adjusts `case` for `encoded`, whose explicit memory operand lies at `place`.
pub(super) fn adjust(
    case: &mut Case,
    encoded: &mut Encoded,
    place: Option<u64>,
    features: &FeatureSet,
    rng: &mut Rng,
) {
    use Mnemonic as M;
    let instruction = encoded.instruction;
    if instruction.is_invalid() {
        return;
    }
    if instruction.is_string_instruction() {
        return string(case, &instruction, rng);
    }
    if instruction.is_stack_instruction() {
        stack(case, rng);
    }
    match instruction.mnemonic() {
        M::Leave => case.gpr[RBP] = operands::target(rng, 8),
        M::Enter => {
            case.gpr[RBP] = operands::target(rng, 8);
            if rng.chance(80) {
                let offset = encoded.offsets.immediate_offset();
                encoded.patch(offset, 2, rng.below(512));
            }
        }
        M::Xlatb => case.gpr[RBX] = operands::target(rng, 1),
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => case.gpr[RDI] = operands::target(rng, 16),
        M::Bt | M::Bts | M::Btr | M::Btc => bit_offset(case, &instruction, place, rng),
        M::Div | M::Idiv => dividend(case, &instruction, rng),
        M::Cmpxchg if rng.chance(50) => expected(case, &instruction, place),
        M::Cmpxchg8b | M::Cmpxchg16b => expected_pair(case, &instruction, place, rng),
        M::Jmp | M::Call => indirect(case, &instruction, place, rng),
        M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => {
            let count = rng.pick(&[0, 1, 1, 2, 1 << 32, (1 << 32) + 1]);
            case.gpr[RCX] = if rng.chance(90) { count } else { case.gpr[RCX] };
        }
        M::Ret => near_return(case, rng),
        M::Retf | M::Iret | M::Iretd | M::Iretq => {
            // A small increment: what lies past it is read before or after the selector is checked.
            let offsets = encoded.offsets;
            if offsets.has_immediate() {
                encoded.patch(offsets.immediate_offset(), 2, rng.below(128));
            }
            far_return(case, &instruction, rng);
        }
        M::Popf | M::Popfq if rng.chance(70) => {
            // Without TF, which would trap behind the next instruction.
            let flags = rng.u64() & 0x3F_FEFF;
            case.memory.write(case.gpr[RSP], &flags.to_le_bytes());
        }
        M::Mov | M::Pop | M::Lss | M::Lfs | M::Lgs | M::Lar | M::Lsl | M::Verr | M::Verw => {
            selector(case, &instruction, place, rng);
        }
        M::Ldmxcsr | M::Vldmxcsr => {
            let reserved = if rng.chance(85) { 0 } else { 1 << rng.pick(&[16, 18, 24, 31]) };
            if let Some(at) = place {
                case.memory.write(at, &(state::mxcsr(rng) | reserved).to_le_bytes());
            }
        }
        M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 | M::Frstor | M::Fldenv => {
            if let Some(at) = place {
                image(case, &instruction, at, components(features), rng);
            }
            mask(case, features, rng);
        }
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 => {
            if let Some(at) = place {
                // XSAVE merges into the header's first word and wants the rest to be anything.
                case.memory.write(at.wrapping_add(512), &[0; 64]);
            }
            mask(case, features, rng);
        }
        M::Wrfsbase | M::Wrgsbase if rng.chance(80) => {
            if let Some(register) = gpr(instruction.op0_register()) {
                case.gpr[register] = operands::canonical(case.gpr[register]);
            }
        }
        M::Pcmpestri | M::Pcmpestrm | M::Vpcmpestri | M::Vpcmpestrm => {
            for register in [RAX, RDX] {
                let length = rng.below(40).wrapping_sub(20);
                case.gpr[register] = if rng.chance(90) { length } else { rng.u64() };
            }
        }
        _ => {}
    }
}

fn gpr(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

/// State components a guest with `features` can enable.
fn components(features: &FeatureSet) -> u8 {
    if features.contains(Feature::Avx) { 7 } else { 3 }
}

/// EDX:EAX, the requested features of the XSAVE family: only components that host and guest share.
fn mask(case: &mut Case, features: &FeatureSet, rng: &mut Rng) {
    let shared = u64::from(components(features));
    case.gpr[RAX] =
        case.gpr[RAX] & !0xFFFF_FFFF | rng.pick(&[7, 3, 1, 2, rng.clone().u64()]) & shared;
    case.gpr[RDX] &= !0xFFFF_FFFF;
}

fn string(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let count = match rng.below(20) {
        0 => 0,
        1 => rng.below(9000),
        2 => rng.u64(),
        _ => rng.below(80),
    };
    for register in [RSI, RDI] {
        let size = if repeated { count.clamp(1, 300) } else { 8 };
        case.gpr[register] = operands::target(rng, size);
    }
    if rng.chance(20) {
        // Overlapping, a few bytes apart.
        case.gpr[RDI] = case.gpr[RSI].wrapping_add(rng.below(40)).wrapping_sub(20);
    }
    match instruction.memory_segment() {
        Register::FS => case.fs_base = rng.below(64),
        Register::GS => case.gs_base = rng.below(64),
        _ => {}
    }
    case.gpr[RCX] = count;
    if rng.chance(60) {
        // Something for SCAS and CMPS to run along.
        let byte = rng.u8();
        let run = vec![byte; rng.range(1, 200) as usize];
        let back = if case.rflags & 0x400 != 0 { run.len() as u64 - 1 } else { 0 };
        for register in [RSI, RDI] {
            case.memory.write(case.gpr[register].wrapping_sub(back), &run);
        }
        case.gpr[RAX] = u64::from(byte) * 0x0101_0101_0101_0101;
    }
}

fn stack(case: &mut Case, rng: &mut Rng) {
    let at = operands::target(rng, 16);
    case.gpr[RSP] = if rng.chance(75) { at & !7 } else { at };
    let mut bytes = [0; LINE];
    values::lanes(rng, values::Lanes::Integer, &mut bytes);
    case.memory.write(case.gpr[RSP], &bytes);
}

/// A bit offset near the operand: BT and its kin reach past it (Intel SDM vol. 2A, BT).
fn bit_offset(case: &mut Case, instruction: &Instruction, place: Option<u64>, rng: &mut Rng) {
    let (Some(_), Some(offset)) = (place, gpr(instruction.op1_register())) else { return };
    let used = [instruction.memory_base(), instruction.memory_index()];
    if rng.chance(85) && used.iter().all(|&r| gpr(r) != Some(offset)) {
        case.gpr[offset] = rng.below(4096).wrapping_sub(2048);
    }
}

/// Makes the quotient fit more often than not.
fn dividend(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let used = [instruction.op0_register(), instruction.memory_base(), instruction.memory_index()];
    let free = |r: usize| used.iter().all(|&u| gpr(u) != Some(r));
    let high = match rng.below(10) {
        0..=4 => 0,
        5 | 6 => u64::MAX,
        7 => rng.below(16),
        _ => return,
    };
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    if bytes == 1 && free(RAX) {
        case.gpr[RAX] = case.gpr[RAX] & !0xFF00 | high << 8 & 0xFF00;
    } else if free(RDX) {
        case.gpr[RDX] = high;
    }
}

/// Lets CMPXCHG find what it compares with.
fn expected(case: &mut Case, instruction: &Instruction, place: Option<u64>) {
    match (instruction.op0_kind(), place) {
        (OpKind::Memory, Some(at)) => {
            let used = [instruction.memory_base(), instruction.memory_index()];
            if used.iter().all(|&r| gpr(r) != Some(RAX)) {
                case.gpr[RAX] = case.memory.read(at, 8);
            }
        }
        _ => {
            if let Some(register) = gpr(instruction.op0_register()) {
                case.gpr[RAX] = case.gpr[register];
            }
        }
    }
}

fn expected_pair(case: &mut Case, instruction: &Instruction, place: Option<u64>, rng: &mut Rng) {
    let Some(at) = place else { return };
    let used = [instruction.memory_base(), instruction.memory_index()];
    if rng.chance(50) && used.iter().all(|&r| !matches!(gpr(r), Some(RAX | RDX))) {
        let half = instruction.memory_size().size() / 2;
        case.gpr[RAX] = case.memory.read(at, half);
        case.gpr[RDX] = case.memory.read(at.wrapping_add(half as u64), half);
    }
}

fn code_target(rng: &mut Rng) -> u64 {
    if rng.chance(92) { CODE + rng.below(CODE_LEN) } else { operands::target(rng, 8) }
}

/// Targets of indirect jumps and calls, near and far.
fn indirect(case: &mut Case, instruction: &Instruction, place: Option<u64>, rng: &mut Rng) {
    let target = code_target(rng);
    if let Some(register) = gpr(instruction.op0_register()) {
        case.gpr[register] = target;
    }
    let Some(at) = place else { return };
    case.memory.write(at, &target.to_le_bytes());
    if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() {
        let offset = instruction.memory_size().size() as u64 - 2;
        let selector = far_selector(rng);
        case.memory.write(at.wrapping_add(offset), &selector.to_le_bytes());
    }
}

fn far_selector(rng: &mut Rng) -> u16 {
    match rng.below(10) {
        0 => USER_CS32,
        1 => any_selector(rng),
        _ => USER_CS,
    }
}

/// A selector of the mirrored descriptor tables, or one that must fault. Never the CPU-number
/// segment, whose limit differs from host to host.
fn any_selector(rng: &mut Rng) -> u16 {
    let selector = match rng.below(6) {
        0 | 1 => rng.pick(&[USER_SS, USER_CS, USER_CS32]),
        2 => rng.below(4) as u16,
        3 => rng.below(0x78) as u16,
        _ => rng.u64() as u16,
    };
    if selector & !7 == 0x78 { USER_SS } else { selector }
}

fn near_return(case: &mut Case, rng: &mut Rng) {
    let target = code_target(rng);
    case.memory.write(case.gpr[RSP], &target.to_le_bytes());
}

/// A frame for RETF or IRET: RIP, CS, and for IRET RFLAGS, RSP, SS.
fn far_return(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let width = match instruction.code().op_code().operand_size() {
        16 => 2,
        64 => 8,
        _ => 4,
    };
    let flags = rng.u64() & 0x3F_FEFF;
    let stack = if rng.chance(80) { DATA + rng.below(0x1000) } else { rng.u64() };
    let selector = if rng.chance(80) { USER_SS } else { any_selector(rng) };
    let frame = [code_target(rng), far_selector(rng).into(), flags, stack, selector.into()];
    for (i, value) in frame.iter().enumerate() {
        let at = case.gpr[RSP].wrapping_add((i * width) as u64);
        case.memory.write(at, &value.to_le_bytes()[..width]);
    }
}

/// Selectors for whatever loads or inspects one.
fn selector(case: &mut Case, instruction: &Instruction, place: Option<u64>, rng: &mut Rng) {
    let loads = instruction.op0_register().is_segment_register();
    let inspects = matches!(
        instruction.mnemonic(),
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw
    );
    let far_pointer =
        matches!(instruction.mnemonic(), Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs);
    if !loads && !inspects && !far_pointer {
        return;
    }
    let selector = any_selector(rng);
    if instruction.mnemonic() == Mnemonic::Pop {
        case.memory.write(case.gpr[RSP], &selector.to_le_bytes());
    } else if let Some(at) = place {
        let offset = if far_pointer { instruction.memory_size().size() as u64 - 2 } else { 0 };
        case.memory.write(at.wrapping_add(offset), &selector.to_le_bytes());
    } else {
        let operand = instruction.op_count() - 1;
        if let Some(register) = gpr(instruction.op_register(operand)) {
            case.gpr[register] = case.gpr[register] & !0xFFFF | u64::from(selector);
        }
    }
}

/// An image for FXRSTOR, XRSTOR, FRSTOR and FLDENV.
fn image(case: &mut Case, instruction: &Instruction, at: u64, components: u8, rng: &mut Rng) {
    let image = state::image(rng, components);
    match instruction.mnemonic() {
        Mnemonic::Frstor | Mnemonic::Fldenv => {
            // Control, status and tag words, each in a field of its own (Intel SDM vol. 1 §8.1.10).
            let field = if matches!(instruction.memory_size().size(), 14 | 94) { 2 } else { 4 };
            case.memory.write(at, &image.fcw().to_le_bytes());
            case.memory.write(at.wrapping_add(field), &image.fsw().to_le_bytes());
            case.memory.write(at.wrapping_add(2 * field), &(rng.u64() as u16).to_le_bytes());
            for i in 0..8 {
                case.memory.write(at.wrapping_add(7 * field + 10 * i), &values::extended(rng));
            }
        }
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => case.memory.write(at, &image.0[..512]),
        _ => case.memory.write(at, &image.0),
    }
}
