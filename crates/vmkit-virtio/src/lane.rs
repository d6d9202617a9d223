//! A lane: one worker, its queues, and the descriptors that wake it. Who turns it is in
//! [`work`](crate::work).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::EpollEvent;

use crate::interrupt::{Shared, status};
use crate::{Fault, LaneSpec, Poller, Progress, QueueSet, Queues, Wake, Worker, poll};

/// Marks the data of an epoll event as a queue's notification; the queue is in the low bits.
const KICK: u64 = 1 << 32;
/// Marks the wake-up for a stop.
const STOP: u64 = 1 << 33;
/// Turns of one queue before other queues have theirs.
const ROUNDS: u32 = 64;
/// Events taken at once.
const EVENTS: usize = 32;

pub(crate) struct Lane {
    shared: Arc<Shared>,
    poller: Poller,
    kicks: Vec<(u16, Wake)>,
    stop: Wake,
    /// Set while the lane may work. Cleared before the state's lock is asked for, so that a busy
    /// worker's loop sees it.
    running: AtomicBool,
    /// A thread turns the lane until it is halted. Changed under the lock of the device's control.
    has_thread: AtomicBool,
    state: Mutex<State>,
}

struct State {
    worker: Box<dyn Worker>,
    queues: Queues,
    /// Queues that had more to do when their turn ended.
    left_over: QueueSet,
    /// Events that came while the lane may not work. Descriptors tell of a change once, so these
    /// would be lost; one entry per descriptor.
    deferred: Vec<EpollEvent>,
}

