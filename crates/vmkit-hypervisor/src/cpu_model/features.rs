//! The features CPUID can list, and sets of them.

use serde::{Deserialize, Serialize};

/// A register of a CPUID answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

macro_rules! features {
    ($($(#[doc = $doc:literal])* $name:ident = $leaf:literal, $subleaf:literal, $register:ident, $bit:literal;)*) => {
        /// A feature that CPUID can list.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Feature {
            $($(#[doc = $doc])* $name,)*
        }

        impl Feature {
            /// All features this crate knows.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Where CPUID lists it: leaf, subleaf, register, bit.
            pub fn place(self) -> (u32, u32, CpuidRegister, u8) {
                match self {
                    $(Self::$name => ($leaf, $subleaf, CpuidRegister::$register, $bit),)*
                }
            }
        }
    };
}

features! {
    /// x87 unit.
    Fpu = 1, 0, Edx, 0;
    /// Debugging extensions.
    De = 1, 0, Edx, 2;
    /// 4 MiB pages.
    Pse = 1, 0, Edx, 3;
    /// RDTSC.
    Tsc = 1, 0, Edx, 4;
    /// RDMSR and WRMSR.
    Msr = 1, 0, Edx, 5;
    /// Physical-address extension.
    Pae = 1, 0, Edx, 6;
    /// CMPXCHG8B.
    Cx8 = 1, 0, Edx, 8;
    /// Local APIC.
    Apic = 1, 0, Edx, 9;
    /// SYSENTER and SYSEXIT.
    Sep = 1, 0, Edx, 11;
    /// Memory-type range registers.
    Mtrr = 1, 0, Edx, 12;
    /// Global pages.
    Pge = 1, 0, Edx, 13;
    /// Machine-check architecture.
    Mca = 1, 0, Edx, 14;
    /// Machine-check exception.
    Mce = 1, 0, Edx, 7;
    /// Conditional moves.
    Cmov = 1, 0, Edx, 15;
    /// Page-attribute table.
    Pat = 1, 0, Edx, 16;
    /// 36-bit 4 MiB pages.
    Pse36 = 1, 0, Edx, 17;
    /// CLFLUSH.
    Clflush = 1, 0, Edx, 19;
    /// MMX.
    Mmx = 1, 0, Edx, 23;
    /// FXSAVE and FXRSTOR.
    Fxsr = 1, 0, Edx, 24;
    /// SSE.
    Sse = 1, 0, Edx, 25;
    /// SSE2.
    Sse2 = 1, 0, Edx, 26;
    /// Running under a hypervisor.
    Hypervisor = 1, 0, Ecx, 31;
    /// SYSCALL and SYSRET.
    Syscall = 0x80000001, 0, Edx, 11;
    /// No-execute pages.
    Nx = 0x80000001, 0, Edx, 20;
    /// 64-bit mode.
    LongMode = 0x80000001, 0, Edx, 29;
    /// A TSC that never changes its rate or stops.
    ConstantTsc = 0x80000007, 0, Edx, 8;
    /// An APIC timer that never stops.
    Arat = 6, 0, Eax, 2;
    /// SSE3.
    Sse3 = 1, 0, Ecx, 0;
    /// SSSE3.
    Ssse3 = 1, 0, Ecx, 9;
    /// CMPXCHG16B.
    Cx16 = 1, 0, Ecx, 13;
    /// SSE4.1.
    Sse4_1 = 1, 0, Ecx, 19;
    /// SSE4.2.
    Sse4_2 = 1, 0, Ecx, 20;
    /// X2APIC.
    X2apic = 1, 0, Ecx, 21;
    /// POPCNT.
    Popcnt = 1, 0, Ecx, 23;
    /// TSC-deadline APIC timer.
    TscDeadline = 1, 0, Ecx, 24;
    /// LAHF and SAHF in 64-bit mode.
    LahfLm = 0x80000001, 0, Ecx, 0;
    /// 1 GiB pages.
    Gbpages = 0x80000001, 0, Edx, 26;
    /// RDTSCP and TSC_AUX.
    Rdtscp = 0x80000001, 0, Edx, 27;
    /// The TSC_ADJUST MSR.
    TscAdjust = 7, 0, Ebx, 1;
    /// PREFETCHW.
    Prefetchw = 0x80000001, 0, Ecx, 8;
    /// Fast REP MOVSB and STOSB.
    Erms = 7, 0, Ebx, 9;
    /// Supervisor-mode execution prevention.
    Smep = 7, 0, Ebx, 7;
    /// Supervisor-mode access prevention.
    Smap = 7, 0, Ebx, 20;
    /// RDFSBASE and kin.
    Fsgsbase = 7, 0, Ebx, 0;
    /// FMA3.
    Fma = 1, 0, Ecx, 12;
    /// MOVBE.
    Movbe = 1, 0, Ecx, 22;
    /// XSAVE and XCR0.
    Xsave = 1, 0, Ecx, 26;
    /// AVX.
    Avx = 1, 0, Ecx, 28;
    /// Half-precision conversion.
    F16c = 1, 0, Ecx, 29;
    /// BMI1.
    Bmi1 = 7, 0, Ebx, 3;
    /// AVX2.
    Avx2 = 7, 0, Ebx, 5;
    /// BMI2.
    Bmi2 = 7, 0, Ebx, 8;
    /// LZCNT.
    Lzcnt = 0x80000001, 0, Ecx, 5;
    /// Virtual-8086 mode enhancements.
    Vme = 1, 0, Edx, 1;
    /// PCLMULQDQ.
    Pclmulqdq = 1, 0, Ecx, 1;
    /// MONITOR and MWAIT.
    Monitor = 1, 0, Ecx, 3;
    /// Process-context identifiers.
    Pcid = 1, 0, Ecx, 17;
    /// AES-NI.
    Aes = 1, 0, Ecx, 25;
    /// RDRAND.
    Rdrand = 1, 0, Ecx, 30;
    /// ADCX and ADOX.
    Adx = 7, 0, Ebx, 19;
    /// RDSEED.
    Rdseed = 7, 0, Ebx, 18;
    /// INVPCID.
    Invpcid = 7, 0, Ebx, 10;
    /// CLFLUSHOPT.
    Clflushopt = 7, 0, Ebx, 23;
    /// CLWB.
    Clwb = 7, 0, Ebx, 24;
    /// SHA extensions.
    Sha = 7, 0, Ebx, 29;
    /// User-mode instruction prevention.
    Umip = 7, 0, Ecx, 2;
    /// RDPID.
    Rdpid = 7, 0, Ecx, 22;
    /// Fast short REP MOVSB.
    Fsrm = 7, 0, Edx, 4;
    /// IBRS and IBPB (SPEC_CTRL and PRED_CMD MSRs).
    SpecCtrl = 7, 0, Edx, 26;
    /// The ARCH_CAPABILITIES MSR.
    ArchCapabilities = 7, 0, Edx, 29;
    /// XSAVEOPT.
    Xsaveopt = 0xd, 1, Eax, 0;
    /// XSAVEC and compacted XRSTOR.
    Xsavec = 0xd, 1, Eax, 1;
    /// XGETBV with ECX 1.
    Xgetbv1 = 0xd, 1, Eax, 2;
    /// XSAVES and XRSTORS.
    Xsaves = 0xd, 1, Eax, 3;
    /// Galois-field instructions.
    Gfni = 7, 0, Ecx, 8;
    /// VAES.
    Vaes = 7, 0, Ecx, 9;
    /// VPCLMULQDQ.
    Vpclmulqdq = 7, 0, Ecx, 10;
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{self:?}").to_ascii_lowercase())
    }
}

/// A set of features.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureSet(u128);

impl std::fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl FeatureSet {
    /// No feature.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Exactly `features`.
    pub fn of(features: &[Feature]) -> Self {
        features.iter().fold(Self::empty(), |set, &f| set.with(f))
    }

    /// This set and `feature`.
    #[must_use]
    pub const fn with(self, feature: Feature) -> Self {
        Self(self.0 | 1 << feature as u8)
    }

    /// This set without `feature`.
    #[must_use]
    pub const fn without(self, feature: Feature) -> Self {
        Self(self.0 & !(1 << feature as u8))
    }

    /// True if `feature` is in it.
    pub const fn contains(&self, feature: Feature) -> bool {
        self.0 >> feature as u8 & 1 != 0
    }

    /// What is in both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The features, in this crate's order.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        Feature::ALL.iter().copied().filter(|f| self.contains(*f))
    }

    /// The bits that the set's features make of one register of a CPUID answer.
    pub fn word(&self, leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
        self.iter().map(Feature::place).fold(0, |word, (l, s, r, bit)| {
            if (l, s, r) == (leaf, subleaf, register) { word | 1 << bit } else { word }
        })
    }

    /// The features that the words `answer` gives for (leaf, subleaf) list.
    pub fn from_cpuid(answer: impl Fn(u32, u32) -> super::CpuidResult) -> Self {
        Feature::ALL.iter().fold(Self::empty(), |set, &feature| {
            let (leaf, subleaf, register, bit) = feature.place();
            let r = answer(leaf, subleaf);
            let word = match register {
                CpuidRegister::Eax => r.eax,
                CpuidRegister::Ebx => r.ebx,
                CpuidRegister::Ecx => r.ecx,
                CpuidRegister::Edx => r.edx,
            };
            if word >> bit & 1 != 0 { set.with(feature) } else { set }
        })
    }

    /// Of every level: without [`Feature::ConstantTsc`], which KVM offers only if its host has it, and
    /// hosts that are guests themselves seldom do.
    pub(super) fn v1() -> Self {
        use Feature::*;
        Self::of(&[
            Fpu, De, Pse, Tsc, Msr, Pae, Cx8, Apic, Sep, Mtrr, Pge, Mca, Mce, Cmov, Pat, Pse36,
            Clflush, Mmx, Fxsr, Sse, Sse2, Hypervisor, Syscall, Nx, LongMode, Arat,
        ])
    }

    pub(super) fn v2() -> Self {
        use Feature::*;
        Self::of(&[
            Sse3,
            Ssse3,
            Cx16,
            Sse4_1,
            Sse4_2,
            X2apic,
            Popcnt,
            TscDeadline,
            LahfLm,
            Gbpages,
            Rdtscp,
            TscAdjust,
            Prefetchw,
            Smep,
            Smap,
            Fsgsbase,
        ])
        .union(Self::v1())
    }

    pub(super) fn v3() -> Self {
        use Feature::*;
        Self::of(&[Fma, Movbe, Xsave, Avx, F16c, Bmi1, Avx2, Bmi2, Lzcnt]).union(Self::v2())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_its_own_bit() {
        let places: Vec<_> = Feature::ALL
            .iter()
            .map(|f| {
                let (l, s, r, b) = f.place();
                (l, s, r as u8, b)
            })
            .collect();
        for (i, place) in places.iter().enumerate() {
            assert!(!places[..i].contains(place), "{:?}", Feature::ALL[i]);
        }
        assert!(Feature::ALL.len() <= 128);
    }

    /// As the manuals of the first of each line list them, and KVM what it emulates.
    #[test]
    fn the_named_models_run_on_nested_hosts_and_on_zen() {
        use Feature::*;
        let all = FeatureSet::v3();
        assert!(all.contains(Avx2) && all.contains(Smap));
        for absent in [ConstantTsc, Erms, Fsrm, Invpcid, Pcid, Rdseed, Adx] {
            assert!(!all.contains(absent), "{absent}");
        }
    }

    #[test]
    fn a_set_survives_cpuid() {
        let set = FeatureSet::v3();
        let back = FeatureSet::from_cpuid(|leaf, subleaf| super::super::CpuidResult {
            eax: set.word(leaf, subleaf, CpuidRegister::Eax),
            ebx: set.word(leaf, subleaf, CpuidRegister::Ebx),
            ecx: set.word(leaf, subleaf, CpuidRegister::Ecx),
            edx: set.word(leaf, subleaf, CpuidRegister::Edx),
        });
        assert_eq!(back, set);
    }
}
