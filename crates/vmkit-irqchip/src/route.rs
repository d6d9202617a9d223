//! Which local APICs a message reaches: pure functions over a word per local APIC.
//!
//! A partition keeps one [`ApicAddress`] per vCPU (it fits an `AtomicU64`, see
//! [`ApicAddress::to_bits`]) so that a sender finds its targets without touching their local APICs.

use crate::message::{ApicMessage, BROADCAST, DeliveryMode, Ipi, Shorthand};

const LDR_SHIFT: u32 = 32;
const MODEL_SHIFT: u32 = 40;
const MODE_SHIFT: u32 = 44;
const SOFTWARE_DISABLED: u64 = 1 << 46;

/// Whether and how a local APIC is on: IA32_APIC_BASE bits 11 and 10.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApicMode {
    /// Off, as if there were none.
    Disabled,
    /// On, with memory-mapped registers.
    Xapic,
    /// On, with registers in MSRs and 32-bit IDs.
    X2apic,
}

/// Everything that decides whether a message is for a local APIC, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApicAddress(u64);

impl ApicAddress {
    /// The address of a local APIC with this ID that software has enabled. `ldr` and `dfr` are the
    /// registers' values; they matter in xAPIC mode only.
    #[must_use]
    pub fn new(mode: ApicMode, id: u32, ldr: u32, dfr: u32) -> Self {
        let mode: u64 = match mode {
            ApicMode::Disabled => 0,
            ApicMode::Xapic => 1,
            ApicMode::X2apic => 2,
        };
        Self(
            u64::from(id)
                | u64::from(ldr >> 24) << LDR_SHIFT
                | u64::from(dfr >> 28) << MODEL_SHIFT
                | mode << MODE_SHIFT,
        )
    }

    /// The same, with the software enable bit of the spurious vector register as it is here.
    #[must_use]
    pub fn with_software_enable(self, enabled: bool) -> Self {
        Self(if enabled { self.0 & !SOFTWARE_DISABLED } else { self.0 | SOFTWARE_DISABLED })
    }

    /// The word, to be kept in an atomic.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The address whose [`to_bits`](Self::to_bits) this is. Any other word is some address.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The (32-bit) APIC ID.
    #[must_use]
    pub fn id(self) -> u32 {
        self.0 as u32
    }

    /// Whether the local APIC is on, and how.
    #[must_use]
    pub fn mode(self) -> ApicMode {
        match self.0 >> MODE_SHIFT & 3 {
            1 => ApicMode::Xapic,
            2 => ApicMode::X2apic,
            _ => ApicMode::Disabled,
        }
    }

    /// Whether the local APIC takes messages of this mode: one that software has disabled responds
    /// to INIT, NMI, SMI and SIPI only (Intel SDM vol. 3A §11.4.7.2).
    #[must_use]
    pub fn takes(self, mode: DeliveryMode) -> bool {
        let enabled = self.0 & SOFTWARE_DISABLED == 0;
        self.mode() != ApicMode::Disabled
            && (enabled || !mode.is_vectored() && mode != DeliveryMode::ExtInt)
    }

    /// Whether a message to `dest` is for this local APIC (Intel SDM vol. 3A §11.6.2,
    /// §11.12.10). A disabled one matches nothing.
    #[must_use]
    pub fn matches(self, dest: u32, logical: bool) -> bool {
        let id = self.id();
        match (self.mode(), logical) {
            (ApicMode::Disabled, _) => false,
            _ if dest == BROADCAST => true,
            // An ID beyond eight bits still answers to its full value, so that such a processor
            // can be woken before it switches to x2APIC mode.
            (_, false) => dest == id,
            (ApicMode::X2apic, true) => {
                id >> 4 == dest >> 16 && 1 << (id & 0xf) & dest & 0xffff != 0
            }
            (ApicMode::Xapic, true) => {
                let ldr = (self.0 >> LDR_SHIFT) as u32 & 0xff;
                match self.0 >> MODEL_SHIFT & 0xf {
                    _ if dest > 0xff => false,
                    0xf => ldr & dest != 0,
                    0x0 if dest >> 4 == 0xf => ldr & dest & 0xf != 0,
                    0x0 => ldr >> 4 == dest >> 4 && ldr & dest & 0xf != 0,
                    _ => false,
                }
            }
        }
    }
}

