//! The INTR wire of the 8259 pair, which leads to vCPU 0 where the pair is not in the kernel.
//!
//! KVM says whether the guest would take an external interrupt now: its flag is set, nothing is in the
//! way, and LINT0 is open (Intel SDM vol. 3A §11.5.1). Only then is the pair asked for the vector,
//! because asking is the acknowledge cycle. The vector goes in as an interrupt that is being delivered,
//! not by KVM_INTERRUPT, whose vector no ioctl shows: so it is part of the state that `get` gives if
//! the run ends before the guest takes it.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_vcpu_events};
use vmkit_hypervisor::Result;

use super::KvmVcpu;
use crate::error::host;
use crate::split::Split;

impl KvmVcpu {
    /// The controllers, if the wire leads here.
    #[inline]
    fn wired(&self) -> Option<&Split> {
        self.partition.split.as_ref().filter(|_| self.index == 0)
    }

    /// A run begins. If the wire is high, the first entry returns at once, because what KVM last said
    /// may be old: a halted vCPU would sleep on, for KVM looks at the wire's window after an entry.
    pub(super) fn begin_with_intr(&self) {
        if self.wired().is_some_and(Split::intr) {
            self.page.set_immediate_exit(true);
        }
    }

    /// Before an entry: an interrupt on the wire goes in, or KVM is asked to return when it could.
    /// `settled`: the vCPU is between two instructions, and what KVM said of it is true.
    #[inline]
    pub(super) fn offer_interrupt(&self, settled: bool) -> Result<()> {
        let Some(split) = self.wired() else { return Ok(()) };
        if split.intr()
            && settled
            && self.page.takes_interrupt()
            && let Some(vector) = split.acknowledge()
        {
            self.inject(vector)?;
        }
        self.page.request_interrupt_window(split.intr());
        Ok(())
    }

    fn inject(&self, vector: u8) -> Result<()> {
        let now = self.fd.get_vcpu_events().map_err(host("read pending events"))?;
        let mut events = kvm_vcpu_events::default();
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        // NMIs that came meanwhile, and the shadow, stay as they are: their flags are not set.
        events.nmi.masked = now.nmi.masked;
        self.fd.set_vcpu_events(&events).map_err(host("inject an interrupt"))?;
        let state = self.fd.get_mp_state().map_err(host("read the multiprocessor state"))?;
        if state.mp_state == KVM_MP_STATE_HALTED {
            // It is awake, though the in-kernel local APIC has not seen why.
            let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(running).map_err(host("set the multiprocessor state"))?;
        }
        Ok(())
    }
}
