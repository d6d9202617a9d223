//! Puts immediates, displacements and address registers so that operands lie where something happens:
//! inside the data pages, across a page border, over the edge into nothing.

use iced_x86::{Instruction, MemorySize, OpCodeOperandKind, OpKind, Register};

use super::super::case::Case;
use super::super::layout::{CODE, CODE_LEN, DATA, DATA_LEN, PAGE, READ_ONLY};
use super::super::rng::Rng;
use super::encode::Encoded;
use super::values::{self, Lanes};

/// The value `register` has in `case`, as iced asks for it: full registers and segment bases.
pub(super) fn register_value(case: &Case, register: Register) -> Option<u64> {
    if register.is_gpr() {
        let full = case.gpr[register.full_register().number()];
        return Some(match register.size() {
            8 => full,
            4 => full & 0xFFFF_FFFF,
            2 => full & 0xFFFF,
            _ => full & 0xFF,
        });
    }
    Some(match register {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => 0,
    })
}

/// Linear address of explicit or implicit memory operand `operand`.
pub(super) fn address(case: &Case, instruction: &Instruction, operand: u32) -> Option<u64> {
    instruction.virtual_address(operand, 0, |register, _, _| register_value(case, register))
}

/// A linear address for an operand of `size` bytes.
pub(super) fn target(rng: &mut Rng, size: u64) -> u64 {
    let size = size.clamp(1, 512);
    let inside = DATA + 64 + rng.below(DATA_LEN - 1024);
    match rng.below(100) {
        0..=54 => inside & !63 | rng.pick(&[0, 16, 32, 48]),
        55..=72 => inside,
        73..=82 => DATA + PAGE - rng.range(1, size.max(2) - 1),
        83..=86 => DATA + DATA_LEN - size,
        87 => DATA,
        88..=90 => DATA + DATA_LEN - rng.range(1, size.max(2) - 1),
        91 => DATA - rng.range(1, size),
        92..=94 => (READ_ONLY + rng.below(PAGE - 512)) & !15,
        95 => READ_ONLY - PAGE + rng.below(PAGE),
        96 => CODE + rng.below(CODE_LEN - 512),
        97 => rng.u64() >> 17,
        // Into the non-canonical hole. Close to it, but not in, processors differ in what they check.
        98 if size > 1 => (1 << 47) - rng.range(1, size - 1),
        _ => rng.u64(),
    }
}

/// Gives immediates edge values and lets near branches land in the code pages.
pub(super) fn immediates(encoded: &mut Encoded, rng: &mut Rng) {
    let instruction = encoded.instruction;
    if instruction.is_invalid() {
        return;
    }
    let branch = matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    let register_in_immediate = instruction
        .code()
        .op_code()
        .op_kinds()
        .iter()
        .any(|kind| matches!(kind, OpCodeOperandKind::xmm_is4 | OpCodeOperandKind::ymm_is4));
    let offsets = encoded.offsets;
    if !offsets.has_immediate() || register_in_immediate {
        return;
    }
    let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
    if branch {
        if size > 1 && rng.chance(90) {
            let target = CODE + rng.below(CODE_LEN);
            encoded.patch(at, size, target.wrapping_sub(instruction.next_ip()));
        }
    } else if rng.chance(70) {
        let value = values::integer(rng, size as u32 * 8);
        encoded.patch(at, size, value);
    }
    if offsets.has_immediate2() && rng.chance(50) {
        encoded.patch(offsets.immediate_offset2(), offsets.immediate_size2(), rng.below(4));
    }
}

/// Bytes that an operand of this kind covers; a guess where the instruction decides at run time.
pub(super) fn size(instruction: &Instruction) -> u64 {
    match instruction.memory_size() {
        MemorySize::Fxsave_512Byte | MemorySize::Fxsave64_512Byte => 512,
        MemorySize::Xsave | MemorySize::Xsave64 => 832,
        other => (other.size() as u64).max(1),
    }
}

/// Chooses where the explicit memory operand lies, makes the registers point there and fills it.
/// Returns its linear address.
pub(super) fn place(case: &mut Case, encoded: &mut Encoded, rng: &mut Rng) -> Option<u64> {
    let instruction = encoded.instruction;
    let operand =
        (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory)?;
    let size = size(&instruction);
    let mut wanted = target(rng, size);
    if size >= 512 && rng.chance(85) {
        wanted = (DATA + 64 + rng.below(DATA_LEN - 1024)) & !63;
    }
    aim(case, encoded, wanted, rng);
    let at = address(case, &encoded.instruction, operand)?;
    fill(case, &encoded.instruction, at, rng);
    Some(at)
}