impl Lane {
    /// A lane at rest.
    pub(crate) fn new(
        spec: LaneSpec,
        queues: Queues,
        kicks: &[Wake],
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let LaneSpec { queues: indices, mut worker } = spec;
        let poller = Poller::new()?;
        let stop = Wake::new()?;
        poller.add_raw(stop.as_raw_fd(), STOP)?;
        let mut own = Vec::new();
        for index in indices {
            if let Some(kick) = kicks.get(usize::from(index)) {
                poller.add_raw(kick.as_raw_fd(), KICK | u64::from(index))?;
                own.push((index, kick.clone()));
            }
        }
        worker.register(&poller)?;
        let state = State { worker, queues, left_over: QueueSet::EMPTY, deferred: Vec::new() };
        Ok(Self {
            shared,
            poller,
            kicks: own,
            stop,
            running: AtomicBool::new(false),
            has_thread: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the lane work, and look at all of its queues first.
    pub(crate) fn resume(&self) {
        self.running.store(true, Ordering::Release);
        self.kicks.iter().for_each(|(_, kick)| kick.wake());
    }

    /// Ends work. When this returns no worker of the lane is working.
    pub(crate) fn halt(&self) {
        let worked = self.running.swap(false, Ordering::AcqRel);
        self.stop.wake();
        self.give_thread();
        let mut state = self.lock();
        // A driver that has never been worked for, because the machine has not run, waits until it does.
        if worked && !self.shared.has(status::NEEDS_RESET) {
            self.serve_outgoing(&mut state);
        }
        self.quiesce(&mut state);
    }

    /// Has the worker take what carries something out of the machine and has been notified, but not
    /// served yet: if the machine has ended there is no other turn.
    fn serve_outgoing(&self, state: &mut State) {
        let State { worker, queues, .. } = state;
        let mut outgoing = worker.outgoing().iter();
        if let Err(fault) = outgoing.try_for_each(|queue| worker.process(queues, queue).map(drop)) {
            self.shared.broken(&fault);
        }
    }

    /// Notes that a thread turns the lane; true if one does already.
    pub(crate) fn take_thread(&self) -> bool {
        self.has_thread.swap(true, Ordering::AcqRel)
    }

    /// Notes that no thread does, or that it is about to end.
    pub(crate) fn give_thread(&self) {
        self.has_thread.store(false, Ordering::Release);
    }

    /// Has the worker finish what is in flight.
    fn quiesce(&self, state: &mut State) {
        let State { worker, queues, .. } = state;
        if let Err(fault) = worker.quiesce(queues).and_then(|()| queues.signal()) {
            self.shared.broken(&fault);
        }
    }

    pub(crate) fn running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// True if the worker waits for anything but notifications.
    pub(crate) fn has_sources(&self) -> bool {
        self.poller.has_sources()
    }

    pub(crate) fn serves(&self, queue: u16) -> bool {
        self.kicks.iter().any(|(index, _)| *index == queue)
    }

    /// Runs `f` on the queues while the worker does not work.
    pub(crate) fn with_queues<T>(&self, f: impl FnOnce(&mut Queues) -> T) -> T {
        f(&mut self.lock().queues)
    }

    /// Takes `queue` out of use.
    pub(crate) fn remove(&self, queue: u16) {
        let mut state = self.lock();
        self.quiesce(&mut state);
        state.queues.remove(queue);
    }

    /// Works on all of the queues, on the caller's thread.
    pub(crate) fn run_all(&self) {
        for &(index, _) in &self.kicks {
            self.run(index);
        }
    }

    /// Works on `queue` on the caller's thread, if the lane may work.
    pub(crate) fn run(&self, queue: u16) {
        let mut state = self.lock();
        self.drain(&mut state, queue);
    }

    /// Goes on with what an earlier turn left over, on the caller's thread. True if that leaves some
    /// over, too.
    pub(crate) fn run_left_over(&self) -> bool {
        let mut state = self.lock();
        let left = std::mem::take(&mut state.left_over);
        left.iter().for_each(|queue| self.drain(&mut state, queue));
        !state.left_over.is_empty()
    }

    /// Waits up to `timeout` milliseconds (-1: for ever) for events and works on them.
    pub(crate) fn turn(&self, timeout: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.poller.wait(timeout, &mut events)?;
        let mut state = self.lock();
        while self.running()
            && let Some(event) = state.deferred.pop()
        {
            self.handle(&mut state, event);
        }
        for event in events.iter().take(count) {
            self.handle(&mut state, *event);
        }
        Ok(())
    }

    fn handle(&self, state: &mut State, event: EpollEvent) {
        let data = event.data();
        if data & STOP != 0 {
            return;
        }
        if !self.running() {
            // The later event tells all that is so by then.
            state.deferred.retain(|earlier| earlier.data() != data);
            state.deferred.push(event);
        } else if data & KICK != 0 {
            self.drain(state, data as u16);
        } else if self.may_work() {
            self.deliver(state, poll::event(&event));
        }
    }

    fn may_work(&self) -> bool {
        self.running() && !self.shared.has(status::NEEDS_RESET)
    }

    fn deliver(&self, state: &mut State, event: crate::Event) {
        let State { worker, queues, .. } = state;
        let answer = worker.event(queues, event).and_then(|runnable| {
            queues.signal()?;
            Ok(runnable)
        });
        match answer {
            Ok(runnable) => runnable.iter().for_each(|queue| self.drain(state, queue)),
            Err(fault) => self.shared.broken(&fault),
        }
    }

    /// Works on `queue` until there is nothing to do, or its turn is over.
    fn drain(&self, state: &mut State, queue: u16) {
        if let Err(fault) = self.try_drain(state, queue) {
            self.shared.broken(&fault);
        }
    }

    fn try_drain(&self, state: &mut State, index: u16) -> Result<(), Fault> {
        let Some(queue) = state.queues.get(index) else { return Ok(()) };
        if !self.may_work() {
            return Ok(());
        }
        queue.disable_notification()?;
        for _ in 0..ROUNDS {
            let progress = state.worker.process(&mut state.queues, index)?;
            state.queues.signal()?;
            match progress {
                Progress::More => {}
                Progress::Waiting => return Ok(()),
                Progress::Drained => {
                    let Some(queue) = state.queues.get(index) else { return Ok(()) };
                    if !queue.enable_notification()? {
                        return Ok(());
                    }
                    queue.disable_notification()?;
                }
            }
            if !self.may_work() {
                return Ok(());
            }
        }
        state.left_over = state.left_over.and(index);
        if let Some((_, kick)) = self.kicks.iter().find(|(kicked, _)| *kicked == index) {
            kick.wake();
        }
        Ok(())
    }
}

impl AsRawFd for Lane {
    fn as_raw_fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }
}
