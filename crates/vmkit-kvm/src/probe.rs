//! Can this KVM really run guests?
//!
//! `/dev/kvm` of a nested or paravirtual host can open, make VMs and run the first instructions of a
//! guest, and still fail on instructions that every 64-bit kernel needs. So a small guest executes
//! them, in long mode: INT3 through an IDT, FXRSTOR, XRSTOR, CMPXCHG16B. It reports each step by a
//! port write, and checks each result.

#![allow(unsafe_code, reason = "the guest's code is assembled into this crate's text")]

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use thiserror::Error;
use vmkit_hypervisor::guest_memory::{Backing, Bytes, GuestAddress, MemoryRegion, region_at};
use vmkit_hypervisor::guest_memory::{GuestMemoryRegion, MemoryRegionAddress};
use vmkit_hypervisor::x86::{Cr0, Cr4, DescriptorTable, Efer, Segment};
use vmkit_hypervisor::{
    CpuModel, Feature, Hypervisor, HypervisorError, InterruptControllers, IoFlow, MapAccess,
    PartitionSpec, Result, StateSet, Unavailable, Vcpu, VcpuIo, VcpuState, VmExit,
};

use crate::{KvmHypervisor, best_available};

/// What the probe guest tries, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProbeStep {
    /// The first instruction.
    Start,
    /// INT3 through an IDT, and back by IRETQ.
    Breakpoint,
    /// FXRSTOR and FXSAVE.
    Fxrstor,
    /// XRSTOR, where KVM offers XSAVE.
    Xrstor,
    /// CMPXCHG16B.
    Cmpxchg16b,
}

impl ProbeStep {
    const ALL: [Self; 5] =
        [Self::Start, Self::Breakpoint, Self::Fxrstor, Self::Xrstor, Self::Cmpxchg16b];
}

impl std::fmt::Display for ProbeStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Start => "the first instruction",
            Self::Breakpoint => "INT3",
            Self::Fxrstor => "FXRSTOR",
            Self::Xrstor => "XRSTOR",
            Self::Cmpxchg16b => "CMPXCHG16B",
        })
    }
}

/// Why KVM is not usable here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProbeFailure {
    /// No VM can be made.
    #[error("no KVM guest can be made: {0}")]
    Unavailable(#[source] HypervisorError),
    /// KVM failed on an instruction.
    #[error("this KVM cannot run {step}: {source}")]
    Failed {
        /// What the guest was about to do.
        step: ProbeStep,
        /// What KVM said.
        source: HypervisorError,
    },
    /// An instruction did something else than it should.
    #[error("this KVM runs {0} wrongly")]
    Wrong(ProbeStep),
    /// The guest did not get on, and was stopped.
    #[error("this KVM hangs at {0}")]
    Hung(ProbeStep),
}

impl ProbeFailure {
    /// True if it is what this KVM does with the instruction, so that asking again is no use. False if
    /// it may pass: a missing permission, too few descriptors, a signal, a host too busy.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Failed { .. } | Self::Wrong(_) => true,
            Self::Unavailable(HypervisorError::Unavailable { reason, .. }) => {
                matches!(reason, Unavailable::Version { .. } | Unavailable::Lacks(_))
            }
            Self::Unavailable(_) | Self::Hung(_) => false,
        }
    }

    /// True if the host has no KVM for this process: no device, nothing behind it, or no permission.
    pub fn is_absence(&self) -> bool {
        let Self::Unavailable(HypervisorError::Unavailable { reason, .. }) = self else {
            return false;
        };
        match reason {
            Unavailable::Device { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EACCES | libc::EPERM)
            ),
            _ => false,
        }
    }
}

/// What the guest writes to [`REPORT`] when all went well.
const DONE: u8 = 0x7F;
/// Set in a report of a wrong result.
const WRONG: u8 = 0x80;
/// The port of reports. The guest's code names it, too.
const REPORT: u16 = 0xF4;
/// After this long a guest that does not end is stopped. It needs well under a millisecond on hardware,
/// but may run inside an emulated machine on a busy host.
const PATIENCE: Duration = Duration::from_secs(5);

