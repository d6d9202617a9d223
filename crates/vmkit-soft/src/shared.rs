//! What other threads may touch of a vCPU: its local APIC, its inbox, and the word that makes it look.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmkit_irqchip::LocalApic;

/// Something another thread asks of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Guest-physical lines of a page were written: drop the code decoded from them.
    Invalidate { page: u64, lines: u64 },
    /// A page now holds decoded code: make writes to it slow.
    CodePage { page: u64, from: u32 },
    /// Dirty bits were taken: forget what is cached for writing.
    FlushWrites,
    /// The memory map changed: take the new one and forget all translations.
    MapChanged,
}

/// The vCPU is outside guest code and sees its inbox before it goes back in.
const OUTSIDE: u8 = 0;
/// The vCPU runs guest code.
const INSIDE: u8 = 1;

/// An INIT has come.
const INIT: u32 = 0x200;
/// A start-up IPI has come, after INIT if there is one.
const SIPI: u32 = 0x100;

/// The shared part of a vCPU.
pub(crate) struct VcpuShared {
    /// The instruction count at which the run loop looks at kicks, interrupts, the inbox and the
    /// clock; 0 makes it look at its next block end.
    pub poll_at: AtomicU64,
    /// Somebody wants it to look.
    attention: AtomicBool,
    kicked: AtomicBool,
    place: AtomicU8,
    pub apic: Mutex<LocalApic>,
    inbox: Mutex<Vec<Message>>,
    sleep: Mutex<()>,
    wake: Condvar,
    pub nmi: AtomicBool,
    /// INIT and start-up IPI that have come, in one word because their order counts: `INIT`, `SIPI`, and the
    /// start-up IPI's vector.
    startup: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VcpuShared {
    pub fn new(apic: LocalApic) -> Self {
        Self {
            poll_at: AtomicU64::new(0),
            attention: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            place: AtomicU8::new(OUTSIDE),
            apic: Mutex::new(apic),
            inbox: Mutex::new(Vec::new()),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            nmi: AtomicBool::new(false),
            startup: AtomicU32::new(0),
        }
    }

    pub fn apic(&self) -> MutexGuard<'_, LocalApic> {
        lock(&self.apic)
    }

    /// Makes the vCPU look around: at its next block end, or at once if it sleeps.
    pub fn notify(&self) {
        self.ask();
        // Taking the lock orders this with a sleeper that has checked `attention` and not yet slept.
        drop(lock(&self.sleep));
        self.wake.notify_all();
    }

    /// As [`notify`](Self::notify), by the vCPU's own thread.
    pub fn ask(&self) {
        self.attention.store(true, Ordering::SeqCst);
        self.poll_at.store(0, Ordering::SeqCst);
    }

    /// The run loop begins to look, and will again at `poll_at`. What is asked after this is not
    /// lost: it sets both words again.
    pub fn begin_looking(&self, poll_at: u64) {
        self.poll_at.store(poll_at, Ordering::SeqCst);
        self.attention.store(false, Ordering::SeqCst);
    }

    /// Somebody asked since [`begin_looking`](Self::begin_looking).
    pub fn asked(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// An INIT comes. A start-up IPI from before it is void.
    pub fn post_init(&self) {
        self.startup.store(INIT, Ordering::SeqCst);
    }

    /// A start-up IPI comes. The first after an INIT counts.
    pub fn post_sipi(&self, vector: u8) {
        let post = |now| (now & SIPI == 0).then_some(now | SIPI | u32::from(vector));
        // If it is not the first, nothing is to be done.
        let _ = self.startup.fetch_update(Ordering::SeqCst, Ordering::SeqCst, post);
    }

    /// Takes INIT and start-up IPI, which came in this order.
    pub fn take_startup(&self) -> (bool, Option<u8>) {
        if self.startup.load(Ordering::SeqCst) == 0 {
            return (false, None);
        }
        let word = self.startup.swap(0, Ordering::SeqCst);
        (word & INIT != 0, (word & SIPI != 0).then_some(word as u8))
    }

    /// Sets the sticky kick.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.notify();
    }

    /// Takes the kick, if one came.
    pub fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Puts a message into the inbox.
    pub fn post(&self, message: Message) {
        {
            let mut inbox = lock(&self.inbox);
            // An inbox can only grow while its vCPU is outside guest code, so keep it bounded: past
            // this many, one message that drops everything says it all.
            if inbox.len() >= 4096 {
                inbox.clear();
                inbox.push(Message::MapChanged);
            }
            if !inbox.contains(&message) {
                inbox.push(message);
            }
        }
        self.notify();
    }

    /// Takes all messages.
    pub fn take_messages(&self) -> Vec<Message> {
        std::mem::take(&mut *lock(&self.inbox))
    }

    /// The vCPU enters guest code. It sees its inbox after this and before it executes.
    pub fn enter(&self) {
        self.place.store(INSIDE, Ordering::SeqCst);
    }

    /// The vCPU leaves guest code.
    pub fn leave(&self) {
        self.place.store(OUTSIDE, Ordering::SeqCst);
    }

    pub fn inside(&self) -> bool {
        self.place.load(Ordering::SeqCst) == INSIDE
    }

    /// True when the inbox is empty or the vCPU will empty it before it executes again.
    pub fn settled(&self) -> bool {
        !self.inside() || lock(&self.inbox).is_empty()
    }

    /// Sleeps until [`notify`](Self::notify) or for `limit`.
    pub fn sleep(&self, limit: Option<Duration>) {
        let guard = lock(&self.sleep);
        if self.asked() {
            return;
        }
        match limit {
            Some(limit) => drop(self.wake.wait_timeout(guard, limit)),
            None => drop(self.wake.wait(guard)),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmkit_irqchip::LapicConfig;

    use super::*;

    #[test]
    fn init_and_sipi_are_taken_in_their_order() {
        let shared = VcpuShared::new(LocalApic::new(LapicConfig::new(1)));
        shared.post_init();
        shared.post_sipi(8);
        shared.post_sipi(9);
        assert_eq!(shared.take_startup(), (true, Some(8)));
        assert_eq!(shared.take_startup(), (false, None));
        shared.post_sipi(8);
        shared.post_init();
        assert_eq!(shared.take_startup(), (true, None));
        shared.post_sipi(0);
        assert_eq!(shared.take_startup(), (false, Some(0)));
    }
}
