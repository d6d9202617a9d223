//! From a description to a machine.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmkit_boot::{Boot, BootContext};
use vmkit_device::{
    Bus, BusRange, Device, DeviceBuilder, EndSignal, IoSpace, MonotonicClock, ResourceAllocator,
    Resources,
};
use vmkit_guest::{Guest, protocol::PORT};
use vmkit_hypervisor::{
    Capabilities, CpuModel, DirtyLog, Hypervisor, InterruptControllers, MapAccess, Partition,
    PartitionSpec, TscSpec,
};
use vmkit_memory::{
    Backing, GuestAddress, GuestMemoryRegion, GuestRam, MemoryError, MemoryRegion, MmapRegion,
    RamLayout, RamRange,
};
use vmkit_virtio::{Vsock, VsockConnector};

use crate::control::Control;
use crate::machine::{Machine, Tracked};
use crate::placement::Placement;
use crate::timeline::Recorder;
use crate::vcpu_thread::Slot;
use crate::{Backend, Chipset, End, Vm, VmError, chipset};

/// Memory of a machine whose builder was not told, in bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;

/// Describes a machine. See [`Vm::builder`].
#[must_use = "a builder does nothing until `build`"]
pub struct VmBuilder {
    memory: u64,
    backing: Backing,
    vcpus: u32,
    backend: Backend,
    chipset: Chipset,
    model: Option<CpuModel>,
    tsc: TscSpec,
    interrupt_controllers: InterruptControllers,
    dirty_log: Option<DirtyLog>,
    boot: Option<Box<dyn Boot>>,
    devices: Vec<Box<dyn DeviceBuilder>>,
    agent: Guest,
    /// The socket device that the agent dials in through.
    agent_device: Option<VsockConnector>,
}

