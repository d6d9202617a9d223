//! One vCPU: the run loop around blocks, waiting, and the contract's face.

#![allow(unsafe_code, reason = "starts blocks by pointer, and moves between threads as a whole")]

use std::ptr::null;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmkit_hypervisor::{
    CpuModel, FailedInstruction, HypervisorError, Kick, Kickable, Result, StateSet, Vcpu, VcpuIo,
    VcpuState, VmExit,
};

use crate::code::{Block, Branch, ELSEWHERE, Link, Next};
use crate::cpu::flags::IF;
use crate::cpu::trap::{Trap, TrapKind};
use crate::cpu::{CS, Cpu, Mode, REG_BLOCK, STEPPING};
use crate::mem::MODE_SUPERVISOR;
use crate::partition::PartitionInner;
use crate::shared::VcpuShared;
use crate::sys::Taken;

/// Instructions between two looks at the clock.
const POLL: u64 = 4096;

/// A vCPU of the software backend.
pub(crate) struct SoftVcpu {
    cpu: Box<Cpu>,
    /// Counted among the partition's vCPUs that nothing inside can wake.
    dead: bool,
}

// SAFETY: the processor's pointers lead into its own arenas, which move with it, and to the run's
// callbacks, which are there only while `run` borrows it.
unsafe impl Send for SoftVcpu {}

impl Kickable for VcpuShared {
    fn kick(&self) {
        Self::kick(self);
    }
}

impl SoftVcpu {
    pub fn new(
        index: u32,
        model: &CpuModel,
        partition: Arc<PartitionInner>,
        shared: Arc<VcpuShared>,
    ) -> Self {
        Self { cpu: Cpu::new(index, model, partition, shared), dead: false }
    }

    fn run_loop(&mut self) -> Result<VmExit> {
        loop {
            if let Some(exit) = self.service() {
                return Ok(exit);
            }
            self.cpu.execute();
            if self.cpu.trap != TrapKind::None {
                match self.cpu.take_trap() {
                    Taken::Go => {}
                    Taken::Shutdown => return Ok(VmExit::Shutdown),
                    Taken::Unimplemented => {
                        let at = self.cpu.failed_instruction();
                        return Err(HypervisorError::Unimplemented(at));
                    }
                }
            }
            if std::mem::take(&mut self.cpu.stop) {
                return Ok(VmExit::Stopped);
            }
        }
    }

    /// Between blocks: messages, kicks, timers, interrupts, and waiting while halted. Returns when
    /// there is code to run, or with an exit.
    fn service(&mut self) -> Option<VmExit> {
        loop {
            let cpu = &mut *self.cpu;
            let shared = cpu.shared.clone();
            shared.begin_looking(cpu.instructions + POLL);
            cpu.read_inbox();
            if shared.take_kick() {
                return Some(VmExit::Kicked);
            }
            cpu.take_startup();
            let deadline = cpu.advance_timers();
            match self.cpu.take_event() {
                Some(Taken::Shutdown) => return Some(VmExit::Shutdown),
                Some(_) => self.revive(),
                None => {}
            }
            let cpu = &mut *self.cpu;
            if !cpu.halted && !cpu.wait_for_sipi {
                self.revive();
                return None;
            }
            // Only an interrupt, NMI, INIT or SIPI goes on from here.
            let wakeable = !cpu.wait_for_sipi && cpu.flags.rest & IF != 0;
            if !wakeable {
                let all = self.bury();
                if all && self.cpu.halted {
                    return Some(VmExit::HaltedForGood);
                }
            }
            let now = self.cpu.partition.clock_ns();
            let limit = deadline.map(|at| Duration::from_nanos(at.saturating_sub(now)));
            if limit != Some(Duration::ZERO) {
                shared.leave();
                shared.sleep(limit);
                shared.enter();
            }
        }
    }

    /// Counts this vCPU among the dead; true if all are.
    fn bury(&mut self) -> bool {
        if self.dead {
            // Asked again after a kick: count anew.
            self.cpu.partition.set_dead(false);
        }
        self.dead = true;
        self.cpu.partition.set_dead(true)
    }

    fn revive(&mut self) {
        if std::mem::take(&mut self.dead) {
            self.cpu.partition.set_dead(false);
        }
    }
}

impl Cpu {
    /// Runs blocks until something wants the run loop.
    pub fn execute(&mut self) {
        let mut next: Next = null();
        loop {
            if self.due() && !self.inhibit {
                self.link_from = None;
                return;
            }
            if next.is_null() {
                let Some(block) = self.find_next() else { return };
                next = block;
            }
            next = self.start(next);
        }
    }

