//! Memory-type range registers (Intel SDM vol. 3A §12.11): kept and checked, without effect, because
//! memory is coherent whatever its type.

/// Variable ranges.
const VARIABLE: usize = 8;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write-combining.
const CAP: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;
const MTRRCAP: u32 = 0xFE;
const FIRST_VARIABLE: u32 = 0x200;
const LAST_VARIABLE: u32 = FIRST_VARIABLE + 2 * VARIABLE as u32 - 1;
const DEF_TYPE: u32 = 0x2FF;

/// The registers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mtrrs {
    /// Base and mask of each variable range, alternating.
    variable: [u64; 2 * VARIABLE],
    /// The fixed ranges, ascending by MSR.
    fixed: [u64; 11],
    def_type: u64,
}

/// Where a fixed-range register is in [`Mtrrs::fixed`].
fn fixed_place(index: u32) -> Option<usize> {
    Some(match index {
        0x250 => 0,
        0x258 | 0x259 => index as usize - 0x257,
        0x268..=0x26F => index as usize - 0x265,
        _ => return None,
    })
}

fn type_valid(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4..=6)
}

impl Mtrrs {
    /// True if MSR `index` is one of these.
    pub fn knows(index: u32) -> bool {
        matches!(index, MTRRCAP | DEF_TYPE | FIRST_VARIABLE..=LAST_VARIABLE)
            || fixed_place(index).is_some()
    }

    /// Reads MSR `index`.
    pub fn read(&self, index: u32) -> Option<u64> {
        match index {
            MTRRCAP => Some(CAP),
            DEF_TYPE => Some(self.def_type),
            FIRST_VARIABLE..=LAST_VARIABLE => {
                self.variable.get((index - FIRST_VARIABLE) as usize).copied()
            }
            _ => self.fixed.get(fixed_place(index)?).copied(),
        }
    }

    /// Writes MSR `index`, if it can hold `value`.
    pub fn write(&mut self, index: u32, value: u64, physical_bits: u8) -> Option<()> {
        let address = ((1_u64 << physical_bits.clamp(32, 52)) - 1) & !0xFFF;
        match index {
            DEF_TYPE if value & !0xCFF == 0 && type_valid(value & 0xFF) => self.def_type = value,
            FIRST_VARIABLE..=LAST_VARIABLE => {
                let mask = index & 1 != 0;
                let low = if mask { 1 << 11 } else { 0xFF };
                let fine = value & !(address | low) == 0 && (mask || type_valid(value & 0xFF));
                *self.variable.get_mut((index - FIRST_VARIABLE) as usize).filter(|_| fine)? = value;
            }
            _ => {
                let fine = value.to_le_bytes().iter().all(|&kind| type_valid(kind.into()));
                *self.fixed.get_mut(fixed_place(index)?).filter(|_| fine)? = value;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_keeps_what_it_can_hold() {
        let mut mtrrs = Mtrrs::default();
        assert_eq!(mtrrs.write(0x200, 0x8000_0006, 46), Some(()));
        assert_eq!(mtrrs.write(0x201, 0x3FFF_8000_0800, 46), Some(()));
        assert_eq!(mtrrs.write(0x26F, 0x0505_0505_0505_0505, 46), Some(()));
        assert_eq!(mtrrs.read(0x200), Some(0x8000_0006));
        assert_eq!(mtrrs.read(0x26F), Some(0x0505_0505_0505_0505));
        assert_eq!(mtrrs.write(0x200, 2, 46), None, "a reserved type");
        assert_eq!(mtrrs.write(0x200, 1 << 46, 46), None, "past the address width");
        assert_eq!(mtrrs.write(DEF_TYPE, 0x1000, 46), None);
        assert_eq!(mtrrs.write(MTRRCAP, CAP, 46), None, "read-only");
    }
}
