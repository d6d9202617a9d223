//! Bytes of a form: prefixes in random order, REX or VEX, opcode, ModRM and a tail, all random where
//! the form leaves a choice. The decoder says whether the bytes are what was meant.

use iced_x86::{
    ConstantOffsets, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix,
    OpCodeInfo, OpCodeOperandKind, OpCodeTableKind,
};

use super::super::forms::Form;
use super::super::rng::Rng;

/// Most bytes of an instruction.
const MAX_LEN: usize = 15;

/// An instruction, as bytes and decoded.
#[derive(Clone, Copy)]
pub struct Encoded {
    bytes: [u8; 16],
    len: usize,
    /// The instruction, with its address.
    pub instruction: Instruction,
    /// Where displacement and immediates lie.
    pub offsets: ConstantOffsets,
}

impl Encoded {
    /// Decodes the instruction at the start of `bytes`, which lies at `at`.
    pub fn decode(bytes: &[u8], at: u64) -> Self {
        let mut kept = [0; 16];
        let len = bytes.len().min(MAX_LEN);
        kept[..len].copy_from_slice(&bytes[..len]);
        let mut decoder = Decoder::with_ip(64, &kept[..len], at, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let offsets = decoder.get_constant_offsets(&instruction);
        let len = if instruction.is_invalid() { len } else { instruction.len() };
        Self { bytes: kept, len, instruction, offsets }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Overwrites `size` bytes at `offset` with the low ones of `value` and decodes again.
    pub fn patch(&mut self, offset: usize, size: usize, value: u64) {
        let size = size.min(8);
        self.bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
        *self = Self::decode(&self.bytes[..self.len], self.instruction.ip());
    }
}

/// Random bytes of `form` for address `at`; `None` if no attempt hit it.
pub fn encode(form: &Form, at: u64, rng: &mut Rng) -> Option<Encoded> {
    (0..200).find_map(|_| {
        let mut bytes = Vec::with_capacity(32);
        match form.info.encoding() {
            EncodingKind::VEX => vex(form.info, rng, &mut bytes),
            _ => legacy(form.info, rng, &mut bytes),
        }
        for _ in 0..12 {
            bytes.push(rng.u8());
        }
        let encoded = Encoded::decode(&bytes, at);
        (encoded.instruction.code() == form.code).then_some(encoded)
    })
}

fn prefixes(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    if info.address_size() == 32 || rng.chance(7) {
        bytes.push(0x67);
    }
    match rng.below(100) {
        0..=9 => bytes.push(rng.pick(&[0x64, 0x65])),
        10..=12 => bytes.push(rng.pick(&[0x26, 0x2E, 0x36, 0x3E])),
        _ => {}
    }
}

fn shuffle(rng: &mut Rng, bytes: &mut [u8]) {
    for i in (1..bytes.len()).rev() {
        bytes.swap(i, rng.below(i as u64 + 1) as usize);
    }
}

fn legacy(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    prefixes(info, rng, bytes);
    let mut wide = match info.operand_size() {
        64 => !info.default_op_size64() || rng.chance(20),
        0 => rng.chance(15),
        _ => false,
    };
    if info.operand_size() == 16 || (info.operand_size() == 0 && rng.chance(6)) {
        bytes.push(0x66);
    } else if info.operand_size() == 64 && rng.chance(4) {
        bytes.push(0x66);
        wide = true;
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xF3),
        MandatoryPrefix::PF2 => bytes.push(0xF2),
        MandatoryPrefix::None => {
            if info.can_use_rep_prefix() && rng.chance(45) {
                bytes.push(0xF3);
            } else if info.can_use_repne_prefix() && rng.chance(45) {
                bytes.push(0xF2);
            } else if rng.chance(2) {
                bytes.push(rng.pick(&[0xF2, 0xF3]));
            }
        }
        _ => {}
    }
    if info.can_use_lock_prefix() && rng.chance(30) {
        bytes.push(0xF0);
    }
    if !bytes.is_empty() && rng.chance(3) {
        bytes.push(rng.pick(bytes));
    }
    shuffle(rng, bytes);
    let rex = 0x40 | u8::from(wide) << 3 | if rng.chance(50) { rng.u8() & 7 } else { 0 };
    if rex != 0x40 || rng.chance(10) {
        bytes.push(rex);
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0F),
        OpCodeTableKind::T0F38 => bytes.extend([0x0F, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0F, 0x3A]),
        _ => {}
    }
    opcode(info, rng, bytes);
    bytes.push(modrm(info, rng));
}

fn opcode(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    use OpCodeOperandKind as K;
    if info.op_code_len() == 2 {
        bytes.push((info.op_code() >> 8) as u8);
    }
    let register = info.op_kinds().iter().any(|kind| {
        matches!(kind, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
    });
    bytes.push(info.op_code() as u8 | if register { rng.u8() & 7 } else { 0 });
}

fn modrm(info: &OpCodeInfo, rng: &mut Rng) -> u8 {
    let mut byte = rng.u8();
    if rng.chance(30) {
        byte |= 0xC0;
    }
    if info.group_index() >= 0 {
        byte = byte & !0x38 | (info.group_index() as u8) << 3;
    }
    if info.rm_group_index() >= 0 {
        byte = byte & !0x07 | info.rm_group_index() as u8;
    }
    byte
}

fn vex(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    use OpCodeOperandKind as K;
    prefixes(info, rng, bytes);
    shuffle(rng, bytes);
    let map = match info.table() {
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        _ => 1,
    };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let wide = if info.is_wig() { rng.chance(20) } else { info.w() == 1 };
    let long = if info.is_lig() { rng.chance(20) } else { info.l() == 1 };
    let uses_vvvv = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            K::r32_vvvv
                | K::r64_vvvv
                | K::xmm_vvvv
                | K::ymm_vvvv
                | K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
        )
    });
    let vvvv = if uses_vvvv { rng.u8() & 0xF } else { 0xF };
    let tail = vvvv << 3 | u8::from(long) << 2 | pp;
    // R, X and B are stored inverted.
    let rxb = if rng.chance(50) { 0xE0 } else { rng.u8() & 0xE0 };
    if map == 1 && !wide && rxb & 0x60 == 0x60 && rng.chance(70) {
        bytes.extend([0xC5, rxb & 0x80 | tail]);
    } else {
        bytes.extend([0xC4, rxb | map, u8::from(wide) << 7 | tail]);
    }
    opcode(info, rng, bytes);
    bytes.push(modrm(info, rng));
}

#[cfg(test)]
mod tests {
    use vmkit_hypervisor::FeatureSet;

    use super::super::super::forms::forms;
    use super::*;

    #[test]
    fn every_form_can_be_encoded() {
        let all =
            vmkit_hypervisor::Feature::ALL.iter().fold(FeatureSet::empty(), |set, &f| set.with(f));
        let mut rng = Rng::new(7, 7);
        let failed: Vec<_> = forms(&all)
            .iter()
            .filter(|form| (0..20).all(|_| encode(form, 0x1000, &mut rng).is_none()))
            .map(|form| form.info.op_code_string())
            .collect();
        assert!(failed.is_empty(), "{failed:#?}");
    }
}