    /// Runs `block`, and as many of its successors as follow by calls in tail position.
    #[inline(always)]
    fn start(&mut self, block: Next) -> Next {
        self.block = block;
        self.regs[usize::from(REG_BLOCK)] = self.rip;
        // SAFETY: `block` came from the cache, which has not been emptied since.
        let first = unsafe { (*block).first() };
        (first.run)(self, first)
    }

    /// Goes on with `block` from the end of another: at once, if the compiler makes that a jump and
    /// nothing wants the run loop's eye.
    #[inline(always)]
    pub fn go_on(&mut self, block: Next) -> Next {
        if cfg!(all(vmkit_tail_calls, not(debug_assertions))) && !block.is_null() && !self.due() {
            return self.start(block);
        }
        block
    }

    /// What to run after a block that names no successor; none if the run loop must look first.
    fn find_next(&mut self) -> Option<Next> {
        self.block = null();
        // Whatever comes between that block's end and the next one makes it no link.
        let mut link_from = self.link_from.take();
        if self.trap != TrapKind::None || self.stop || self.halted {
            return None;
        }
        while self.inhibit || self.must_step() {
            link_from = None;
            if self.one_instruction() == Err(Trap) || self.stop || self.halted {
                return None;
            }
            if self.due() && !self.inhibit {
                return None;
            }
        }
        let generation = self.generation;
        let mut block = self.code.jump(self.rip, self.context, self.translations);
        if block.is_null() {
            block = self.block_here(false).ok()?;
            self.code.set_jump(self.rip, self.context, self.translations, block);
        }
        if let Some((from, which)) = link_from
            && generation == self.generation
        {
            let generation = if self.stays_in_page(block) { generation } else { ELSEWHERE };
            self.code.link(from, which, Link { generation, block });
        }
        Some(block)
    }

    /// True if `block`, which is at `rip`, and the one before it are all in the same page of the linear
    /// address space: then the one leads to the other wherever that page is mapped.
    fn stays_in_page(&self, block: *const Block) -> bool {
        let base = if self.mode.contains(Mode::LONG64) { 0 } else { self.segs[CS].base };
        let page = |rip: u64| self.wrap_linear(base.wrapping_add(rip)) >> 12;
        // SAFETY: `block` was just found in the cache, which has not been emptied since.
        let crosses = unsafe { (*block).second_page().is_some() };
        !crosses && page(self.rip) == page(self.regs[usize::from(REG_BLOCK)])
    }

    /// Runs exactly one instruction, with its debug traps.
    fn one_instruction(&mut self) -> std::result::Result<(), Trap> {
        let shadowed = std::mem::take(&mut self.inhibit);
        let stepped = self.step_before()?;
        let (start, of_branches) = (self.rip, self.steps_branches());
        let block = self.run_single()?;
        if self.trap != TrapKind::None {
            return Err(Trap);
        }
        let _ = shadowed;
        self.step_after(stepped && (!of_branches || self.branched(block, start)))
    }

    /// True if `block`, a single instruction at `start` that was just run, took a branch. One to the
    /// next instruction is told from one that was not taken by its being unconditional.
    fn branched(&self, block: *const Block, start: u64) -> bool {
        // SAFETY: the block was found in the cache, which is emptied only where one is looked for.
        let (branch, bytes) = unsafe { ((*block).branch, (*block).bytes) };
        let next = start.wrapping_add(bytes.into());
        let next = if self.mode.contains(Mode::LONG64) { next } else { next & 0xFFFF_FFFF };
        branch == Branch::Always || branch == Branch::Perhaps && self.rip != next
    }

    /// Runs the instruction at RIP, whatever is set to happen around it, and returns its block.
    pub fn run_single(&mut self) -> std::result::Result<*const Block, Trap> {
        let block = self.block_here(true)?;
        // No jump is remembered from a step, and so none goes on past it.
        self.context |= STEPPING;
        let _ = self.start(block);
        self.context &= !STEPPING;
        self.block = null();
        self.link_from = None;
        Ok(block)
    }

