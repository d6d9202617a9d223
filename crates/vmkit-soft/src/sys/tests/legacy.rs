//! Protected mode without long mode: gates, privilege levels, virtual-8086 mode, tasks; and real mode.

use vmkit_device::memory::{Bytes, GuestAddress};
use vmkit_hypervisor::x86::{DescriptorTable, Segment, SegmentAttributes};

use super::{CODE, Found, GDT, HANDLERS, HLT, IDT, TSS, Taken, USER_CODE};
use crate::cpu::{CS, DS, ES, FS, RAX, RCX, RSP, SS, TrapKind, flags};
use crate::testing::Bench;

/// Selectors of the test's GDT.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_CODE_SELECTOR: u16 = 0x1B;
const USER_DATA: u16 = 0x23;
const FIRST_TASK: u16 = 0x28;
const SECOND_TASK: u16 = 0x30;
const CALL_GATE: u16 = 0x3B;
const NOT_PRESENT: u16 = 0x40;
const SMALL_STACK: u16 = 0x48;
const THIRD_TASK: u16 = 0x50;

const SECOND_TSS: u64 = 0x7800;
const THIRD_TSS: u64 = 0x7C00;
const INNER_STACK: u64 = 0x8_0000;
const USER_STACK: u64 = 0x7_0000;
const TASK_STACK: u64 = 0x9_0000;

fn bench() -> Bench {
    let mut bench = Bench::real();
    let descriptors: [u64; 11] = [
        0,
        0x00CF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00CF_FB00_0000_FFFF,
        0x00CF_F300_0000_FFFF,
        0x0000_8B00_7000_0067,
        0x0000_8900_7800_0067,
        // To the code at 0x8100, with two parameters, for level 3.
        0x0000_EC02_0008_8100,
        0x00CF_1300_0000_FFFF,
        0x0040_9300_0000_0FFF,
        0x0000_8900_7C00_0067,
    ];
    for (i, descriptor) in (0..).zip(descriptors) {
        bench.put(GDT + 8 * i, descriptor);
    }
    for vector in 0..256 {
        bench.put(IDT + 8 * vector, 0xEE00_0008_0000 | (HANDLERS + 16 * vector));
        bench.ram.write_obj(HLT, GuestAddress(HANDLERS + 16 * vector)).unwrap();
    }
    bench.put32(TSS + 4, INNER_STACK as u32);
    bench.put32(TSS + 8, KERNEL_DATA.into());
    let cpu = &mut bench.cpu;
    cpu.gdt = DescriptorTable { base: GDT, limit: 87 };
    cpu.idt = DescriptorTable { base: IDT, limit: 0x7FF };
    cpu.control.cr0 |= 1;
    cpu.segs = [Segment::data(KERNEL_DATA); 6];
    cpu.segs[CS] = Segment::code32(KERNEL_CODE);
    cpu.tr = Segment {
        selector: FIRST_TASK,
        base: TSS,
        limit: 0x67,
        attributes: SegmentAttributes(0x8B),
    };
    cpu.regs[RSP] = 0x10_0000;
    cpu.update_mode();
    bench
}

impl Bench {
    /// Runs into a handler at level 0 and reads its frame of four-byte values.
    fn found32(&mut self) -> Found {
        let (vector, has_error) = self.run_to_handler();
        let mut sp = self.cpu.regs[RSP];
        let error = has_error.then(|| self.get32(sp).into());
        sp += if has_error { 4 } else { 0 };
        let [rip, cs, rflags, rsp, ss] = [0, 4, 8, 12, 16].map(|at| self.get32(sp + at).into());
        Found { vector, error, rip, cs, rflags, rsp, ss }
    }

    /// IRETD with `frame`, lowest first, on the stack.
    fn iret32(&mut self, frame: &[u32]) {
        let sp = self.cpu.regs[RSP] - 4 * frame.len() as u64;
        for (i, &value) in (0..).zip(frame) {
            self.put32(sp + 4 * i, value);
        }
        self.cpu.regs[RSP] = sp;
        self.load(CODE, &[0xCF]);
    }

    /// Runs `code` at level 3 into a handler.
    fn user32(&mut self, code: &[u8]) -> Found {
        self.ram.write_slice(code, GuestAddress(USER_CODE)).unwrap();
        let (cs, ss) = (USER_CODE_SELECTOR.into(), USER_DATA.into());
        self.iret32(&[USER_CODE as u32, cs, 2, USER_STACK as u32, ss]);
        self.found32()
    }
}

