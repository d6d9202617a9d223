//! Power-up, INIT and start-up (Intel SDM vol. 3A §10.1).

use vmkit_hypervisor::x86::{ControlRegisters, DebugRegisters, Pending, Segment, Segments};

use super::msr::Msrs;
use crate::cpu::{CS, Cpu, RDX};
use crate::fpu::Fpu;
use crate::sse::MXCSR_RESET;

/// CR0.CD and CR0.NW: INIT leaves them alone.
const CACHE_BITS: u64 = 3 << 29;

impl Cpu {
    /// Power-up. Not the local APIC: that is its owner's.
    pub fn reset(&mut self) {
        self.control.cr0 = ControlRegisters::default().cr0;
        self.control.xcr0 = 1;
        self.msrs = Msrs::new();
        self.fpu = Fpu::new();
        self.reset_sse();
        self.mxcsr = MXCSR_RESET;
        self.init();
        self.tsc_offset = 0;
    }

    /// INIT: what power-up does, but for what survives it: x87 and vector state, XCR0, MSRs, the TSC,
    /// CR0.CD and CR0.NW (Intel SDM vol. 3A table 10-1).
    pub fn init(&mut self) {
        let segments = Segments::default();
        self.regs[..16].fill(0);
        // Family, model and stepping.
        self.regs[RDX] = u64::from(self.signature());
        self.rip = 0xFFF0;
        self.flags.set_all(2);
        self.segs = [segments.es, segments.cs, segments.ss, segments.ds, segments.fs, segments.gs];
        self.ldt = segments.ldt;
        self.tr = segments.tr;
        self.gdt = segments.gdt;
        self.idt = segments.idt;
        self.control = ControlRegisters {
            cr0: self.control.cr0 & CACHE_BITS | 0x10,
            xcr0: self.control.xcr0,
            ..ControlRegisters::default()
        };
        self.pdptes = [0; 4];
        self.debug = DebugRegisters::default();
        self.msrs.debugctl = 0;
        self.inhibit = false;
        self.halted = false;
        self.nmi_masked = false;
        self.injected = Pending::None;
        self.data_hits = 0;
        self.step = super::Step::default();
        self.flush_all();
        self.update_mode();
    }

    fn signature(&self) -> u32 {
        self.model.cpuid(1, 0, &vmkit_hypervisor::CpuidContext::default()).eax
    }

    /// A start-up IPI, while waiting for it: starts in real mode at `vector << 12`.
    pub fn sipi(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        self.segs[CS] = Segment { attributes: self.segs[CS].attributes, ..Segment::real(selector) };
        self.rip = 0;
        self.update_mode();
    }
}
