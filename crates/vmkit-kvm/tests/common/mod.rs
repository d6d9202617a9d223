//! A small machine for guest programs: 1 MiB of RAM, long mode, the first GiB mapped one to one.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use vmkit_device::MonotonicClock;
use vmkit_hypervisor::guest_memory::{
    Backing, Bytes, GuestAddress, MemoryRegion, MemoryRegionAddress, region_at,
};
use vmkit_hypervisor::x86::{Cr0, Cr4, DescriptorTable, Efer, MpState, Segment};
use vmkit_hypervisor::{
    CpuModel, Hypervisor, InterruptControllers, IoFlow, MapAccess, MapId, Partition, PartitionSpec,
    StateSet, Vcpu, VcpuIo, VcpuState, VmExit,
};
use vmkit_kvm::{KvmHypervisor, best_available};

/// A function that returns the machine code of a guest program in Intel syntax, to be loaded
/// anywhere.
#[macro_export]
macro_rules! guest_program {
    ($name:ident: $($line:literal),+ $(,)?) => {
        #[allow(unsafe_code, reason = "guest programs are assembled into the test's text")]
        fn $name() -> &'static [u8] {
            // SAFETY: never called: its bytes go to a guest.
            #[unsafe(naked)]
            unsafe extern "C" fn code() {
                core::arch::naked_asm!(".long 998f - 997f", "997:", $($line,)+ "998:")
            }
            let start = code as unsafe extern "C" fn() as *const u8;
            // SAFETY: the body is a 32-bit length and as many bytes, in text, which is readable.
            unsafe {
                let len = start.cast::<u32>().read_unaligned() as usize;
                std::slice::from_raw_parts(start.add(4), len)
            }
        }
    };
}

/// Where programs are loaded.
pub const CODE: u64 = 0x1_0000;
/// Where their stack starts, downwards.
pub const STACK: u64 = 0x8_0000;
/// A page for their data.
pub const DATA: u64 = 0x9_0000;
/// Bytes of RAM.
pub const RAM: u64 = 1 << 20;
/// Mapped by the page tables, with nothing behind it: MMIO.
pub const MMIO: u64 = 0x1000_0000;
/// A write to this port ends the run.
pub const STOP: u16 = 0xF4;
const GDT: u64 = 0x500;
/// The IDT, 256 gates.
pub const IDT: u64 = 0x4000;

/// KVM, if it can run guests at all.
pub fn kvm() -> Option<&'static KvmHypervisor> {
    static KVM: OnceLock<Option<KvmHypervisor>> = OnceLock::new();
    let kvm = KVM.get_or_init(|| {
        let kvm = KvmHypervisor::open().ok()?;
        kvm.can_run_simple_guests().ok()?;
        Some(kvm)
    });
    if kvm.is_none() {
        eprintln!("SKIPPED: no KVM here that can run guests");
    }
    kvm.as_ref()
}

/// KVM, if it can run 64-bit kernels.
pub fn true_kvm() -> Option<&'static KvmHypervisor> {
    static TRUE: OnceLock<bool> = OnceLock::new();
    let kvm = kvm()?;
    let usable = TRUE.get_or_init(|| {
        let probe = kvm.probe();
        if let Err(why) = &probe {
            eprintln!("SKIPPED: {why}");
        }
        probe.is_ok()
    });
    usable.then_some(kvm)
}

pub struct Machine {
    pub partition: Arc<dyn Partition>,
    pub ram: Arc<MemoryRegion>,
    pub map: MapId,
    pub model: CpuModel,
}

impl Machine {
    pub fn new(
        kvm: &KvmHypervisor,
        vcpus: u32,
        controllers: InterruptControllers,
        access: MapAccess,
    ) -> Self {
        let mut spec = PartitionSpec::new(vcpus, Arc::new(MonotonicClock::new()));
        spec.interrupt_controllers = controllers;
        Self::of(kvm, &spec, access)
    }