#[test]
fn an_event_at_level_3_takes_the_stack_of_the_tss() {
    let mut bench = bench();
    // int 0x40
    let found = bench.user32(&[0xCD, 0x40]);
    let want = Found {
        vector: 0x40,
        error: None,
        rip: USER_CODE + 2,
        cs: USER_CODE_SELECTOR.into(),
        rflags: 2,
        rsp: USER_STACK,
        ss: USER_DATA.into(),
    };
    assert_eq!(found, want);
    let cpu = &bench.cpu;
    assert_eq!((cpu.cpl, cpu.segs[SS].selector), (0, KERNEL_DATA));
    assert_eq!(cpu.regs[RSP], INNER_STACK - 20);
    // Level 3 could not have had the kernel's data segments.
    assert!(cpu.segs[DS].attributes.unusable() && cpu.segs[DS].selector == 0);
}

#[test]
fn a_bad_stack_in_the_tss_is_an_invalid_tss() {
    // The handler of #TS runs as a task of its own, on a stack that is good.
    for (selector, error) in [(0, 1), (USER_DATA, 0x21), (KERNEL_CODE, 9), (0xF10, 0xF11)] {
        let mut bench = bench();
        bench.put32(TSS + 8, selector.into());
        second_task(&mut bench, HANDLERS + 16 * 10, KERNEL_CODE);
        bench.put(IDT + 8 * 10, 0xE500_0030_0000);
        bench.ram.write_slice(&[0x0F, 0x0B], GuestAddress(USER_CODE)).unwrap();
        let (cs, ss) = (USER_CODE_SELECTOR.into(), USER_DATA.into());
        bench.iret32(&[USER_CODE as u32, cs, 2, USER_STACK as u32, ss]);
        assert!(bench.run());
        assert_eq!(bench.cpu.rip, HANDLERS + 16 * 10 + 1);
        assert_eq!(bench.get32(bench.cpu.regs[RSP]), error, "SS0 {selector:#x}");
    }
}

#[test]
fn segment_limits_hold() {
    // mov eax, [0xFFE]: the last byte is past a limit of 0x1000.
    let mut bench = bench();
    bench.cpu.segs[DS].limit = 0x1000;
    bench.load(CODE, &[0xA1, 0xFD, 0x0F, 0, 0, 0xA1, 0xFE, 0x0F, 0, 0]);
    let found = bench.found32();
    assert_eq!((found.vector, found.error, found.rip), (13, Some(0), CODE + 5));
}

#[test]
fn code_ends_at_its_segments_limit() {
    // nop; nop; nop; mov eax, 5, entered anew, from a block before it, and by a jump that is remembered.
    let code = [0x90, 0x90, 0x90, 0xB8, 5, 0, 0, 0];
    let jump = [0xEB, 0x0E];
    for at in [CODE, CODE + 0x10, 0x8FFC] {
        for limit in [7, 6, 4, 2] {
            let mut bench = bench();
            if at == CODE + 0x10 {
                bench.ram.write_slice(&jump, GuestAddress(CODE)).unwrap();
            }
            // Once with a limit that does not matter.
            bench.ram.write_slice(&code, GuestAddress(at)).unwrap();
            for limit in [at as u32 + 0x100, at as u32 + limit] {
                bench.cpu.regs[RAX] = 1;
                bench.cpu.regs[RSP] = 0x10_0000;
                bench.cpu.segs[CS].limit = limit;
                bench.cpu.segs[CS].attributes.0 &= !0x8000;
                bench.cpu.update_mode();
                bench.ram.write_obj(HLT, GuestAddress(at + 8)).unwrap();
                let before = bench.cpu.instructions;
                bench.cpu.rip = if at == CODE + 0x10 { CODE } else { at };
                let jumps = u64::from(at == CODE + 0x10);
                if limit == at as u32 + 0x100 {
                    assert!(bench.run());
                    assert_eq!((bench.cpu.rip, bench.cpu.regs[RAX]), (at + 9, 5));
                    assert_eq!(bench.cpu.instructions, before + jumps + 5);
                    continue;
                }
                let found = bench.found32();
                // The move passes the limit, or ends with it and the HLT is past.
                let (rip, moved) = if limit == at as u32 + 7 { (8, 5) } else { (3, 1) };
                assert_eq!((found.vector, found.error), (13, Some(0)), "{at:#x}, {limit:#x}");
                assert_eq!((found.rip, bench.cpu.regs[RAX]), (at + rip, moved));
                let done = if moved == 5 { 4 } else { 3 };
                // And the handler's HLT.
                assert_eq!(bench.cpu.instructions, before + jumps + done + 1);
            }
        }
    }
}

