//! What the threads of one machine agree on: run, pause, or end, and why.
//!
//! This module knows nothing of processors beyond how to kick them, and calls no device.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmkit_hypervisor::Kick;

use crate::error::RunFailure;
use crate::{End, VmError};

/// How a run came out.
pub(crate) type Outcome = Result<End, RunFailure>;

/// How often a vCPU that only an NMI or INIT could wake looks for one.
const DEAD_POLL: Duration = Duration::from_millis(5);

/// What a vCPU's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    Run,
    Leave,
}

/// What is done once the machine is ending.
type AtEnd = Box<dyn Fn() + Send + Sync>;

/// The meeting point of a machine's threads.
#[derive(Default)]
pub(crate) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    kicks: OnceLock<Vec<Kick>>,
    at_end: OnceLock<AtEnd>,
}

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    /// Pauses in force.
    pauses: u32,
    /// vCPU threads that have not left.
    live: usize,
    /// Of these, the ones that wait at the gate.
    parked: usize,
    /// Which vCPUs have said that they can never run again, and have executed nothing since.
    dead: Vec<bool>,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how the vCPUs are kicked. Once.
    pub(crate) fn set_kicks(&self, kicks: Vec<Kick>) {
        self.lock().dead = vec![false; kicks.len()];
        let _ = self.kicks.set(kicks);
    }

    /// Says what to do once the machine is ending, from whichever thread says so. Once.
    pub(crate) fn at_end(&self, act: impl Fn() + Send + Sync + 'static) {
        let _ = self.at_end.set(Box::new(act));
    }

    /// Makes every vCPU come out of its run and look here.
    pub(crate) fn kick_all(&self) {
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kick();
        }
    }

    /// Ends the machine. The first word counts.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let mut state = self.lock();
        if state.outcome.is_some() {
            return;
        }
        state.outcome = Some(outcome);
        drop(state);
        self.changed.notify_all();
        self.kick_all();
        if let Some(act) = self.at_end.get() {
            act();
        }
    }

    /// A vCPU thread is about to be started.
    pub(crate) fn enter(&self) {
        self.lock().live += 1;
    }

    /// A vCPU thread leaves, or could not be started.
    pub(crate) fn leave(&self) {
        self.lock().live -= 1;
        self.changed.notify_all();
    }

    /// Where a vCPU thread passes between two runs: it waits here while the machine is paused. The
    /// thread must not hold its vCPU.
    pub(crate) fn gate(&self) -> Gate {
        let mut state = self.lock();
        if state.pauses > 0 && state.outcome.is_none() {
            // Said once: who is woken while the pause lasts has nothing new to tell, and would wake
            // the others, who would wake it.
            state.parked += 1;
            self.changed.notify_all();
            while state.pauses > 0 && state.outcome.is_none() {
                state = self.wait(state);
            }
            state.parked -= 1;
        }
        if state.outcome.is_some() { Gate::Leave } else { Gate::Run }
    }

    /// Begins a pause and waits until no vCPU runs.
    pub(crate) fn pause(&self) {
        let mut state = self.lock();
        state.pauses += 1;
        drop(state);
        self.kick_all();
        // A vCPU that waits in `dead` must see the pause too.
        self.changed.notify_all();
        state = self.lock();
        while state.parked != state.live {
            state = self.wait(state);
        }
    }

    /// Ends a pause.
    pub(crate) fn resume(&self) {
        let mut state = self.lock();
        state.pauses = state.pauses.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// vCPU `index` can never run again by itself: it halted with interrupts off. `executed` says
    /// whether it executed anything since it last said so. Ends the machine if all vCPUs are of
    /// that kind; otherwise waits a little, so that the caller may look for an NMI.
    ///
    /// Any vCPU that executed something may have woken another one, so its word makes all others
    /// speak again. Only a round in which nobody executed anything counts.
    pub(crate) fn dead(&self, index: usize, executed: bool) {
        let mut state = self.lock();
        if state.outcome.is_some() || state.pauses > 0 {
            return;
        }
        if executed {
            state.dead.fill(false);
        }
        if let Some(vote) = state.dead.get_mut(index) {
            *vote = true;
        }
        if state.dead.iter().all(|&dead| dead) {
            drop(state);
            self.finish(Ok(End::Halted));
            return;
        }
        if executed {
            drop(state);
            self.kick_all();
            state = self.lock();
            if state.outcome.is_some() || state.pauses > 0 {
                return;
            }
        }
        drop(self.changed.wait_timeout(state, DEAD_POLL));
    }

    /// True while some vCPU says that it is dead, so that one that waits for a start-up IPI should
    /// say so.
    pub(crate) fn counts_the_dead(&self) -> bool {
        self.lock().dead.contains(&true)
    }

    /// Makes every vCPU come out of the guest once per `period` until the machine ends, so
    /// that dead ones are seen.
    pub(crate) fn kick_every(&self, period: Duration) {
        let mut state = self.lock();
        while state.outcome.is_none() {
            let (next, waited) = self
                .changed
                .wait_timeout_while(state, period, |state| state.outcome.is_none())
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.pauses == 0 {
                drop(state);
                self.kick_all();
                state = self.lock();
            }
        }
    }

    /// vCPU `index` waits for a start-up IPI. Like [`dead`](Self::dead), but does not wait.
    pub(crate) fn never_started(&self, index: usize) {
        let mut state = self.lock();
        if let Some(vote) = state.dead.get_mut(index) {
            *vote = true;
        }
        if state.outcome.is_none() && state.pauses == 0 && state.dead.iter().all(|&dead| dead) {
            drop(state);
            self.finish(Ok(End::Halted));
        }
    }

    /// How it ended, if it has.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// Waits until the machine has ended and every vCPU thread has left, or until `deadline`.
    pub(crate) fn wait_end(&self, deadline: Option<Instant>) -> Option<Result<End, VmError>> {
        let mut state = self.lock();
        loop {
            if state.live == 0
                && let Some(outcome) = &state.outcome
            {
                return Some(outcome.clone().map_err(VmError::from));
            }
            state = match deadline {
                None => self.wait(state),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn control(vcpus: usize) -> Control {
        let control = Control::default();
        control.lock().dead = vec![false; vcpus];
        control
    }

    #[test]
    fn the_first_word_counts() {
        let control = control(1);
        control.finish(Ok(End::Reset));
        control.finish(Ok(End::Stopped));
        assert!(matches!(control.wait_end(None), Some(Ok(End::Reset))));
    }

    #[test]
    fn a_pause_waits_for_all_threads_and_they_wait_for_its_end() {
        let control = Arc::new(control(2));
        let rounds = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                control.enter();
                let (control, rounds) = (control.clone(), rounds.clone());
                std::thread::spawn(move || {
                    while control.gate() == Gate::Run {
                        rounds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    }
                    control.leave();
                })
            })
            .collect();
        for _ in 0..3 {
            control.pause();
            let at = rounds.load(std::sync::atomic::Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(3));
            assert_eq!(rounds.load(std::sync::atomic::Ordering::SeqCst), at);
            control.resume();
        }
        control.finish(Ok(End::Stopped));
        assert!(matches!(control.wait_end(None), Some(Ok(End::Stopped))));
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn threads_that_wait_for_the_end_of_a_pause_leave_each_other_alone() {
        let control = Arc::new(control(2));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                control.enter();
                let control = control.clone();
                std::thread::spawn(move || {
                    while control.gate() == Gate::Run {}
                    control.leave();
                })
            })
            .collect();
        control.pause();
        // Something else has changed, which concerns neither.
        control.changed.notify_all();
        let (rounds, mut disturbed) = (20, 0);
        for _ in 0..rounds {
            let state = control.lock();
            let waited = control.changed.wait_timeout(state, Duration::from_millis(5)).unwrap().1;
            disturbed += u32::from(!waited.timed_out());
        }
        control.resume();
        control.finish(Ok(End::Stopped));
        threads.into_iter().for_each(|t| t.join().unwrap());
        // A wait may end for no reason, but not half of them.
        assert!(disturbed < rounds / 2, "{disturbed} wakes in {rounds} waits");
    }

    #[test]
    fn one_dead_vcpu_of_two_does_not_end_the_machine() {
        let control = control(2);
        control.dead(0, true);
        control.dead(0, false);
        assert!(control.outcome().is_none());
        // The second one lived until now and may have woken the first.
        control.dead(1, true);
        assert!(control.outcome().is_none());
        control.dead(0, false);
        assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
    }

    #[test]
    fn a_vcpu_that_never_started_cannot_help() {
        let control = control(2);
        assert!(!control.counts_the_dead());
        control.dead(0, true);
        assert!(control.counts_the_dead());
        control.never_started(1);
        assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
    }

    #[test]
    fn waiting_has_a_limit() {
        let control = control(1);
        assert!(control.wait_end(Some(Instant::now() + Duration::from_millis(2))).is_none());
    }
}
