//! 64-bit mode.

use vmkit_device::memory::{Bytes, GuestAddress};
use vmkit_hypervisor::CpuModel;
use vmkit_hypervisor::x86::{
    DescriptorTable, Exception, MpState, Msr, Pending, Segment, SegmentAttributes, StateSet,
    VcpuState,
};

use super::{CODE, Found, GDT, HANDLERS, HLT, IDT, TSS, USER_CODE};
use crate::cpu::{CS, Cpu, DS, RAX, RCX, RDX, RSP, SS, flags};
use crate::mem::MODE_SUPERVISOR;
use crate::testing::Bench;

/// Where level 0 begins its stack when it is entered from level 3, and that of IST 1.
const INNER_STACK: u64 = 0x8_0000;
const IST_STACK: u64 = 0x9_0000;

struct Rig {
    bench: Bench,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self { bench: Bench::long() };
        let descriptors: [u64; 8] = [
            0,
            0x00AF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
            0x00AF_FB00_0000_FFFF,
            // The TSS, with an I/O map that opens port 0x80.
            0x0000_8900_7000_0FFF,
            0,
        ];
        for (i, descriptor) in (0..).zip(descriptors) {
            rig.bench.put(GDT + 8 * i, descriptor);
        }
        for vector in 0..256 {
            rig.gate(vector, 8, 0xEE, 0);
            rig.bench.ram.write_obj(HLT, GuestAddress(HANDLERS + 16 * vector)).unwrap();
        }
        rig.bench.put(TSS + 4, INNER_STACK);
        rig.bench.put(TSS + 0x24, IST_STACK);
        rig.bench.ram.write_slice(&[0xFF; 0x1000 - 104], GuestAddress(TSS + 104)).unwrap();
        rig.bench.ram.write_obj(0_u8, GuestAddress(TSS + 104 + 0x10)).unwrap();
        rig.bench.ram.write_obj(104_u16, GuestAddress(TSS + 102)).unwrap();
        let cpu = &mut rig.bench.cpu;
        cpu.gdt = DescriptorTable { base: GDT, limit: 63 };
        cpu.idt = DescriptorTable { base: IDT, limit: 0xFFF };
        cpu.tr = Segment {
            selector: 0x30,
            base: TSS,
            limit: 0xFFF,
            attributes: SegmentAttributes(0x8B),
        };
        rig
    }

    /// Makes the gate of `vector`: code selector, access byte, IST.
    fn gate(&mut self, vector: u64, selector: u64, access: u64, ist: u64) {
        let offset = HANDLERS + 16 * vector;
        let low = offset & 0xFFFF | selector << 16 | ist << 32 | access << 40;
        self.bench.put(IDT + 16 * vector, low);
        self.bench.put(IDT + 16 * vector + 8, 0);
    }

    /// Runs `code`, which is to end in a handler, and reads its frame.
    fn fault(&mut self, code: &[u8]) -> Found {
        self.bench.load(CODE, code);
        self.found()
    }

    fn found(&mut self) -> Found {
        let (vector, has_error) = self.bench.run_to_handler();
        let mut sp = self.bench.cpu.regs[RSP];
        let error = has_error.then(|| self.bench.get(sp));
        sp += if has_error { 8 } else { 0 };
        let [rip, cs, rflags, rsp, ss] = [0, 8, 16, 24, 32].map(|at| self.bench.get(sp + at));
        Found { vector, error, rip, cs, rflags, rsp, ss }
    }

    /// Runs `code` at privilege level 3 with `rflags`.
    fn user_fault(&mut self, code: &[u8], rflags: u64) -> Found {
        self.bench.ram.write_slice(code, GuestAddress(USER_CODE)).unwrap();
        let rsp = self.bench.cpu.regs[RSP] - 40;
        for (i, value) in (0..).zip([USER_CODE, 0x2B, rflags, 0x7_0000, 0x23]) {
            self.bench.put(rsp + 8 * i, value);
        }
        self.bench.cpu.regs[RSP] = rsp;
        // iretq
        self.fault(&[0x48, 0xCF])
    }
}

