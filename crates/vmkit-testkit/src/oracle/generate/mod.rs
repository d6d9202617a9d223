//! Cases out of forms: random bytes of an encoding, a random state, and then the few adjustments
//! without which most random instructions would only fault.

mod adjust;
mod encode;
mod operands;
mod state;
mod values;

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use vmkit_hypervisor::{FeatureSet, Vendor};

pub use encode::Encoded;

use super::case::Case;
use super::forms::{self, Form};
use super::layout::{CODE, CODE_LEN, PAGE};
use super::rng::Rng;

/// Linear address of the explicit memory operand of `instruction` in the state that `case` starts
/// from.
pub fn memory_address(case: &Case, instruction: &Instruction) -> Option<u64> {
    let operand =
        (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory)?;
    operands::address(case, instruction, operand)
}

/// What cases are made of.
pub struct Generator {
    seed: u64,
    forms: Vec<Form>,
    features: FeatureSet,
    host: Vendor,
    /// Of 100 cases, how many are random bytes instead of a form.
    random_percent: u64,
    /// The forms are those that must not be executable.
    unlisted: bool,
}

impl Generator {
    /// A generator over every form that `features` list, for a processor of `host`'s make.
    pub fn new(seed: u64, features: &FeatureSet, host: Vendor) -> Self {
        let forms = forms::forms(features);
        Self { seed, forms, features: *features, host, random_percent: 5, unlisted: false }
    }

    /// A generator over the forms that `features` do not list and that must therefore fault.
    pub fn unlisted(seed: u64, features: &FeatureSet, host: Vendor) -> Self {
        let forms = forms::unlisted(features);
        Self { seed, forms, features: *features, host, random_percent: 0, unlisted: true }
    }

    /// Keeps only the forms that `keep` wants, and makes no random bytes.
    pub fn retain(&mut self, keep: impl Fn(&Form) -> bool) {
        self.forms.retain(keep);
        self.random_percent = 0;
    }

    /// The forms it draws from.
    pub fn forms(&self) -> &[Form] {
        &self.forms
    }

    /// Makes case `number` in `case` and returns its instruction; `None` if this number makes none.
    pub fn make(&self, number: u64, case: &mut Case) -> Option<Instruction> {
        let mut rng = Rng::new(self.seed, number);
        let rng = &mut rng;
        let at = address(rng);
        let (encoded, form) = if rng.chance(self.random_percent) {
            (self.random_bytes(rng, at)?, None)
        } else {
            let count = self.forms.len().max(1) as u64;
            let form = self.forms.get((number % count) as usize)?;
            let mut encoded = encode::encode(form, at, rng)?;
            if rng.chance(1) && !self.unlisted {
                encoded = self.permitted(spoiled(&encoded, rng))?;
            }
            (encoded, Some(form))
        };
        state::fill(case, rng, form);
        case.at = at;
        let mut encoded = encoded;
        operands::immediates(&mut encoded, rng);
        let place = operands::place(case, &mut encoded, rng);
        adjust::adjust(case, &mut encoded, place, &self.features, rng);
        case.set_bytes(encoded.bytes());
        let instruction = encoded.instruction;
        let skip = (self.unlisted && instruction.next_ip() > CODE + CODE_LEN)
            || loops(&instruction)
            || forbidden(&instruction)
            || (self.host == Vendor::Amd
                && (amd_differs(&encoded) || stray_offset(case, &instruction)))
            || wraps(case, &instruction);
        (!skip).then_some(instruction)
    }

    /// Random bytes, with a prefix or two more often than chance would have it.
    fn random_bytes(&self, rng: &mut Rng, at: u64) -> Option<Encoded> {
        let mut bytes = [0; 15];
        rng.fill(&mut bytes);
        let mut i = 0;
        while rng.chance(35) && i < 4 {
            bytes[i] = rng.pick(&[0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x48, 0x41, 0x64, 0x2E]);
            i += 1;
        }
        if rng.chance(50) {
            bytes[i] = 0x0F;
        }
        self.permitted(Encoded::decode(&bytes, at))
    }

    /// `encoded` if the oracle can judge it: a listed instruction, or none at all.
    fn permitted(&self, encoded: Encoded) -> Option<Encoded> {
        let code = encoded.instruction.code();
        let invalid = encoded.instruction.is_invalid();
        // How much of an undefined instruction is fetched is the processor's affair: keep off the end.
        let inside = encoded.instruction.ip() + 16 <= CODE + CODE_LEN;
        (invalid && inside && !reserved(encoded.bytes())
            || !invalid && forms::judged(code) && forms::listed(code, &self.features))
        .then_some(encoded)
    }
}

/// Where the instruction lies: inside a page, across two, or at the end of the code.
fn address(rng: &mut Rng) -> u64 {
    match rng.below(20) {
        0 => CODE + PAGE - rng.below(15),
        1 => CODE + CODE_LEN - rng.range(1, 15),
        _ => CODE + PAGE + rng.below(0x800) + 0x200,
    }
}

/// The instruction with one more prefix before it, legal or not.
fn spoiled(encoded: &Encoded, rng: &mut Rng) -> Encoded {
    let mut bytes = vec![rng.pick(&[0xF0, 0xF0, 0x66, 0xF2, 0xF3, 0x48, 0x2E])];
    bytes.extend_from_slice(encoded.bytes());
    Encoded::decode(&bytes, encoded.instruction.ip())
}