    /// Advances this vCPU's timers (and the PIT, on the first) and says when the next one is due.
    fn advance_timers(&mut self) -> Option<u64> {
        if !self.partition.has_chips {
            return None;
        }
        let now = self.partition.clock_ns();
        let own = {
            let mut apic = self.shared.apic();
            apic.advance(now);
            apic.next_deadline()
        };
        if self.index != 0 {
            return own;
        }
        let pit = self.partition.advance_pit(now);
        match (own, pit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Takes the most urgent event that may be taken now, if any.
    fn take_event(&mut self) -> Option<Taken> {
        if self.wait_for_sipi {
            return None;
        }
        if self.inhibit && !self.halted {
            // One more instruction, then another look.
            self.shared.ask();
            return None;
        }
        if self.injected != vmkit_hypervisor::x86::Pending::None {
            self.halted = false;
            return Some(self.take_injected());
        }
        if !self.nmi_masked && self.shared.nmi.swap(false, Ordering::SeqCst) {
            self.halted = false;
            return Some(self.take_nmi());
        }
        if !self.partition.has_chips {
            return None;
        }
        self.interrupt_waits = self.flags.rest & IF == 0;
        if self.interrupt_waits {
            return None;
        }
        let (vector, extint) = {
            let mut apic = self.shared.apic();
            let vector = apic.pending_vector().map(|_| apic.acknowledge());
            (vector, apic.accepts_extint())
        };
        let vector = match vector {
            Some(vector) => vector,
            None if extint && self.index == 0 => {
                let partition = self.partition.clone();
                let mut chips = partition.chips();
                if !chips.pic.output() {
                    return None;
                }
                self.shared.apic().extint_acknowledged();
                chips.pic.acknowledge()
            }
            None => return None,
        };
        // More may be waiting behind it.
        self.shared.ask();
        self.halted = false;
        Some(self.take_interrupt(vector))
    }

    /// Does what INIT and start-up IPI ask for, if they have come.
    pub fn take_startup(&mut self) {
        let (init, sipi) = self.shared.take_startup();
        if init {
            self.init();
            self.shared.apic().init();
            self.halted = false;
            self.wait_for_sipi = self.index != 0;
        }
        // One that nobody waits for is nothing.
        if let Some(vector) = sipi
            && self.wait_for_sipi
        {
            self.wait_for_sipi = false;
            self.sipi(vector);
        }
    }

    /// The instruction at RIP, for a report.
    pub fn failed_instruction(&mut self) -> FailedInstruction {
        let base = if self.long64() { 0 } else { self.segs[crate::cpu::CS].base };
        let address = self.wrap_linear(base.wrapping_add(self.rip));
        let mut at = FailedInstruction { address, bytes: [0; 15], len: 0 };
        for (i, byte) in at.bytes.iter_mut().enumerate() {
            let linear = self.wrap_linear(address.wrapping_add(i as u64));
            let mut one = [0];
            let read = self.load_bytes(linear, &mut one, MODE_SUPERVISOR);
            self.trap = TrapKind::None;
            if read.is_err() {
                break;
            }
            (*byte, at.len) = (one[0], i as u8 + 1);
        }
        at
    }
}

/// A run. Whichever way it ends, a panic among them, the vCPU is outside guest code afterwards, or others
/// would wait for it without end, and the callbacks are their owner's.
struct Running<'a>(&'a mut SoftVcpu);

impl<'a> Running<'a> {
    fn enter(vcpu: &'a mut SoftVcpu, io: &'a mut dyn VcpuIo) -> Self {
        vcpu.cpu.partition.running();
        vcpu.cpu.lend_io(io);
        vcpu.cpu.shared.enter();
        vcpu.cpu.fp_enter();
        Self(vcpu)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let cpu = &mut self.0.cpu;
        cpu.fp_leave();
        cpu.shared.leave();
        cpu.return_io();
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        Running::enter(self, io).0.run_loop()
    }

    fn kick(&self) -> Kick {
        Kick::new(self.cpu.shared.clone())
    }

    fn get(&mut self, what: StateSet, out: &mut VcpuState) -> Result<()> {
        self.cpu.get_state(what, out);
        Ok(())
    }

    fn set(&mut self, what: StateSet, from: &VcpuState) -> Result<()> {
        self.cpu.set_state(what, from)
    }

    fn after_pause(&mut self) -> Result<()> {
        // All of a guest's clocks follow the machine's, which stood still.
        Ok(())
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.cpu.instructions)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use vmkit_device::Clock;
    use vmkit_hypervisor::{Hypervisor, PartitionSpec};
    use vmkit_irqchip::{LapicConfig, LocalApic};

    use super::*;
    use crate::testing::Silence;

    /// A clock that stops whoever asks it.
    struct Broken;

    impl Clock for Broken {
        fn now(&self) -> Duration {
            panic!("nobody knows what time it is");
        }
        fn wall(&self) -> Duration {
            Duration::ZERO
        }
    }

    #[test]
    fn a_panic_leaves_the_vcpu_outside_guest_code() {
        let spec = PartitionSpec::new(1, Arc::new(Broken));
        let partition = Arc::new(PartitionInner::new(&spec));
        let features = crate::SoftHypervisor::new().capabilities().features;
        let model = CpuModel::with_features("test", features);
        let shared = Arc::new(VcpuShared::new(LocalApic::new(LapicConfig::new(0))));
        let mut vcpu = SoftVcpu::new(0, &model, partition, shared.clone());
        catch_unwind(AssertUnwindSafe(|| vcpu.run(&mut Silence))).unwrap_err();
        // Else whoever posts it something waits for ever.
        assert!(!shared.inside());
        assert!(vcpu.cpu.io.is_none());
    }
}
