//! What the threads of one machine agree on: run, pause, or end, and why.
//!
//! This module knows nothing of processors beyond how to kick them, and calls no device.

use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Counts how often all votes for dead became void. Changed under the lock.
    epoch: AtomicU64,
}

/// A moment before a vCPU was looked at, from which its vote for dead is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

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

/// What a vote for dead came to.
enum Vote {
    Void,
    Counted,
    /// Now all have voted.
    Last,
}

impl State {
    /// True while votes for dead count.
    fn may_halt(&self) -> bool {
        self.outcome.is_none() && self.pauses == 0
    }
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

    /// Begins a pause, has `release` let vCPUs go that wait inside an access, and waits until no vCPU
    /// runs.
    pub(crate) fn pause(&self, release: impl FnOnce()) {
        let mut state = self.lock();
        state.pauses += 1;
        drop(state);
        self.kick_all();
        // Not before: the end of an earlier pause would undo it and let the vCPUs run.
        release();
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
        // Whoever paused the machine may have changed it, and nobody voted meanwhile.
        self.void_votes(&mut state);
        drop(state);
        self.changed.notify_all();
    }

    /// To be read before a vCPU is run and looked at. Takes no lock.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Some vCPU executed something and may have woken others.
    fn void_votes(&self, state: &mut State) {
        state.dead.fill(false);
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes the vote of vCPU `index`. One from before the last execution says nothing: another vCPU
    /// may have woken this one after it had been looked at, and died.
    fn vote(&self, state: &mut State, index: usize, since: Epoch) -> Vote {
        if since != self.epoch() {
            return Vote::Void;
        }
        if let Some(vote) = state.dead.get_mut(index) {
            *vote = true;
        }
        if state.dead.iter().all(|&dead| dead) { Vote::Last } else { Vote::Counted }
    }

    /// Acts on a vote: it may have been the last one, or the vCPU has to be looked at again.
    fn act(&self, vote: Vote, index: usize) {
        match vote {
            Vote::Last => self.finish(Ok(End::Halted)),
            Vote::Counted => {}
            // Sticky: the next run ends at once.
            Vote::Void => {
                self.kicks.get().and_then(|k| k.get(index)).into_iter().for_each(Kick::kick);
            }
        }
    }

    /// vCPU `index` can never run again by itself: it was found halted with interrupts off, after
    /// `since`. `executed` says whether it executed anything since it last said so. Ends the machine
    /// if all vCPUs are of that kind; otherwise waits a little, so that the caller may look for an NMI.
    ///
    /// Any vCPU that executed something may have woken another one, so its word makes all others
    /// speak again. Only a round in which nobody executed anything counts.
    pub(crate) fn dead(&self, index: usize, executed: bool, mut since: Epoch) {
        let mut state = self.lock();
        if !state.may_halt() {
            return;
        }
        if executed {
            // Its own vote stays as valid as it was.
            let valid = since == self.epoch();
            self.void_votes(&mut state);
            if valid {
                since = self.epoch();
            }
        }
        let vote = self.vote(&mut state, index, since);
        drop(state);
        self.act(vote, index);
        if executed {
            self.kick_all();
        }
        let state = self.lock();
        if state.may_halt() {
            drop(self.changed.wait_timeout(state, DEAD_POLL));
        }
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

    /// vCPU `index` was found waiting for a start-up IPI, after `since`. Like [`dead`](Self::dead),
    /// but does not wait.
    pub(crate) fn never_started(&self, index: usize, since: Epoch) {
        let mut state = self.lock();
        if state.may_halt() {
            let vote = self.vote(&mut state, index, since);
            drop(state);
            self.act(vote, index);
        }
    }

    /// How it ended, if it has.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// Waits until the machine is ending, or until `deadline`. Its vCPUs may be inside an access.
    pub(crate) fn wait_ending(&self, deadline: Option<Instant>) -> Option<()> {
        self.wait_until(deadline, |state| state.outcome.is_some().then_some(()))
    }

    /// Waits until the machine has ended and every vCPU thread has left, or until `deadline`.
    pub(crate) fn wait_end(&self, deadline: Option<Instant>) -> Option<Result<End, VmError>> {
        self.wait_until(deadline, |state| {
            let outcome = state.outcome.as_ref().filter(|_| state.live == 0)?;
            Some(outcome.clone().map_err(VmError::from))
        })
    }

    fn wait_until<T>(
        &self,
        deadline: Option<Instant>,
        look: impl Fn(&State) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
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
            control.pause(|| ());
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
        control.pause(|| ());
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
        control.dead(0, true, control.epoch());
        control.dead(0, false, control.epoch());
        assert!(control.outcome().is_none());
        // The second one lived until now and may have woken the first.
        control.dead(1, true, control.epoch());
        assert!(control.outcome().is_none());
        control.dead(0, false, control.epoch());
        assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
    }

    #[test]
    fn a_vcpu_that_never_started_cannot_help() {
        let control = control(2);
        assert!(!control.counts_the_dead());
        control.dead(0, true, control.epoch());
        assert!(control.counts_the_dead());
        control.never_started(1, control.epoch());
        assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
    }

    #[derive(Default)]
    struct Kicked(AtomicU64);
    impl vmkit_hypervisor::Kickable for Kicked {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_vcpu_that_was_woken_after_it_had_been_looked_at_is_looked_at_again() {
        for started in [true, false] {
            let control = Control::default();
            let kicked = Arc::new(Kicked::default());
            control.set_kicks(vec![Kick::new(kicked.clone()), Kick::new(Arc::<Kicked>::default())]);
            let vote = |since| match started {
                true => control.dead(0, false, since),
                false => control.never_started(0, since),
            };
            let looked = control.epoch();
            // The other one wakes it, dies, and comes to say so first.
            control.dead(1, true, control.epoch());
            let kicks = kicked.0.load(Ordering::SeqCst);
            vote(looked);
            assert!(control.outcome().is_none());
            assert_eq!(kicked.0.load(Ordering::SeqCst), kicks + 1);
            vote(control.epoch());
            assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
        }
    }

    #[test]
    fn a_pause_makes_all_vcpus_speak_again() {
        let control = control(2);
        control.dead(0, true, control.epoch());
        let looked = control.epoch();
        control.pause(|| ());
        // It may have woken the first one just before, and is not heard.
        control.dead(1, true, looked);
        control.resume();
        control.dead(1, false, control.epoch());
        assert!(control.outcome().is_none());
        control.dead(0, false, control.epoch());
        assert_eq!(control.outcome().unwrap().unwrap(), End::Halted);
    }

    #[test]
    fn waiting_has_a_limit() {
        let control = control(1);
        assert!(control.wait_end(Some(Instant::now() + Duration::from_millis(2))).is_none());
    }
}
