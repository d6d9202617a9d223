//! One KVM vCPU.

mod eoi;
mod intr;
mod lapic;
mod msr;
mod page;
mod run;
mod state;
mod xsave;

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_enable_cap,
    kvm_mp_state,
};
use kvm_ioctls::VcpuFd;
use vmkit_hypervisor::x86::{GeneralRegisters, MpState};
use vmkit_hypervisor::{
    CpuModel, CpuidContext, HypervisorError, InterruptControllers, Kick, Result, StateSet, Vcpu,
    VcpuIo, VcpuState, VmExit,
};

use crate::error::host;
use crate::kick::KickTarget;
use crate::partition::Shared;
use crate::{cpuid, hypervisor};

use self::page::RunPage;

/// A vCPU. The descriptor goes first when it is dropped, the partition it belongs to last.
pub(crate) struct KvmVcpu {
    page: RunPage,
    fd: VcpuFd,
    kick: Arc<KickTarget>,
    model: CpuModel,
    index: u32,
    /// The MSRs this vCPU saves, once they are known.
    msrs: Option<Vec<u32>>,
    partition: Arc<Shared>,
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.close();
    }
}

impl KvmVcpu {
    /// Makes vCPU `index`. `model` has been checked against the host.
    pub(crate) fn create(
        partition: &Arc<Shared>,
        index: u32,
        model: &CpuModel,
        tsc_khz: u32,
    ) -> Result<Self> {
        partition.signal.ensure_handler()?;
        let mut fd = partition.vm.create_vcpu(u64::from(index)).map_err(host("create a vCPU"))?;
        if let Some(khz) = partition.tsc_request {
            fd.set_tsc_khz(khz).map_err(host("set the TSC frequency"))?;
        }
        if partition.host.enforces_paravirtual {
            // Else a guest that does not ask CPUID could have steal time, asynchronous page faults and
            // EOIs by memory, none of which a state holds.
            let cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
            let cap = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..kvm_enable_cap::default() };
            fd.enable_cap(&cap).map_err(host("keep KVM's own features to CPUID"))?;
        }
        let context = CpuidContext {
            apic_id: index,
            vcpus: partition.vcpus,
            tsc_khz,
            apic_hz: hypervisor::APIC_HZ,
            ..CpuidContext::default()
        };
        let table = cpuid::table(model, &context, &partition.host)?;
        fd.set_cpuid2(&table).map_err(host("set the CPUID table"))?;

