//! Every form of every vector instruction against the host: the same bytes, the same inputs.

#![allow(unsafe_code, reason = "runs instructions natively, from a page of their own")]

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};

use crate::cpu::flags::ARITHMETIC;
use crate::cpu::{Cpu, TrapKind, Vector};
use crate::testing::Bench;
use vmkit_device::memory::{Bytes, GuestAddress};

/// What a tested instruction may read and write: RAX, RCX, RDX, flags, MXCSR, and the first eight
/// vector registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub(crate) struct Regs {
    pub vectors: [Vector; 8],
    pub general: [u64; 3],
    pub flags: u64,
    pub mxcsr: u32,
}

/// A page of code that loads a [`Regs`], executes one instruction and stores the [`Regs`].
pub(crate) struct Native(*mut u8);

impl Native {
    pub fn new() -> Self {
        // SAFETY: a fresh private mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page.cast())
    }

    /// Executes `insn` on `regs`.
    pub fn run(&self, insn: &[u8], regs: &mut Regs) {
        let avx = is_x86_feature_detected!("avx");
        let mut code = vec![0x53]; // push rbx
        code.extend([0x48, 0x89, 0xFB]); // mov rbx, rdi
        for i in 0..8_u8 {
            // (v)movups (y|x)mm(i), [rbx + 32 * i]
            code.extend(if avx { &[0xC5, 0xFC, 0x10][..] } else { &[0x0F, 0x10] });
            code.extend([0x83 | i << 3]);
            code.extend((u32::from(i) * 32).to_le_bytes());
        }
        code.extend([0x0F, 0xAE, 0x93, 0x20, 1, 0, 0]); // ldmxcsr [rbx + 0x120]
        code.extend([0xFF, 0xB3, 0x18, 1, 0, 0, 0x9D]); // push [rbx + 0x118]; popfq
        code.extend([0x48, 0x8B, 0x83, 0, 1, 0, 0]); // mov rax, [rbx + 0x100]
        code.extend([0x48, 0x8B, 0x8B, 8, 1, 0, 0]); // mov rcx, [rbx + 0x108]
        code.extend([0x48, 0x8B, 0x93, 0x10, 1, 0, 0]); // mov rdx, [rbx + 0x110]
        code.extend(insn);
        code.extend([0x48, 0x89, 0x83, 0, 1, 0, 0]);
        code.extend([0x48, 0x89, 0x8B, 8, 1, 0, 0]);
        code.extend([0x48, 0x89, 0x93, 0x10, 1, 0, 0]);
        code.extend([0x9C, 0x8F, 0x83, 0x18, 1, 0, 0]); // pushfq; pop [rbx + 0x118]
        code.extend([0x0F, 0xAE, 0x9B, 0x20, 1, 0, 0]); // stmxcsr [rbx + 0x120]
        for i in 0..8_u8 {
            code.extend(if avx { &[0xC5, 0xFC, 0x11][..] } else { &[0x0F, 0x11] });
            code.extend([0x83 | i << 3]);
            code.extend((u32::from(i) * 32).to_le_bytes());
        }
        if avx {
            code.extend([0xC5, 0xF8, 0x77]); // vzeroupper
        }
        code.extend([0x5B, 0xC3]);
        let mxcsr = 0x1F80_u32;
        // SAFETY: the page holds the code just written, which touches `regs` and volatile registers
        // only; MXCSR goes back to its default.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.0, code.len());
            let run: extern "C" fn(*mut Regs) = std::mem::transmute(self.0);
            run(regs);
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr);
        }
    }
}

/// A small generator, so that a failure can be repeated.
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Bits of which many are interesting as numbers.
    pub fn bits(&mut self) -> u64 {
        let special = [
            0x3FF0_0000_0000_0000,
            0x4045_0000_4048_F5C3,
            0x7FF0_0000_7F80_0000,
            0x7FF8_0000_FFC0_0001,
            0x0000_0001_0000_0001,
            0x8000_0000_8000_0000,
            0xC1E0_0000_0020_0000,
            0x0010_0000_0080_0000,
            0x7FEF_FFFF_FFFF_FFFF,
            0,
            u64::MAX,
        ];
        match self.next() % 4 {
            0 => special[self.next() as usize % special.len()],
            1 => (self.next() as i32 as f64 / 1024.0).to_bits(),
            2 => {
                let pair = [(self.next() as i16 as f32 / 8.0), (self.next() as i32 as f32)];
                u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32
            }
            _ => self.next(),
        }
    }

    pub fn regs(&mut self, mxcsr: u32) -> Regs {
        let mut regs = Regs {
            vectors: [Vector::default(); 8],
            general: [self.bits() & 0x1F, self.bits(), self.next() & 0x1F],
            flags: self.next() & ARITHMETIC | 2,
            mxcsr,
        };
        for vector in &mut regs.vectors {
            vector.0 = std::array::from_fn(|_| self.bits());
        }
        regs
    }
}

