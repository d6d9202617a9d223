//! Ending a vCPU's run from another thread.
//!
//! A kick is sticky. It sets a flag, sets `immediate_exit` in the vCPU's `kvm_run` page, and, if a
//! thread is inside `run`, sends it one signal. Whatever the interleaving, one of the three is
//! seen: before the thread enters the kernel it is `immediate_exit`, which KVM reads after it has
//! completed a pending access; past that point the thread is in KVM and the signal ends the run.
//! The handler has no part in it, so any handler will do, also one of the host program.

#![allow(unsafe_code, reason = "signals and the shared kvm_run page have no safe wrapper")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libc::{c_int, pthread_t};
use vmkit_hypervisor::{HypervisorError, Kickable, Result};

/// The real-time signal that ends runs. It is sent to single threads while they are inside
/// [`Vcpu::run`](vmkit_hypervisor::Vcpu::run), and to nobody else.
///
/// When a vCPU is made and the signal still has its default action (which would end the process) or
/// is ignored, a handler that does nothing is installed. A handler that the host program installed,
/// before or after, stays and simply runs now and then. `run` unblocks the signal in its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KickSignal(c_int);

impl KickSignal {
    /// Number `n` after the first real-time signal: `SIGRTMIN + n`. `None` past `SIGRTMAX`.
    pub fn realtime(n: u8) -> Option<Self> {
        let number = libc::SIGRTMIN() + c_int::from(n);
        (number <= libc::SIGRTMAX()).then_some(Self(number))
    }

    /// The signal's number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// Makes sure that the signal's action is not to end the process.
    pub(crate) fn ensure_handler(self) -> Result<()> {
        extern "C" fn nothing(_: c_int) {}
        let failed = |source| HypervisorError::Host { what: "set up the kick signal", source };

        let mut current = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: `current` is a sigaction for the call to fill; no new action is passed.
        if unsafe { libc::sigaction(self.0, ptr::null(), current.as_mut_ptr()) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: zero-initialised, and filled by the successful call above; all bit patterns of its
        // integer fields are valid, and its optional function pointer is null or valid.
        let current = unsafe { current.assume_init() };
        if current.sa_sigaction != libc::SIG_DFL && current.sa_sigaction != libc::SIG_IGN {
            return Ok(());
        }
        // SAFETY: an all-zero sigaction is a valid value: default action, empty mask, no flags.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
        // KVM_RUN ends with EINTR all the same; other system calls of this thread need not.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is fully initialised, and its handler is async-signal-safe: it does
        // nothing.
        if unsafe { libc::sigaction(self.0, &action, ptr::null_mut()) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Lets the signal reach the calling thread. In every run: the embedder may have blocked it again
    /// since the last one, and no kick would reach the guest.
    fn unblock(self) -> Result<()> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set it is given, the two calls after it read it.
        let outcome = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut())
        };
        if outcome != 0 {
            return Err(HypervisorError::Host {
                what: "unblock the kick signal",
                source: io::Error::from_raw_os_error(outcome),
            });
        }
        Ok(())
    }
}

impl Default for KickSignal {
    /// `SIGRTMIN + 5`.
    fn default() -> Self {
        Self(libc::SIGRTMIN() + 5)
    }
}

/// What the kicks of one vCPU work on. Outlives the vCPU if a kick handle does.
pub(crate) struct KickTarget {
    pending: AtomicBool,
    /// Counts entries into the kernel's KVM_RUN and returns from it, if anybody is to know: odd while
    /// inside.
    passages: AtomicU64,
    /// A nudge came that the run loop has not noticed yet.
    nudged: AtomicBool,
    signal: KickSignal,
    running: Mutex<Running>,
}

struct Running {
    /// The byte in the vCPU's `kvm_run` page; `None` once the vCPU is gone.
    immediate_exit: Option<NonNull<AtomicU8>>,
    /// The thread inside `run`.
    thread: Option<pthread_t>,
}

// SAFETY: the pointer is to an atomic in a mapping that lives until `close` takes it away under the
// lock that all users hold; a pthread_t is a number.
unsafe impl Send for Running {}

