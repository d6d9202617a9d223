//! A small machine for guest programs: RAM, descriptor tables, handlers that report exceptions, and
//! vCPUs that cannot hang a case.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use vmkit_device::memory::region_at;
use vmkit_device::memory::{Backing, Bytes, GuestAddress, MemoryRegion, MemoryRegionAddress};
use vmkit_device::{InterruptSink, MonotonicClock};

use super::Failure;
use super::asm::assemble;
use super::cpu::Cpu;
use super::tables;
use crate::{
    CpuModel, Hypervisor, InterruptControllers, MapAccess, MapId, Partition, PartitionSpec,
    PartitionState, StateSet, VcpuState,
};

/// A write to this port ends the run.
pub(super) const STOP_PORT: u32 = 0xF4;
/// The handlers of exceptions write to this port.
pub(super) const FAULT_PORT: u32 = 0xF5;

/// Bytes of RAM, from address 0.
pub(super) const RAM: u64 = 4 << 20;
/// Where programs are loaded.
pub(super) const CODE: u64 = 0x1_0000;
/// Where more code goes: handlers, other vCPUs' programs.
pub(super) const CODE2: u64 = 0x2_0000;
/// Top of the stack of vCPU 0; those of others are each 8 KiB further down.
pub(super) const STACK: u64 = 0x8_0000;
/// Top of the stack for exceptions that come from ring 3.
pub(super) const STACK_RING0: u64 = 0x6_8000;
/// Top of the stack of IST 1.
pub(super) const STACK_IST1: u64 = 0x6_4000;
/// Top of the stack of ring 3.
pub(super) const STACK_RING3: u64 = 0x6_0000;
/// Pages for data.
pub(super) const DATA: u64 = 0x9_0000;
/// Pages for a case's own page tables.
pub(super) const TABLES: u64 = 0x10_0000;
/// Mapped by the page tables, with nothing behind it: MMIO.
pub(super) const MMIO: u64 = 0x1000_0000;
/// The local APIC.
pub(super) const APIC: u64 = 0xFEE0_0000;
/// The IOAPIC.
pub(super) const IOAPIC: u64 = 0xFEC0_0000;

/// The mode programs start in, at ring 0, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Real mode, CS at [`CODE`], DS and ES at [`DATA`].
    Real,
    /// 32-bit protected mode, flat, without paging.
    Protected,
    /// 64-bit mode, the first GiB and the interrupt controllers mapped one to one, for all rings.
    Long,
}

impl Mode {
    pub fn bits(self) -> u32 {
        match self {
            Self::Real => 16,
            Self::Protected => 32,
            Self::Long => 64,
        }
    }
}

/// A partition with its RAM and its first vCPU.
pub(super) struct Guest {
    pub partition: Arc<dyn Partition>,
    pub interrupts: Arc<dyn InterruptSink>,
    pub ram: Arc<MemoryRegion>,
    pub map: MapId,
    pub model: CpuModel,
    pub mode: Mode,
    /// vCPU 0.
    pub cpu: Cpu,
}

/// The richest model that a backend can give.
pub(super) fn best_model(hypervisor: &dyn Hypervisor) -> CpuModel {
    let capabilities = hypervisor.capabilities();
    let mut model = CpuModel::x86_64_v3();
    model.features = model.features.intersection(capabilities.features);
    model.physical_bits = model.physical_bits.min(capabilities.physical_bits);
    model
}

impl Guest {
    /// One vCPU in 64-bit mode, a PC's interrupt controllers.
    pub fn long(hypervisor: &dyn Hypervisor) -> Result<Self, Failure> {
        Self::new(hypervisor, Mode::Long, 1)
    }

    /// One vCPU in `mode`, room for `vcpus`.
    pub fn new(hypervisor: &dyn Hypervisor, mode: Mode, vcpus: u32) -> Result<Self, Failure> {
        Self::with(hypervisor, mode, vcpus, MapAccess::WRITE, best_model(hypervisor))
    }

    /// As [`new`](Self::new), with RAM that the guest may `access`, and another CPU model.
    pub fn with(
        hypervisor: &dyn Hypervisor,
        mode: Mode,
        vcpus: u32,
        access: MapAccess,
        model: CpuModel,
    ) -> Result<Self, Failure> {
        let mut spec = PartitionSpec::new(vcpus, Arc::new(MonotonicClock::new()));
        spec.interrupt_controllers = InterruptControllers::Full;
        Self::of(hypervisor, &spec, mode, access, model)
    }