/// Calls `deliver` with the index of each local APIC that `message` is for and that
/// [takes](ApicAddress::takes) it, and returns how many that were. A lowest-priority message goes to one: the lowest by `priority` (the processor
/// priority is the natural measure), and among equals one picked by the vector, so that a fixed
/// priority function still spreads the interrupts.
pub fn route<A>(
    message: &ApicMessage,
    apics: A,
    priority: impl Fn(usize) -> u8,
    deliver: impl FnMut(usize),
) -> usize
where
    A: IntoIterator<Item = ApicAddress>,
    A::IntoIter: Clone,
{
    let targets = apics
        .into_iter()
        .enumerate()
        .filter(|(_, a)| a.takes(message.mode) && a.matches(message.dest, message.logical))
        .map(|(index, _)| index);
    spread(message, targets, priority, deliver)
}

/// [`route`] for an interprocessor interrupt sent by the local APIC with index `sender`.
pub fn route_ipi<A>(
    ipi: &Ipi,
    sender: usize,
    apics: A,
    priority: impl Fn(usize) -> u8,
    deliver: impl FnMut(usize),
) -> usize
where
    A: IntoIterator<Item = ApicAddress>,
    A::IntoIter: Clone,
{
    if ipi.shorthand == Shorthand::None {
        return route(&ipi.message, apics, priority, deliver);
    }
    let with_self = ipi.shorthand == Shorthand::All;
    let targets = apics
        .into_iter()
        .enumerate()
        .filter(|(index, a)| a.takes(ipi.message.mode) && (with_self || *index != sender))
        .map(|(index, _)| index);
    spread(&ipi.message, targets, priority, deliver)
}

