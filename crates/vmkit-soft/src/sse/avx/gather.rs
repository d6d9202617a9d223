//! Masked moves and gathers, element by element, and VEX-encoded moves of MXCSR.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::code::{ColdChoice, ColdFn, Ends};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Vector};
use crate::exec::operand::segment_number;
use crate::mem::canonical;

/// Chooses the code of an instruction of this module.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    use Mnemonic as M;
    let run: ColdFn = match (insn.mnemonic(), insn.op0_kind()) {
        (M::Vmaskmovps | M::Vpmaskmovd, OpKind::Register) => masked_load::<4>,
        (M::Vmaskmovpd | M::Vpmaskmovq, OpKind::Register) => masked_load::<8>,
        (M::Vmaskmovps | M::Vpmaskmovd, OpKind::Memory) => masked_store::<4>,
        (M::Vmaskmovpd | M::Vpmaskmovq, OpKind::Memory) => masked_store::<8>,
        (M::Vpgatherdd | M::Vgatherdps, _) => gather::<4, 4>,
        (M::Vpgatherdq | M::Vgatherdpd, _) => gather::<4, 8>,
        (M::Vpgatherqd | M::Vgatherqps, _) => gather::<8, 4>,
        (M::Vpgatherqq | M::Vgatherqpd, _) => gather::<8, 8>,
        _ => match insn.code() {
            Code::VEX_Vldmxcsr_m32 => ldmxcsr,
            Code::VEX_Vstmxcsr_m32 => stmxcsr,
            _ => return None,
        },
    };
    Some((run, Ends::No))
}

fn number(register: Register) -> usize {
    register.number() & 15
}

impl Vector {
    /// Element `i`, `bytes` (4 or 8) wide, zero-extended.
    fn element(&self, bytes: usize, i: usize) -> u64 {
        if bytes == 8 { self.0[i & 3] } else { self.0[i >> 1 & 3] >> (32 * (i & 1)) & 0xFFFF_FFFF }
    }

    fn set_element(&mut self, bytes: usize, i: usize, value: u64) {
        if bytes == 8 {
            self.0[i & 3] = value;
        } else {
            let (word, shift) = (&mut self.0[i >> 1 & 3], 32 * (i & 1));
            *word = *word & !(0xFFFF_FFFF << shift) | (value & 0xFFFF_FFFF) << shift;
        }
    }

    /// The top bit of element `i`.
    fn chosen(&self, bytes: usize, i: usize) -> bool {
        self.element(bytes, i) >> (8 * bytes - 1) & 1 != 0
    }
}

// Neither masked moves nor gathers are subject to alignment checks (Intel SDM vol. 2, VMASKMOVPS), so
// their elements move as bytes.

fn masked_load<const BYTES: usize>(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let mask = cpu.vectors[number(insn.op1_register())];
    let mut result = Vector::default();
    for i in 0..insn.op0_register().size() / BYTES {
        if mask.chosen(BYTES, i) {
            let linear = element_address::<BYTES>(cpu, insn, i, false)?;
            result.set_element(BYTES, i, load_element::<BYTES>(cpu, linear)?);
        }
    }
    cpu.vectors[number(insn.op0_register())] = result;
    Ok(())
}

fn masked_store<const BYTES: usize>(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let mask = cpu.vectors[number(insn.op1_register())];
    let value = cpu.vectors[number(insn.op2_register())];
    let count = insn.op2_register().size() / BYTES;
    let mut places = [None; 8];
    for (i, place) in places.iter_mut().enumerate().take(count) {
        if mask.chosen(BYTES, i) {
            let linear = element_address::<BYTES>(cpu, insn, i, true)?;
            let last = cpu.wrap_linear(linear.wrapping_add(BYTES as u64 - 1));
            if !canonical(last) {
                // An element that leaves canonical space faults for that before anything else.
                cpu.probe_store(last, 1)?;
            }
            cpu.probe_store(linear, 1)?;
            if (linear ^ last) & !0xFFF != 0 {
                cpu.probe_store(last & !0xFFF, 1)?;
            }
            *place = Some(linear);
        }
    }
    for (i, place) in places.into_iter().enumerate() {
        if let Some(linear) = place {
            let bytes = value.element(BYTES, i).to_le_bytes();
            cpu.store_bytes(linear, &bytes[..BYTES], cpu.tlb_mode)?;
        }
    }
    Ok(())
}