        let page = RunPage::of(&mut fd, partition.vm.run_size());
        let kick = page.kick_target(partition.signal);
        partition.memory.add_ring(&fd, &kick)?;
        if index == 0
            && let Some(split) = &partition.split
        {
            split.wire_intr(&kick);
        }
        let vcpu = Self {
            page,
            fd,
            kick,
            model: model.clone(),
            index,
            msrs: None,
            partition: partition.clone(),
        };
        vcpu.start_as_after_reset(&context)?;
        Ok(vcpu)
    }

    /// KVM makes a vCPU in the state after reset, but for what depends on the model, and for the
    /// segments' types, which differ from host to host.
    fn start_as_after_reset(&self, context: &CpuidContext) -> Result<()> {
        // RDX holds the processor's signature (Intel SDM vol. 3A §10.1.1).
        let mut general = GeneralRegisters::default();
        general.set_rdx(u64::from(self.model.cpuid(1, 0, context).eax));
        self.set_general(&general)?;
        self.set_system(StateSet::SEGMENTS, &VcpuState::default())?;
        self.turn_fast_strings_on()?;
        if self.has_lapic() {
            // KVM notes which vCPU has which APIC ID when a local APIC is set, and last did so before
            // this vCPU counted: until the next time no message would find it.
            let lapic = self.fd.get_lapic().map_err(host("read the local APIC"))?;
            self.fd.set_lapic(&lapic).map_err(host("set the local APIC"))?;
        }
        if self.index != 0 {
            self.set_mp(MpState::WaitForSipi)?;
        }
        Ok(())
    }

    fn has_lapic(&self) -> bool {
        self.partition.controllers != InterruptControllers::None
    }

    fn mp(&self) -> Result<MpState> {
        if !self.has_lapic() {
            return Ok(MpState::Runnable);
        }
        let state = self.fd.get_mp_state().map_err(host("read the multiprocessor state"))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_HALTED => MpState::Halted,
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_SIPI_RECEIVED => MpState::WaitForSipi,
            _ => MpState::Runnable,
        })
    }

    fn set_mp(&self, state: MpState) -> Result<()> {
        let mp_state = match state {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Halted => KVM_MP_STATE_HALTED,
            // Not `UNINITIALIZED`, which would wait for an INIT first.
            MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
            other => return Err(HypervisorError::state(format!("multiprocessor state {other:?}"))),
        };
        if !self.has_lapic() {
            // Without a local APIC nothing could wake it.
            return match state {
                MpState::Runnable => Ok(()),
                _ => Err(HypervisorError::state("a halted vCPU without a local APIC")),
            };
        }
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(host("set the multiprocessor state"))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        self.run_guest(io)
    }

    fn kick(&self) -> Kick {
        Kick::new(self.kick.clone())
    }

    fn get(&mut self, what: StateSet, out: &mut VcpuState) -> Result<()> {
        if what.intersects(StateSet::LAPIC | StateSet::EVENTS)
            && let Some(split) = &self.partition.split
        {
            split.drain_irqfds();
        }
        // Reading this makes KVM digest a pending INIT or SIPI, so it goes before the rest.
        if what.contains(StateSet::MP) {
            out.mp = self.mp()?;
        }
        if what.contains(StateSet::GENERAL) {
            out.general = self.general()?;
        }
        if what.intersects(StateSet::SEGMENTS | StateSet::CONTROL) {
            self.system(what, out)?;
        }
        if what.contains(StateSet::DEBUG) {
            out.debug = self.debug()?;
        }
        if what.contains(StateSet::XSAVE) {
            self.xsave(&mut out.xsave)?;
        }
        if what.contains(StateSet::MSRS) {
            self.msrs(&mut out.msrs)?;
        }
        if what.contains(StateSet::LAPIC) {
            out.lapic = if self.has_lapic() { Some(self.lapic()?) } else { None };
        }
        if what.contains(StateSet::EVENTS) {
            out.events = self.events()?;
        }
        if what.contains(StateSet::TSC) {
            out.tsc = self.tsc()?;
        }
        Ok(())
    }

    fn set(&mut self, what: StateSet, from: &VcpuState) -> Result<()> {
        self.check(what, from)?;
        if what.contains(StateSet::GENERAL) {
            self.set_general(&from.general)?;
        }
        // XCR0 (control) before the area it governs; the APIC's mode (its base) before its registers.
        if what.intersects(StateSet::SEGMENTS | StateSet::CONTROL | StateSet::LAPIC) {
            self.set_system(what, from)?;
        }
        if what.contains(StateSet::XSAVE) {
            self.set_xsave(&from.xsave)?;
        }
        if what.contains(StateSet::DEBUG) {
            self.set_debug(&from.debug)?;
        }
        if what.contains(StateSet::TSC) {
            self.set_tsc(from.tsc)?;
        }
        if what.contains(StateSet::MSRS) {
            self.set_msrs(&from.msrs)?;
        }
        if what.contains(StateSet::LAPIC)
            && let Some(lapic) = &from.lapic
        {
            self.set_lapic(lapic)?;
        }
        if what.contains(StateSet::MP) {
            self.set_mp(from.mp)?;
        }
        if what.contains(StateSet::EVENTS) {
            self.set_events(&from.events)?;
        }
        Ok(())
    }

    fn after_pause(&mut self) -> Result<()> {
        match self.fd.kvmclock_ctrl() {
            // The guest has no kvmclock on.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(host("tell the guest that it was stopped")),
        }
    }

    fn instructions(&self) -> Option<u64> {
        None
    }
}
