//! A KVM virtual machine: set up, its memory and vCPUs, and its state.

#![allow(unsafe_code, reason = "two ioctls that kvm-ioctls does not wrap")]

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KVMIO, kvm_clock_data, kvm_enable_cap, kvm_irqchip,
    kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};
use vmkit_hypervisor::guest_memory::{DirtyBitmap, GuestAddress, MemoryRegion};
use vmkit_hypervisor::{
    CpuModel, DirtyLog, Doorbells, HypervisorError, InterruptControllers, InterruptSink, MapAccess,
    MapId, Partition, PartitionSpec, PartitionState, Result, TscSpec, Vcpu,
};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::convert;
use crate::cpuid;
use crate::doorbells::KvmDoorbells;
use crate::error::host as host_error;
use crate::hypervisor::Host;
use crate::interrupts::KvmInterrupts;
use crate::kick::KickSignal;
use crate::memory::{DirtyLogKind, Memory};
use crate::ring;
use crate::routing::{PIN_GSIS, Routes};
use crate::split::Split;
use crate::vcpu::KvmVcpu;

ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xA3);

/// Four pages in the MMIO hole that KVM needs for itself on some Intel processors, and the page of
/// the identity map before them (Linux, Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
const IDENTITY_MAP: u64 = 0xFFFB_C000;
const TSS: usize = 0xFFFB_D000;

/// How often to try to make a VM that signals interrupt.
const CREATE_ATTEMPTS: u32 = 100;

/// What a partition and its vCPUs share. The VM's descriptor is closed before the memory that it
/// shows goes.
pub(crate) struct Shared {
    /// Goes first: it has a thread that uses the VM.
    pub(crate) split: Option<Split>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    pub(crate) routes: Arc<Routes>,
    pub(crate) host: Arc<Host>,
    pub(crate) controllers: InterruptControllers,
    pub(crate) vcpus: u32,
    pub(crate) signal: KickSignal,
    /// The TSC frequency that vCPUs are to be set to.
    pub(crate) tsc_request: Option<u32>,
    tsc_khz: OnceLock<u32>,
    taken: Mutex<Vec<u32>>,
    has_doorbells: bool,
}

/// A KVM virtual machine.
pub(crate) struct KvmPartition(Arc<Shared>);

impl KvmPartition {
    pub(crate) fn create(
        kvm: &Kvm,
        host: &Arc<Host>,
        spec: &PartitionSpec,
        signal: KickSignal,
        has_doorbells: bool,
    ) -> Result<Self> {
        let vm = Arc::new(create_vm(kvm).map_err(host_error("create a VM"))?);
        vm.set_identity_map_address(IDENTITY_MAP).map_err(host_error("place the identity map"))?;
        vm.set_tss_address(TSS).map_err(host_error("place the TSS"))?;
        turn_pmu_off(&vm)?;
        let routes = Arc::new(match spec.interrupt_controllers {
            InterruptControllers::Split => Routes::split(),
            _ => Routes::in_kernel(),
        });
        let split = match spec.interrupt_controllers {
            InterruptControllers::Full => {
                vm.create_irq_chip().map_err(host_error("create the interrupt controllers"))?;
                let config =
                    kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
                vm.create_pit2(config).map_err(host_error("create the PIT"))?;
                use_32_bit_apic_ids(&vm)?;
                routes.start(&vm).map_err(|source| HypervisorError::Host {
                    what: "route the interrupt wires",
                    source,
                })?;
                None
            }
            InterruptControllers::Split => {
                if vm.check_extension_raw(u64::from(KVM_CAP_SPLIT_IRQCHIP)) <= 0 {
                    return Err(HypervisorError::Unsupported("a split interrupt controller"));
                }
                enable(&vm, KVM_CAP_SPLIT_IRQCHIP, u64::from(PIN_GSIS))
                    .map_err(host_error("create the local APICs"))?;
                use_32_bit_apic_ids(&vm)?;
                Some(Split::new(&vm, &routes, &spec.clock)?)
            }
            InterruptControllers::None => None,
            _ => return Err(HypervisorError::Unsupported("these interrupt controllers")),
        };
        let dirty_log = dirty_log(kvm, &vm, spec.dirty_log);
        let native = vm_tsc_khz(&vm);
        let tsc_request = match spec.tsc {
            TscSpec::Khz(khz) if native != Some(khz) => {
                if !host.scales_tsc {
                    return Err(HypervisorError::Unsupported(
                        "a TSC frequency other than the host's",
                    ));
                }
                Some(khz)
            }
            _ => None,
        };
        let tsc_khz = OnceLock::new();
        if let Some(khz) = tsc_request.or(native) {
            let _ = tsc_khz.set(khz);
        }
        Ok(Self(Arc::new(Shared {
            split,
            vm,
            memory: Memory::new(host.slots, dirty_log),
            routes,
            host: host.clone(),
            controllers: spec.interrupt_controllers,
            vcpus: spec.vcpus,
            signal,
            tsc_request,
            tsc_khz,
            taken: Mutex::default(),
            has_doorbells,
        })))
    }

    fn is_full(&self) -> bool {
        self.0.controllers == InterruptControllers::Full
    }

    fn chip(&self, chip_id: u32) -> Result<kvm_irqchip> {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        self.0.vm.get_irqchip(&mut chip).map_err(host_error("read an interrupt controller"))?;
        Ok(chip)
    }
}

/// Makes a VM. A signal for this thread, whoever's, makes KVM give up; but the next attempt starts with
/// none pending, so that only as many signals as there are attempts could make it fail.
fn create_vm(kvm: &Kvm) -> std::result::Result<VmFd, vmm_sys_util::errno::Error> {
    let interrupted = |error: &vmm_sys_util::errno::Error| error.errno() == libc::EINTR;
    let mut outcome = kvm.create_vm();
    for _ in 1..CREATE_ATTEMPTS {
        match &outcome {
            Err(error) if interrupted(error) => outcome = kvm.create_vm(),
            _ => break,
        }
    }
    outcome
}

