//! Output on its way to a writer that may block: a bounded queue, and what the thread that writes it
//! and the vCPUs that fill it tell each other.
//!
//! Nothing is called under the lock here, neither the writer nor a watcher, so that whoever wants the
//! vCPUs out of their accesses always gets it.

use std::any::Any;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{BUFFER, IDLE, OutputProbe};
use crate::access::lock;

/// With so much on its way, a vCPU that writes more waits.
pub(super) const ROOM: usize = 16 << 10;
/// How long a pause or the end waits for a writer.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// For one that takes nothing.
    pub(super) stall: Duration,
    /// For one that takes something now and then.
    pub(super) all: Duration,
}

/// What [`SerialOutput::writer`](super::SerialOutput::writer) promises.
pub(super) const LIMITS: Limits =
    Limits { stall: Duration::from_secs(1), all: Duration::from_secs(10) };

pub(super) type Writer = Box<dyn Write + Send>;
/// What a panic carries.
pub(super) type Panic = Box<dyn Any + Send>;

pub(super) struct Backlog {
    state: Mutex<State>,
    /// Wakes the thread.
    work: Condvar,
    /// Wakes those who wait for the thread, if there are any.
    progress: Condvar,
    /// Whether a vCPU should look for room; a hint that saves each byte the lock.
    full: AtomicBool,
    limits: Limits,
    probe: OutputProbe,
}

#[derive(Default)]
struct State {
    /// Given to nobody yet.
    queue: Vec<u8>,
    /// In the thread's hands and not known to be written.
    taken: usize,
    /// There while no thread has it.
    writer: Option<Writer>,
    /// A line has begun that is not in the queue.
    partial: bool,
    /// How often the writer took something.
    steps: u64,
    /// `steps` when a pause last gave up.
    gave_up: Option<u64>,
    /// A callback's panic on the thread, of which no vCPU has heard.
    panic: Option<Panic>,
    complained: bool,
    /// There is a thread.
    alive: bool,
    thread: Doing,
    /// Those who wait for `progress`.
    waiters: usize,
    /// No vCPU is to wait for room.
    released: bool,
    /// The thread is to end once the queue is empty.
    stopping: bool,
    /// The thread is to end, and what it does no longer counts.
    abandoned: bool,
}

/// What the thread does.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Doing {
    #[default]
    Works,
    /// It waits for the idle time of a line to pass, or for bytes.
    Idles,
    /// It waits for a line to begin, or for bytes.
    Parks,
}

/// Why the thread comes back from waiting or writing.
pub(super) enum Turn {
    /// A line has waited long enough.
    Idle,
    Over,
}

impl State {
    fn on_its_way(&self) -> usize {
        self.queue.len() + self.taken
    }
}

