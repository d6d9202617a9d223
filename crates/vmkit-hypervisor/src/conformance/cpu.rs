//! A case's vCPU: runs that end, however the guest behaves, and the exceptions they end in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmkit_device::memory::{Bytes, MemoryRegion, MemoryRegionAddress};

use super::Failure;
use super::guest::Mode;
use super::recorder::Recorder;
use super::tables;
use crate::x86::MpState;
use crate::{Kick, StateSet, Vcpu, VcpuIo, VcpuState, VmExit};

/// A vCPU none of whose runs ends for this long is taken to hang. Emulated hosts are slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// An exception or interrupt as its handler found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub vector: u64,
    /// 0 for those without.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The program said so, with this value.
    Stop(u64),
    /// In the handler of an exception or interrupt. Running again returns from it.
    Fault(Fault),
    /// Otherwise.
    Exit(VmExit),
}

/// Kicks a vCPU that takes too long.
struct Watchdog {
    fired: Arc<AtomicBool>,
    /// Runs that have ended.
    ended: Arc<AtomicU64>,
    done: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    fn new(kick: Kick) -> Result<Self, Failure> {
        let (done, waiting) = mpsc::channel::<()>();
        let fired = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicU64::new(0));
        let (flag, count) = (fired.clone(), ended.clone());
        let bark = move || {
            let (mut patience, mut seen) = (PATIENCE, 0);
            while waiting.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                let now = count.load(Ordering::SeqCst);
                if now != seen && !flag.load(Ordering::SeqCst) {
                    seen = now;
                    continue;
                }
                flag.store(true, Ordering::SeqCst);
                kick.kick();
                patience = Duration::from_millis(10);
            }
        };
        let thread = thread::Builder::new().name("watchdog".into()).spawn(bark)?;
        Ok(Self { fired, ended, done: Some(done), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to panic about, and a case's result does not depend on it.
            let _ = thread.join();
        }
    }
}

/// A vCPU.
pub(super) struct Cpu {
    watchdog: Watchdog,
    vcpu: Box<dyn Vcpu>,
    ram: Arc<MemoryRegion>,
}

impl Cpu {
    pub fn new(vcpu: Box<dyn Vcpu>, ram: Arc<MemoryRegion>) -> Result<Self, Failure> {
        Ok(Self { watchdog: Watchdog::new(vcpu.kick())?, vcpu, ram })
    }

    /// Puts the vCPU at the start of a program in `mode`.
    pub fn start(&mut self, mode: Mode, index: u32) -> Result<(), Failure> {
        let state = tables::start_state(mode, index);
        self.set(StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL, &state)
    }

    /// Goes on at `rip`.
    pub fn jump(&mut self, rip: u64) -> Result<(), Failure> {
        self.change(StateSet::GENERAL, |state| state.general.rip = rip)
    }

    /// Ends the wait for a start-up IPI.
    pub fn make_runnable(&mut self) -> Result<(), Failure> {
        let state = VcpuState { mp: MpState::Runnable, ..VcpuState::default() };
        self.set(StateSet::MP, &state)
    }

    pub fn kick(&self) -> Kick {
        self.vcpu.kick()
    }

    pub fn instructions(&self) -> Option<u64> {
        self.vcpu.instructions()
    }

    /// Runs with any callbacks.
    pub fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit, Failure> {
        let exit = self.vcpu.run(io);
        self.watchdog.ended.fetch_add(1, Ordering::SeqCst);
        let exit = exit?;
        if self.watchdog.fired.load(Ordering::SeqCst) {
            let rip = self.get(StateSet::GENERAL)?.general.rip;
            return Err(Failure::Hung { rip });
        }
        Ok(exit)
    }

    /// Runs to the next end.
    pub fn go(&mut self, io: &mut Recorder) -> Result<End, Failure> {
        (io.stopped, io.faulted) = (None, false);
        let exit = self.run(io)?;
        Ok(match (exit, io.stopped, io.faulted) {
            (VmExit::Stopped, Some(value), _) => End::Stop(value),
            (VmExit::Stopped, None, true) => End::Fault(self.frame()?),
            (exit, ..) => End::Exit(exit),
        })
    }

    /// Runs to the program's own end; the value it stopped with.
    pub fn finish(&mut self, io: &mut Recorder) -> Result<u64, Failure> {
        match self.go(io)? {
            End::Stop(value) => Ok(value),
            other => Err(Failure::Wrong(format!("expected the program's end, got {other:x?}"))),
        }
    }

    /// Runs into an exception.
    pub fn fault(&mut self, io: &mut Recorder) -> Result<Fault, Failure> {
        match self.go(io)? {
            End::Fault(fault) => Ok(fault),
            other => Err(Failure::Wrong(format!("expected an exception, got {other:x?}"))),
        }
    }

    pub fn get(&mut self, what: StateSet) -> Result<VcpuState, Failure> {
        let mut state = VcpuState::default();
        self.vcpu.get(what, &mut state)?;
        Ok(state)
    }

    pub fn set(&mut self, what: StateSet, from: &VcpuState) -> Result<(), Failure> {
        Ok(self.vcpu.set(what, from)?)
    }

    /// Reads, changes and writes parts of the state.
    pub fn change(
        &mut self,
        what: StateSet,
        change: impl FnOnce(&mut VcpuState),
    ) -> Result<(), Failure> {
        let mut state = self.get(what)?;
        change(&mut state);
        self.set(what, &state)
    }

    /// General register number `index`.
    pub fn register(&mut self, index: usize) -> Result<u64, Failure> {
        let state = self.get(StateSet::GENERAL)?;
        Ok(state.general.gpr.get(index).copied().unwrap_or(0))
    }

    /// What the reporting handler and the processor pushed: vector, error code, RIP, CS, flags.
    fn frame(&mut self) -> Result<Fault, Failure> {
        let state = self.get(StateSet::GENERAL | StateSet::SEGMENTS)?;
        let mode = state.segments.cs.attributes;
        let width = match (mode.long(), mode.big()) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        };
        let base = if width == 8 { 0 } else { state.segments.ss.base };
        let mut words = [0; 5];
        for (at, word) in (base + state.general.rsp()..).step_by(width).zip(&mut words) {
            let mut bytes = [0; 8];
            let (used, _) = bytes.split_at_mut(width);
            self.ram.read_slice(used, MemoryRegionAddress(at))?;
            *word = u64::from_le_bytes(bytes);
        }
        let [vector, error, rip, cs, rflags] = words;
        Ok(Fault { vector: vector & 0xFF, error, rip, cs: cs & 0xFFFF, rflags })
    }
}