/// True for bytes that no vmkit model has and that the host may execute all the same: what encodes
/// AVX-512 and XOP, and the opcode space that processors without MPX, CET and their like treat as
/// NOPs and others do not (Intel SDM vol. 2B, opcode map 0F 18 to 0F 1F). With LOCK, AMD's processors
/// read a move to CR0 as one to CR8 (APM vol. 3, MOV CRn), and VERW before they refuse it.
fn reserved(bytes: &[u8]) -> bool {
    let opcode = bytes.iter().position(|b| {
        !matches!(b, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3 | 0x40..=0x4F)
    });
    let Some(at) = opcode else { return false };
    match bytes[at] {
        0x62 | 0x8F | 0xC4 | 0xC5 => true,
        0x0F => {
            matches!(
                bytes.get(at + 1),
                Some(0x00 | 0x01 | 0x20..=0x23 | 0x0E | 0x0F | 0x18..=0x1F | 0xA6 | 0xA7)
            )
        }
        _ => false,
    }
}

/// True if a branch goes into the instruction itself.
fn loops(instruction: &Instruction) -> bool {
    let target = match instruction.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call => {
            instruction.near_branch_target()
        }
        _ => return false,
    };
    target.wrapping_sub(instruction.ip()) < instruction.len() as u64
}

/// True for what reaches the host kernel in this very form.
fn forbidden(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Int && instruction.immediate8() == 0x80
}

/// True for encodings that AMD's processors read in their own way where vmkit's reads them in
/// Intel's: near branches with an operand-size prefix (APM vol. 3, "Near branches in 64-bit mode";
/// SDM vol. 2A, "Call" ignores the prefix), and far pointers with REX.W, which AMD's processors
/// ignore (APM vol. 3, JMP far, LSS).
fn amd_differs(encoded: &Encoded) -> bool {
    let instruction = &encoded.instruction;
    let prefixes = instruction.len().saturating_sub(1);
    let has = |wanted: fn(&u8) -> bool| {
        let is_prefix = |b: &&u8| matches!(b, 0x26 | 0x2E | 0x36 | 0x3E | 0x40..=0x4F | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3);
        encoded.bytes()[..prefixes].iter().take_while(is_prefix).any(wanted)
    };
    let near = instruction.is_jcc_short_or_near()
        || instruction.is_jmp_short_or_near()
        || instruction.is_call_near()
        || instruction.is_jmp_near_indirect()
        || instruction.is_call_near_indirect()
        || instruction.is_loop()
        || instruction.is_loopcc()
        || instruction.is_jcx_short()
        || matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16);
    let far = instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect()
        || matches!(instruction.mnemonic(), Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs);
    // A repeat prefix decides which way LOOPE and LOOPNE look at ZF; the manuals reserve it there
    // (SDM vol. 2A §2.1.1, APM vol. 3 §1.2.6).
    let repeated = instruction.is_loopcc() && has(|b| matches!(b, 0xF2 | 0xF3));
    // UD0 and UD1 may be refused before their ModRM is fetched.
    let cut = matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1)
        && instruction.next_ip() > CODE + CODE_LEN;
    // The register form of the prefetch group is a NOP on Intel's processors only.
    let prefetch = matches!(
        instruction.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    );
    // With an operand-size prefix MOVSXD reads 16 bits on Intel's processors and 32 on AMD's.
    let narrow = matches!(instruction.code(), Code::Movsxd_r16_rm16);
    near && has(|b| *b == 0x66)
        || far && has(|b| matches!(b, 0x48..=0x4F))
        || repeated
        || cut
        || narrow
        || prefetch
}

/// True for an operand whose offset is not canonical but becomes so with a segment base: AMD's
/// processors refuse some of them by the offset alone (APM vol. 2 §5.3.1 speaks of the linear address
/// only).
fn stray_offset(case: &Case, instruction: &Instruction) -> bool {
    let base = match instruction.memory_segment() {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => return false,
    };
    memory_address(case, instruction).is_some_and(|at| {
        let offset = at.wrapping_sub(base);
        operands::canonical(offset) != offset
    })
}

/// True if an operand with 32-bit addressing reaches past 4 GiB, where only some instructions wrap.
fn wraps(case: &Case, instruction: &Instruction) -> bool {
    let narrow = [instruction.memory_base(), instruction.memory_index()]
        .iter()
        .any(|r| r.is_gpr32() || *r == Register::EIP);
    narrow
        && memory_address(case, instruction).is_some_and(|at| {
            let last = at.wrapping_add(operands::size(instruction) - 1);
            at >> 32 != last >> 32
        })
}

#[cfg(test)]
mod tests {
    use vmkit_hypervisor::CpuModel;

    use super::*;

    #[test]
    fn nearly_every_number_makes_a_case_and_makes_it_again() {
        let generator = Generator::new(3, &CpuModel::x86_64_v2().features, Vendor::Intel);
        let (mut one, mut two) = (Case::default(), Case::default());
        let mut made = 0;
        for number in 0..4000 {
            let first = generator.make(number, &mut one);
            let second = generator.make(number, &mut two);
            assert_eq!(first, second);
            if first.is_some() {
                made += 1;
                assert_eq!((one.bytes(), one.gpr), (two.bytes(), two.gpr));
                assert!(one.memory == two.memory && one.fpu == two.fpu);
            }
        }
        assert!(made > 3600, "{made}");
    }
}