impl Backlog {
    pub(super) fn new(writer: Option<Writer>, limits: Limits, probe: OutputProbe) -> Self {
        let room = if writer.is_some() { ROOM + BUFFER } else { 0 };
        let state = State { queue: Vec::with_capacity(room), writer, ..State::default() };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: Condvar::new(),
            full: AtomicBool::new(false),
            limits,
            probe,
        }
    }

    /// Waits until there is room, or until nobody should wait for it.
    pub(super) fn await_room(&self) {
        if !self.full.load(Ordering::Relaxed) {
            return;
        }
        let mut state = lock(&self.state);
        state.waiters += 1;
        while state.alive && !state.released && state.on_its_way() >= ROOM {
            state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiters -= 1;
    }

    /// From now on no vCPU waits here, until the next [`start`](Self::start).
    pub(super) fn release(&self) {
        let mut state = lock(&self.state);
        state.released = true;
        self.tell(&state);
    }

    /// A line has begun elsewhere. Answers a callback's panic that a vCPU should hear of.
    pub(super) fn begin_line(&self) -> Option<Panic> {
        let mut state = lock(&self.state);
        state.partial = true;
        if state.thread == Doing::Parks {
            self.work.notify_one();
        }
        state.panic.take()
    }

    /// The line is over, and these bytes of it are to be written.
    pub(super) fn end_line(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        state.partial = false;
        if bytes.is_empty() {
            return;
        }
        state.queue.extend_from_slice(bytes);
        self.full.store(state.on_its_way() >= ROOM, Ordering::Relaxed);
        if state.thread != Doing::Works {
            self.work.notify_one();
        }
    }

    /// Keeps a callback's panic on the thread for a vCPU.
    pub(super) fn keep_panic(&self, panic: Panic) {
        lock(&self.state).panic.get_or_insert(panic);
    }

    /// Undoes [`drain`](Self::drain). True if a thread is to be made, which the caller does.
    pub(super) fn start(&self) -> bool {
        let mut state = lock(&self.state);
        state.stopping = false;
        state.released = false;
        state.gave_up = None;
        !std::mem::replace(&mut state.alive, true)
    }

    /// The thread could not be made.
    pub(super) fn failed_start(&self) {
        lock(&self.state).alive = false;
    }

    /// Waits until all that is in the queue is written and the thread ends, but not for ever. True if
    /// there is no thread any more; otherwise it goes on writing what the queue holds.
    pub(super) fn drain(&self) -> bool {
        let mut state = lock(&self.state);
        state.stopping = true;
        state.released = true;
        self.work.notify_one();
        self.tell(&state);
        if state.gave_up == Some(state.steps) {
            return !state.alive;
        }
        state.waiters += 1;
        let Limits { stall, all } = self.limits;
        let begin = Instant::now();
        let (mut steps, mut stepped) = (state.steps, begin);
        while state.alive {
            let now = Instant::now();
            // A thread that has not come to it yet (on a loaded host) is not the writer's fault.
            if steps != state.steps || state.taken == 0 {
                (steps, stepped) = (state.steps, now);
            }
            let left = stall.saturating_sub(now - stepped).min(all.saturating_sub(now - begin));
            if left.is_zero() {
                state.gave_up = Some(steps);
                break;
            }
            let wait = self.progress.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiters -= 1;
        !state.alive
    }

    /// Leaves the thread to itself, if there is one. What is not written is lost.
    pub(super) fn abandon(&self) {
        let mut state = lock(&self.state);
        state.abandoned = true;
        let left = state.on_its_way();
        state.queue = Vec::new();
        drop(state);
        if left > 0 {
            lock(&self.probe.figures).lost += left as u64;
            log::warn!("console output is lost: nobody took the last {left} bytes in time");
        }
    }

    /// The thread's work, until there is something else to do.
    pub(super) fn work(&self, hands: &mut Hands) -> Turn {
        let mut state = lock(&self.state);
        loop {
            if hands.writer.is_none() {
                hands.writer = state.writer.take();
            }
            if !state.queue.is_empty()
                && let Some(writer) = &mut hands.writer
            {
                std::mem::swap(&mut state.queue, &mut hands.bytes);
                state.taken = hands.bytes.len();
                drop(state);
                let mut bytes = &*hands.bytes;
                while !bytes.is_empty() {
                    let (piece, rest) = bytes.split_at(piece(bytes));
                    if !self.write(writer, piece) {
                        return Turn::Over;
                    }
                    bytes = rest;
                }
                hands.bytes.clear();
                state = lock(&self.state);
            } else if state.stopping {
                state.writer = hands.writer.take();
                state.alive = false;
                self.tell(&state);
                return Turn::Over;
            } else if state.partial {
                state.thread = Doing::Idles;
                let wait = self.work.wait_timeout(state, IDLE);
                let (next, waited) = wait.unwrap_or_else(PoisonError::into_inner);
                state = next;
                state.thread = Doing::Works;
                if waited.timed_out() && state.partial {
                    return Turn::Idle;
                }
            } else {
                state.thread = Doing::Parks;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.thread = Doing::Works;
            }
        }
    }

    /// Writes a piece of what the thread took. False if nobody wants that any more.
    fn write(&self, writer: &mut Writer, piece: &[u8]) -> bool {
        let written = catch_unwind(AssertUnwindSafe(|| self.write_all(writer, piece)));
        let mut state = self.step();
        if state.abandoned {
            return false;
        }
        state.taken -= piece.len();
        self.full.store(state.on_its_way() >= ROOM, Ordering::Relaxed);
        let mut figures = lock(&self.probe.figures);
        let len = piece.len() as u64;
        match written {
            Ok(Ok(())) => figures.written += len,
            Ok(Err(error)) => {
                figures.lost += len;
                if !std::mem::replace(&mut state.complained, true) {
                    log::warn!("console output is lost: {error}");
                }
            }
            // Its message has been printed.
            Err(panic) => {
                figures.lost += len;
                state.panic.get_or_insert(panic);
            }
        }
        true
    }

    fn write_all(&self, writer: &mut Writer, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            match writer.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if bytes.is_empty() {
                return writer.flush();
            }
            if self.step().abandoned {
                return Ok(());
            }
        }
    }

    /// The writer took something.
    fn step(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        state.steps = state.steps.wrapping_add(1);
        self.tell(&state);
        state
    }

    /// Wakes those who wait for the thread; they look once `state` is let go.
    fn tell(&self, state: &State) {
        if state.waiters > 0 {
            self.progress.notify_all();
        }
    }

    #[cfg(test)]
    pub(super) fn waiters(&self) -> usize {
        lock(&self.state).waiters
    }

    #[cfg(test)]
    pub(super) fn on_its_way(&self) -> usize {
        lock(&self.state).on_its_way()
    }
}

/// How many of `bytes` are written at once: whole lines, so that other writers to the same file come
/// between lines, unless there is but one.
fn piece(bytes: &[u8]) -> usize {
    let most = bytes.get(..BUFFER).unwrap_or(bytes);
    most.iter().rposition(|&byte| byte == b'\n').map_or(most.len(), |at| at + 1)
}

/// What the thread holds.
#[derive(Default)]
pub(super) struct Hands {
    writer: Option<Writer>,
    bytes: Vec<u8>,
}
