//! Which backends exist, which of them work on this host, and which one a machine gets.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vmkit_hypervisor::{Hypervisor, HypervisorError};
use vmkit_kvm::{KvmHypervisor, ProbeFailure};
use vmkit_soft::SoftHypervisor;

/// Which backend runs a machine.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Backend {
    /// KVM if it can run 64-bit kernels here ([`preflight`] tells), else the software processor. The
    /// choice and its reason go to the `log` crate, as a warning if the reason may pass (too few
    /// descriptors, a host too busy to probe): then the next machine asks again.
    #[default]
    Auto,
    /// KVM, even where it runs simple guests only.
    Kvm,
    /// The software processor.
    Software,
    /// A backend of the embedder's own.
    Custom(Arc<dyn Hypervisor>),
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("Auto"),
            Self::Kvm => f.write_str("Kvm"),
            Self::Software => f.write_str("Software"),
            Self::Custom(hypervisor) => write!(f, "Custom({})", hypervisor.capabilities().name),
        }
    }
}

/// A backend's name in a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendKind {
    /// KVM.
    Kvm,
    /// The software processor.
    Software,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Software => "software",
        })
    }
}

impl From<BackendKind> for Backend {
    fn from(kind: BackendKind) -> Self {
        match kind {
            BackendKind::Kvm => Self::Kvm,
            BackendKind::Software => Self::Software,
        }
    }
}

/// How far a backend works on this host.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Readiness {
    /// It runs everything, stock kernels too.
    Usable,
    /// It runs small guests, and fails on what a stock kernel needs.
    SimpleGuests {
        /// What fails.
        reason: Arc<ProbeFailure>,
    },
    /// It does not work.
    Unusable {
        /// Why not.
        reason: Arc<ProbeFailure>,
    },
}

/// What [`preflight`] found out about one backend.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackendReport {
    /// The backend.
    pub backend: BackendKind,
    /// How far it works here.
    pub readiness: Readiness,
}

impl BackendReport {
    /// True if the backend runs everything here.
    pub fn is_usable(&self) -> bool {
        matches!(self.readiness, Readiness::Usable)
    }
}

impl fmt::Display for BackendReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.readiness {
            Readiness::Usable => write!(f, "{}: usable", self.backend),
            Readiness::SimpleGuests { reason } => {
                write!(f, "{}: simple guests only: {reason}", self.backend)
            }
            Readiness::Unusable { reason } => write!(f, "{}: unusable: {reason}", self.backend),
        }
    }
}

/// Looks at every backend, the preferred one first, by running a small guest on it.
///
/// ```
/// let reports = vmkit::preflight();
/// for report in &reports {
///     println!("{report}");
/// }
/// assert!(reports.iter().any(|report| report.is_usable()));
/// ```
pub fn preflight() -> Vec<BackendReport> {
    vec![
        BackendReport { backend: BackendKind::Kvm, readiness: kvm_readiness() },
        BackendReport { backend: BackendKind::Software, readiness: Readiness::Usable },
    ]
}

fn kvm_readiness() -> Readiness {
    match vmkit_kvm::probe() {
        Ok(()) => Readiness::Usable,
        Err(failure) => {
            let reason = Arc::new(failure);
            match vmkit_kvm::can_run_simple_guests() {
                Ok(()) => Readiness::SimpleGuests { reason },
                Err(_) => Readiness::Unusable { reason },
            }
        }
    }
}

impl Backend {
    /// The backend itself.
    pub(crate) fn hypervisor(&self) -> Result<Arc<dyn Hypervisor>, HypervisorError> {
        match self {
            Self::Auto => Self::from(preferred()).hypervisor(),
            Self::Kvm => Ok(Arc::new(KvmHypervisor::open()?)),
            Self::Software => Ok(Arc::new(SoftHypervisor::new())),
            Self::Custom(hypervisor) => Ok(hypervisor.clone()),
        }
    }
}

/// What [`Backend::Auto`] means here.
fn preferred() -> BackendKind {
    static KNOWN: OnceLock<BackendKind> = OnceLock::new();
    preferred_by(&KNOWN, vmkit_kvm::probe)
}

/// What a probe says of the host's KVM is true for the life of the process, because a host does not
/// change its processor: it is kept in `known`. What merely kept the probe from finding out may have
/// passed when the next machine is built, and is asked again.
fn preferred_by(
    known: &OnceLock<BackendKind>,
    probe: impl FnOnce() -> Result<(), ProbeFailure>,
) -> BackendKind {
    if let Some(known) = known.get() {
        return *known;
    }
    match probe() {
        Ok(()) => {
            log::info!("machines run on KVM");
            *known.get_or_init(|| BackendKind::Kvm)
        }
        Err(reason) if reason.is_lasting() => {
            log::info!("machines run on the software processor, because KVM is no help: {reason}");
            *known.get_or_init(|| BackendKind::Software)
        }
        Err(reason) if reason.is_absence() => {
            log::info!("a machine runs on the software processor: {reason}");
            BackendKind::Software
        }
        Err(reason) => {
            log::warn!(
                "a machine runs on the software processor, as KVM cannot be had now: {reason}"
            );
            BackendKind::Software
        }
    }
}

#[cfg(test)]
mod tests {
    use vmkit_kvm::ProbeStep;

    use super::*;

    #[test]
    fn what_may_pass_is_asked_again_and_what_kvm_says_is_kept() {
        let hung = || Err(ProbeFailure::Hung(ProbeStep::Start));
        let busy = || {
            let source = std::io::ErrorKind::Interrupted.into();
            Err(ProbeFailure::Unavailable(HypervisorError::Host { what: "create a VM", source }))
        };
        let wrong = || Err(ProbeFailure::Wrong(ProbeStep::Breakpoint));
        let known = OnceLock::new();
        assert_eq!(preferred_by(&known, hung), BackendKind::Software);
        assert_eq!(preferred_by(&known, busy), BackendKind::Software);
        assert_eq!(preferred_by(&known, || Ok(())), BackendKind::Kvm);
        assert_eq!(preferred_by(&known, wrong), BackendKind::Kvm);
        let known = OnceLock::new();
        assert_eq!(preferred_by(&known, wrong), BackendKind::Software);
        assert_eq!(preferred_by(&known, || Ok(())), BackendKind::Software);
    }
}
