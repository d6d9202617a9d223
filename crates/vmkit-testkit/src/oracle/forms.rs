//! The encodings there are: iced-x86's opcode tables, filtered by what a case can hold and by CPUID
//! features.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeInfo};
use vmkit_hypervisor::{Feature, FeatureSet};

/// One encoding.
#[derive(Clone, Copy)]
pub struct Form {
    /// iced's name for it.
    pub code: Code,
    /// How it is encoded.
    pub info: &'static OpCodeInfo,
}

/// Every 64-bit encoding whose CPUID features are all in `features` and that the oracle can judge.
/// Most privileged ones are among them: in ring 3 they must fault.
pub fn forms(features: &FeatureSet) -> Vec<Form> {
    Code::values()
        .filter(|&code| encodable(code.op_code()) && judged(code) && listed(code, features))
        .map(|code| Form { code, info: code.op_code() })
        .collect()
}

/// Every encoding that needs a feature this crate's models know and `features` lack, and that is then
/// no instruction at all. (Without their features LZCNT and TZCNT are BSR and BSF, and PREFETCHW is a
/// NOP.)
pub fn unlisted(features: &FeatureSet) -> Vec<Form> {
    let known =
        |code: Code| code.cpuid_features().iter().all(|&f| !matches!(needs(f), Need::Unknown));
    Code::values()
        .filter(|&code| encodable(code.op_code()) && judged(code) && known(code))
        .filter(|&code| !listed(code, features))
        .filter(|code| {
            !matches!(code.mnemonic(), Mnemonic::Lzcnt | Mnemonic::Tzcnt | Mnemonic::Prefetchw)
        })
        .map(|code| Form { code, info: code.op_code() })
        .collect()
}

/// True if `code` is a form this module can build and 64-bit mode has.
fn encodable(info: &OpCodeInfo) -> bool {
    info.is_instruction()
        && info.mode64()
        // These are two instructions: WAIT and another one.
        && !info.fwait()
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && info.decoder_option() == 0
        // AMD alone has 16-bit near branches and a UD0 without ModRM in 64-bit mode.
        && info.intel_decoder64()
}

/// True if `features` list all that `code` needs.
pub fn listed(code: Code, features: &FeatureSet) -> bool {
    code.cpuid_features().iter().all(|&f| match needs(f) {
        Need::Nothing => true,
        Need::Feature(feature) => features.contains(feature),
        Need::Unknown => false,
    })
}

/// What an iced CPUID feature asks of ours.
enum Need {
    /// Every 64-bit processor has it.
    Nothing,
    Feature(Feature),
    /// No vmkit model can list it.
    Unknown,
}

fn needs(feature: CpuidFeature) -> Need {
    use CpuidFeature as C;
    Need::Feature(match feature {
        C::INTEL8086 | C::INTEL186 | C::INTEL286 | C::INTEL386 | C::INTEL486 => {
            return Need::Nothing;
        }
        C::X64 | C::MULTIBYTENOP | C::PAUSE | C::SMM => return Need::Nothing,
        C::FPU | C::FPU287 | C::FPU387 => Feature::Fpu,
        C::ADX => Feature::Adx,
        C::AES => Feature::Aes,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::CLFSH => Feature::Clflush,
        C::CLFLUSHOPT => Feature::Clflushopt,
        C::CLWB => Feature::Clwb,
        C::CMOV => Feature::Cmov,
        C::CMPXCHG16B => Feature::Cx16,
        C::CX8 => Feature::Cx8,
        C::F16C => Feature::F16c,
        C::FMA => Feature::Fma,
        C::FSGSBASE => Feature::Fsgsbase,
        C::FXSR => Feature::Fxsr,
        C::GFNI => Feature::Gfni,
        C::INVPCID => Feature::Invpcid,
        C::LZCNT => Feature::Lzcnt,
        C::MMX => Feature::Mmx,
        C::MOVBE => Feature::Movbe,
        C::MSR => Feature::Msr,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::POPCNT => Feature::Popcnt,
        C::PREFETCHW => Feature::Prefetchw,
        C::SHA => Feature::Sha,
        C::SMAP => Feature::Smap,
        C::SSE => Feature::Sse,
        C::SSE2 => Feature::Sse2,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse4_1,
        C::SSE4_2 => Feature::Sse4_2,
        C::VAES => Feature::Vaes,
        C::VPCLMULQDQ => Feature::Vpclmulqdq,
        C::XSAVE => Feature::Xsave,
        C::XSAVEC => Feature::Xsavec,
        C::XSAVEOPT => Feature::Xsaveopt,
        C::XSAVES => Feature::Xsaves,
        _ => return Need::Unknown,
    })
}

/// False for instructions whose result the host does not determine alone, or that would leave the
/// harness.
pub fn judged(code: Code) -> bool {
    !matches!(
        code.mnemonic(),
        // Not an instruction, or never this one in 64-bit mode.
        Mnemonic::INVALID
            // Differ from run to run or from machine to machine by design.
            | Mnemonic::Cpuid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpmc
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Rdpid
            | Mnemonic::Xgetbv
            // Show the host kernel's tables, or its emulation of them (UMIP).
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Smsw
            // What is saved depends on what was used since the last XRSTOR at the same address,
            // which a context switch changes (Intel SDM vol. 1 §13.9).
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            // Hypervisors intercept it and do not agree where RIP points then.
            | Mnemonic::Int1
            // Reach the host kernel, or a hypervisor underneath it.
            | Mnemonic::Syscall
            | Mnemonic::Sysenter
            | Mnemonic::Vmcall
            | Mnemonic::Vmmcall
    )
}

#[cfg(test)]
mod tests {
    use vmkit_hypervisor::CpuModel;

    use super::*;

    #[test]
    fn the_baseline_has_the_instructions_it_should() {
        let forms = forms(&CpuModel::x86_64_v1().features);
        let has = |mnemonic| forms.iter().any(|f| f.code.mnemonic() == mnemonic);
        for mnemonic in [Mnemonic::Add, Mnemonic::Fyl2x, Mnemonic::Addps, Mnemonic::Cvttpd2dq] {
            assert!(has(mnemonic), "{mnemonic:?}");
        }
        assert!(has(Mnemonic::Hlt) && has(Mnemonic::Movsb) && has(Mnemonic::Fxsave64));
        for mnemonic in [Mnemonic::Pshufb, Mnemonic::Andn, Mnemonic::Vaddps, Mnemonic::Cpuid] {
            assert!(!has(mnemonic), "{mnemonic:?}");
        }
        assert!(forms.len() > 900, "{}", forms.len());
    }

    #[test]
    fn a_richer_model_adds_forms() {
        let count = |model: CpuModel| forms(&model.features).len();
        assert!(count(CpuModel::x86_64_v2()) > count(CpuModel::x86_64_v1()) + 80);
        assert!(count(CpuModel::x86_64_v3()) > count(CpuModel::x86_64_v2()) + 400);
    }
}