fn load_element<const BYTES: usize>(cpu: &mut Cpu, linear: u64) -> Result<u64, Trap> {
    let mut bytes = [0; 8];
    cpu.load_bytes(linear, &mut bytes[..BYTES], cpu.tlb_mode)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The linear address of element `i` of the memory operand.
fn element_address<const BYTES: usize>(
    cpu: &mut Cpu,
    insn: &Instruction,
    i: usize,
    write: bool,
) -> Result<u64, Trap> {
    let offset = cpu.offset_of(insn).wrapping_add((i * BYTES) as u64);
    let offset = if cpu.long64() { offset } else { offset & 0xFFFF_FFFF };
    cpu.linear(segment_number(insn.memory_segment()), offset, BYTES as u64, write)
}

/// Gathers `BYTES`-wide elements at `INDEX`-wide indices. An element that is done has its mask cleared,
/// so that the instruction can go on after a fault (Intel SDM vol. 2, VGATHERDPS).
fn gather<const INDEX: usize, const BYTES: usize>(
    cpu: &mut Cpu,
    insn: &Instruction,
) -> Result<(), Trap> {
    let (dst, index, mask) = (insn.op0_register(), insn.memory_index(), insn.op2_register());
    if number(dst) == number(index) || number(dst) == number(mask) || number(index) == number(mask)
    {
        return Err(cpu.ud());
    }
    let indices = cpu.vectors[number(index)];
    let count = (index.size() / INDEX).min(dst.size() / BYTES);
    for i in 0..count {
        if !cpu.vectors[number(mask)].chosen(BYTES, i) {
            cpu.vectors[number(mask)].set_element(BYTES, i, 0);
            continue;
        }
        let linear = gathered_address::<INDEX, BYTES>(cpu, insn, indices.element(INDEX, i))?;
        let value = load_element::<BYTES>(cpu, linear)?;
        cpu.vectors[number(dst)].set_element(BYTES, i, value);
        cpu.vectors[number(mask)].set_element(BYTES, i, 0);
    }
    cpu.vectors[number(mask)] = Vector::default();
    let bytes = count * BYTES;
    for (i, word) in cpu.vectors[number(dst)].0.iter_mut().enumerate() {
        if i * 8 >= bytes {
            *word = 0;
        }
    }
    Ok(())
}

fn gathered_address<const INDEX: usize, const BYTES: usize>(
    cpu: &mut Cpu,
    insn: &Instruction,
    index: u64,
) -> Result<u64, Trap> {
    let index = if INDEX == 4 { i64::from(index as i32) as u64 } else { index };
    let base = insn.memory_base();
    // Without a base register, the displacement tells the address size.
    let short = base == Register::None && insn.memory_displ_size() == 4;
    let narrow = !cpu.long64() || base.size() == 4 || short;
    let start = if base == Register::None { 0 } else { cpu.gpr(base) };
    let offset = start
        .wrapping_add(insn.memory_displacement64())
        .wrapping_add(index.wrapping_mul(u64::from(insn.memory_index_scale())));
    let offset = if narrow { offset & 0xFFFF_FFFF } else { offset };
    cpu.linear(segment_number(insn.memory_segment()), offset, BYTES as u64, false)
}

fn ldmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.read_operand(insn, 0)?;
    cpu.set_mxcsr(value as u32)
}

fn stmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.current_mxcsr();
    cpu.write_operand(insn, 0, u64::from(value))
}
