//! What decoding depends on: part of a block's key.

use bitflags::bitflags;
use vmkit_hypervisor::x86::{Cr0, Cr4, Efer};

use super::{CS, Cpu, SS, flags};

bitflags! {
    /// The state that decides what a byte sequence means.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub(crate) struct Mode: u32 {
        /// 64-bit mode.
        const LONG64 = 1;
        /// Default operand and address size is 32 bits.
        const CODE32 = 1 << 1;
        /// Stack pointer is ESP (outside 64-bit mode).
        const STACK32 = 1 << 2;
        /// Protected mode (CR0.PE, not virtual-8086).
        const PROTECTED = 1 << 3;
        /// Virtual-8086 mode.
        const V86 = 1 << 4;
        /// x87 and MMX fault with #NM (CR0.EM for x87, CR0.TS).
        const NO_X87 = 1 << 5;
        /// SSE faults with #NM (CR0.TS).
        const SSE_NM = 1 << 6;
        /// SSE faults with #UD (CR0.EM, CR4.OSFXSR clear).
        const SSE_UD = 1 << 7;
        /// VEX-encoded instructions are enabled (CR4.OSXSAVE and XCR0).
        const AVX = 1 << 8;
        /// MMX and FXSAVE fault with #UD (CR0.EM).
        const MMX_UD = 1 << 9;
        /// WAIT faults with #NM (CR0.MP and CR0.TS).
        const WAIT_NM = 1 << 10;
        /// Long mode is active, in 64-bit or compatibility code.
        const LMA = 1 << 11;
        /// The block holds one instruction (single step, interrupt shadow).
        const STEP = 1 << 12;
        /// No processor's: the block was dropped.
        const GONE = 1 << 13;
        /// The code segment ends somewhere (outside 64-bit mode, a limit below 4 GiB): blocks begin with a
        /// look at it.
        const LIMIT = 1 << 14;
    }
}

impl Mode {
    /// The mode of `cpu` as its registers stand.
    pub fn of(cpu: &Cpu) -> Self {
        let (cr0, cr4) = (cpu.cr0(), cpu.cr4());
        let lma = cpu.efer().contains(Efer::LMA);
        let v86 = cpu.flags.rest & flags::VM != 0 && cr0.contains(Cr0::PE) && !lma;
        let code = cpu.segs[CS].attributes;
        let mut mode = Self::empty();
        mode.set(Self::LMA, lma);
        mode.set(Self::LONG64, lma && code.long());
        mode.set(Self::CODE32, code.big() && !(lma && code.long()));
        mode.set(Self::LIMIT, !(lma && code.long()) && cpu.segs[CS].limit != u32::MAX);
        mode.set(Self::STACK32, cpu.segs[SS].attributes.big());
        mode.set(Self::PROTECTED, cr0.contains(Cr0::PE) && !v86);
        mode.set(Self::V86, v86);
        mode.set(Self::NO_X87, cr0.intersects(Cr0::EM | Cr0::TS));
        mode.set(Self::MMX_UD, cr0.contains(Cr0::EM));
        mode.set(Self::SSE_NM, cr0.contains(Cr0::TS));
        mode.set(Self::SSE_UD, cr0.contains(Cr0::EM) || !cr4.contains(Cr4::OSFXSR));
        mode.set(Self::WAIT_NM, cr0.contains(Cr0::MP | Cr0::TS));
        mode.set(Self::AVX, cr4.contains(Cr4::OSXSAVE) && cpu.control.xcr0 & 6 == 6);
        mode
    }

    /// Bits of the default code size.
    pub fn bitness(self) -> u32 {
        if self.contains(Self::LONG64) {
            64
        } else if self.contains(Self::CODE32) {
            32
        } else {
            16
        }
    }
}
