//! The guest's half: runs cases on one vCPU of any backend.
//!
//! The vCPU starts in ring 3 at the instruction under test. Whatever exception ends the case goes
//! through the guest's IDT to a stub of its vector, whose port write stops the run; RIP tells the
//! vector, the ring-0 stack holds the frame.

mod tables;
mod watchdog;

use std::sync::Arc;

use thiserror::Error;
use vmkit_device::{IoFlow, MonotonicClock};
use vmkit_hypervisor::x86::{Cr0, Cr4, DescriptorTable, Efer, Segment, SegmentAttributes};
use vmkit_hypervisor::{
    CpuModel, Feature, FeatureSet, Hypervisor, HypervisorError, InterruptControllers, MapAccess,
    Partition, PartitionSpec, StateSet, Vcpu, VcpuIo, VcpuState, Vendor, VmExit,
};
use vmkit_memory::{
    Backing, Bytes, GuestAddress, MemoryError, MemoryRegion, MemoryRegionAddress, region_at,
};

use super::case::{Case, Ending, Outcome};
use super::layout::{
    CODE, CODE_LEN, DATA, DATA_LEN, LINE, READ_ONLY, USER_CS, USER_SS, background, read_only,
};
use watchdog::Watchdog;

/// Why a backend cannot run cases.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] HypervisorError),
    /// The host refused memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A vCPU as an executor of cases.
pub struct Guest {
    vcpu: Box<dyn Vcpu>,
    _partition: Arc<dyn Partition>,
    low: Arc<MemoryRegion>,
    data: Arc<MemoryRegion>,
    code: Arc<MemoryRegion>,
    state: VcpuState,
    started: bool,
    pages: Box<[u8; DATA_LEN as usize]>,
    watchdog: Watchdog,
    refusal: Option<String>,
}

/// Stops at the stubs' port and answers nothing else.
struct Stubs;

impl VcpuIo for Stubs {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) -> IoFlow {
        IoFlow::Stop
    }
    fn mmio_read(&mut self, _address: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0xFF);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _address: u64, _data: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

/// What each case sets.
const SET: StateSet = StateSet::GENERAL.union(StateSet::SEGMENTS).union(StateSet::XSAVE);
/// What each case reads.
const GET: StateSet = SET.union(StateSet::CONTROL);

impl Guest {
    /// A guest with `features` on `hypervisor`, which calls its processor `vendor`'s.
    ///
    /// # Errors
    /// [`GuestError`] if the backend or the host refuses.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        features: &FeatureSet,
        vendor: Vendor,
    ) -> Result<Self, GuestError> {
        let mut spec = PartitionSpec::new(1, Arc::new(MonotonicClock::new()));
        spec.interrupt_controllers = InterruptControllers::None;
        let partition = hypervisor.create(&spec)?;
        let map = |at: u64, bytes: &[u8]| -> Result<Arc<MemoryRegion>, GuestError> {
            let at = GuestAddress(at);
            let region = Arc::new(region_at(at, bytes.len() as u64, Backing::Anonymous)?);
            write(&region, 0, bytes);
            partition.map(at, Arc::clone(&region), MapAccess::WRITE)?;
            Ok(region)
        };
        let low = map(0, &tables::low_memory())?;
        let data = map(DATA, background())?;
        map(READ_ONLY, read_only())?;
        let code = map(CODE, &[0xCC; CODE_LEN as usize])?;
        let mut model = CpuModel::with_features("oracle", *features);
        model.vendor = vendor;
        let vcpu = partition.create_vcpu(0, &model)?;
        let watchdog = Watchdog::new(vcpu.kick());
        Ok(Self {
            vcpu,
            _partition: partition,
            low,
            data,
            code,
            state: initial(&model),
            started: false,
            pages: Box::new(*background()),
            watchdog,
            refusal: None,
        })
    }

    /// Why the backend refused the last case, if it did.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Runs one case.
    ///
    /// # Errors
    /// [`GuestError`] if the vCPU's state cannot be set or read; an instruction that the backend
    /// refuses is an [`Ending::Refused`].
    pub fn run(&mut self, case: &Case, outcome: &mut Outcome) -> Result<(), GuestError> {
        for (i, line) in case.memory.iter() {
            write(&self.data, i * LINE, line);
        }
        self.place(case.at, case.bytes(), None);
        let state = &mut self.state;
        state.general.gpr = case.gpr;
        state.general.rip = case.at;
        state.general.rflags = case.rflags;
        let len = state.xsave.0.len().min(case.fpu.0.len());
        state.xsave.0[..len].copy_from_slice(&case.fpu.0[..len]);
        segments(state, case);
        let what = if self.started { SET } else { GET };
        self.vcpu.set(what, state)?;
        self.started = true;

        let ended = self.watchdog.during(|| self.vcpu.run(&mut Stubs));
        self.vcpu.get(GET, &mut self.state)?;
        self.refusal = None;
        outcome.ending = match ended {
            Ok(VmExit::Stopped) => Ending::Exception,
            Ok(VmExit::Kicked) => Ending::Hung,
            Ok(exit) => {
                self.refusal = Some(format!("{exit:?}"));
                Ending::Refused
            }
            Err(error) => {
                self.refusal = Some(error.to_string());
                Ending::Refused
            }
        };
        self.collect(outcome);
        self.place(case.at, case.bytes(), Some(0xCC));
        for (i, _) in outcome.memory.iter().chain(case.memory.iter()) {
            write(&self.data, i * LINE, &background()[i * LINE..][..LINE]);
        }
        Ok(())
    }

    fn collect(&mut self, outcome: &mut Outcome) {
        let state = &self.state;
        outcome.gpr = state.general.gpr;
        outcome.rip = state.general.rip;
        outcome.rflags = state.general.rflags;
        outcome.fs_base = state.segments.fs.base;
        outcome.gs_base = state.segments.gs.base;
        outcome.selectors.ds = state.segments.ds.selector;
        outcome.selectors.es = state.segments.es.selector;
        outcome.selectors.fs = state.segments.fs.selector;
        outcome.selectors.gs = state.segments.gs.selector;
        let len = state.xsave.0.len().min(outcome.fpu.0.len());
        outcome.fpu.0[..len].copy_from_slice(&state.xsave.0[..len]);
        (outcome.vector, outcome.error, outcome.cr2) = (u32::MAX, 0, 0);
        let stub = outcome.rip.wrapping_sub(tables::HIGH + tables::STUBS);
        if outcome.ending == Ending::Exception && stub < 32 * tables::STUB_LEN {
            outcome.vector = (stub / tables::STUB_LEN) as u32;
            self.frame(outcome);
            if outcome.vector == 14 {
                outcome.cr2 = self.state.control.cr2;
            }
        }
        read(&self.data, 0, &mut self.pages[..]);
        outcome.memory.capture(&self.pages);
    }

    /// Reads what the exception pushed (Intel SDM vol. 3A §7.14.2).
    fn frame(&self, outcome: &mut Outcome) {
        let mut frame = [0; 48];
        read(&self.low, tables::STACK_TOP as usize - 48, &mut frame);
        let word = |i: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|b| frame[i * 8 + b]);
            u64::from_le_bytes(bytes)
        };
        if matches!(outcome.vector, 8 | 10..=14 | 17 | 21) {
            outcome.error = word(0);
        }
        outcome.rip = word(1);
        outcome.selectors.cs = word(2) as u16;
        outcome.rflags = word(3);
        outcome.gpr[4] = word(4);
        outcome.selectors.ss = word(5) as u16;
    }

    /// Writes the instruction's bytes, or as many of `instead`, to the code pages.
    fn place(&self, at: u64, bytes: &[u8], instead: Option<u8>) {
        let mut filler = [0; 16];
        let bytes = match instead {
            Some(byte) => {
                filler.fill(byte);
                &filler[..bytes.len()]
            }
            None => bytes,
        };
        let offset = at.wrapping_sub(CODE);
        if offset < CODE_LEN {
            let room = ((CODE_LEN - offset) as usize).min(bytes.len());
            write(&self.code, offset as usize, &bytes[..room]);
        }
    }
}

