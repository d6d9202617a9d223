//! A set of interrupt vectors: the IRR, ISR and TMR.

/// 256 bits, a vector each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VectorSet([u64; 4]);

impl VectorSet {
    pub(super) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    pub(super) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & 1 << (vector & 63) != 0
    }

    /// The highest vector, or 0 for none: vector 0 is never a member.
    pub(super) fn highest(&self) -> u8 {
        for (index, &word) in self.0.iter().enumerate().rev() {
            if word != 0 {
                return (index as u8) << 6 | word.ilog2() as u8;
            }
        }
        0
    }

    /// The 32-bit register `index`, 0 to 7, as the guest reads it.
    pub(super) fn register(&self, index: usize) -> u32 {
        (self.0[(index / 2) & 3] >> (index % 2 * 32)) as u32
    }

    /// Sets the 32-bit register `index`, 0 to 7.
    pub(super) fn set_register(&mut self, index: usize, value: u32) {
        let shift = index % 2 * 32;
        let word = &mut self.0[(index / 2) & 3];
        *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(ops in prop::collection::vec((any::<bool>(), 1..=255_u8), 0..64)) {
            let mut set = VectorSet::default();
            let mut model = BTreeSet::new();
            for (add, vector) in ops {
                if add {
                    set.insert(vector);
                    model.insert(vector);
                } else {
                    set.remove(vector);
                    model.remove(&vector);
                }
                prop_assert_eq!(set.highest(), model.last().copied().unwrap_or(0));
                prop_assert_eq!(set.contains(vector), model.contains(&vector));
            }
            let mut copy = VectorSet::default();
            for index in 0..8 {
                copy.set_register(index, set.register(index));
            }
            prop_assert_eq!(copy, set);
        }
    }
}