fn put(cpu: &mut Cpu, regs: &Regs) {
    cpu.vectors[..8].copy_from_slice(&regs.vectors);
    cpu.regs[..3].copy_from_slice(&regs.general);
    cpu.flags.set_arithmetic(regs.flags);
    cpu.mxcsr = regs.mxcsr;
}

fn get(cpu: &mut Cpu) -> Regs {
    let mut regs = Regs {
        vectors: [Vector::default(); 8],
        general: [0; 3],
        flags: cpu.flags.arithmetic() | 2,
        mxcsr: cpu.current_mxcsr(),
    };
    regs.vectors.copy_from_slice(&cpu.vectors[..8]);
    regs.general.copy_from_slice(&cpu.regs[..3]);
    regs
}

/// Executes `insn` on the processor under test, which must not trap.
pub(crate) fn run_guest(bench: &mut Bench, insn: &[u8], regs: &Regs) -> Regs {
    let mut code = insn.to_vec();
    code.extend([0x0F, 0x0B]);
    bench.load(0x8000, &code);
    bench.cpu.code.forget();
    bench.cpu.code_changed();
    bench.cpu.trap = TrapKind::None;
    put(&mut bench.cpu, regs);
    bench.cpu.fp_enter();
    bench.go();
    let after = get(&mut bench.cpu);
    assert_eq!(bench.cpu.trap, TrapKind::Exception { vector: 6, error: None }, "{insn:02X?}");
    assert_eq!(bench.cpu.rip, 0x8000 + insn.len() as u64, "{insn:02X?}");
    after
}

fn decode(bytes: &[u8]) -> Option<Instruction> {
    let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    (!insn.is_invalid() && insn.len() == bytes.len()).then_some(insn)
}

/// Where the memory operand of tested instructions lies, in the guest and in this process.
const OPERAND: u64 = 0x20_0040;

/// A page at the same address as the guest's.
struct Page;