    pub fn of(kvm: &KvmHypervisor, spec: &PartitionSpec, access: MapAccess) -> Self {
        let partition = kvm.create(spec).unwrap();
        let ram = Arc::new(region_at(GuestAddress(0), RAM, Backing::Memfd).unwrap());
        let map = partition.map(GuestAddress(0), ram.clone(), access).unwrap();
        let machine = Self {
            partition,
            ram,
            map,
            model: best_available(&CpuModel::x86_64_v2(), kvm.capabilities()),
        };
        machine.write(GDT + 8, &0x00AF_9B00_0000_FFFF_u64.to_le_bytes());
        machine.write(GDT + 16, &0x00CF_9300_0000_FFFF_u64.to_le_bytes());
        machine.write(0x1000, &0x2023_u64.to_le_bytes());
        machine.write(0x2000, &0x3023_u64.to_le_bytes());
        for entry in 0..512_u64 {
            machine.write(0x3000 + entry * 8, &(entry << 21 | 0xE3).to_le_bytes());
        }
        machine
    }

    /// One vCPU, about to run `program`.
    pub fn with_program(kvm: &KvmHypervisor, program: &[u8]) -> (Self, Box<dyn Vcpu>) {
        let machine = Self::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
        let vcpu = machine.vcpu(0, program);
        (machine, vcpu)
    }

    pub fn vcpu(&self, index: u32, program: &[u8]) -> Box<dyn Vcpu> {
        let mut vcpu = self.partition.create_vcpu(index, &self.model).unwrap();
        self.start(vcpu.as_mut(), program);
        vcpu
    }

    /// Loads `program` and points `vcpu` at it.
    pub fn start(&self, vcpu: &mut dyn Vcpu, program: &[u8]) {
        self.write(CODE, program);
        vcpu.set(StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL, &long_mode(CODE))
            .unwrap();
    }

    /// Has interrupt or exception `vector` go to `handler`, an address of the guest.
    pub fn gate(&self, vector: u8, handler: u64) {
        let gate = handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48;
        self.write(IDT + u64::from(vector) * 16, &gate.to_le_bytes());
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, MemoryRegionAddress(at)).unwrap();
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, MemoryRegionAddress(at)).unwrap();
        bytes
    }

    pub fn read_u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at))
    }
}

/// Runs and kicks `vcpu` until it waits in a HLT: how soon it comes there is the host's business.
pub fn run_until_halted(vcpu: &mut dyn Vcpu) {
    let start = Instant::now();
    let mut state = VcpuState::default();
    while state.mp != MpState::Halted {
        assert!(start.elapsed() < Duration::from_secs(30), "it does not halt: {state:?}");
        let kick = vcpu.kick();
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            kick.kick();
        });
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Kicked);
        kicker.join().unwrap();
        vcpu.get(StateSet::all(), &mut state).unwrap();
    }
}

/// A vCPU in long mode at `rip`, interrupts off.
pub fn long_mode(rip: u64) -> VcpuState {
    let mut state = VcpuState::default();
    let data = Segment::data(16);
    let s = &mut state.segments;
    s.cs = Segment::code64(8);
    (s.ds, s.es, s.ss, s.fs, s.gs) = (data, data, data, data, data);
    s.gdt = DescriptorTable { base: GDT, limit: 23 };
    s.idt = DescriptorTable { base: IDT, limit: 0xFFF };
    let c = &mut state.control;
    c.cr0 = (Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG).bits();
    c.cr3 = 0x1000;
    c.cr4 = (Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT).bits();
    c.efer = (Efer::LME | Efer::LMA).bits();
    state.general.rip = rip;
    state.general.set_rsp(STACK);
    state
}

/// One access that reached the world outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// Records accesses, and answers reads with 1, 2, 3, …, byte by byte.
#[derive(Default)]
pub struct Recorder {
    pub log: Vec<Access>,
    pub next: u8,
    /// Stops at every access, not only at a write to [`STOP`].
    pub stop_always: bool,
}

impl Recorder {
    fn answer(&mut self, data: &mut [u8]) {
        for byte in data {
            self.next = self.next.wrapping_add(1);
            *byte = self.next;
        }
    }

    fn flow(&self, stop: bool) -> IoFlow {
        if stop || self.stop_always { IoFlow::Stop } else { IoFlow::Continue }
    }
}

impl VcpuIo for Recorder {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> IoFlow {
        self.log.push(Access::In(port, data.len()));
        self.answer(data);
        self.flow(false)
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> IoFlow {
        if port != STOP {
            self.log.push(Access::Out(port, data.to_vec()));
        }
        self.flow(port == STOP)
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) -> IoFlow {
        self.log.push(Access::Read(address, data.len()));
        self.answer(data);
        self.flow(false)
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) -> IoFlow {
        self.log.push(Access::Write(address, data.to_vec()));
        self.flow(false)
    }
}