#[test]
fn a_fault_pushes_an_aligned_frame_with_rf_set() {
    let mut rig = Rig::new();
    rig.bench.cpu.regs[RSP] = 0x5_0008;
    // ud2
    let found = rig.fault(&[0x0F, 0x0B]);
    let want = Found {
        vector: 6,
        error: None,
        rip: CODE,
        cs: 8,
        rflags: 0x1_0002,
        rsp: 0x5_0008,
        ss: 0x10,
    };
    assert_eq!(found, want);
    assert_eq!(rig.bench.cpu.regs[RSP], 0x5_0000 - 40);
}

#[test]
fn a_page_fault_tells_address_and_kind() {
    let mut rig = Rig::new();
    // mov [0xC0000000], al: past the mapped GiB
    let found = rig.fault(&[0xB9, 0, 0, 0, 0xC0, 0x88, 0x01]);
    assert_eq!((found.vector, found.error, found.rip), (14, Some(2), CODE + 5));
    assert_eq!(rig.bench.cpu.control.cr2, 0xC000_0000);
}

#[test]
fn software_interrupts_report_after_and_name_their_entry_in_errors() {
    let mut rig = Rig::new();
    assert_eq!(rig.fault(&[0xCD, 0x81]).rip, CODE + 2);
    let mut rig = Rig::new();
    rig.gate(0x81, 8, 0x6E, 0);
    let found = rig.fault(&[0xCD, 0x81]);
    assert_eq!((found.vector, found.error, found.rip), (11, Some(0x81 << 3 | 2), CODE));
    // The same gate for an exception: EXT is set.
    let mut rig = Rig::new();
    rig.gate(6, 8, 0x6E, 0);
    assert_eq!(rig.fault(&[0x0F, 0x0B]).error, Some(6 << 3 | 3));
}

#[test]
fn faults_while_delivering_escalate() {
    let mut rig = Rig::new();
    rig.gate(13, 0x50, 0x8E, 0);
    rig.gate(8, 8, 0x8E, 1);
    // mov ax, 0x50; lldt ax
    let found = rig.fault(&[0x66, 0xB8, 0x50, 0, 0x0F, 0x00, 0xD0]);
    assert_eq!((found.vector, found.error, found.rip), (8, Some(0), CODE + 4));
    assert_eq!(rig.bench.cpu.regs[RSP], IST_STACK - 48);
    let mut rig = Rig::new();
    rig.bench.cpu.idt.limit = 0;
    rig.bench.load(CODE, &[0x0F, 0x0B]);
    assert!(!rig.bench.run(), "nothing can be delivered: a triple fault");
}

#[test]
fn ring_3_is_entered_by_iret_and_left_by_an_event() {
    let mut rig = Rig::new();
    // int 0x40
    let found = rig.user_fault(&[0xCD, 0x40], 0x202);
    let want = Found {
        vector: 0x40,
        error: None,
        rip: USER_CODE + 2,
        cs: 0x2B,
        rflags: 0x202,
        rsp: 0x7_0000,
        ss: 0x23,
    };
    assert_eq!(found, want);
    let cpu = &rig.bench.cpu;
    assert_eq!((cpu.cpl, cpu.segs[SS].selector, cpu.regs[RSP]), (0, 0, INNER_STACK - 40));
}

#[test]
fn ring_3_may_not() {
    // cli; hlt; mov rax, cr0; rdmsr; swapgs; in al, 0x90; lgdt [rsp]
    let forbidden: [&[u8]; 7] = [
        &[0xFA],
        &[0xF4],
        &[0x0F, 0x20, 0xC0],
        &[0x0F, 0x32],
        &[0x0F, 0x01, 0xF8],
        &[0xE4, 0x90],
        &[0x0F, 0x01, 0x14, 0x24],
    ];
    for code in forbidden {
        let found = Rig::new().user_fault(code, 2);
        assert_eq!((found.vector, found.error), (13, Some(0)), "{code:02x?}");
    }
    // in al, 0x80, which the I/O map opens, then ud2; and cli at IOPL 3
    assert_eq!(Rig::new().user_fault(&[0xE4, 0x80, 0x0F, 0x0B], 2).vector, 6);
    assert_eq!(Rig::new().user_fault(&[0xFA, 0x0F, 0x0B], 0x3202).rflags, 0x1_3002);
}

