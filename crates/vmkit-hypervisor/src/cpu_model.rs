//! CPU models: what CPUID says, in one place for both backends.
//!
//! A model is a vendor, a version and a set of features. What it lists is what a backend implements,
//! exactly; everything CPUID answers is computed from it here (Intel SDM vol. 2A, CPUID; AMD APM
//! vol. 3 appendix E).

use serde::{Deserialize, Serialize};

mod features;

pub use features::{CpuidRegister, Feature, FeatureSet};

/// Whose processor the guest believes to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Vendor {
    /// `GenuineIntel`.
    #[default]
    Intel,
    /// `AuthenticAMD`.
    Amd,
}

impl Vendor {
    fn id(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
        }
    }
}

/// What CPUID answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// One leaf of a CPUID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on the way in.
    pub leaf: u32,
    /// ECX on the way in, for leaves that look at it.
    pub subleaf: Option<u32>,
    /// The answer.
    pub result: CpuidResult,
}

/// What CPUID depends on beside the model.
#[derive(Clone, Copy, Debug)]
pub struct CpuidContext {
    /// The processor's APIC ID.
    pub apic_id: u32,
    /// Processors in the machine.
    pub vcpus: u32,
    /// TSC frequency in kHz; 0 if it is not to be told.
    pub tsc_khz: u32,
    /// Frequency of the local APIC's timer input in Hz; 0 if it is not to be told.
    pub apic_hz: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
}

impl Default for CpuidContext {
    fn default() -> Self {
        Self { apic_id: 0, vcpus: 1, tsc_khz: 0, apic_hz: 0, osxsave: false, xcr0: 1 }
    }
}

/// A CPU model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CpuModel {
    /// The model's name: `"x86-64-v2"`.
    pub name: String,
    /// Vendor.
    pub vendor: Vendor,
    /// Display family.
    pub family: u32,
    /// Display model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Brand string, at most 47 bytes.
    pub brand: String,
    /// Features.
    pub features: FeatureSet,
    /// Guest-physical address width in bits, 36 to 52.
    pub physical_bits: u8,
}

impl CpuModel {
    fn named(name: &str, features: FeatureSet) -> Self {
        Self {
            name: name.into(),
            vendor: Vendor::Intel,
            family: 6,
            model: 0x8F,
            stepping: 8,
            brand: "vmkit virtual processor".into(),
            features,
            physical_bits: 46,
        }
    }

    /// The x86-64 baseline of the psABI: SSE2, CMOV, CMPXCHG8B, SYSCALL, NX; and an APIC timer that
    /// never stops, which KVM has on every host.
    ///
    /// No named model lists [`Feature::ConstantTsc`]: it depends on the host, and is not offered where
    /// KVM is itself in a virtual machine, unless somebody asked for it. A fleet all of which has it may
    /// add it:
    ///
    /// ```
    /// use vmkit_hypervisor::{CpuModel, Feature};
    ///
    /// let mut model = CpuModel::x86_64_v2();
    /// model.features = model.features.with(Feature::ConstantTsc);
    /// ```
    pub fn x86_64_v1() -> Self {
        Self::named("x86-64-v1", FeatureSet::v1())
    }

    /// The psABI's x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B, LAHF in 64-bit mode; and what kernels use
    /// beside: SMEP, SMAP, FSGSBASE, PREFETCHW, RDTSCP, 1 GiB pages, and x2APIC, TSC deadline and
    /// TSC_ADJUST, which KVM has on every host. So the oldest hosts are Intel's Broadwell and AMD's Zen.
    pub fn x86_64_v2() -> Self {
        Self::named("x86-64-v2", FeatureSet::v2())
    }

    /// The psABI's x86-64-v3: AVX2, BMI1 and BMI2, FMA, F16C, LZCNT, MOVBE, XSAVE; and all of
    /// [`x86_64_v2`](Self::x86_64_v2). Its oldest hosts are the same.
    pub fn x86_64_v3() -> Self {
        Self::named("x86-64-v3", FeatureSet::v3())
    }

    /// A model with exactly `features`, and with the vendor, family and model of an Intel processor, as
    /// all named models have.
    pub fn with_features(name: &str, features: FeatureSet) -> Self {
        Self::named(name, features)
    }

