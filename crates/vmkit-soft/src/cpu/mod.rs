//! The processor's state, and the small operations everything else is made of.
//!
//! What belongs to one instruction group lives with that group (`exec`, `sse`, `fpu`, `sys`); what
//! belongs to memory in `mem`, to decoded code in `code`.

pub(crate) mod flags;
mod mode;
pub(crate) mod trap;
mod width;

use std::ptr::{NonNull, null};
use std::sync::Arc;

use flags::Flags;
pub(crate) use mode::Mode;
pub(crate) use trap::{Trap, TrapKind};
use vmkit_hypervisor::x86::{
    ControlRegisters, Cr0, Cr4, DebugRegisters, DescriptorTable, Efer, Pending, Segment, Segments,
};
use vmkit_hypervisor::{CpuModel, Feature, VcpuIo};
pub(crate) use width::{HIGH_BYTE, Int, W8, W16, W32, W64, Width};

use crate::code::{Block, CodeCache};
use crate::fpu::Fpu;
use crate::mem::{
    MODE_SUPERVISOR, MODE_SUPERVISOR_AC, MODE_USER, MODE_USER_ALIGNED, MemoryMap, Tlb,
};
use crate::partition::PartitionInner;
use crate::shared::VcpuShared;
use crate::sys::msr::Msrs;

/// Register number of "no register": reads as zero.
pub(crate) const REG_ZERO: u8 = 17;
/// Register number of the running block's first RIP, the base of RIP-relative addresses.
pub(crate) const REG_BLOCK: u8 = 16;

pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;

/// Indices into [`Cpu::segs`], in the order of their encoding.
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const DS: usize = 3;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;
/// Index into [`Cpu::seg_base`] of a base that is always zero.
pub(crate) const SEG_NONE: usize = 7;

/// Where [`Cpu::context`] has the mode.
const MODE_SHIFT: u32 = 33;
/// In [`Cpu::context`]: exactly one instruction is being run.
pub(crate) const STEPPING: u64 = (Mode::STEP.bits() as u64) << MODE_SHIFT;

/// One 256-bit vector register; its low half is the XMM register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub(crate) struct Vector(pub [u64; 4]);

/// A processor.
#[repr(C)]
pub(crate) struct Cpu {
    /// RAX..R15, then the block's first RIP and zero ([`REG_BLOCK`], [`REG_ZERO`]); the rest unused.
    pub regs: [u64; 32],
    pub flags: Flags,
    /// Bases of ES, CS, SS, DS, FS, GS as they apply to addresses: zero for the first four in 64-bit
    /// mode. Index 7 is always zero.
    pub seg_base: [u64; 8],
    /// One of the `MODE_` constants, from CPL and AC.
    pub tlb_mode: u64,
    /// The next instruction, exact between blocks and inside operations that end one.
    pub rip: u64,
    /// Instructions completed.
    pub instructions: u64,
    /// Bumped whenever a link between blocks may have become stale: [`code_changed`](Self::code_changed).
    pub generation: u64,
    /// Bumped with that, and whenever an address may lead to another block than before:
    /// [`translations_changed`](Self::translations_changed).
    pub translations: u64,
    /// The running block.
    pub block: *const Block,
    /// The block and link that the next look-up's result goes into, with the generation it is for.
    pub link_from: Option<(*const Block, usize)>,
    /// What else than RIP decides which block is next: the base of CS where it has one, and above it
    /// whether CPL is 3, and the mode.
    pub context: u64,
    /// What stopped an instruction; `None` between instructions.
    pub trap: TrapKind,
    /// What decoding depends on.
    pub mode: Mode,
    /// Current privilege level.
    pub cpl: u8,
    /// Set by STI, MOV SS and POP SS: the next instruction runs before any interrupt is taken.
    pub inhibit: bool,
    /// The run loop found IF clear when it last looked: whoever sets IF asks it to look again.
    pub interrupt_waits: bool,
    /// HLT was executed.
    pub halted: bool,
    /// A callback answered Stop: leave before the next instruction.
    pub stop: bool,
    pub mxcsr: u32,
    pub vectors: [Vector; 16],
    pub tlb: Tlb,
    pub fpu: Fpu,
    pub code: CodeCache,

    /// ES, CS, SS, DS, FS, GS.
    pub segs: [Segment; 6],
    pub ldt: Segment,
    pub tr: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub control: ControlRegisters,
    pub pdptes: [u64; 4],
    pub debug: DebugRegisters,
    pub msrs: Msrs,
    /// Guest-physical address bits that exist.
    pub physical_mask: u64,
    /// The model lists 1 GiB pages.
    pub gbpages: bool,
    pub nmi_masked: bool,
    /// An event that was being delivered when the run was left, or that the embedder injected.
    pub injected: Pending,
    /// Data breakpoints hit by the current instruction, as DR6 bits.
    pub data_hits: u64,
    /// What single-stepping remembers.
    pub step: crate::sys::Step,
    /// What the last load that missed the TLB read.
    pub loaded: u128,
    /// Steps of long instructions, for [`Cpu::attention`].
    pub long_steps: u32,
    /// After INIT: waiting for a start-up IPI.
    pub wait_for_sipi: bool,
    /// What of iced's features the model lists, by number.
    pub listed: Box<[bool; 256]>,
    /// How iced is to decode for the model.
    pub decoder_options: u32,
    /// TSC value minus clock ticks.
    pub tsc_offset: u64,

    pub model: Arc<CpuModel>,
    pub index: u32,
    pub map: Arc<MemoryMap>,
    pub partition: Arc<PartitionInner>,
    pub shared: Arc<VcpuShared>,
    /// The world outside, during a run.
    pub io: Option<NonNull<dyn VcpuIo>>,
}