impl Page {
    fn map() -> Self {
        // SAFETY: a fresh private mapping, of a page nothing uses (or the one that an earlier test made).
        let page = unsafe {
            libc::mmap(
                (OPERAND & !0xFFF) as *mut libc::c_void,
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(page as u64, OPERAND & !0xFFF);
        Self
    }

    fn operand(&mut self) -> &mut [u8; 64] {
        // SAFETY: the mapping above, to which nothing else refers.
        unsafe { &mut *(OPERAND as *mut [u8; 64]) }
    }
}

/// A kind of operand in an encoding: registers only, memory at RDX, or a vector of addresses from RDX.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Registers,
    Memory,
    Gather,
}

impl Form {
    fn modrm(self, group: u8) -> Vec<u8> {
        match self {
            Self::Registers => vec![0xC1 | group << 3],
            Self::Memory => vec![0x02 | group << 3],
            Self::Gather => vec![0x04 | group << 3, 0x0A],
        }
    }
}

/// All instructions of the legacy maps: register 2 with register 1 or memory.
fn legacy_forms(form: Form, each: &mut dyn FnMut(&[u8])) {
    for prefix in [None, Some(0x66), Some(0xF3), Some(0xF2)] {
        for rex in [None, Some(0x48)] {
            for map in [&[0x0F][..], &[0x0F, 0x38], &[0x0F, 0x3A]] {
                let start = prefix.into_iter().chain(rex).chain(map.iter().copied());
                all_opcodes(form, &start.collect::<Vec<_>>(), map == [0x0F], each);
            }
        }
    }
}

/// All instructions in VEX encoding: registers 2, 3 (or 0) and 1 or memory.
fn vex_forms(form: Form, each: &mut dyn FnMut(&[u8])) {
    for map in 1..=3_u8 {
        for pp in 0..4_u8 {
            for l in [0, 4] {
                for w in [0, 0x80] {
                    for vvvv in [0x60, 0x78] {
                        let start = [0xC4, 0xE0 | map, w | vvvv | l | pp];
                        all_opcodes(form, &start, map == 1, each);
                    }
                }
            }
        }
    }
}

fn all_opcodes(form: Form, start: &[u8], groups: bool, each: &mut dyn FnMut(&[u8])) {
    for opcode in 0..=255_u8 {
        for group in [2, 3, 4, 6, 7] {
            if group != 2 && !(groups && (0x71..=0x73).contains(&opcode)) {
                continue;
            }
            for imm in [None, Some(0x1B_u8), Some(0xE4), Some(2), Some(0x4D)] {
                let mut bytes = start.to_vec();
                bytes.push(opcode);
                bytes.extend(form.modrm(group));
                bytes.extend(imm);
                each(&bytes);
            }
        }
    }
}

/// True if `insn` works on vector registers and is none that MMX has a part in.
fn is_vector(insn: &Instruction) -> bool {
    let any = |f: fn(iced_x86::Register) -> bool| {
        (0..insn.op_count()).any(|n| f(insn.op_register(n)))
            || insn.op_count() > 1 && f(insn.memory_index())
    };
    any(iced_x86::Register::is_vector_register) && !any(iced_x86::Register::is_mm)
}

fn is_form(insn: &Instruction, form: Form) -> bool {
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    let plain = (0..insn.op_count())
        .all(|n| matches!(insn.op_kind(n), OpKind::Register | OpKind::Immediate8 | OpKind::Memory));
    plain && memory == (form != Form::Registers) && insn.is_vsib() == (form == Form::Gather)
}

/// Runs every form of every vector instruction that the host lists here and there.
/// Hands each encoding of a form to a function.
type Encoder = fn(Form, &mut dyn FnMut(&[u8]));

fn agree(mxcsr: u32, rounds: u32, form: Form, encoding: Encoder) -> usize {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    static PAGE: std::sync::LazyLock<std::sync::Mutex<Page>> =
        std::sync::LazyLock::new(|| std::sync::Mutex::new(Page::map()));
    let _alone = ALONE.lock();
    let mut page = PAGE.lock().unwrap();
    let (native, mut bench, mut random) = (Native::new(), Bench::long(), Random(0x1234_5678_9ABC));
    let mut codes = std::collections::BTreeSet::new();
    bench.cpu.control.cr4 |= 1 << 18;
    bench.cpu.control.xcr0 = 7;
    bench.cpu.update_mode();
    encoding(form, &mut |bytes| {
        let Some(insn) = decode(bytes) else { return };
        let listed = bench.cpu.lists(&insn) && is_vector(&insn) && is_form(&insn, form);
        if !listed {
            return;
        }
        codes.insert(insn.code() as usize);
        for _ in 0..rounds {
            let mut before = random.regs(mxcsr);
            if form != Form::Registers {
                before.general[2] = OPERAND;
                // Indices of a gather.
                before.vectors[1].0 = std::array::from_fn(|_| random.next() & 31);
            }
            let operand =
                std::array::from_fn::<_, 64, _>(|i| (random.bits() >> ((i & 7) * 8)) as u8);
            let mut expected = before;
            *page.operand() = operand;
            native.run(bytes, &mut expected);
            expected.flags = expected.flags & ARITHMETIC | 2;
            bench.ram.write_slice(&operand, GuestAddress(OPERAND)).unwrap();
            let got = run_guest(&mut bench, bytes, &before);
            assert_eq!(got, expected, "{:?} {bytes:02X?} on {before:X?}", insn.code());
            let mut left = [0; 64];
            bench.ram.read_slice(&mut left, GuestAddress(OPERAND)).unwrap();
            assert_eq!(left, *page.operand(), "{:?} {bytes:02X?}", insn.code());
        }
    });
    codes.len()
}

/// Flags clear, default control bits.
const DEFAULT: u32 = 0x1F80;
/// Round up, flush to zero, denormals are zero.
const UNUSUAL: u32 = 0xDFC0;

#[test]
fn register_forms_agree_with_the_host() {
    let codes = agree(DEFAULT, 12, Form::Registers, legacy_forms);
    assert!(codes > 200, "{codes}");
    agree(UNUSUAL, 6, Form::Registers, legacy_forms);
}

#[test]
fn memory_forms_agree_with_the_host() {
    let codes = agree(DEFAULT, 6, Form::Memory, legacy_forms);
    assert!(codes > 200, "{codes}");
    agree(UNUSUAL, 3, Form::Memory, legacy_forms);
}

#[test]
fn vex_register_forms_agree_with_the_host() {
    let codes = agree(DEFAULT, 12, Form::Registers, vex_forms);
    assert!(codes > 400 || !is_x86_feature_detected!("avx2"), "{codes}");
    agree(UNUSUAL, 6, Form::Registers, vex_forms);
}

#[test]
fn vex_memory_forms_agree_with_the_host() {
    let codes = agree(DEFAULT, 6, Form::Memory, vex_forms);
    assert!(codes > 400 || !is_x86_feature_detected!("avx2"), "{codes}");
    agree(UNUSUAL, 3, Form::Memory, vex_forms);
}

#[test]
fn gathers_agree_with_the_host() {
    let codes = agree(DEFAULT, 30, Form::Gather, vex_forms);
    assert!(codes == 16 || !is_x86_feature_detected!("avx2"), "{codes}");
}