    /// True if the model lists `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(feature)
    }

    /// What of this model `available` lacks.
    pub fn missing(&self, available: &FeatureSet) -> Vec<Feature> {
        self.features.iter().filter(|f| !available.contains(*f)).collect()
    }

    /// The XCR0 bits this model allows: x87, SSE, AVX.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            1
        } else if self.has(Feature::Avx) {
            7
        } else {
            3
        }
    }

    /// Bytes of the XSAVE area in the standard format with all of [`xcr0_mask`](Self::xcr0_mask)
    /// enabled.
    pub fn xsave_bytes(&self) -> u32 {
        xsave_size(self.xcr0_mask())
    }

    /// Highest basic leaf.
    const MAX_BASIC: u32 = 0x16;
    /// Highest extended leaf.
    const MAX_EXTENDED: u32 = 0x8000_0008;

    /// What CPUID answers for `leaf` and `subleaf`. A basic leaf past the highest answers as the
    /// highest (Intel SDM vol. 2A, CPUID), others as zero.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> CpuidResult {
        let leaf = match leaf {
            0..=Self::MAX_BASIC | 0x4000_0000..=0x4FFF_FFFF => leaf,
            0x8000_0000..=0x8000_0008 => leaf,
            _ => Self::MAX_BASIC,
        };
        // Only these leaves look at ECX.
        let subleaf = if matches!(leaf, 4 | 7 | 0xB | 0xD) { subleaf } else { 0 };
        let mut r = CpuidResult {
            eax: self.features.word(leaf, subleaf, CpuidRegister::Eax),
            ebx: self.features.word(leaf, subleaf, CpuidRegister::Ebx),
            ecx: self.features.word(leaf, subleaf, CpuidRegister::Ecx),
            edx: self.features.word(leaf, subleaf, CpuidRegister::Edx),
        };
        match leaf {
            0 => {
                let id = self.vendor.id();
                (r.eax, r.ebx, r.edx, r.ecx) =
                    (Self::MAX_BASIC, word(id, 0), word(id, 4), word(id, 8));
            }
            1 => self.version(&mut r, context),
            2 => (r.eax, r.ebx, r.ecx, r.edx) = (0x00FF_FF01, 0, 0, 0),
            4 => r = self.caches(subleaf, context),
            0xB => r = topology(subleaf, context),
            0xD => self.xsave(subleaf, context, &mut r),
            0x15 => {
                if let Some((denominator, numerator)) = tsc_ratio(context) {
                    (r.eax, r.ebx, r.ecx) = (denominator, numerator, context.apic_hz);
                }
            }
            0x16 if context.tsc_khz != 0 => {
                let mhz = context.tsc_khz.div_ceil(1000);
                (r.eax, r.ebx, r.ecx) = (mhz, mhz, 100);
            }
            0x8000_0000 => r.eax = Self::MAX_EXTENDED,
            0x8000_0002..=0x8000_0004 => r = self.brand(leaf - 0x8000_0002),
            0x8000_0006 => r.ecx = 1024 << 16 | 8 << 12 | 64,
            0x8000_0008 => {
                r.eax = u32::from(self.physical_bits) | 48 << 8;
            }
            _ => {}
        }
        r
    }

    fn version(&self, r: &mut CpuidResult, context: &CpuidContext) {
        let (family, extended) =
            if self.family > 15 { (15, self.family - 15) } else { (self.family, 0) };
        r.eax = (extended & 0xFF) << 20
            | (self.model >> 4 & 0xF) << 16
            | family << 8
            | (self.model & 0xF) << 4
            | (self.stepping & 0xF);
        let logical = context.vcpus.next_power_of_two().min(255);
        r.ebx = context.apic_id << 24 | logical << 16 | 8 << 8;
        if self.has(Feature::Xsave) && context.osxsave {
            r.ecx |= 1 << 27;
        }
        if context.vcpus > 1 {
            r.edx |= 1 << 28;
        }
    }

    fn caches(&self, subleaf: u32, context: &CpuidContext) -> CpuidResult {
        // Type, level, bytes, ways, processors sharing it.
        let cores = context.vcpus.next_power_of_two().min(64);
        let (kind, level, bytes, ways, shared) = match subleaf {
            0 => (1, 1, 32 << 10, 8, 1),
            1 => (2, 1, 32 << 10, 8, 1),
            2 => (3, 2, 1 << 20, 8, 1),
            3 => (3, 3, 16 << 20, 16, cores),
            _ => return CpuidResult::default(),
        };
        CpuidResult {
            eax: kind | level << 5 | 1 << 8 | (shared - 1) << 14 | (cores - 1) << 26,
            ebx: 63 | (ways - 1) << 22,
            ecx: bytes / (64 * ways) - 1,
            edx: 0,
        }
    }

    fn xsave(&self, subleaf: u32, context: &CpuidContext, r: &mut CpuidResult) {
        if !self.has(Feature::Xsave) {
            return;
        }
        match subleaf {
            0 => {
                r.eax = self.xcr0_mask() as u32;
                r.ebx = xsave_size(context.xcr0);
                r.ecx = self.xsave_bytes();
            }
            1 if self.has(Feature::Xsavec) => r.ebx = xsave_size(context.xcr0),
            2 if self.has(Feature::Avx) => (r.eax, r.ebx) = (256, 576),
            _ => {}
        }
    }

    fn brand(&self, part: u32) -> CpuidResult {
        let mut text = [0_u8; 48];
        for (to, from) in text.iter_mut().take(47).zip(self.brand.bytes()) {
            *to = from;
        }
        let at = part as usize * 16;
        CpuidResult {
            eax: word(&text, at),
            ebx: word(&text, at + 4),
            ecx: word(&text, at + 8),
            edx: word(&text, at + 12),
        }
    }

    /// The whole table, for backends that hand it to the host.
    pub fn cpuid_table(&self, context: &CpuidContext) -> Vec<CpuidEntry> {
        let mut table = Vec::new();
        for leaf in (0..=Self::MAX_BASIC).chain(0x8000_0000..=Self::MAX_EXTENDED) {
            let subleaves = match leaf {
                4 => Some(4),
                7 => Some(0),
                0xB => Some(2),
                0xD => Some(2),
                _ => None,
            };
            for subleaf in 0..=subleaves.unwrap_or(0) {
                let result = self.cpuid(leaf, subleaf, context);
                table.push(CpuidEntry { leaf, subleaf: subleaves.map(|_| subleaf), result });
            }
        }
        table
    }
}