fn write(region: &MemoryRegion, at: usize, bytes: &[u8]) {
    // Offsets are this module's own and inside the region; a short write would show as a mismatch.
    let _ = region.write_slice(bytes, MemoryRegionAddress(at as u64));
}

fn read(region: &MemoryRegion, at: usize, bytes: &mut [u8]) {
    let _ = region.read_slice(bytes, MemoryRegionAddress(at as u64));
}

/// Long mode with everything that 64-bit Linux enables for its processes.
fn initial(model: &CpuModel) -> VcpuState {
    let mut state = VcpuState::default();
    let cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
    let mut cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    for (feature, bit) in [
        (Feature::Fsgsbase, Cr4::FSGSBASE),
        (Feature::Xsave, Cr4::OSXSAVE),
        (Feature::Umip, Cr4::UMIP),
    ] {
        if model.has(feature) {
            cr4 |= bit;
        }
    }
    state.control.cr0 = cr0.bits();
    state.control.cr3 = tables::PML4;
    state.control.cr4 = cr4.bits();
    state.control.efer = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    state.control.xcr0 = model.xcr0_mask();
    state.xsave.0 = vec![0; model.xsave_bytes().max(576) as usize];
    state
}

/// The segment registers of a 64-bit Linux process.
fn segments(state: &mut VcpuState, case: &Case) {
    let null = Segment { attributes: SegmentAttributes::UNUSABLE, ..Segment::default() };
    let segments = &mut state.segments;
    segments.cs = Segment::code64(USER_CS).with_dpl(3);
    segments.ss = Segment::data(USER_SS).with_dpl(3);
    (segments.ds, segments.es) = (null, null);
    segments.fs = Segment { base: case.fs_base, ..null };
    segments.gs = Segment { base: case.gs_base, ..null };
    segments.ldt = null;
    segments.tr = Segment {
        selector: tables::TSS_SELECTOR,
        base: tables::HIGH + tables::TSS,
        limit: tables::TSS_LIMIT,
        attributes: SegmentAttributes(0x8B),
    };
    segments.gdt = DescriptorTable { base: tables::HIGH + tables::GDT, limit: tables::GDT_LIMIT };
    segments.idt = DescriptorTable { base: tables::HIGH + tables::IDT, limit: tables::IDT_LIMIT };
    // Bits of the header that the model does not have must be zero.
    let components = if state.xsave.0.len() > 576 { 7 } else { 3 };
    state.xsave.0[512] &= components;
}
