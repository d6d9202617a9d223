//! Which backends exist, which of them work on this host, and which one a machine gets.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vmkit_hypervisor::{Hypervisor, HypervisorError};
use vmkit_kvm::KvmHypervisor;
use vmkit_soft::SoftHypervisor;

/// Which backend runs a machine.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Backend {
    /// KVM if it can run 64-bit kernels here ([`preflight`] tells), else the software processor. The
    /// choice and its reason go to the `log` crate.
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
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readiness {
    /// It runs everything, stock kernels too.
    Usable,
    /// It runs small guests, and fails on what a stock kernel needs.
    SimpleGuests {
        /// What fails.
        reason: String,
    },
    /// It does not work.
    Unusable {
        /// Why not.
        reason: String,
    },
}

/// What [`preflight`] found out about one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackendReport {
    /// The backend.
    pub backend: BackendKind,
    /// How far it works here.
    pub readiness: Readiness,
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
/// assert!(reports.iter().any(|r| r.readiness == vmkit::Readiness::Usable));
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
            let reason = failure.to_string();
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

/// What [`Backend::Auto`] means here: asked once per process, because a host does not change its
/// processor.
fn preferred() -> BackendKind {
    static PREFERRED: OnceLock<BackendKind> = OnceLock::new();
    *PREFERRED.get_or_init(|| match vmkit_kvm::probe() {
        Ok(()) => {
            log::info!("machines run on KVM");
            BackendKind::Kvm
        }
        Err(reason) => {
            log::info!("machines run on the software processor, because KVM is no help: {reason}");
            BackendKind::Software
        }
    })
}
