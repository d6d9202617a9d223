//! The board and what is around it: how what it does gets out.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvm_ioctls::VmFd;
use vmkit_device::Clock;
use vmkit_hypervisor::EventFd;
use vmkit_irqchip::{ApicMessage, Board};
use vmm_sys_util::timerfd::TimerFd;

use super::kvm_messages;
use super::worker::{Inputs, Worker};
use crate::error::io_error;
use crate::kick::KickTarget;
use crate::routing::Routes;

/// The shortest time for which the timer is set. A guest that has the 8254 interrupt faster than
/// that is served by the catching up of [`Pit::advance`](vmkit_irqchip::Pit::advance), and cannot
/// have the thread do more than so many rounds.
const SHORTEST: Duration = Duration::from_micros(100);

/// What vCPUs, devices and the board's thread share.
pub(super) struct Chips {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// The 8259 pair's output, as of the last work on the board.
    intr: AtomicBool,
    /// Where the output leads to.
    first: OnceLock<Arc<KickTarget>>,
    pub(super) inputs: Inputs,
}

pub(super) struct State {
    pub(super) board: Board,
    /// vCPUs inside `run`.
    pub(super) running: u32,
    /// A state was loaded whose saver may have been in the midst of sending interrupts.
    pub(super) resample: bool,
    /// The time for which the timer is set.
    alarm: Option<u64>,
    timer: TimerFd,
    /// Descriptors that the thread watches.
    pub(super) irqfds: Vec<EventFd>,
    pub(super) worker: Option<Worker>,
}

impl Chips {
    pub(super) fn new(
        vm: Arc<VmFd>,
        routes: Arc<Routes>,
        clock: Arc<dyn Clock>,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io_error)?;
        let inputs = Inputs::new(timer.as_raw_fd())?;
        let state = State {
            board: Board::new(),
            running: 0,
            resample: false,
            alarm: None,
            timer,
            irqfds: Vec::new(),
            worker: None,
        };
        Ok(Self {
            vm,
            routes,
            clock,
            state: Mutex::new(state),
            intr: AtomicBool::new(false),
            first: OnceLock::new(),
            inputs,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest time in nanoseconds.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.clock.now().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn wire_intr(&self, to: Arc<KickTarget>) {
        // vCPU 0 is made once.
        let _ = self.first.set(to);
    }

    pub(super) fn intr(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    /// Does something to the board, and carries out what comes of it.
    pub(super) fn work<R>(
        &self,
        task: impl FnOnce(&mut Board, &mut dyn FnMut(ApicMessage) -> bool) -> R,
    ) -> R {
        self.work_on(&mut self.lock(), task)
    }

    /// [`work`](Self::work), for who holds the lock.
    pub(super) fn work_on<R>(
        &self,
        state: &mut State,
        task: impl FnOnce(&mut Board, &mut dyn FnMut(ApicMessage) -> bool) -> R,
    ) -> R {
        let answer = task(&mut state.board, &mut |message| self.send(&message));
        self.carry_out(state);
        answer
    }

    /// Does something to the board that may change where the IOAPIC's pins lead. What these owe is
    /// sent by [`Ioapic::resample`](vmkit_irqchip::Ioapic::resample) afterwards: its EOI may come at
    /// once, and KVM must know by then that it is awaited.
    pub(super) fn redirect<R>(&self, state: &mut State, task: impl FnOnce(&mut Board) -> R) -> R {
        let answer = task(&mut state.board);
        let pins = std::array::from_fn(|pin| state.board.ioapic.level_message(pin));
        if let Err(error) = self.routes.watch_pins(&self.vm, &pins) {
            log::error!("KVM does not tell of the IOAPIC's EOIs: {error}");
        }
        self.carry_out(state);
        answer
    }

    /// Hands a message to KVM; whether a local APIC took it.
    fn send(&self, message: &ApicMessage) -> bool {
        let mut taken = false;
        for message in kvm_messages(message) {
            match self.vm.signal_msi(message) {
                Ok(takers) => taken |= takers > 0,
                // Destination and vector are the guest's, and so may be nonsense: not worth more.
                Err(error) => {
                    log::debug!("the IOAPIC's {:#x} was not delivered: {error}", message.data);
                }
            }
        }
        taken
    }

    fn carry_out(&self, state: &mut State) {
        let output = state.board.pic.output();
        let before = self.intr.swap(output, Ordering::SeqCst);
        if output
            && !before
            && let Some(first) = self.first.get()
        {
            first.nudge();
        }
        self.set_alarm(state);
    }

    /// A vCPU enters `run`. By now the local APICs are loaded, too, if the board was.
    pub(super) fn enter(&self, state: &mut State) {
        state.running += 1;
        if std::mem::take(&mut state.resample) {
            self.work_on(state, |board, sink| board.ioapic.resample(sink));
        }
        self.set_alarm(state);
    }

    /// A vCPU leaves `run`.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        self.set_alarm(&mut state);
    }

    /// Sets the timer for the 8254's next interrupt, if a vCPU runs that could see it.
    fn set_alarm(&self, state: &mut State) {
        let next = state.board.pit.next_deadline().filter(|_| state.running > 0);
        if next == state.alarm {
            return;
        }
        state.alarm = next;
        let outcome = match next {
            Some(at) => {
                let delay = Duration::from_nanos(at.saturating_sub(self.now()));
                state.timer.reset(delay.max(SHORTEST), None)
            }
            None => state.timer.clear(),
        };
        if let Err(error) = outcome {
            log::error!("the PIT's timer could not be set: {error}");
        }
    }

    /// The timer has expired: the 8254 catches up with the clock.
    pub(super) fn tick(&self) {
        let mut state = self.lock();
        // Setting a timer, to nothing too, makes it forget that it has expired.
        state.alarm = None;
        if let Err(error) = state.timer.clear() {
            log::error!("the PIT's timer could not be cleared: {error}");
        }
        // The event was under way when the last vCPU left: its tick belongs to the next run, for what is
        // saved between must hold it once.
        if state.running == 0 {
            return;
        }
        let now = self.now();
        let _ = self.work_on(&mut state, |board, sink| board.advance(now, sink));
    }

    /// Pulses the inputs whose irqfds were written to: when this returns, all that were before the
    /// call have arrived.
    pub(super) fn drain_irqfds(&self, state: &mut State) {
        let outcome = self.inputs.take_irqfds(state.irqfds.len(), |gsi| {
            self.work_on(state, |board, sink| {
                board.set_level(gsi, true, sink);
                board.set_level(gsi, false, sink);
            });
        });
        if let Err(error) = outcome {
            log::error!("irqfds could not be read: {error}");
        }
    }
}
