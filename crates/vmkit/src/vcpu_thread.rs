//! The loop each vCPU's thread runs: enter the guest, and decide what an exit means.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmkit_hypervisor::x86::MpState;
use vmkit_hypervisor::{StateSet, Vcpu, VcpuState, VmExit};

use crate::End;
use crate::control::{Control, Epoch, Gate, Outcome};
use crate::error::RunFailure;
use crate::io::{BusIo, Counters};
use crate::machine::Machine;

/// One vCPU and what belongs to it. Its thread holds the vCPU while it runs; whoever paused the
/// machine may hold it then.
pub(crate) struct Slot {
    pub(crate) vcpu: Mutex<Box<dyn Vcpu>>,
    pub(crate) counters: Arc<Counters>,
}

impl Slot {
    pub(crate) fn new(vcpu: Box<dyn Vcpu>) -> Self {
        Self { vcpu: Mutex::new(vcpu), counters: Arc::default() }
    }

    /// The vCPU. A panic in a device poisons the lock, and then the machine has already failed with
    /// that panic's words; its state may still be looked at.
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Box<dyn Vcpu>> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of vCPU `index`'s thread.
pub(crate) fn run(machine: &Machine, index: usize) {
    let Some(slot) = machine.slots.get(index) else { return };
    let control = &*machine.control;
    let io = BusIo::new(machine.bus.view(), slot.counters.clone());
    if index == 0 {
        machine.timeline.set_first_instruction(Instant::now());
    }
    let runner = Runner { control, slot, index, said_dead_at: None };
    let body = AssertUnwindSafe(move || runner.run(io));
    if let Err(panic) = catch_unwind(body) {
        let message = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".into());
        control.finish(Err(RunFailure::Panicked { vcpu: index as u32, message }));
    }
    control.leave();
}

struct Runner<'a> {
    control: &'a Control,
    slot: &'a Slot,
    index: usize,
    /// How far this vCPU had come when it last said that it is dead: its instruction count, or its
    /// instruction pointer where there is none.
    said_dead_at: Option<u64>,
}

impl Runner<'_> {
    fn run(mut self, mut io: BusIo) {
        while self.control.gate() == Gate::Run {
            if let Some(outcome) = self.run_once(&mut io) {
                self.control.finish(outcome);
            }
        }
    }

    /// Says that this vCPU can never run again by itself.
    fn dead(&mut self, place: u64, since: Epoch) {
        let executed = self.said_dead_at.replace(place) != Some(place);
        self.control.dead(self.index, executed, since);
    }

    fn run_once(&mut self, io: &mut BusIo) -> Option<Outcome> {
        let since = self.control.epoch();
        let mut vcpu = self.slot.lock();
        let exit = vcpu.run(io);
        let instructions = vcpu.instructions();
        self.slot.counters.exit(instructions);
        let exit = match exit {
            Ok(exit) => exit,
            Err(source) => {
                let vcpu = self.index as u32;
                return Some(Err(RunFailure::Backend { vcpu, source: Arc::new(source) }));
            }
        };
        match exit {
            VmExit::Shutdown => {
                let rip = rip(&mut **vcpu);
                Some(Ok(End::TripleFault { vcpu: self.index as u32, rip }))
            }
            // A device that stops a vCPU has raised the end signal, whose hook has told `control`:
            // the gate knows.
            VmExit::Stopped => None,
            VmExit::HaltedForGood => {
                drop(vcpu);
                self.dead(instructions.unwrap_or(0), since);
                None
            }
            VmExit::Kicked => {
                if let Some(rip) = halted_for_good(&mut **vcpu) {
                    drop(vcpu);
                    self.dead(instructions.unwrap_or(rip), since);
                } else if self.control.counts_the_dead() && waits_for_sipi(&mut **vcpu) {
                    self.control.never_started(self.index, since);
                }
                None
            }
            // A control exit this build does not know changes nothing for the guest.
            _ => None,
        }
    }
}

/// The instruction pointer of a vCPU that is in HLT with interrupts off and without an NMI.
fn halted_for_good(vcpu: &mut dyn Vcpu) -> Option<u64> {
    const INTERRUPT_FLAG: u64 = 1 << 9;
    let mut state = VcpuState::default();
    vcpu.get(StateSet::GENERAL | StateSet::MP | StateSet::EVENTS, &mut state).ok()?;
    let dead = state.mp == MpState::Halted
        && state.general.rflags & INTERRUPT_FLAG == 0
        && !state.events.nmi_pending;
    dead.then_some(state.general.rip)
}

fn rip(vcpu: &mut dyn Vcpu) -> u64 {
    let mut state = VcpuState::default();
    match vcpu.get(StateSet::GENERAL, &mut state) {
        Ok(()) => state.general.rip,
        Err(error) => {
            log::warn!("the instruction pointer after a triple fault is not to be had: {error}");
            0
        }
    }
}

fn waits_for_sipi(vcpu: &mut dyn Vcpu) -> bool {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::MP, &mut state).is_ok() && state.mp == MpState::WaitForSipi
}
