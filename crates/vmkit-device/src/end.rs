//! How a guest ends its own machine.

use std::sync::{Arc, OnceLock};

/// What the guest did to end the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEnd {
    /// It powered the machine off (ACPI S5 or a power-off port).
    PowerOff,
    /// It asked for a reset (i8042, ACPI reset register, port 0xCF9).
    Reset,
    /// It left with this exit code through the debug-exit port.
    ExitCode(u32),
    /// Its kernel panicked and said so (pvpanic).
    Panicked,
}

type Hook = Box<dyn Fn(GuestEnd) + Send + Sync>;

/// The wire on which a device says that the guest ended the machine. The first word counts.
#[derive(Clone, Default)]
pub struct EndSignal {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    end: OnceLock<GuestEnd>,
    hook: OnceLock<Hook>,
}

impl std::fmt::Debug for EndSignal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndSignal").field("end", &self.inner.end.get()).finish_non_exhaustive()
    }
}

impl EndSignal {
    /// A signal nobody has raised, that calls `hook` once when somebody does.
    pub fn with_hook(hook: impl Fn(GuestEnd) + Send + Sync + 'static) -> Self {
        let signal = Self::default();
        let _ = signal.inner.hook.set(Box::new(hook));
        signal
    }

    /// Says that the guest ended the machine. A device that does so inside an access also answers
    /// that access with [`IoFlow::Stop`](crate::IoFlow::Stop).
    pub fn raise(&self, end: GuestEnd) {
        if self.inner.end.set(end).is_ok()
            && let Some(hook) = self.inner.hook.get()
        {
            hook(end);
        }
    }

    /// What was raised first, if anything.
    pub fn raised(&self) -> Option<GuestEnd> {
        self.inner.end.get().copied()
    }
}