#[test]
fn popf_in_ring_3_changes_neither_if_nor_iopl() {
    // push 0x3000; popfq; ud2
    let found = Rig::new().user_fault(&[0x68, 0, 0x30, 0, 0, 0x9D, 0x0F, 0x0B], 0x202);
    assert_eq!(found.rflags, 0x1_0202);
}

#[test]
fn syscall_and_sysret_are_a_round_trip() {
    let mut rig = Rig::new();
    let cpu = &mut rig.bench.cpu;
    cpu.msrs.star = 0x0018_0008_0000_0000;
    cpu.msrs.lstar = CODE + 0x100;
    cpu.msrs.fmask = flags::IF;
    // mov eax, cs; sysretq
    let kernel = [0x8C, 0xC8, 0x48, 0x0F, 0x07];
    rig.bench.ram.write_slice(&kernel, GuestAddress(CODE + 0x100)).unwrap();
    // syscall; int 0x40
    let found = rig.user_fault(&[0x0F, 0x05, 0xCD, 0x40], 0x202);
    assert_eq!((found.vector, found.cs, found.ss), (0x40, 0x2B, 0x23));
    assert_eq!(found.rflags, 0x202, "IF was masked in the kernel and is back");
    let cpu = &rig.bench.cpu;
    assert_eq!((cpu.regs[RAX], cpu.regs[RCX], cpu.regs[11]), (8, USER_CODE + 2, 0x202));
}

#[test]
fn single_steps_are_reported_after_each_instruction() {
    // push 0x102; popfq; nop; nop
    let mut rig = Rig::new();
    let found = rig.fault(&[0x68, 2, 1, 0, 0, 0x9D, 0x90, 0x90]);
    assert_eq!((found.vector, found.rip, found.rflags), (1, CODE + 7, 0x102));
    assert_eq!(rig.bench.cpu.debug.dr6, 0xFFFF_4FF0);
    assert_eq!(rig.bench.cpu.flags.rest & flags::TF, 0);
    // mov ss, eax is not reported before the instruction after it is done.
    let mut rig = Rig::new();
    rig.bench.cpu.regs[RAX] = 0x10;
    let found = rig.fault(&[0x68, 2, 1, 0, 0, 0x9D, 0x8E, 0xD0, 0x90, 0x90]);
    assert_eq!(found.rip, CODE + 9);
}

#[test]
fn steps_are_of_branches_if_debugctl_says_so() {
    // push 0x102; popfq; xor ecx, ecx; jnz +0; jz +1; nop; call +0; nop
    let code =
        [0x68, 2, 1, 0, 0, 0x9D, 0x31, 0xC9, 0x75, 0, 0x74, 1, 0x90, 0xE8, 0, 0, 0, 0, 0x90, 0x90];
    let mut rig = Rig::new();
    rig.bench.cpu.msrs.debugctl = 2;
    let found = rig.fault(&code);
    assert_eq!((found.vector, found.rip), (1, CODE + 13), "after the jump that is taken");
    assert_eq!(rig.bench.cpu.debug.dr6, 0xFFFF_4FF0);
    assert_eq!(rig.bench.cpu.msrs.debugctl, 0);
    // A call of what follows it is a branch too. The handler: iretq, at the HLT that was run.
    rig.bench.cpu.msrs.debugctl = 2;
    rig.bench.load(rig.bench.cpu.rip, &[0x48, 0xCF]);
    rig.bench.cpu.code.forget();
    rig.bench.cpu.code_changed();
    assert!(rig.bench.run());
    let rsp = rig.bench.cpu.regs[RSP];
    assert_eq!(rig.bench.get(rsp), CODE + 18);
}

#[test]
fn breakpoints_hit_code_before_and_data_after() {
    let mut rig = Rig::new();
    let cpu = &mut rig.bench.cpu;
    cpu.debug.dr[0] = CODE + 1;
    cpu.debug.dr[1] = 0x5_0000;
    // DR0 on execution, DR1 on four bytes of writing.
    cpu.debug.dr7 = 0x00D0_0405;
    let found = rig.fault(&[0x90, 0x90]);
    assert_eq!((found.vector, found.rip, found.rflags), (1, CODE + 1, 2));
    assert_eq!(rig.bench.cpu.debug.dr6, 0xFFFF_0FF1);

    let mut rig = Rig::new();
    let cpu = &mut rig.bench.cpu;
    cpu.debug.dr[1] = 0x5_0000;
    cpu.debug.dr7 = 0x00D0_0404;
    cpu.regs[RDX] = 0x5_0003;
    // mov al, [rdx]; mov [rdx], al; nop
    let found = rig.fault(&[0x8A, 0x02, 0x88, 0x02, 0x90]);
    assert_eq!((found.vector, found.rip), (1, CODE + 4));
    assert_eq!(rig.bench.cpu.debug.dr6, 0xFFFF_0FF2);
}

