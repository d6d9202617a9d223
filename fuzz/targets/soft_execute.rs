//! Random code from random state on the software processor: whatever a guest does, the run ends in a
//! control exit or a typed error, and nothing panics or touches memory that is not the guest's.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_device::ManualClock;
use vmkit_fuzz::{Answers, watched};
use vmkit_hypervisor::x86::{Segment, StateSet, VcpuState};
use vmkit_hypervisor::{CpuModel, Hypervisor, MapAccess, PartitionSpec};
use vmkit_memory::{Backing, Bytes, GuestAddress, GuestMemoryBackend, RamLayout};
use vmkit_soft::SoftHypervisor;

const RAM: u64 = 1 << 20;
const CODE: u64 = 0x8000;

#[derive(Arbitrary, Debug)]
enum Mode {
    Real,
    Protected { paging: bool },
    Long { user: bool },
}

#[derive(Arbitrary, Debug)]
struct Input {
    mode: Mode,
    gpr: [u64; 16],
    rflags: u32,
    cr0: u32,
    cr4: u32,
    dr7: u32,
    xsave: [u8; 32],
    answers: Vec<u8>,
    data: Vec<u8>,
    code: Vec<u8>,
}

fuzz_target!(|input: Input| {
    let soft = SoftHypervisor::new();
    let spec = PartitionSpec::new(1, Arc::new(ManualClock::default()));
    let partition = soft.create(&spec).unwrap();
    let ram = vmkit_memory::allocate(&RamLayout::pc(RAM).unwrap(), Backing::Anonymous).unwrap();
    for region in ram.iter() {
        let region =
            vmkit_memory::MemoryRegion::with_arc(region.get_mmap(), GuestAddress(0)).unwrap();
        partition.map(GuestAddress(0), Arc::new(region), MapAccess::WRITE).unwrap();
    }
    let model = CpuModel::with_features("fuzz", soft.capabilities().features);
    let mut vcpu = partition.create_vcpu(0, &model).unwrap();
    let len = input.data.len().min(0x4000);
    ram.write_slice(&input.data[..len], GuestAddress(0)).unwrap();
    let len = input.code.len().min(0x1000);
    ram.write_slice(&input.code[..len], GuestAddress(CODE)).unwrap();
    // Tables: four levels to a 2 MiB page, which two-level and PAE walks can also make something of.
    for (at, entry) in [(0x5000_u64, 0x6007_u64), (0x6000, 0x7007), (0x7000, 0x87)] {
        ram.write_obj(entry, GuestAddress(at)).unwrap();
    }

    let mut state = VcpuState::default();
    state.general.gpr = input.gpr;
    state.general.gpr[4] = 0x9000 | input.gpr[4] & 0xFFF;
    state.general.rip = CODE;
    state.general.rflags = u64::from(input.rflags) & 0x24_4FD5 | 2;
    state.debug.dr7 = u64::from(input.dr7) & 0xFFFF | 0x400;
    state.xsave.0[..24].copy_from_slice(&input.xsave[..24]);
    state.segments.cs = Segment::real(0);
    let c = &mut state.control;
    match input.mode {
        Mode::Real => {}
        Mode::Protected { paging } => {
            c.cr0 = 0x11 | u64::from(input.cr0) & 0x5_002E | u64::from(paging) << 31;
            c.cr4 = u64::from(input.cr4) & 0x61E;
            c.cr3 = 0x7000;
            state.segments.cs = Segment::code32(8);
            for seg in [
                &mut state.segments.ds,
                &mut state.segments.es,
                &mut state.segments.ss,
                &mut state.segments.fs,
                &mut state.segments.gs,
            ] {
                *seg = Segment::data(16);
            }
        }
        Mode::Long { user } => {
            c.cr0 = 0x8000_0011 | u64::from(input.cr0) & 0x5_002E;
            c.cr4 = 0x20 | u64::from(input.cr4) & 0x30_0E9E;
            c.cr3 = 0x5000;
            c.efer = 0xD01;
            let dpl = if user { 3 } else { 0 };
            state.segments.cs = Segment::code64(8).with_dpl(dpl);
            for seg in [&mut state.segments.ds, &mut state.segments.es, &mut state.segments.ss] {
                *seg = Segment::data(16).with_dpl(dpl);
            }
        }
    }
    let parts = StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL | StateSet::DEBUG;
    // A state that is refused is fine: it says so.
    if vcpu.set(parts, &state).is_err() || vcpu.set(StateSet::XSAVE, &state).is_err() {
        return;
    }
    let _ = watched(vcpu.kick(), || vcpu.run(&mut Answers::new(&input.answers, 200)));
    vcpu.get(StateSet::all(), &mut state).unwrap();
});