impl Cpu {
    /// A processor after power-up.
    pub fn new(
        index: u32,
        model: &CpuModel,
        partition: Arc<PartitionInner>,
        shared: Arc<VcpuShared>,
    ) -> Box<Self> {
        let segments = Segments::default();
        let mut cpu = Box::new(Self {
            regs: [0; 32],
            flags: Flags::new(2),
            seg_base: [0; 8],
            tlb_mode: MODE_SUPERVISOR,
            rip: 0xFFF0,
            instructions: 0,
            generation: 1,
            translations: 1,
            block: null(),
            link_from: None,
            context: 0,
            trap: TrapKind::None,
            mode: Mode::empty(),
            cpl: 0,
            inhibit: false,
            interrupt_waits: false,
            halted: false,
            stop: false,
            mxcsr: 0x1F80,
            vectors: [Vector::default(); 16],
            tlb: Tlb::new(),
            fpu: Fpu::new(),
            code: CodeCache::new(),
            segs: [segments.es, segments.cs, segments.ss, segments.ds, segments.fs, segments.gs],
            ldt: segments.ldt,
            tr: segments.tr,
            gdt: segments.gdt,
            idt: segments.idt,
            control: ControlRegisters::default(),
            pdptes: [0; 4],
            debug: DebugRegisters::default(),
            msrs: Msrs::new(),
            physical_mask: (1 << model.physical_bits.clamp(32, 52)) - 1,
            gbpages: model.has(Feature::Gbpages),
            nmi_masked: false,
            injected: Pending::None,
            data_hits: 0,
            step: crate::sys::Step::default(),
            loaded: 0,
            long_steps: 0,
            wait_for_sipi: index != 0,
            listed: crate::features::listed(model),
            decoder_options: crate::features::decoder_options(model),
            tsc_offset: 0,
            model: Arc::new(model.clone()),
            index,
            map: partition.memory_map(),
            partition,
            shared,
            io: None,
        });
        cpu.reset();
        cpu.update_mode();
        cpu
    }

    #[inline(always)]
    pub fn cr0(&self) -> Cr0 {
        Cr0::from_bits_retain(self.control.cr0)
    }

    #[inline(always)]
    pub fn cr4(&self) -> Cr4 {
        Cr4::from_bits_retain(self.control.cr4)
    }

    #[inline(always)]
    pub fn efer(&self) -> Efer {
        Efer::from_bits_retain(self.control.efer)
    }

    /// True in 64-bit mode (long mode with CS.L).
    #[inline(always)]
    pub fn long64(&self) -> bool {
        self.mode.contains(Mode::LONG64)
    }

    /// Cuts `linear` to the width of linear addresses: 64 bits in long mode, else 32.
    #[inline(always)]
    pub fn wrap_linear(&self, linear: u64) -> u64 {
        if self.control.efer & Efer::LMA.bits() != 0 { linear } else { linear & 0xFFFF_FFFF }
    }

    /// The running block. Only operations of a block ask.
    #[inline(always)]
    #[allow(unsafe_code, reason = "the running block lies in the arena")]
    pub fn running(&self) -> &Block {
        // SAFETY: the run loop sets `block` before it calls a block's first operation, and the arena
        // is emptied only between blocks.
        unsafe { &*self.block }
    }

    /// Takes note of decoded code that is no more, or that must be looked at again: links between
    /// blocks are stale, and so are remembered jumps.
    pub fn code_changed(&mut self) {
        self.generation += 1;
        self.translations += 1;
    }

    /// Takes note of a linear address that may be fetched from elsewhere. Links between blocks stay
    /// good: they lead to other blocks of the same page. What calls this ends its block with no link.
    pub fn translations_changed(&mut self) {
        self.translations += 1;
    }

    /// Takes note of a change to CPL, AC, CR0, CR4, EFER, XCR0 or a segment: recomputes everything
    /// derived from them. No link leads from a block that can do such a thing.
    pub fn update_mode(&mut self) {
        self.cpl = if self.cr0().contains(Cr0::PE) {
            if self.flags.rest & flags::VM != 0 { 3 } else { self.segs[SS].attributes.dpl() }
        } else {
            0
        };
        let mode = Mode::of(self);
        self.mode = mode;
        let base = if mode.contains(Mode::LONG64) { 0 } else { self.segs[CS].base & 0xFFFF_FFFF };
        self.context = base | u64::from(self.cpl == 3) << 32 | u64::from(mode.bits()) << MODE_SHIFT;
        for (base, seg) in self.seg_base.iter_mut().zip(&self.segs) {
            *base = seg.base;
        }
        if mode.contains(Mode::LONG64) {
            self.seg_base[..4].fill(0);
        }
        self.update_tlb_mode();
    }

    /// Takes note of a change to AC, CPL or CR0.AM.
    #[inline]
    pub fn update_tlb_mode(&mut self) {
        self.tlb_mode = if self.cpl == 3 {
            let aligned =
                self.flags.rest & flags::AC != 0 && self.control.cr0 & Cr0::AM.bits() != 0;
            if aligned { MODE_USER_ALIGNED } else { MODE_USER }
        } else if self.flags.rest & flags::AC != 0 {
            MODE_SUPERVISOR_AC
        } else {
            MODE_SUPERVISOR
        };
    }

    /// Data breakpoints are armed: every data access takes the slow path.
    #[inline]
    pub fn watches_data(&self) -> bool {
        self.debug.dr7 & 0xFF != 0 && self.data_breakpoints_armed()
    }

    /// RSP as a stack of the current width sees it.
    pub fn stack_mask(&self) -> u64 {
        if self.mode.contains(Mode::LONG64) {
            u64::MAX
        } else if self.mode.contains(Mode::STACK32) {
            0xFFFF_FFFF
        } else {
            0xFFFF
        }
    }
}