/// With 32-bit IDs the local APIC's saved page is the architecture's own in x2APIC mode too.
fn use_32_bit_apic_ids(vm: &VmFd) -> Result<()> {
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(vm, KVM_CAP_X2APIC_API, u64::from(flags)).map_err(host_error("enable 32-bit APIC IDs"))
}

/// No CPU model lists performance counters; AMD's are there all the same unless KVM is told (Linux
/// 5.18). Before the first vCPU.
fn turn_pmu_off(vm: &VmFd) -> Result<()> {
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY));
    if offered <= 0 || offered & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    enable(vm, KVM_CAP_PMU_CAPABILITY, u64::from(KVM_PMU_CAP_DISABLE))
        .map_err(host_error("turn the performance counters off"))
}

/// Sets up how KVM tells of written pages: as wanted, or as it can.
fn dirty_log(kvm: &Kvm, vm: &VmFd, wanted: DirtyLog) -> DirtyLogKind {
    if wanted == DirtyLog::Ring
        && let Some(capability) = ring::capability(kvm)
    {
        match enable(vm, capability, ring::BYTES as u64) {
            Ok(()) => return DirtyLogKind::Rings,
            Err(error) => log::warn!("KVM offers dirty rings and refuses them: {error}"),
        }
    }
    let manual = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)) & 1 != 0
        && enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1).is_ok();
    if manual { DirtyLogKind::ManualBitmap } else { DirtyLogKind::Bitmap }
}

fn enable(
    vm: &VmFd,
    cap: u32,
    argument: u64,
) -> std::result::Result<(), vmm_sys_util::errno::Error> {
    vm.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() })
}

/// The TSC frequency of vCPUs of this VM, where KVM tells it of a VM (since Linux 5.18).
fn vm_tsc_khz(vm: &VmFd) -> Option<u32> {
    // SAFETY: the request takes no argument; on older kernels it is refused.
    let khz = unsafe { ioctl(&vm.as_raw_fd(), KVM_GET_TSC_KHZ()) };
    u32::try_from(khz).ok().filter(|khz| *khz != 0)
}

impl Partition for KvmPartition {
    fn map(&self, at: GuestAddress, region: Arc<MemoryRegion>, access: MapAccess) -> Result<MapId> {
        self.0.memory.map(&self.0.vm, at, region, access)
    }

    fn unmap(&self, id: MapId) -> Result<()> {
        self.0.memory.unmap(&self.0.vm, id)
    }

    fn take_dirty(&self, id: MapId, into: &mut DirtyBitmap) -> Result<()> {
        self.0.memory.take_dirty(&self.0.vm, id, into)
    }

    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>> {
        cpuid::check(model, &self.0.host.features)?;
        // KVM keeps a vCPU until its VM goes, so an index is taken for good.
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if index >= self.0.vcpus || taken.contains(&index) {
            return Err(HypervisorError::VcpuIndex(index));
        }
        let vcpu = KvmVcpu::create(&self.0, index, model, self.tsc_khz())?;
        taken.push(index);
        Ok(Box::new(vcpu))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::new(KvmInterrupts(self.0.clone()))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.0.has_doorbells.then(|| Arc::new(KvmDoorbells(self.0.clone())) as Arc<dyn Doorbells>)
    }

    fn tsc_khz(&self) -> u32 {
        *self.0.tsc_khz.get_or_init(|| scratch_tsc_khz().unwrap_or(0))
    }

    fn save(&self) -> Result<PartitionState> {
        let clock = self.0.vm.get_clock().map_err(host_error("read the clock"))?;
        let mut state = convert::empty_state();
        state.clock_ns = clock.clock;
        if self.is_full() {
            let primary = self.chip(KVM_IRQCHIP_PIC_MASTER)?;
            let secondary = self.chip(KVM_IRQCHIP_PIC_SLAVE)?;
            state.pic = convert::pic(&primary, &secondary);
            state.ioapic = convert::ioapic(&self.chip(KVM_IRQCHIP_IOAPIC)?);
            let pit = self.0.vm.get_pit2().map_err(host_error("read the PIT"))?;
            state.pit = convert::pit(&pit, convert::monotonic_ns());
        }
        if let Some(split) = &self.0.split {
            split.save(&mut state);
        }
        Ok(state)
    }

    fn load(&self, from: &PartitionState) -> Result<()> {
        if self.is_full() {
            let [primary, secondary] = convert::kvm_pic(&from.pic)?;
            let ioapic = convert::kvm_ioapic(&from.ioapic)?;
            let pit = convert::kvm_pit(&from.pit)?;
            for chip in [primary, secondary, ioapic] {
                self.0.vm.set_irqchip(&chip).map_err(host_error("load an interrupt controller"))?;
            }
            self.0.vm.set_pit2(&pit).map_err(host_error("load the PIT"))?;
        }
        if let Some(split) = &self.0.split {
            split.load(from)?;
        }
        let clock = kvm_clock_data { clock: from.clock_ns, ..kvm_clock_data::default() };
        self.0.vm.set_clock(&clock).map_err(host_error("set the clock"))
    }
}

/// The TSC frequency as a vCPU of a VM made for the purpose tells it.
fn scratch_tsc_khz() -> Option<u32> {
    let vcpu = create_vm(&Kvm::new().ok()?).ok()?.create_vcpu(0).ok()?;
    vcpu.get_tsc_khz().ok()
}