/// Delivers to all targets, or to the one that arbitration chooses.
fn spread(
    message: &ApicMessage,
    targets: impl Iterator<Item = usize> + Clone,
    priority: impl Fn(usize) -> u8,
    mut deliver: impl FnMut(usize),
) -> usize {
    if message.mode != DeliveryMode::LowestPriority {
        return targets.map(deliver).count();
    }
    let Some(lowest) = targets.clone().map(&priority).min() else {
        return 0;
    };
    let mut equals = targets.clone().filter(|&index| priority(index) == lowest);
    let count = equals.clone().count().max(1);
    // Priorities can change under us, and then nothing equals the lowest any more: any target is
    // as good as another, but one it must be.
    let chosen = equals.nth(usize::from(message.vector) % count);
    chosen.or_else(|| targets.clone().next()).map(&mut deliver).iter().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAT: u32 = u32::MAX;
    const CLUSTER: u32 = 0x0fff_ffff;

    fn xapic(id: u32, ldr: u32, dfr: u32) -> ApicAddress {
        ApicAddress::new(ApicMode::Xapic, id, ldr << 24, dfr)
    }

    fn x2apic(id: u32) -> ApicAddress {
        ApicAddress::new(ApicMode::X2apic, id, 0, 0)
    }

    #[test]
    fn flat_and_cluster_models_match_by_their_own_rules() {
        assert!(xapic(0, 0x04, FLAT).matches(0x06, true));
        assert!(!xapic(0, 0x04, FLAT).matches(0x0b, true));
        assert!(xapic(0, 0x24, CLUSTER).matches(0x26, true));
        assert!(!xapic(0, 0x24, CLUSTER).matches(0x36, true));
        assert!(!xapic(0, 0x24, CLUSTER).matches(0x2b, true));
        assert!(xapic(0, 0x24, CLUSTER).matches(0xf4, true));
        assert!(!xapic(0, 0x04, 0x5fff_ffff).matches(0x04, true));
        assert!(!xapic(0, 0x04, FLAT).matches(0x0001_0004, true));
    }

    #[test]
    fn x2apic_logical_ids_derive_from_the_apic_id() {
        assert!(x2apic(0x25).matches(0x0002_0020, true));
        assert!(!x2apic(0x25).matches(0x0002_0010, true));
        assert!(!x2apic(0x25).matches(0x0003_0020, true));
        assert!(x2apic(0x1_0025).matches(0x1_0025, false));
    }

    #[test]
    fn broadcast_reaches_all_but_the_disabled() {
        assert!(x2apic(3).matches(BROADCAST, false));
        assert!(xapic(3, 0, CLUSTER).matches(BROADCAST, true));
        assert!(!ApicAddress::new(ApicMode::Disabled, 3, 0, FLAT).matches(BROADCAST, false));
    }

    #[test]
    fn an_address_survives_its_bits() {
        let a = xapic(0x8000_0001, 0x81, CLUSTER);
        assert_eq!(ApicAddress::from_bits(a.to_bits()), a);
        assert_eq!((a.id(), a.mode()), (0x8000_0001, ApicMode::Xapic));
    }

    fn message(mode: DeliveryMode, vector: u8) -> ApicMessage {
        ApicMessage { dest: 0x0e, logical: true, mode, vector, level: false }
    }

    #[test]
    fn lowest_priority_goes_to_one_of_the_lowest() {
        let apics: [_; 4] = std::array::from_fn(|i| xapic(i as u32, 1 << i, FLAT));
        let mut hits = Vec::new();
        let msg = message(DeliveryMode::LowestPriority, 0x40);
        assert_eq!(route(&msg, apics, |i| [0, 0x50, 0x20, 0x30][i], |i| hits.push(i)), 1);
        assert_eq!(hits, [2]);
        let mut seen = [0; 4];
        for vector in 0x40..0x80 {
            let msg = message(DeliveryMode::LowestPriority, vector);
            route(&msg, apics, |_| 0, |i| seen[i] += 1);
        }
        assert_eq!(seen[0], 0);
        assert!(seen[1..].iter().all(|&n| n > 16));
        assert_eq!(route(&message(DeliveryMode::Fixed, 0x40), apics, |_| 0, |_| ()), 3);
    }

    #[test]
    fn a_local_apic_that_software_disabled_takes_no_vector() {
        let apics = [xapic(0, 1, FLAT), xapic(1, 0, FLAT).with_software_enable(false)];
        let to_all = |mode, vector| ApicMessage { dest: BROADCAST, ..message(mode, vector) };
        for vector in 0x40..0x80 {
            let msg = to_all(DeliveryMode::LowestPriority, vector);
            assert_eq!(route(&msg, apics, |_| 0, |i| assert_eq!(i, 0, "{vector:#x}")), 1);
        }
        for (mode, takers) in [
            (DeliveryMode::Fixed, 1),
            (DeliveryMode::ExtInt, 1),
            (DeliveryMode::Nmi, 2),
            (DeliveryMode::Smi, 2),
            (DeliveryMode::Init, 2),
            (DeliveryMode::Sipi, 2),
        ] {
            let msg = to_all(mode, 0x40);
            assert_eq!(route(&msg, apics, |_| 0, |_| ()), takers, "{mode:?}");
            let ipi = Ipi { shorthand: Shorthand::All, message: msg };
            assert_eq!(route_ipi(&ipi, 0, apics, |_| 0, |_| ()), takers, "{mode:?}");
        }
        assert!(apics[1].with_software_enable(true).takes(DeliveryMode::Fixed));
    }

    #[test]
    fn an_address_follows_the_software_enable_bit() {
        use crate::lapic::{LapicAction, LapicConfig, LocalApic};
        let mut apic = LocalApic::new(LapicConfig::new(1));
        for (svr, takes) in [(0x1ff_u32, true), (0xff, false), (0x1ff, true)] {
            assert_eq!(apic.address().takes(DeliveryMode::Fixed), !takes);
            assert_eq!(apic.write_mmio(0xf0, &svr.to_le_bytes(), 0), LapicAction::None);
            assert_eq!(apic.address().takes(DeliveryMode::Fixed), takes);
            assert!(apic.address().takes(DeliveryMode::Sipi));
        }
        apic.init();
        assert!(!apic.address().takes(DeliveryMode::Fixed));
    }

    #[test]
    fn a_message_is_not_lost_when_priorities_change_meanwhile() {
        let apics: [_; 4] = std::array::from_fn(|i| xapic(i as u32, 1 << i, FLAT));
        let calls = std::cell::Cell::new(0_u8);
        let changing = |_| {
            calls.set(calls.get() + 1);
            calls.get()
        };
        let msg = message(DeliveryMode::LowestPriority, 0x41);
        assert_eq!(route(&msg, apics, changing, |i| assert!((1..4).contains(&i))), 1);
    }

    #[test]
    fn shorthands_ignore_the_destination() {
        let apics = [x2apic(0), x2apic(1), ApicAddress::from_bits(2), x2apic(3)];
        let message = message(DeliveryMode::Fixed, 0x40);
        let mut hits = Vec::new();
        let ipi = Ipi { shorthand: Shorthand::AllButSelf, message };
        route_ipi(&ipi, 1, apics, |_| 0, |i| hits.push(i));
        assert_eq!(hits, [0, 3]);
        hits.clear();
        route_ipi(&Ipi { shorthand: Shorthand::All, message }, 1, apics, |_| 0, |i| hits.push(i));
        assert_eq!(hits, [0, 1, 3]);
        let message = ApicMessage { mode: DeliveryMode::LowestPriority, ..message };
        hits.clear();
        let ipi = Ipi { shorthand: Shorthand::AllButSelf, message };
        route_ipi(&ipi, 1, apics, |i| if i == 0 { 0x20 } else { 0x10 }, |i| hits.push(i));
        assert_eq!(hits, [3]);
    }
}