// The guest's memory: 64 KiB.
const RAM: u64 = 0x1_0000;
const GDT: u64 = 0x500;
const IDT: u64 = 0x600;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// FXRSTOR's image, XRSTOR's image, where FXSAVE stores, and the operand of CMPXCHG16B.
const FX_IMAGE: u64 = 0x5000;
const XSAVE_IMAGE: u64 = 0x5400;
const FX_OUT: u64 = 0x5800;
const OPERAND: u64 = 0x5C00;
const STACK_TOP: u64 = 0x7000;
/// XMM0 in an FXSAVE image.
const XMM0: u64 = 160;
/// XSTATE_BV in an XSAVE image.
const XSTATE_BV: u64 = 512;
/// Values of XMM0 in the two images.
const FX_PATTERN: u64 = 0x1122_3344_5566_7788;
const XSAVE_PATTERN: u64 = 0x99AA_BBCC_DDEE_FF00;

/// The guest. Before its first instruction: the length of its code, and the offset of the INT3
/// handler. RDI tells whether to try XRSTOR.
// SAFETY: never called here: its bytes go to a guest (`guest_code`), and are all there is to it.
#[unsafe(naked)]
unsafe extern "C" fn guest() {
    core::arch::naked_asm!(
        ".long 9f - 2f, 8f - 2f",
        "2:",
        // Step 0: we run.
        "xor eax, eax",
        "out 0xF4, al",
        // Step 1: INT3. The handler counts in RBX.
        "mov al, 1",
        "out 0xF4, al",
        "xor ebx, ebx",
        "int3",
        "mov eax, 0x81",
        "cmp ebx, 1",
        "jne 7f",
        // Step 2: FXRSTOR, seen through FXSAVE.
        "mov al, 2",
        "out 0xF4, al",
        "fxrstor64 [0x5000]",
        "fxsave64 [0x5800]",
        "mov eax, 0x82",
        "mov rcx, [0x50A0]",
        "cmp rcx, [0x58A0]",
        "jne 7f",
        // Step 3: XRSTOR of x87 and SSE state.
        "test edi, edi",
        "jz 3f",
        "mov al, 3",
        "out 0xF4, al",
        "mov eax, 3",
        "xor edx, edx",
        "xrstor64 [0x5400]",
        "fxsave64 [0x5800]",
        "mov eax, 0x83",
        "mov rcx, [0x54A0]",
        "cmp rcx, [0x58A0]",
        "jne 7f",
        // Step 4: CMPXCHG16B of zero with RCX:RBX.
        "3:",
        "mov al, 4",
        "out 0xF4, al",
        "xor eax, eax",
        "xor edx, edx",
        "mov ebx, 5",
        "mov ecx, 6",
        "lock cmpxchg16b [0x5C00]",
        "mov eax, 0x84",
        "jnz 7f",
        "cmp qword ptr [0x5C08], 6",
        "jne 7f",
        "mov al, 0x7F",
        "7:",
        "out 0xF4, al",
        "jmp 7b",
        // The handler of INT3.
        "8:",
        "inc ebx",
        "iretq",
        "9:",
    )
}

/// The guest's code, and the offset of its INT3 handler.
fn guest_code() -> (&'static [u8], u64) {
    let start = guest as unsafe extern "C" fn() as *const u8;
    // SAFETY: the function's body starts with two 32-bit numbers, the first of which is the number of
    // bytes of code that follow them; text is readable and lives as long as the process.
    unsafe {
        let len = start.cast::<u32>().read_unaligned();
        let handler = start.cast::<u32>().add(1).read_unaligned();
        (std::slice::from_raw_parts(start.add(8), len as usize), u64::from(handler))
    }
}

/// Runs the probe guest: can this KVM run 64-bit kernels? Takes a few milliseconds and never hangs.
///
/// # Errors
/// [`ProbeFailure`] says why not.
pub fn probe() -> std::result::Result<(), ProbeFailure> {
    KvmHypervisor::open().map_err(ProbeFailure::Unavailable)?.probe()
}