impl std::fmt::Debug for VmBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmBuilder")
            .field("memory", &self.memory)
            .field("vcpus", &self.vcpus)
            .field("backend", &self.backend)
            .field("chipset", &self.chipset)
            .field("devices", &self.devices.iter().map(|d| d.name()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl VmBuilder {
    pub(crate) fn new() -> Self {
        Self {
            memory: DEFAULT_MEMORY,
            backing: Backing::default(),
            vcpus: 1,
            backend: Backend::default(),
            chipset: Chipset::default(),
            model: None,
            tsc: TscSpec::default(),
            interrupt_controllers: InterruptControllers::default(),
            dirty_log: None,
            boot: None,
            devices: Vec::new(),
            agent: Guest::unreachable(),
            agent_device: None,
        }
    }

    /// Guest memory in bytes, a multiple of 4096; 512 MiB if not said. The host gives pages only as
    /// the guest touches them.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// What guest memory comes from; a memfd if not said.
    pub fn memory_backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Number of virtual processors, each on a thread of its own; 1 if not said.
    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// Which backend runs the machine; [`Backend::Auto`] if not said.
    ///
    /// KVM's runs are ended by a signal: `SIGRTMIN + 5`, unless the embedder opens KVM itself, as here for
    /// a choice like that of [`Backend::Auto`] with a signal of one's own:
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// use vmkit::kvm::{KickSignal, KvmHypervisor};
    /// use vmkit::{Backend, Vm};
    ///
    /// let signal = KickSignal::realtime(9).ok_or("there is no SIGRTMIN + 9")?;
    /// let kvm = KvmHypervisor::with_signal(signal)?;
    /// let backend = match kvm.probe() {
    ///     Ok(()) => Backend::Custom(Arc::new(kvm)),
    ///     Err(_) => Backend::Software,
    /// };
    /// let builder = Vm::builder().backend(backend);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// What processor the guest sees; everything the backend can give if not said, under the name of an
    /// Intel processor whatever the host's. A guest that is to choose its own mitigations of the host's
    /// processor bugs wants [`vmkit_kvm::host_model`].
    pub fn cpu_model(mut self, model: CpuModel) -> Self {
        self.model = Some(model);
        self
    }

    /// The guest's TSC frequency; what costs nothing if not said.
    pub fn tsc(mut self, tsc: TscSpec) -> Self {
        self.tsc = tsc;
        self
    }

    /// Where the interrupt controllers are; in the kernel where the backend is KVM, if not said. Full
    /// or split, the guest sees a PC's, and on the software processor they are the same.
    ///
    /// With [`InterruptControllers::None`] the guest has no interrupts, local APIC or timer: it polls,
    /// as no stock kernel does, and devices may have the chips' places. A PC's chipset would be no use
    /// to it, so this is for [`bare`](Self::bare) machines.
    pub fn interrupt_controllers(mut self, controllers: InterruptControllers) -> Self {
        self.interrupt_controllers = controllers;
        self
    }

    /// Keeps track of the pages of memory that are written, for
    /// [`Paused::take_dirty`](crate::Paused::take_dirty); not done if not said, because it costs the guest.
    ///
    /// [`DirtyLog::Ring`] needs a KVM that has dirty rings, as
    /// [`Capabilities::dirty_ring`](vmkit_hypervisor::Capabilities::dirty_ring) tells (Linux 5.11 and
    /// hardware that KVM itself runs on); anywhere else it is as [`DirtyLog::Bitmap`].
    ///
    /// ```
    /// # use vmkit::{Backend, DirtyLog, Vm, boot::Flat};
    /// let vm = Vm::builder()
    ///     .memory(2 << 20)
    ///     .backend(Backend::Software)
    ///     .bare()
    ///     .dirty_log(DirtyLog::Ring)
    ///     .boot(Flat::at(0x1000, vec![0xF4]))
    ///     .build()?;
    /// # Ok::<(), vmkit::VmError>(())
    /// ```
    pub fn dirty_log(mut self, kind: DirtyLog) -> Self {
        self.dirty_log = Some(kind);
        self
    }

    /// Which devices the machine holds beside those of [`device`](Self::device); a PC's if not said.
    pub fn chipset(mut self, chipset: Chipset) -> Self {
        self.chipset = chipset;
        self
    }

    /// No devices but those of [`device`](Self::device): short for `chipset(Chipset::Bare)`.
    pub fn bare(self) -> Self {
        self.chipset(Chipset::Bare)
    }

    /// What the machine boots.
    pub fn boot(mut self, guest: impl Boot + 'static) -> Self {
        self.boot = Some(Box::new(guest));
        self
    }

    /// Adds a device: one of vmkit's, or one of the embedder's own. Here a machine has nothing but one
    /// that doubles numbers and ends the machine; [`vmkit_device`] shows one with an interrupt and a
    /// saved state.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU8, Ordering};
    ///
    /// use vmkit::boot::Flat;
    /// use vmkit::device::*;
    /// use vmkit::{Backend, End, Vm};
    ///
    /// struct Doubler;
    ///
    /// impl DeviceBuilder for Doubler {
    ///     fn name(&self) -> String {
    ///         "doubler".into()
    ///     }
    ///     fn needs(&self) -> Needs {
    ///         Needs { io: vec![IoNeed::ports(0x99, 2)], irqs: vec![] }
    ///     }
    ///     fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
    ///         Ok(Arc::new(Running { number: AtomicU8::new(0), end: resources.end }))
    ///     }
    /// }
    ///
    /// struct Running {
    ///     number: AtomicU8,
    ///     end: EndSignal,
    /// }
    ///
    /// impl Device for Running {
    ///     fn name(&self) -> &str {
    ///         "doubler"
    ///     }
    ///     fn announce(&self) -> Vec<Announcement> {
    ///         Vec::new()
    ///     }
    ///     fn read(&self, _region: usize, _offset: u64, data: &mut [u8]) {
    ///         data.fill(self.number.load(Ordering::Relaxed).wrapping_mul(2));
    ///     }
    ///     fn write(&self, _region: usize, offset: u64, data: &[u8]) -> IoFlow {
    ///         let [number] = *data else { return IoFlow::Continue };
    ///         if offset == 0 {
    ///             self.number.store(number, Ordering::Relaxed);
    ///             return IoFlow::Continue;
    ///         }
    ///         self.end.raise(GuestEnd::ExitCode(number.into()));
    ///         IoFlow::Stop
    ///     }
    ///     fn start(&self) -> Result<(), DeviceError> {
    ///         Ok(())
    ///     }
    ///     fn pause(&self) {}
    ///     fn reset(&self) {}
    ///     fn save(&self) -> Saved {
    ///         Saved::Cannot("it is an example")
    ///     }
    ///     fn load(&self, _: &[Section]) -> Result<(), DeviceError> {
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let code = [
    ///     &[0xB0, 21][..], // mov al, 21
    ///     &[0xE6, 0x99],   // out 0x99, al
    ///     &[0xE4, 0x99],   // in al, 0x99
    ///     &[0xE6, 0x9A],   // out 0x9A, al
    /// ];
    /// let vm = Vm::builder()
    ///     .memory(2 << 20)
    ///     .backend(Backend::Software)
    ///     .bare()
    ///     .device(Doubler)
    ///     .boot(Flat::at(0x1000, code.concat()))
    ///     .build()?;
    /// assert_eq!(vm.run()?, End::ExitCode(42));
    /// # Ok::<(), vmkit::VmError>(())
    /// ```
    pub fn device(self, device: impl DeviceBuilder + 'static) -> Self {
        self.boxed_device(Box::new(device))
    }

    /// Adds a device whose type is not known here.
    pub fn boxed_device(mut self, device: Box<dyn DeviceBuilder>) -> Self {
        self.devices.push(device);
        self
    }

    /// Listens for the guest's agent on `vsock`, which must also become a device of the machine:
    /// [`build`](Self::build) fails with [`VmError::AgentWithoutDevice`] if it does not.
    /// [`RunningVm::guest`](crate::RunningVm::guest) then reaches commands and files of the guest, once it
    /// has started [`guest::AGENT`](vmkit_guest::AGENT).
    ///
    /// ```no_run
    /// # use vmkit::{Vm, boot::Linux, virtio::Vsock};
    /// let mut vsock = Vsock::new(3)?;
    /// let vm = Vm::builder()
    ///     .guest_agent(&mut vsock)
    ///     .device(vsock)
    ///     .boot(Linux::bzimage("vmlinuz")?.initrd("with-agent.img")?)
    ///     .build()?
    ///     .start()?;
    /// let output = vm.guest().exec("uname").arg("-a").output()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn guest_agent(mut self, vsock: &mut Vsock) -> Self {
        self.agent_device = Some(vsock.connector());
        let listener = vsock.listen(PORT);
        self.agent = Guest::listening(move |limit| listener.accept_timeout(limit));
        self
    }

    /// Builds the machine: memory, partition, devices, the guest's image, processors. No guest
    /// instruction is executed, and no thread is started.
    ///
    /// # Errors
    /// [`VmError`] naming what could not be had. Everything that had been made is freed.
    pub fn build(self) -> Result<Vm, VmError> {
        let mut timeline = Recorder::begin();
        let guest = self.boot.ok_or(VmError::NothingToBoot)?;
        let none = self.interrupt_controllers == InterruptControllers::None;
        if none && self.chipset != Chipset::Bare {
            return Err(VmError::NoInterruptControllers);
        }
        let hypervisor = self.backend.hypervisor()?;
        let capabilities = hypervisor.capabilities().clone();
        if self.vcpus == 0 || self.vcpus > capabilities.max_vcpus {
            return Err(VmError::VcpuCount {
                wanted: self.vcpus,
                backend: capabilities.name,
                most: capabilities.max_vcpus,
            });
        }
        let model = self.model.unwrap_or_else(|| everything(&capabilities));
        let layout = RamLayout::pc(self.memory)?;
        let (mut builders, power_button) = chipset::devices(self.chipset, &self.devices);
        builders.extend(self.devices);
        let addresses = 1_u64 << model.physical_bits.min(52);
        let placement = Placement::of(&builders, &layout, addresses)?;
        let mut regions = regions(&layout, self.backing)?;
        regions.extend(placement.regions);
        let memory = regions.iter().map(|(region, _)| region.clone()).collect();
        let memory =
            GuestRam::from_arc_regions(memory).map_err(|_| MemoryError::Overlap(layout.bytes()))?;

        let clock = Arc::new(MonotonicClock::new());
        clock.pause();
        let mut spec = PartitionSpec::new(self.vcpus, clock.clone());
        spec.tsc = self.tsc;
        spec.interrupt_controllers = self.interrupt_controllers;
        spec.dirty_log = self.dirty_log.unwrap_or_default();
        let (partition, tracked) =
            partition(&*hypervisor, &spec, regions, self.dirty_log.is_some())?;

        let control = Arc::new(Control::default());
        let end = {
            let control = control.clone();
            EndSignal::with_hook(move |end| control.finish(Ok(End::from(end))))
        };
        let agent = self.agent.clone();
        control.at_end(move || agent.close());
        let mut resources =
            Resources::new(memory.clone(), clock.clone(), end, partition.interrupts());
        resources.doorbells = partition.doorbells();
        let builders = builders.into_iter().zip(placement.places);
        let mut allocator = ResourceAllocator::new(resources.interrupts.clone());
        reserve(&mut allocator, self.interrupt_controllers, addresses);
        let (bus, devices) = attach(builders, &resources, allocator)?;
        if self.agent_device.is_some_and(|vsock| !vsock.is_plugged()) {
            return Err(VmError::AgentWithoutDevice);
        }

        timeline.load_began = Instant::now();
        let announcements: Vec<_> = devices.iter().flat_map(|d| d.announce()).collect();
        let context =
            BootContext::new(&memory, &layout).vcpus(self.vcpus).announcements(&announcements);
        let entry = guest.load(&context)?;
        timeline.loaded = Instant::now();

        let mut slots = Vec::new();
        for index in 0..self.vcpus {
            let mut vcpu = partition.create_vcpu(index, &model)?;
            if index == 0 {
                vcpu.set(entry.set, &entry.state)?;
            }
            slots.push(Slot::new(vcpu));
        }
        control.set_kicks(slots.iter().map(|slot| slot.lock().kick()).collect());
        timeline.built = Instant::now();
        Ok(Vm::new(Machine {
            slots,
            bus,
            devices,
            partition,
            clock,
            agent: self.agent,
            memory,
            tracked,
            layout,
            control,
            power_button,
            capabilities,
            model,
            timeline,
            threads: Mutex::default(),
        }))
    }
}

/// The model that lists all a backend has.
fn everything(capabilities: &Capabilities) -> CpuModel {
    let mut model = CpuModel::with_features(capabilities.name, capabilities.features);
    model.physical_bits = model.physical_bits.min(capabilities.physical_bits);
    model
}

type Regions = Vec<(Arc<MemoryRegion>, MapAccess)>;

/// Maps all of `layout` on the host.
fn regions(layout: &RamLayout, backing: Backing) -> Result<Regions, MemoryError> {
    let ranges = layout.ranges().iter();
    let region = |r: &RamRange| vmkit_memory::region_at(r.start, r.len, backing).map(Arc::new);
    ranges.map(|range| Ok((region(range)?, MapAccess::WRITE))).collect()
}

/// Makes the partition and shows it all of `memory`. With `track`, what can be written is tracked.
fn partition(
    hypervisor: &dyn Hypervisor,
    spec: &PartitionSpec,
    memory: Regions,
    track: bool,
) -> Result<(Arc<dyn Partition>, Vec<Tracked>), VmError> {
    let partition = hypervisor.create(spec)?;
    let mut tracked = Vec::new();
    for (region, mut access) in memory {
        let track = track && access.contains(MapAccess::WRITE);
        access.set(MapAccess::TRACK_DIRTY, track);
        let map = partition.map(region.start_addr(), region.clone(), access)?;
        if track {
            MmapRegion::bitmap(&region).set_tracking(true);
            tracked.push(Tracked { region, map });
        }
    }
    Ok((partition, tracked))
}

/// Where accesses go to a PC's interrupt controllers and timer, and not to the bus.
const CONTROLLERS: &[(IoSpace, u64, u64, &str)] = &[
    (IoSpace::Pio, 0x20, 0x21, "the interrupt controller"),
    (IoSpace::Pio, 0x40, 0x43, "the timer"),
    (IoSpace::Pio, 0x61, 0x61, "the timer's gate"),
    (IoSpace::Pio, 0xA0, 0xA1, "the interrupt controller"),
    (IoSpace::Pio, 0x4D0, 0x4D1, "the interrupt controller"),
    (IoSpace::Mmio, 0xFEC0_0000, 0xFEC0_0FFF, "the IOAPIC"),
    (IoSpace::Mmio, 0xFEE0_0000, 0xFEEF_FFFF, "the local APIC"),
];

/// Keeps devices away from where the guest would never reach them. `addresses` is how many the
/// processor has.
fn reserve(allocator: &mut ResourceAllocator, controllers: InterruptControllers, addresses: u64) {
    if controllers != InterruptControllers::None {
        for &(space, start, last, what) in CONTROLLERS {
            allocator.reserve(space, start, last, what);
        }
    }
    let what = "the end of the processor's addresses";
    allocator.reserve(IoSpace::Mmio, addresses, u64::MAX, what);
}

type Attached = (Arc<Bus>, Vec<Arc<dyn Device>>);

/// Gives each device what it needs and puts it on the bus.
fn attach(
    builders: impl Iterator<Item = (Box<dyn DeviceBuilder>, Vec<GuestAddress>)>,
    common: &Resources,
    mut allocator: ResourceAllocator,
) -> Result<Attached, VmError> {
    let bus = Arc::new(Bus::new());
    let mut names = HashSet::new();
    let mut devices = Vec::new();
    for (builder, placed) in builders {
        let name = builder.name();
        if !names.insert(name.clone()) {
            return Err(VmError::DuplicateDevice(name));
        }
        let needs = builder.needs();
        let mut resources = common.clone();
        resources.placed = placed;
        allocator.assign(&name, &needs, &mut resources)?;
        let starts = resources.io.clone();
        let device = builder.build(resources)?;
        for (region, (need, start)) in needs.io.iter().zip(starts).enumerate() {
            let range = BusRange { space: need.space, start, len: need.len };
            bus.insert(range, device.clone(), region)?;
        }
        devices.push(device);
    }
    Ok((bus, devices))
}

#[cfg(test)]
mod tests {
    use vmkit_boot::Flat;
    use vmkit_device::{
        Announcement, DeviceError, IoFlow, IoNeed, Needs, RangeReason, ResourceError, Saved,
        Section,
    };
    use vmkit_irqchip::Board;
    use vmkit_pci::PciHost;
    use vmkit_virtio::Pci;

    use super::*;

    /// A device with one range that does nothing.
    struct At(IoNeed);
    impl DeviceBuilder for At {
        fn name(&self) -> String {
            "mine".into()
        }
        fn needs(&self) -> Needs {
            Needs { io: vec![self.0], irqs: vec![] }
        }
        fn build(self: Box<Self>, _: Resources) -> Result<Arc<dyn Device>, DeviceError> {
            Ok(Arc::new(*self))
        }
    }
    impl Device for At {
        fn name(&self) -> &str {
            "mine"
        }
        fn announce(&self) -> Vec<Announcement> {
            Vec::new()
        }
        fn read(&self, _: usize, _: u64, _: &mut [u8]) {}
        fn write(&self, _: usize, _: u64, _: &[u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn start(&self) -> Result<(), DeviceError> {
            Ok(())
        }
        fn pause(&self) {}
        fn reset(&self) {}
        fn save(&self) -> Saved {
            Saved::Stateless
        }
        fn load(&self, _: &[Section]) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    fn bare() -> VmBuilder {
        Vm::builder()
            .memory(2 << 20)
            .backend(Backend::Software)
            .bare()
            .boot(Flat::at(0x1000, vec![0xF4]))
    }

    #[test]
    fn a_device_that_no_guest_could_reach_is_refused() {
        let mmio = |at| IoNeed { space: IoSpace::Mmio, at: Some(at), len: 0x10, align: 1 };
        let chips = [
            mmio(0xFEC0_0000),
            mmio(0xFEDF_FFF8),
            mmio(0xFEE0_0080),
            IoNeed::ports(0x21, 1),
            IoNeed::ports(0x3C, 5),
            IoNeed::ports(0xA0, 1),
        ];
        let nowhere = [mmio(0xB8000), mmio(0x1F_FFF8), mmio(1 << 52)];
        for need in chips.into_iter().chain(nowhere) {
            match bare().device(At(need)).build() {
                Err(VmError::Resources(ResourceError::Range {
                    device,
                    reason: RangeReason::Unreachable(_),
                    ..
                })) if device == "mine" => {}
                other => panic!("{need:?}: {other:?}"),
            }
        }
        // Where there are no chips, a device may take their place.
        for need in chips {
            let none = bare().interrupt_controllers(InterruptControllers::None);
            none.device(At(need)).build().unwrap();
        }
    }

    #[test]
    fn a_pcs_chipset_without_interrupt_controllers_is_refused() {
        let none = || bare().interrupt_controllers(InterruptControllers::None);
        let error = none().chipset(Chipset::Pc).build().unwrap_err();
        assert!(matches!(error, VmError::NoInterruptControllers), "{error}");
        none().build().unwrap();
    }

    #[test]
    fn an_agent_whose_socket_device_is_not_plugged_in_is_refused() {
        let mut kept = Vsock::new(3).unwrap();
        let mut dropped = Vsock::new(4).unwrap();
        let builders = [bare().guest_agent(&mut kept), bare().guest_agent(&mut dropped)];
        drop(dropped);
        for builder in builders {
            let error = builder.build().unwrap_err();
            assert!(matches!(error, VmError::AgentWithoutDevice), "{error}");
        }
        let (mut mmio, mut pci) = (Vsock::new(3).unwrap(), Vsock::new(3).unwrap());
        let builder = bare().guest_agent(&mut mmio).device(mmio.named("socket"));
        builder.build().unwrap();
        let builder = bare().guest_agent(&mut pci);
        builder.device(PciHost::new().function(Pci::new(pci))).build().unwrap();
    }

    #[test]
    fn the_places_of_the_chips_are_those_that_the_backends_answer() {
        let reserved = |space, at: u64| {
            CONTROLLERS
                .iter()
                .any(|&(s, start, last, _)| s == space && (start..=last).contains(&at))
        };
        for port in 0..=u16::MAX {
            assert_eq!(reserved(IoSpace::Pio, port.into()), Board::has_port(port), "{port:#x}");
        }
        let page = (0xFEBF_F000..0xFEC0_2000).step_by(8);
        for at in page {
            assert_eq!(reserved(IoSpace::Mmio, at), Board::ioapic_offset(at).is_some(), "{at:#x}");
        }
    }
}