    /// One vCPU in 64-bit mode, no interrupt controllers.
    pub fn bare(hypervisor: &dyn Hypervisor) -> Result<Self, Failure> {
        let mut spec = PartitionSpec::new(1, Arc::new(MonotonicClock::new()));
        spec.interrupt_controllers = InterruptControllers::None;
        Self::of(hypervisor, &spec, Mode::Long, MapAccess::WRITE, best_model(hypervisor))
    }

    fn of(
        hypervisor: &dyn Hypervisor,
        spec: &PartitionSpec,
        mode: Mode,
        access: MapAccess,
        model: CpuModel,
    ) -> Result<Self, Failure> {
        let partition = hypervisor.create(spec)?;
        let ram = Arc::new(region_at(GuestAddress(0), RAM, Backing::Memfd)?);
        let map = partition.map(GuestAddress(0), ram.clone(), access)?;
        tables::write(&ram, mode)?;
        let vcpu = partition.create_vcpu(0, &model)?;
        let mut cpu = Cpu::new(vcpu, ram.clone())?;
        cpu.start(mode, 0)?;
        let interrupts = partition.interrupts();
        Ok(Self { partition, interrupts, ram, map, model, mode, cpu })
    }

    /// Another vCPU, as after reset: it waits for a start-up IPI.
    pub fn add_cpu(&self, index: u32) -> Result<Cpu, Failure> {
        Cpu::new(self.partition.create_vcpu(index, &self.model)?, self.ram.clone())
    }

    /// Another vCPU that runs what is loaded at `entry`, in the machine's mode.
    pub fn add_running_cpu(&self, index: u32, entry: u64) -> Result<Cpu, Failure> {
        let mut cpu = self.add_cpu(index)?;
        cpu.start(self.mode, index)?;
        cpu.jump(entry)?;
        cpu.make_runnable()?;
        Ok(cpu)
    }

    /// Loads a program for vCPU 0 at [`CODE`] and starts it in the machine's mode.
    pub fn load(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), Failure> {
        let at = if self.mode == Mode::Real { 0 } else { CODE };
        let code = assemble(self.mode.bits(), at, write)?;
        self.write(CODE, &code)?;
        self.cpu.start(self.mode, 0)
    }

    /// Loads code for the machine's mode at `at`; its length.
    pub fn load_at(
        &self,
        at: u64,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<u64, Failure> {
        let code = assemble(self.mode.bits(), at, write)?;
        self.write(at, &code)?;
        Ok(code.len() as u64)
    }

    /// Has `vector` go to `handler` instead of the handler that reports.
    pub fn gate(&self, vector: u8, handler: u64) -> Result<(), Failure> {
        tables::gate(&self.ram, self.mode, vector, handler, 0)
    }

    /// Another machine in 64-bit mode, which goes on from this one's memory and from the state of its
    /// vCPU and its chips.
    pub fn twin(
        &self,
        hypervisor: &dyn Hypervisor,
        cpu: &VcpuState,
        chips: &PartitionState,
    ) -> Result<Self, Failure> {
        let mut twin = Self::long(hypervisor)?;
        let mut memory = vec![0; RAM as usize];
        self.read_into(0, &mut memory)?;
        twin.write(0, &memory)?;
        twin.partition.load(chips)?;
        twin.cpu.set(StateSet::all(), cpu)?;
        Ok(twin)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.ram.write_slice(bytes, MemoryRegionAddress(at))?)
    }

    pub fn write_u64(&self, at: u64, value: u64) -> Result<(), Failure> {
        self.write(at, &value.to_le_bytes())
    }

    pub fn write_u32(&self, at: u64, value: u32) -> Result<(), Failure> {
        self.write(at, &value.to_le_bytes())
    }

    pub fn read_into(&self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        Ok(self.ram.read_slice(bytes, MemoryRegionAddress(at))?)
    }

    pub fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], Failure> {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, MemoryRegionAddress(at))?;
        Ok(bytes)
    }

    pub fn read_u64(&self, at: u64) -> Result<u64, Failure> {
        Ok(u64::from_le_bytes(self.read(at)?))
    }

    pub fn read_u32(&self, at: u64) -> Result<u32, Failure> {
        Ok(u32::from_le_bytes(self.read(at)?))
    }
}