/// Can this KVM run a guest of two instructions in real mode?
///
/// # Errors
/// [`ProbeFailure`] says why not.
pub fn can_run_simple_guests() -> std::result::Result<(), ProbeFailure> {
    KvmHypervisor::open().map_err(ProbeFailure::Unavailable)?.can_run_simple_guests()
}

impl KvmHypervisor {
    /// See [`probe`](crate::probe()).
    ///
    /// # Errors
    /// [`ProbeFailure`] says why not.
    pub fn probe(&self) -> std::result::Result<(), ProbeFailure> {
        let model = best_available(&CpuModel::x86_64_v3(), self.capabilities());
        let xsave = model.has(Feature::Xsave);
        let vcpu = prepare(self, &model, long_mode_memory, |state| {
            long_mode_state(state, xsave);
        });
        watch(vcpu.map_err(ProbeFailure::Unavailable)?)
    }

    /// See [`can_run_simple_guests`](crate::can_run_simple_guests()).
    ///
    /// # Errors
    /// [`ProbeFailure`] says why not.
    pub fn can_run_simple_guests(&self) -> std::result::Result<(), ProbeFailure> {
        let model = best_available(&CpuModel::x86_64_v1(), self.capabilities());
        // mov al, DONE; out REPORT, al
        let code = [0xB0, DONE, 0xE6, REPORT as u8];
        let vcpu = prepare(
            self,
            &model,
            |memory| write(memory, CODE, &code),
            |state| {
                state.segments.cs = Segment::real(0);
                state.segments.cs.attributes.0 = 0x9B;
                state.general.rip = CODE;
            },
        );
        watch(vcpu.map_err(ProbeFailure::Unavailable)?)
    }
}

/// A vCPU ready to run in a partition of its own.
fn prepare(
    kvm: &KvmHypervisor,
    model: &CpuModel,
    fill: impl FnOnce(&MemoryRegion) -> Result<()>,
    start: impl FnOnce(&mut VcpuState),
) -> Result<Box<dyn Vcpu>> {
    let mut spec = PartitionSpec::new(1, Arc::new(vmkit_device::MonotonicClock::new()));
    spec.interrupt_controllers = InterruptControllers::None;
    let partition = kvm.create(&spec)?;
    let memory = region_at(GuestAddress(0), RAM, Backing::Anonymous).map_err(no_memory)?;
    fill(&memory)?;
    partition.map(GuestAddress(0), Arc::new(memory), MapAccess::WRITE)?;
    let mut vcpu = partition.create_vcpu(0, model)?;
    let mut state = VcpuState::default();
    start(&mut state);
    vcpu.set(StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL, &state)?;
    Ok(vcpu)
}

fn no_memory(error: impl std::error::Error + Send + Sync + 'static) -> HypervisorError {
    HypervisorError::Host {
        what: "prepare the probe guest's memory",
        source: std::io::Error::other(error),
    }
}

fn write(memory: &MemoryRegion, at: u64, bytes: &[u8]) -> Result<()> {
    memory.write_slice(bytes, MemoryRegionAddress(at)).map_err(no_memory)
}