/// The ratio of TSC to crystal for leaf 15h, in lowest terms: none if it is not to be told, or so odd
/// that guests that compute in 32 bits (kHz times numerator, as Linux does) would get it wrong.
fn tsc_ratio(context: &CpuidContext) -> Option<(u32, u32)> {
    let crystal_khz = context.apic_hz / 1000;
    if crystal_khz == 0 || context.tsc_khz == 0 {
        return None;
    }
    let (mut a, mut b) = (context.tsc_khz, crystal_khz);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (denominator, numerator) = (crystal_khz / a, context.tsc_khz / a);
    crystal_khz.checked_mul(numerator).map(|_| (denominator, numerator))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.iter().skip(at).take(4).rev().fold(0, |acc, &b| acc << 8 | u32::from(b))
}

/// Bytes of the standard XSAVE area for the components in `xcr0`.
fn xsave_size(xcr0: u64) -> u32 {
    if xcr0 & 4 != 0 { 832 } else { 576 }
}

fn topology(subleaf: u32, context: &CpuidContext) -> CpuidResult {
    let cores = context.vcpus.max(1);
    let (shift, count, kind) = match subleaf {
        0 => (0, 1, 1),
        1 => (cores.next_power_of_two().trailing_zeros(), cores, 2),
        _ => (0, 0, 0),
    };
    CpuidResult { eax: shift, ebx: count, ecx: kind << 8 | subleaf & 0xFF, edx: context.apic_id }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> CpuidContext {
        CpuidContext { tsc_khz: 2_600_000, apic_hz: 1_000_000_000, ..CpuidContext::default() }
    }

    #[test]
    fn a_model_answers_for_what_it_lists_and_nothing_else() {
        let v1 = CpuModel::x86_64_v1();
        let leaf1 = v1.cpuid(1, 0, &context());
        assert_eq!(leaf1.edx >> 25 & 3, 3, "SSE and SSE2");
        assert_eq!(v1.cpuid(1, 0x1234, &context()), leaf1, "leaf 1 has no subleaves");
        assert_eq!(leaf1.ecx & 1 << 20, 0, "no SSE4.2 in v1");
        assert_ne!(CpuModel::x86_64_v2().cpuid(1, 0, &context()).ecx & 1 << 20, 0);
        assert_ne!(CpuModel::x86_64_v3().cpuid(7, 0, &context()).ebx & 1 << 5, 0, "AVX2");
        assert_eq!(CpuModel::x86_64_v3().cpuid(7, 1, &context()), CpuidResult::default());
    }

    #[test]
    fn the_tsc_frequency_can_be_computed_from_leaf_15() {
        let r = CpuModel::x86_64_v2().cpuid(0x15, 0, &context());
        let hz = u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax);
        assert_eq!(hz, 2_600_000_000);
    }

    #[test]
    fn a_ratio_that_overflows_the_guest_is_not_told() {
        let odd = CpuidContext { tsc_khz: 2_596_123, ..context() };
        assert_eq!(CpuModel::x86_64_v2().cpuid(0x15, 0, &odd), CpuidResult::default());
    }

    #[test]
    fn missing_features_are_named() {
        let missing = CpuModel::x86_64_v2().missing(&FeatureSet::v1());
        assert!(missing.contains(&Feature::Sse4_2));
        assert!(CpuModel::x86_64_v1().missing(&FeatureSet::v2()).is_empty());
    }

    #[test]
    fn the_vendor_reads_as_text() {
        let r = CpuModel::x86_64_v1().cpuid(0, 0, &context());
        let text: Vec<u8> = [r.ebx, r.edx, r.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(text, b"GenuineIntel");
    }
}
