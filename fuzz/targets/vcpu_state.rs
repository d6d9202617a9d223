//! Processor and controller state from a stranger. The software processor takes it or refuses it;
//! taken, it runs whatever comes of it, and what it then says of itself it takes back unchanged.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_device::ManualClock;
use vmkit_fuzz::{Answers, watched};
use vmkit_hypervisor::x86::{
    Exception, Interrupt, MpState, Pending, Segment, SegmentAttributes, StateSet, VcpuState,
};
use vmkit_hypervisor::{CpuModel, Hypervisor, MapAccess, Partition, PartitionSpec, Vcpu};
use vmkit_memory::{Backing, Bytes, GuestAddress, GuestMemoryBackend, MemoryRegion, RamLayout};
use vmkit_soft::SoftHypervisor;

const RAM: u64 = 1 << 20;

#[derive(Arbitrary, Debug)]
enum Edit {
    Gpr(u8, u64),
    Rip(u64),
    Rflags(u64),
    Segment(u8, u16, u64, u32, u32),
    Table(bool, u64, u16),
    Cr0(u64),
    Cr2(u64),
    Cr3(u64),
    Cr4(u64),
    Cr8(u64),
    Efer(u64),
    Xcr0(u64),
    Dr(u8, u64),
    Xsave(u16, u64),
    XsaveLen(u16),
    Msr(u8, u64),
    Exception(u8, Option<u32>),
    Interrupt(u8, bool),
    Nmi(bool, bool),
    Shadow(bool),
    Apic(u8, u32),
    ApicBase(u64),
    ApicTimer(u64, Option<u64>),
    ApicInputs([bool; 2], bool, u8),
    Mp(u8),
    Tsc(u64),
    LongMode,
    Protected,
}

#[derive(Arbitrary, Debug)]
struct Input {
    edits: Vec<Edit>,
    parts: u32,
    chips: Vec<(u16, u8)>,
    answers: Vec<u8>,
    data: Vec<u8>,
    code: Vec<u8>,
}

fn edit(state: &mut VcpuState, edit: &Edit) {
    let (c, s) = (&mut state.control, &mut state.segments);
    match *edit {
        Edit::Gpr(n, value) => state.general.gpr[usize::from(n) % 16] = value,
        Edit::Rip(value) => state.general.rip = value,
        Edit::Rflags(value) => state.general.rflags = value,
        Edit::Segment(n, selector, base, limit, attributes) => {
            let all = [
                &mut s.cs, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss, &mut s.tr,
                &mut s.ldt,
            ];
            let attributes = SegmentAttributes(attributes);
            let n = usize::from(n) % all.len();
            if let Some(segment) = all.into_iter().nth(n) {
                *segment = Segment { selector, base, limit, attributes };
            }
        }
        Edit::Table(interrupts, base, limit) => {
            let table = if interrupts { &mut s.idt } else { &mut s.gdt };
            (table.base, table.limit) = (base, limit);
        }
        Edit::Cr0(value) => c.cr0 = value,
        Edit::Cr2(value) => c.cr2 = value,
        Edit::Cr3(value) => c.cr3 = value,
        Edit::Cr4(value) => c.cr4 = value,
        Edit::Cr8(value) => c.cr8 = value,
        Edit::Efer(value) => c.efer = value,
        Edit::Xcr0(value) => c.xcr0 = value,
        Edit::Dr(n, value) => match n % 6 {
            4 => state.debug.dr6 = value,
            5 => state.debug.dr7 = value,
            n => state.debug.dr[usize::from(n)] = value,
        },
        Edit::Xsave(at, value) => {
            let len = state.xsave.0.len();
            if let Some(bytes) = state.xsave.0.get_mut(usize::from(at) % len.max(1)..) {
                let len = bytes.len().min(8);
                bytes[..len].copy_from_slice(&value.to_le_bytes()[..len]);
            }
        }
        Edit::XsaveLen(len) => state.xsave.0.resize(usize::from(len) % 1024, 0),
        Edit::Msr(n, value) => {
            let count = state.msrs.len().max(1);
            if let Some(msr) = state.msrs.get_mut(usize::from(n) % count) {
                msr.value = value;
            }
        }
        Edit::Exception(vector, error_code) => {
            state.events.pending = Pending::Exception(Exception { vector, error_code });
        }
        Edit::Interrupt(vector, software) => {
            state.events.pending = Pending::Interrupt(Interrupt { vector, software });
        }
        Edit::Nmi(pending, masked) => {
            (state.events.nmi_pending, state.events.nmi_masked) = (pending, masked);
        }
        Edit::Shadow(on) => state.events.interrupt_shadow = on,
        Edit::Apic(n, value) => {
            if let Some(lapic) = &mut state.lapic {
                lapic.registers.set(usize::from(n % 64) * 16, value);
            }
        }
        Edit::ApicBase(value) => {
            if let Some(lapic) = &mut state.lapic {
                lapic.apic_base = value;
            }
        }
        Edit::ApicTimer(deadline, remaining) => {
            if let Some(lapic) = &mut state.lapic {
                (lapic.tsc_deadline, lapic.timer_remaining) = (deadline, remaining);
            }
        }
        Edit::ApicInputs(lint, extint, errors) => {
            if let Some(lapic) = &mut state.lapic {
                (lapic.lint, lapic.extint, lapic.pending_errors) = (lint, extint, errors);
            }
        }
        Edit::Mp(n) => {
            state.mp =
                [MpState::Runnable, MpState::Halted, MpState::WaitForSipi][usize::from(n % 3)];
        }
        Edit::Tsc(value) => state.tsc = value,
        Edit::LongMode => {
            (c.cr0, c.cr3, c.cr4, c.efer) = (0x8000_0011, 0x5000, 0x20, 0xD01);
            (s.cs, s.ss, s.ds) = (Segment::code64(8), Segment::data(16), Segment::data(16));
            state.general.rip = 0x8000;
        }
        Edit::Protected => {
            (c.cr0, c.efer) = (0x11, 0);
            (s.cs, s.ss, s.ds) = (Segment::code32(8), Segment::data(16), Segment::data(16));
            state.general.rip = 0x8000;
        }
    }
}