#[test]
fn a_call_gate_carries_parameters_in_and_ret_releases_them() {
    let mut bench = bench();
    // mov eax, [esp+8]; mov ecx, [esp+12]; retf 8
    let inner = [0x8B, 0x44, 0x24, 8, 0x8B, 0x4C, 0x24, 12, 0xCA, 8, 0];
    bench.ram.write_slice(&inner, GuestAddress(0x8100)).unwrap();
    // push 1; push 2; call far CALL_GATE; int 0x40
    let [low, high] = CALL_GATE.to_le_bytes();
    let found = bench.user32(&[0x6A, 1, 0x6A, 2, 0x9A, 0, 0, 0, 0, low, high, 0xCD, 0x40]);
    assert_eq!((found.vector, found.cs), (0x40, USER_CODE_SELECTOR.into()));
    assert_eq!((bench.cpu.regs[RAX], bench.cpu.regs[RCX]), (2, 1));
    assert_eq!(found.rsp, USER_STACK);
}

/// Enters virtual-8086 mode at 0x900:0 with `eflags`.
fn enter_v86(bench: &mut Bench, code: &[u8], eflags: u32) {
    bench.ram.write_slice(code, GuestAddress(0x9000)).unwrap();
    let eflags = eflags | flags::VM as u32 | 2;
    bench.iret32(&[0, 0x900, eflags, 0x800, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
}

#[test]
fn virtual_8086_mode_is_entered_by_iret_and_left_with_its_segments_saved() {
    let mut bench = bench();
    // mov ax, fs; cli
    enter_v86(&mut bench, &[0x8C, 0xE0, 0xFA], 0);
    let found = bench.found32();
    assert_eq!((found.vector, found.error), (13, Some(0)), "IOPL 0 may not CLI");
    assert_eq!((found.rip, found.cs, found.rsp, found.ss), (2, 0x900, 0x800, 0x1000));
    assert_eq!(found.rflags, 0x3_0002);
    assert_eq!(bench.cpu.regs[RAX] & 0xFFFF, 0x4000);
    let saved = [24, 28, 32, 36].map(|at| bench.get32(bench.cpu.regs[RSP] + at));
    assert_eq!(saved, [0x2000, 0x3000, 0x4000, 0x5000]);
    for seg in [ES, DS, FS] {
        assert!(bench.cpu.segs[seg].attributes.unusable());
    }
}

#[test]
fn virtual_8086_interrupts_need_iopl_3_or_the_redirection_map() {
    let int40 = [0xCD, 0x40];
    let mut bench_0 = bench();
    enter_v86(&mut bench_0, &int40, 0);
    assert_eq!(bench_0.found32().vector, 13);
    let mut bench_3 = bench();
    enter_v86(&mut bench_3, &int40, 0x3000);
    assert_eq!(bench_3.found32().vector, 0x40);
    // With CR4.VME and a clear bit, the program's own vector table: to 0x900:0x10.
    let mut vme = bench();
    vme.cpu.control.cr4 |= 1;
    vme.cpu.tr.limit = 0x200;
    vme.put32(TSS + 100, 0x88 << 16);
    vme.put32(0x40 * 4, 0x0900_0010);
    // hlt: #GP in virtual-8086 mode
    vme.ram.write_obj(HLT, GuestAddress(0x9010)).unwrap();
    enter_v86(&mut vme, &int40, flags::VIF as u32);
    let found = vme.found32();
    assert_eq!((found.vector, found.rip, found.rsp), (13, 0x10, 0x800 - 6));
    assert_eq!(found.rflags & flags::VIF, 0, "cleared in place of IF");
    assert_eq!(vme.get32(0x1_0800 - 4) >> 16, 0x3202, "the image shows VIF as IF, and IOPL 3");
}

/// Makes the second task begin at `eip` with code selector `cs`.
fn second_task(bench: &mut Bench, eip: u64, cs: u16) {
    bench.put32(SECOND_TSS + 0x20, eip as u32);
    bench.put32(SECOND_TSS + 0x24, 2);
    bench.put32(SECOND_TSS + 0x28, 0x1234);
    bench.put32(SECOND_TSS + 0x38, TASK_STACK as u32);
    bench.put32(SECOND_TSS + 0x4C, cs.into());
    for at in [0x48, 0x50, 0x54] {
        bench.put32(SECOND_TSS + at, KERNEL_DATA.into());
    }
}

#[test]
fn a_called_task_returns_to_its_caller() {
    let mut bench = bench();
    // str ebx; iretd
    bench.ram.write_slice(&[0x0F, 0x00, 0xCB, 0xCF], GuestAddress(0x8100)).unwrap();
    second_task(&mut bench, 0x8100, KERNEL_CODE);
    // mov eax, 7; call far SECOND_TASK; int 0x40
    let [low, high] = SECOND_TASK.to_le_bytes();
    bench.load(CODE, &[0xB8, 7, 0, 0, 0, 0x9A, 0, 0, 0, 0, low, high, 0xCD, 0x40]);
    let found = bench.found32();
    assert_eq!((found.vector, found.rip), (0x40, CODE + 14));
    assert_eq!(bench.cpu.regs[RAX], 7);
    assert_eq!(bench.cpu.tr.selector, FIRST_TASK);
    assert_ne!(bench.cpu.control.cr0 & 8, 0, "TS");
    // The second task: link, EIP after its IRET, EAX, EBX; not busy.
    assert_eq!(bench.get32(SECOND_TSS) as u16, FIRST_TASK);
    assert_eq!(bench.get32(SECOND_TSS + 0x20), 0x8104);
    assert_eq!(bench.get32(SECOND_TSS + 0x34) as u16, SECOND_TASK);
    assert_eq!(bench.get32(GDT + u64::from(SECOND_TASK) + 4) >> 8 & 0xF, 9);
}

#[test]
fn a_fault_while_loading_the_new_task_belongs_to_it() {
    let mut bench = bench();
    second_task(&mut bench, 0x8100, KERNEL_CODE);
    bench.put32(SECOND_TSS + 0x54, NOT_PRESENT.into());
    // jmp far SECOND_TASK
    let [low, high] = SECOND_TASK.to_le_bytes();
    bench.load(CODE, &[0xEA, 0, 0, 0, 0, low, high]);
    let found = bench.found32();
    assert_eq!((found.vector, found.error), (11, Some(NOT_PRESENT.into())));
    assert_eq!((found.rip, bench.cpu.tr.selector), (0x8100, SECOND_TASK));
    assert_eq!(bench.get32(TSS + 0x20), CODE as u32 + 7, "the old task goes on after its jump");
}

#[test]
fn a_fault_of_a_task_that_an_event_switched_to_is_delivered_with_the_event() {
    // #GP by a task gate; the new task's stack is outside its segment, for the error code.
    let mut bench = bench();
    second_task(&mut bench, 0x8100, KERNEL_CODE);
    bench.put32(SECOND_TSS + 0x50, SMALL_STACK.into());
    bench.put(IDT + 8 * 13, 0xE500_0030_0000);
    // #SS by a task gate too, of a task that is fine.
    bench.put32(THIRD_TSS + 0x20, 0x8200);
    bench.put32(THIRD_TSS + 0x24, 2);
    bench.put32(THIRD_TSS + 0x38, TASK_STACK as u32);
    bench.put32(THIRD_TSS + 0x4C, KERNEL_CODE.into());
    for at in [0x48, 0x50, 0x54] {
        bench.put32(THIRD_TSS + at, KERNEL_DATA.into());
    }
    bench.put(IDT + 8 * 12, 0xE500_0050_0000);
    let _ = bench.cpu.gp0();
    // Before an interrupt could be looked for.
    assert_eq!(bench.cpu.take_trap(), Taken::Go);
    assert_eq!(bench.cpu.trap, TrapKind::None);
    assert_eq!((bench.cpu.tr.selector, bench.cpu.rip), (THIRD_TASK, 0x8200));
    assert_eq!(bench.get32(THIRD_TSS) as u16, SECOND_TASK, "the second task faulted");
    assert_eq!(bench.get32(SECOND_TSS) as u16, FIRST_TASK);
}

#[test]
fn real_mode_goes_through_the_vector_table_and_back() {
    let mut bench = Bench::real();
    bench.cpu.idt = DescriptorTable { base: 0, limit: 0x3FF };
    bench.cpu.regs[RSP] = 0x7000;
    bench.cpu.segs[CS] = Segment::real(0x800);
    bench.cpu.update_mode();
    // Vector 0x21 at 0x800:0x100: inc ax; iret. Vector 0 at 0x800:0x200: hlt.
    bench.put32(0x21 * 4, 0x0800_0100);
    bench.put32(0, 0x0800_0200);
    bench.ram.write_slice(&[0x40, 0xCF], GuestAddress(0x8100)).unwrap();
    bench.ram.write_obj(HLT, GuestAddress(0x8200)).unwrap();
    // sti; int 0x21; xor cx, cx; div cx
    bench.load(0x8000, &[0xFB, 0xCD, 0x21, 0x31, 0xC9, 0xF7, 0xF1]);
    bench.cpu.rip = 0;
    assert!(bench.run());
    assert_eq!((bench.cpu.rip, bench.cpu.regs[RAX]), (0x201, 1));
    let frame = bench.get(0x7000 - 6);
    assert_eq!(frame & 0xFFFF_FFFF, 0x0800_0005, "IP of the division, CS");
    assert_ne!(frame >> 32 & flags::IF, 0);
    assert_eq!(bench.cpu.flags.rest & flags::IF, 0);
}