#[test]
fn segment_loads_are_checked() {
    // mov eax, selector; mov ds, eax; ud2
    let load = |selector: u8| {
        let mut rig = Rig::new();
        let found = rig.fault(&[0xB8, selector, 0, 0, 0, 0x8E, 0xD8, 0x0F, 0x0B]);
        (found.vector, found.error, rig.bench.cpu.segs[DS])
    };
    assert_eq!(load(0x40).1, Some(0x40), "past the limit");
    assert_eq!(load(0x30).1, Some(0x30), "a system segment");
    assert_eq!(load(0x13).1, Some(0x10), "RPL above DPL");
    let (vector, _, null) = load(0);
    assert!(vector == 6 && null.attributes.unusable());
    let (vector, _, user) = load(0x23);
    assert_eq!((vector, user.attributes, user.limit), (6, SegmentAttributes(0xC0F3), u32::MAX));
}

#[test]
fn xsave_and_xrstor_carry_what_is_asked() {
    let mut rig = Rig::new();
    let cpu = &mut rig.bench.cpu;
    cpu.control.cr4 |= 1 << 18;
    cpu.control.xcr0 = cpu.model.xcr0_mask();
    let mask = cpu.control.xcr0;
    cpu.update_mode();
    for (i, vector) in (1..).zip(&mut cpu.vectors) {
        vector.0 = [i, i << 8, i << 16, i << 24];
    }
    let before = cpu.vectors;
    cpu.regs[RAX] = mask;
    cpu.regs[RDX] = 0;
    cpu.regs[RCX] = 0x5_0000;
    // xsave [rcx]; int 0x40
    rig.fault(&[0x0F, 0xAE, 0x21, 0xCD, 0x40]);
    assert_eq!(rig.bench.get(0x5_0200), mask & !1, "x87 is in its initial state");
    let cpu = &mut rig.bench.cpu;
    for vector in &mut cpu.vectors {
        vector.0 = [7; 4];
    }
    cpu.halted = false;
    // xrstor [rcx]; int 0x40
    rig.bench.load(CODE + 0x100, &[0x0F, 0xAE, 0x29, 0xCD, 0x40]);
    rig.found();
    let kept = if mask & 4 != 0 { 4 } else { 2 };
    for (now, before) in rig.bench.cpu.vectors.iter().zip(&before) {
        assert_eq!(now.0[..kept], before.0[..kept]);
    }
    // A misaligned area.
    rig.bench.cpu.halted = false;
    rig.bench.cpu.regs[RCX] = 0x5_0010;
    rig.bench.load(CODE + 0x200, &[0x0F, 0xAE, 0x21]);
    assert_eq!(rig.found().vector, 13);
}

/// A state that a processor of the test model can be in.
fn good_state(cpu: &mut Cpu) -> VcpuState {
    let mut state = VcpuState::default();
    cpu.get_state(StateSet::all(), &mut state);
    state
}