/// Loads the controllers' own state with some bytes of its encoding changed.
fn edit_chips(partition: &dyn Partition, edits: &[(u16, u8)]) {
    let state = partition.save().unwrap();
    let mut bytes = postcard::to_stdvec(&state).unwrap();
    for &(at, value) in edits {
        let len = bytes.len();
        bytes[usize::from(at) % len] = value;
    }
    if let Ok(hostile) = postcard::from_bytes(&bytes)
        && partition.load(&hostile).is_ok()
    {
        let taken = partition.save().unwrap();
        partition.load(&taken).unwrap();
    }
}

fn whole(vcpu: &mut dyn Vcpu) -> VcpuState {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::all(), &mut state).unwrap();
    state
}

fuzz_target!(|input: Input| {
    let soft = SoftHypervisor::new();
    let spec = PartitionSpec::new(1, Arc::new(ManualClock::default()));
    let partition = soft.create(&spec).unwrap();
    let ram = vmkit_memory::allocate(&RamLayout::pc(RAM).unwrap(), Backing::Anonymous).unwrap();
    for region in ram.iter() {
        let region = MemoryRegion::with_arc(region.get_mmap(), GuestAddress(0)).unwrap();
        partition.map(GuestAddress(0), Arc::new(region), MapAccess::WRITE).unwrap();
    }
    let len = input.data.len().min(0x4000);
    ram.write_slice(&input.data[..len], GuestAddress(0)).unwrap();
    let len = input.code.len().min(0x1000);
    ram.write_slice(&input.code[..len], GuestAddress(0x8000)).unwrap();
    for (at, entry) in [(0x5000_u64, 0x6007_u64), (0x6000, 0x7007), (0x7000, 0x87)] {
        ram.write_obj(entry, GuestAddress(at)).unwrap();
    }
    let model = CpuModel::with_features("fuzz", soft.capabilities().features);
    let mut vcpu = partition.create_vcpu(0, &model).unwrap();

    let before = whole(&mut *vcpu);
    let mut state = before.clone();
    for change in &input.edits {
        edit(&mut state, change);
    }
    let parts = StateSet::from_bits_truncate(input.parts);
    if vcpu.set(parts, &state).is_err() && vcpu.set(StateSet::all(), &state).is_err() {
        assert_eq!(whole(&mut *vcpu), before, "refused, and changed");
    }
    edit_chips(&*partition, &input.chips);
    let _ = watched(vcpu.kick(), || vcpu.run(&mut Answers::new(&input.answers, 200)));

    let after = whole(&mut *vcpu);
    vcpu.set(StateSet::all(), &after).unwrap();
    assert_eq!(whole(&mut *vcpu), after);
});