impl KickTarget {
    /// # Safety
    /// `immediate_exit` is valid until [`close`](Self::close) is called.
    pub(crate) unsafe fn new(immediate_exit: NonNull<AtomicU8>, signal: KickSignal) -> Arc<Self> {
        Arc::new(Self {
            pending: AtomicBool::new(false),
            passages: AtomicU64::new(0),
            nudged: AtomicBool::new(false),
            signal,
            running: Mutex::new(Running { immediate_exit: Some(immediate_exit), thread: None }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the calling thread as the one that runs, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entered> {
        self.signal.unblock()?;
        // SAFETY: no preconditions.
        self.lock().thread = Some(unsafe { libc::pthread_self() });
        Ok(Entered(self.clone()))
    }

    /// True if a kick came that no run has reported yet; it is reported now.
    pub(crate) fn take(&self) -> bool {
        self.pending.swap(false, Ordering::SeqCst)
    }

    /// True if a kick came that no run has reported yet.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Has a run in progress look around, and go on. Nothing happens if there is none, or if it is
    /// the caller's: the run loop looks before it enters the guest.
    pub(crate) fn nudge(&self) {
        if self.nudged.swap(true, Ordering::SeqCst) {
            return;
        }
        let running = self.lock();
        // SAFETY: no preconditions.
        let caller = unsafe { libc::pthread_self() };
        match running.thread {
            Some(thread) if thread != caller => self.interrupt(&running),
            _ => self.nudged.store(false, Ordering::SeqCst),
        }
    }

    /// The signal that ends runs.
    pub(crate) fn signal(&self) -> KickSignal {
        self.signal
    }

    /// The run loop is about to look around.
    pub(crate) fn notice_nudges(&self) {
        self.nudged.store(false, Ordering::SeqCst);
    }

    /// The vCPU's thread is about to enter KVM_RUN, or has returned.
    pub(crate) fn pass(&self) {
        self.passages.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns when the vCPU has been outside KVM_RUN since the call.
    pub(crate) fn wait_outside(&self) {
        let before = self.passages.load(Ordering::SeqCst);
        if before.is_multiple_of(2) {
            return;
        }
        self.nudge();
        while self.passages.load(Ordering::SeqCst) == before {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Ends the KVM_RUN in progress, or the next.
    fn interrupt(&self, running: &Running) {
        let Some(immediate_exit) = running.immediate_exit else { return };
        // SAFETY: still `Some` and the caller holds the lock, so `close` has not been called.
        unsafe { immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
        if let Some(thread) = running.thread {
            // SAFETY: the thread is inside `run`, which cannot return before it takes the lock that
            // is held here; so it exists.
            let outcome = unsafe { libc::pthread_kill(thread, self.signal.0) };
            if outcome != 0 {
                log::error!("kick signal {} not sent: error {outcome}", self.signal.0);
            }
        }
    }

    /// The vCPU goes: later kicks do nothing.
    pub(crate) fn close(&self) {
        self.lock().immediate_exit = None;
    }
}

impl Kickable for KickTarget {
    fn kick(&self) {
        // Flag first: whoever clears `immediate_exit` looks at the flag afterwards.
        if self.pending.swap(true, Ordering::SeqCst) {
            // A kick that is not reported yet has done, or is doing, the rest. So kicks cannot pile
            // up in the queue of real-time signals.
            return;
        }
        self.interrupt(&self.lock());
    }
}

/// A run in progress.
pub(crate) struct Entered(Arc<KickTarget>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.lock().thread = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_after_the_vcpu_is_gone_does_nothing() {
        let byte = AtomicU8::new(0);
        // SAFETY: `byte` lives until after `close`.
        let target = unsafe { KickTarget::new(NonNull::from(&byte), KickSignal::default()) };
        target.kick();
        assert_eq!(byte.load(Ordering::SeqCst), 1);
        byte.store(0, Ordering::SeqCst);
        assert!(target.take());
        target.close();
        target.kick();
        assert_eq!(byte.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_handler_of_the_host_program_survives() {
        extern "C" fn hosts_own(_: c_int) {}
        let signal = KickSignal::realtime(20).unwrap();
        // SAFETY: an all-zero sigaction is valid, and the handler does nothing.
        let current = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = hosts_own as extern "C" fn(c_int) as usize;
            assert_eq!(libc::sigaction(signal.number(), &action, ptr::null_mut()), 0);
            signal.ensure_handler().unwrap();
            let mut current: libc::sigaction = MaybeUninit::zeroed().assume_init();
            assert_eq!(libc::sigaction(signal.number(), ptr::null(), &mut current), 0);
            current
        };
        assert_eq!(current.sa_sigaction, hosts_own as extern "C" fn(c_int) as usize);
    }

    #[test]
    fn signals_past_the_last_are_refused() {
        assert!(KickSignal::realtime(200).is_none());
        assert_eq!(KickSignal::realtime(5), Some(KickSignal::default()));
    }
}