fn long_mode_memory(memory: &MemoryRegion) -> Result<()> {
    let (code, handler) = guest_code();
    let handler = CODE + handler;
    write(memory, CODE, code)?;
    // Interrupt gate of vector 3 to selector 8 (Intel SDM vol. 3A figure 6-8).
    let gate = handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48;
    let words = [
        (GDT + 8, 0x00AF_9B00_0000_FFFF),
        (GDT + 16, 0x00CF_9300_0000_FFFF),
        (IDT + 3 * 16, gate),
        // Identity map of the first 2 MiB: present, writable, accessed, dirty; the last one large.
        (PML4, PDPT | 0x23),
        (PDPT, PD | 0x23),
        (PD, 0xE3),
        (FX_IMAGE + XMM0, FX_PATTERN),
        (XSAVE_IMAGE + XMM0, XSAVE_PATTERN),
        (XSAVE_IMAGE + XSTATE_BV, 3),
        (OPERAND, 0),
        (FX_OUT, 0),
    ];
    for (at, word) in words {
        write(memory, at, &u64::to_le_bytes(word))?;
    }
    for image in [FX_IMAGE, XSAVE_IMAGE] {
        write(memory, image, &0x37F_u16.to_le_bytes())?;
        write(memory, image + 24, &0x1F80_u32.to_le_bytes())?;
    }
    debug_assert!(CODE + code.len() as u64 <= FX_IMAGE && memory.len() == RAM);
    Ok(())
}

fn long_mode_state(state: &mut VcpuState, xsave: bool) {
    let data = Segment::data(16);
    let segments = &mut state.segments;
    segments.cs = Segment::code64(8);
    (segments.ds, segments.es, segments.ss) = (data, data, data);
    (segments.fs, segments.gs) = (data, data);
    segments.gdt = DescriptorTable { base: GDT, limit: 23 };
    segments.idt = DescriptorTable { base: IDT, limit: 4 * 16 - 1 };
    let control = &mut state.control;
    control.cr0 = (Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG).bits();
    control.cr3 = PML4;
    control.cr4 = (Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT).bits();
    if xsave {
        control.cr4 |= Cr4::OSXSAVE.bits();
        control.xcr0 = 3;
    }
    control.efer = (Efer::LME | Efer::LMA).bits();
    state.general.rip = CODE;
    state.general.set_rsp(STACK_TOP);
    state.general.set_rdi(u64::from(xsave));
}

/// What the guest reported last.
struct Reports(u8);

impl VcpuIo for Reports {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> IoFlow {
        if let (REPORT, [report]) = (port, data) {
            self.0 = *report;
            if *report == DONE || *report & WRONG != 0 {
                return IoFlow::Stop;
            }
        }
        IoFlow::Continue
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }

    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

/// Runs the guest, for at most [`PATIENCE`].
fn watch(mut vcpu: Box<dyn Vcpu>) -> std::result::Result<(), ProbeFailure> {
    let (done, waiting) = mpsc::channel::<()>();
    let kick = vcpu.kick();
    let watchdog = thread::Builder::new().name("vmkit-probe".into()).spawn(move || {
        if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            kick.kick();
        }
    });
    let watchdog = watchdog.map_err(|source| {
        ProbeFailure::Unavailable(HypervisorError::Host { what: "start a thread", source })
    })?;
    let mut reports = Reports(0);
    let outcome = vcpu.run(&mut reports);
    drop(done);
    if watchdog.join().is_err() {
        log::error!("the probe's watchdog thread panicked");
    }
    let step = usize::from(reports.0 & !WRONG);
    let step = ProbeStep::ALL.get(step).copied().unwrap_or(ProbeStep::Start);
    match outcome {
        Ok(VmExit::Stopped) if reports.0 == DONE => Ok(()),
        Ok(VmExit::Kicked) => Err(ProbeFailure::Hung(step)),
        Ok(_) => Err(ProbeFailure::Wrong(step)),
        Err(source) => Err(ProbeFailure::Failed { step, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_from_one_that_is_short_of_something() {
        let open = |errno| {
            let reason =
                Unavailable::Device { path: "/dev/kvm", source: Error::from_raw_os_error(errno) };
            ProbeFailure::Unavailable(HypervisorError::Unavailable { backend: "kvm", reason })
        };
        assert!(open(libc::ENOENT).is_absence() && open(libc::EACCES).is_absence());
        assert!(!open(libc::EMFILE).is_absence() && !open(libc::EMFILE).is_lasting());
        let source = Error::from_raw_os_error(libc::EINTR);
        let create = HypervisorError::Host { what: "create a VM", source };
        assert!(!ProbeFailure::Unavailable(create).is_absence());
    }
}