#[test]
fn a_state_survives_the_round_trip() {
    let mut rig = Rig::new();
    rig.bench.cpu.regs[3] = 0x1234;
    rig.bench.cpu.vectors[5].0[0] = 99;
    rig.bench.cpu.msrs.lstar = 0xFFFF_8000_0000_1000;
    rig.bench.cpu.debug.dr[2] = 0x77;
    rig.bench.cpu.injected = Pending::Exception(Exception { vector: 13, error_code: Some(8) });
    let mut state = good_state(&mut rig.bench.cpu);
    state.mp = MpState::Halted;
    state.events.interrupt_shadow = true;
    let mut other = Bench::real();
    other.cpu.set_state(StateSet::all(), &state).unwrap();
    assert_eq!(good_state(&mut other.cpu), state);
    assert!(other.cpu.long64() && other.cpu.halted);
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let mut bench = Bench::long();
    bench.cpu.idt = DescriptorTable { base: 0, limit: 0xFFF };
    let good = good_state(&mut bench.cpu);
    let mut refuse = |what: &str, change: &dyn Fn(&mut VcpuState)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.general.gpr[0] ^= 1;
        assert!(bench.cpu.set_state(StateSet::all(), &bad).is_err(), "{what}");
        assert_eq!(good_state(&mut bench.cpu), good, "{what}");
    };
    refuse("a RIP that is not canonical", &|s| s.general.rip = 1 << 63);
    refuse("RFLAGS bit 1 clear", &|s| s.general.rflags = 0);
    refuse("VM in long mode", &|s| s.general.rflags |= flags::VM);
    refuse("paging without protection", &|s| s.control.cr0 &= !1);
    refuse("long mode without PAE", &|s| s.control.cr4 &= !0x20);
    refuse("LMA without LME", &|s| s.control.efer &= !0x100);
    refuse("a CR4 bit that does not exist", &|s| s.control.cr4 |= 1 << 31);
    refuse("a CR3 past the address width", &|s| s.control.cr3 |= 1 << 50);
    refuse("an XCR0 without x87", &|s| s.control.xcr0 = 2);
    refuse("L and D", &|s| s.segments.cs.attributes.0 |= 0x4000);
    refuse("an FS base that is not canonical", &|s| s.segments.fs.base = 1 << 60);
    refuse("a DR7 of 64 bits", &|s| s.debug.dr7 |= 1 << 40);
    refuse("MXCSR", &|s| s.xsave.0[27] = 1);
    refuse("a short XSAVE area", &|s| s.xsave.0.truncate(575));
    refuse("an unknown state component", &|s| s.xsave.0[513] = 1);
    refuse("an unknown MSR", &|s| s.msrs.push(Msr { index: 0x1234, value: 0 }));
    refuse("an LSTAR that is not canonical", &|s| {
        for msr in s.msrs.iter_mut().filter(|msr| msr.index == 0xC000_0082) {
            msr.value = 1 << 63;
        }
    });
    refuse("an exception past 31", &|s| {
        s.events.pending = Pending::Exception(Exception { vector: 32, error_code: None });
    });
}

#[test]
fn a_start_up_ipi_starts_in_real_mode() {
    let mut bench = Bench::long();
    bench.cpu.init();
    assert_eq!(bench.cpu.regs[RDX], u64::from(CpuModel::x86_64_v2().cpuid(1, 0, &context()).eax));
    bench.cpu.sipi(0x12);
    let cpu = &bench.cpu;
    assert_eq!((cpu.segs[CS].selector, cpu.segs[CS].base, cpu.rip), (0x1200, 0x1_2000, 0));
    assert!(!cpu.long64() && cpu.cpl == 0 && cpu.control.cr0 & 1 == 0);
}

fn context() -> vmkit_hypervisor::CpuidContext {
    vmkit_hypervisor::CpuidContext::default()
}

#[test]
fn the_tsc_moves_with_its_adjustment() {
    let mut rig = Rig::new();
    let cpu = &mut rig.bench.cpu;
    let before = cpu.tsc();
    assert_eq!(cpu.write_msr(0x3B, 500), Some(()));
    assert_eq!(cpu.tsc(), before.wrapping_add(500));
    assert_eq!(cpu.write_msr(0x10, 7), Some(()));
    assert_eq!(cpu.tsc(), 7);
    assert_eq!(cpu.read_msr(0x3B), Some(7_u64.wrapping_sub(before)));
}

#[test]
fn descriptor_tables_are_read_as_supervisor() {
    // With the GDT on a supervisor page, ring 3 can still load from it.
    let mut rig = Rig::new();
    rig.bench.put(0x2000, 0x0083);
    let cpu = &mut rig.bench.cpu;
    cpu.flush_all();
    assert!(cpu.descriptor(0x10, 13, 0).is_ok());
    assert!(cpu.load_as::<u64>(GDT, MODE_SUPERVISOR).is_ok());
    assert!(cpu.load_as::<u64>(GDT, crate::mem::MODE_USER).is_err());
}