/// Changes displacement, base, index or segment base so that the operand lies at `wanted`, as nearly
/// as the encoding allows.
fn aim(case: &mut Case, encoded: &mut Encoded, wanted: u64, rng: &mut Rng) {
    let instruction = encoded.instruction;
    let offsets = encoded.offsets;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if offsets.displacement_size() >= 4 && !matches!(base, Register::RIP | Register::EIP) {
        // Half of the wide displacements are small, of either sign.
        if rng.chance(50) {
            let small = rng.below(0x1000).wrapping_sub(0x800);
            encoded.patch(offsets.displacement_offset(), offsets.displacement_size(), small);
        }
    }
    let segment = register_value(case, instruction.memory_segment()).unwrap_or(0);
    let scale = u64::from(instruction.memory_index_scale());
    let full = |r: Register| r.full_register().number();
    let narrow = |r: Register| r.size() == 4;
    let set = |case: &mut Case, r: Register, value: u64| {
        let register = &mut case.gpr[full(r)];
        *register = if narrow(r) { *register & !0xFFFF_FFFF | value & 0xFFFF_FFFF } else { value };
    };
    let vector_index = index.is_vector_register();
    let displacement = encoded.instruction.memory_displacement64();
    let rest = wanted.wrapping_sub(segment);
    match (base, index) {
        (Register::RIP | Register::EIP, _) => {
            let displacement = rest.wrapping_sub(instruction.next_ip());
            encoded.patch(offsets.displacement_offset(), 4, displacement);
        }
        (Register::None, Register::None) => {
            // The base takes what the displacement cannot reach.
            match instruction.memory_segment() {
                Register::FS => case.fs_base = canonical(wanted.wrapping_sub(displacement)),
                Register::GS => case.gs_base = canonical(wanted.wrapping_sub(displacement)),
                _ => {}
            }
            let segment = register_value(case, instruction.memory_segment()).unwrap_or(0);
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            encoded.patch(at, size, wanted.wrapping_sub(segment));
        }
        (base, index) if index != Register::None && !vector_index && base == index => {
            set(case, base, rest.wrapping_sub(displacement) / (1 + scale));
        }
        (Register::None, index) if !vector_index => {
            set(case, index, rest.wrapping_sub(displacement) / scale.max(1));
        }
        (base, index) => {
            if vector_index && rng.chance(80) {
                small_indices(case, index, rng);
            }
            let indexed = match index {
                Register::None => 0,
                _ if vector_index => 0,
                _ => register_value(case, index).unwrap_or(0).wrapping_mul(scale),
            };
            if base != Register::None {
                set(case, base, rest.wrapping_sub(displacement).wrapping_sub(indexed));
            }
        }
    }
}

fn small_indices(case: &mut Case, index: Register, rng: &mut Rng) {
    use super::super::case::Fpu;
    for start in [Fpu::XMM, Fpu::YMM_HIGH] {
        let at = start + 16 * index.number();
        for lane in case.fpu.0[at..at + 16].chunks_exact_mut(8) {
            lane.copy_from_slice(&rng.below(64).to_le_bytes());
        }
    }
}

/// The nearest canonical address.
pub(super) fn canonical(address: u64) -> u64 {
    ((address << 16) as i64 >> 16) as u64
}

/// Writes values that suit the operand's type at `at`.
fn fill(case: &mut Case, instruction: &Instruction, at: u64, rng: &mut Rng) {
    let element = instruction.memory_size().element_type();
    let kind = match element {
        MemorySize::Float32 => Lanes::Single,
        MemorySize::Float64 => Lanes::Double,
        _ => Lanes::Integer,
    };
    match element {
        MemorySize::Float80 => case.memory.write(at, &values::extended(rng)),
        MemorySize::Bcd => case.memory.write(at, &values::bcd(rng)),
        _ => {
            let mut bytes = [0; 32];
            values::lanes(rng, kind, &mut bytes);
            let len = (size(instruction) as usize).clamp(8, 32);
            case.memory.write(at, &bytes[..len]);
        }
    }
}
