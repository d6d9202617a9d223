//! The state as plain data, for the embedder. What comes in is untrusted: it is checked as a whole
//! before anything changes, so that the processor is never in a state that it could not have reached.

use vmkit_hypervisor::HypervisorError;
use vmkit_hypervisor::x86::{
    ControlRegisters, Cr0, Cr4, DebugRegisters, DescriptorTable, Efer, Events, GeneralRegisters,
    MpState, Msr, Pending, Segment, SegmentAttributes, Segments, StateSet, VcpuState, XsaveArea,
};
use vmkit_irqchip::IrqchipError;

use super::control::{cr4_bits, efer_bits, xcr0_valid};
use super::debug::{dr6_value, dr7_value};
use super::msr::{Msrs, saved_msrs};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, flags};
use crate::mem::canonical;
use crate::sse::MXCSR_MASK;

/// RFLAGS bits that exist.
const RFLAGS: u64 = 0x3F_7FD7;
/// Bits of a segment's attributes that exist: the descriptor's, and "unusable".
const ATTRIBUTES: u32 = 0x1_F0FF;
const XSAVE_HEADER: usize = 512;
const XSAVE_MIN: usize = 576;

fn refuse<T>(why: impl Into<String>) -> Result<T, HypervisorError> {
    Err(HypervisorError::state(why))
}

fn check(fine: bool, why: impl FnOnce() -> String) -> Result<(), HypervisorError> {
    if fine { Ok(()) } else { refuse(why()) }
}

impl Cpu {
    /// Reads the parts named by `what` into `out`.
    pub fn get_state(&mut self, what: StateSet, out: &mut VcpuState) {
        if what.contains(StateSet::MP) {
            // They belong to the state, and have no other place in it.
            self.take_startup();
        }
        let now = self.partition.clock_ns();
        if what.contains(StateSet::GENERAL) {
            let mut gpr = [0; 16];
            gpr.copy_from_slice(&self.regs[..16]);
            let rf = if self.must_step() { 0 } else { flags::RF };
            out.general = GeneralRegisters { gpr, rip: self.rip, rflags: self.flags.all() & !rf };
        }
        if what.contains(StateSet::SEGMENTS) {
            out.segments = self.segments();
        }
        if what.contains(StateSet::CONTROL) {
            let cr8 = u64::from(self.shared.apic().cr8());
            out.control = ControlRegisters { cr8, ..self.control };
        }
        if what.contains(StateSet::DEBUG) {
            out.debug = self.debug;
        }
        if what.contains(StateSet::XSAVE) {
            out.xsave = self.xsave_state();
        }
        if what.contains(StateSet::MSRS) {
            let list: Vec<u32> = saved_msrs(&self.model.clone()).collect();
            out.msrs.clear();
            for index in list {
                if let Some(value) = self.read_msr(index) {
                    out.msrs.push(Msr { index, value });
                }
            }
        }
        if what.contains(StateSet::EVENTS) {
            out.events = Events {
                pending: self.injected,
                nmi_pending: self.shared.nmi.load(std::sync::atomic::Ordering::SeqCst),
                nmi_masked: self.nmi_masked,
                interrupt_shadow: self.inhibit,
            };
        }
        if what.contains(StateSet::LAPIC) {
            out.lapic = self.partition.has_chips.then(|| self.shared.apic().save(now));
        }
        if what.contains(StateSet::MP) {
            out.mp = match (self.wait_for_sipi, self.halted) {
                (true, _) => MpState::WaitForSipi,
                (false, true) => MpState::Halted,
                (false, false) => MpState::Runnable,
            };
        }
        if what.contains(StateSet::TSC) {
            out.tsc = self.tsc();
        }
    }

    fn segments(&self) -> Segments {
        Segments {
            cs: self.segs[CS],
            ds: self.segs[DS],
            es: self.segs[ES],
            fs: self.segs[FS],
            gs: self.segs[GS],
            ss: self.segs[SS],
            tr: self.tr,
            ldt: self.ldt,
            gdt: self.gdt,
            idt: self.idt,
        }
    }

    fn xsave_state(&self) -> XsaveArea {
        let mut area = self.xsave_area();
        area[XSAVE_HEADER] = self.model.xcr0_mask() as u8 | 3;
        let len = (self.model.xsave_bytes() as usize).clamp(XSAVE_MIN, area.len());
        XsaveArea(area[..len].to_vec())
    }

    /// Sets the parts named by `what` after checking all of them: `from` is untrusted.
    pub fn set_state(&mut self, what: StateSet, from: &VcpuState) -> Result<(), HypervisorError> {
        self.check_registers(what, from)?;
        let debug = from.debug;
        if what.contains(StateSet::DEBUG) {
            check(debug.dr6 >> 32 == 0 && debug.dr7 >> 32 == 0, || {
                format!("DR6 {:#x}, DR7 {:#x}", debug.dr6, debug.dr7)
            })?;
        }
        if what.contains(StateSet::XSAVE) {
            self.check_xsave(&from.xsave.0)?;
        }
        let msrs = match what.contains(StateSet::MSRS) {
            true => Some(self.checked_msrs(&from.msrs)?),
            false => None,
        };
        if what.contains(StateSet::EVENTS) {
            check_pending(from.events.pending)?;
        }
        let lacks = what.contains(StateSet::LAPIC) && self.partition.has_chips;
        check(!lacks || from.lapic.is_some(), || "no local APIC, and this vCPU has one".into())?;
        let lapic = from.lapic.as_ref().filter(|_| what.contains(StateSet::LAPIC));
        let refused = |e: IrqchipError| HypervisorError::state(e.to_string());
        let now = self.partition.clock_ns();
        if let Some(lapic) = lapic {
            // It checks itself as it loads: on a copy first, because it can still refuse.
            let mut copy = self.shared.apic().clone();
            copy.load(lapic, now).map_err(refused)?;
        }
        if what.contains(StateSet::TSC) {
            let by = from.tsc.wrapping_sub(self.tsc());
            self.move_tsc(by);
        }
        if let Some(lapic) = lapic {
            // After the TSC, which its deadline counts in.
            self.shared.apic().load(lapic, now).map_err(refused)?;
        }
        if let Some(msrs) = msrs {
            self.msrs = msrs;
        }
        self.apply(what, from);
        Ok(())
    }

    /// Changes what has been checked.
    fn apply(&mut self, what: StateSet, from: &VcpuState) {
        if what.contains(StateSet::GENERAL) {
            self.regs[..16].copy_from_slice(&from.general.gpr);
            self.rip = from.general.rip;
            self.flags.set_all(from.general.rflags);
        }
        if what.contains(StateSet::SEGMENTS) {
            let s = &from.segments;
            self.segs = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs];
            (self.ldt, self.tr, self.gdt, self.idt) = (s.ldt, s.tr, s.gdt, s.idt);
        }
        if what.contains(StateSet::CONTROL) {
            self.control = from.control;
            let mut apic = self.shared.apic();
            // Unchanged, it must not clear the low bits of the task priority.
            if u64::from(apic.cr8()) != from.control.cr8 {
                apic.set_cr8(from.control.cr8 as u8 & 0xF);
            }
            drop(apic);
            let pae = self.cr0().contains(Cr0::PG)
                && self.cr4().contains(Cr4::PAE)
                && !self.efer().contains(Efer::LMA);
            if pae && !self.load_pdptes() {
                // As the processor would have them had they been bad all along: not present.
                self.pdptes = [0; 4];
            }
        }
        if what.contains(StateSet::DEBUG) {
            self.debug = DebugRegisters {
                dr6: dr6_value(from.debug.dr6),
                dr7: dr7_value(from.debug.dr7),
                ..from.debug
            };
        }
        if what.contains(StateSet::XSAVE) {
            self.apply_xsave(&from.xsave.0);
        }
        if what.contains(StateSet::EVENTS) {
            self.injected = from.events.pending;
            self.nmi_masked = from.events.nmi_masked;
            self.inhibit = from.events.interrupt_shadow;
            self.shared.nmi.store(from.events.nmi_pending, std::sync::atomic::Ordering::SeqCst);
        }
        if what.contains(StateSet::MP) {
            // What came before belongs to the state that this one replaces.
            self.shared.take_startup();
            self.halted = from.mp == MpState::Halted;
            self.wait_for_sipi = from.mp == MpState::WaitForSipi;
        }
        self.step = super::Step::default();
        self.flush_all();
        self.update_mode();
        self.shared.notify();
    }

    fn apply_xsave(&mut self, bytes: &[u8]) {
        let mut area = [0; 832];
        let len = bytes.len().min(area.len());
        area[..len].copy_from_slice(&bytes[..len]);
        let present = u64::from(area[XSAVE_HEADER]);
        self.load_xsave_area(&area, 7, present, 16);
        // MXCSR goes with either vector component; an area without them has its reset value too.
        self.mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]) & MXCSR_MASK;
    }

    fn check_xsave(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        check(bytes.len() >= XSAVE_MIN, || format!("an XSAVE area of {} bytes", bytes.len()))?;
        let header = &bytes[XSAVE_HEADER..XSAVE_MIN];
        let allowed = (self.model.xcr0_mask() | 3) as u8;
        let components = header[0];
        let plain = components & !allowed == 0 && header[1..].iter().all(|&b| b == 0);
        check(plain, || "an XSAVE header with components that the CPU model lacks".into())?;
        let needs = if components & 4 != 0 { 832 } else { XSAVE_MIN };
        check(bytes.len() >= needs, || "an XSAVE area that ends before its components".into())?;
        let mxcsr = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        check(mxcsr & !MXCSR_MASK == 0, || format!("MXCSR {mxcsr:#x}"))
    }

    fn checked_msrs(&self, list: &[Msr]) -> Result<Msrs, HypervisorError> {
        let known: Vec<u32> = saved_msrs(&self.model).collect();
        let mut msrs = self.msrs.clone();
        for msr in list {
            let set = known
                .contains(&msr.index)
                .then(|| msrs.set(&self.model, msr.index, msr.value))
                .flatten();
            check(set.is_some(), || format!("MSR {:#x} cannot be {:#x}", msr.index, msr.value))?;
        }
        Ok(msrs)
    }

    /// Checks general, control and segment registers together, as they will be.
    fn check_registers(&self, what: StateSet, from: &VcpuState) -> Result<(), HypervisorError> {
        let control = if what.contains(StateSet::CONTROL) { from.control } else { self.control };
        if what.contains(StateSet::CONTROL) {
            self.check_control(&control)?;
        }
        let segments =
            if what.contains(StateSet::SEGMENTS) { from.segments } else { self.segments() };
        if what.contains(StateSet::SEGMENTS) {
            check_segments(&segments)?;
        }
        let (rip, rflags) = if what.contains(StateSet::GENERAL) {
            (from.general.rip, from.general.rflags)
        } else {
            (self.rip, self.flags.all())
        };
        if what.contains(StateSet::GENERAL) {
            check(rflags & !RFLAGS == 0 && rflags & 2 != 0, || format!("RFLAGS {rflags:#x}"))?;
        }
        let lma = control.efer & Efer::LMA.bits() != 0;
        let code = segments.cs.attributes;
        if lma {
            check(!(code.long() && code.big()), || "CS with both L and D set".into())?;
            check(rflags & flags::VM == 0, || "RFLAGS.VM in IA-32e mode".into())?;
        }
        let long64 = lma && code.long();
        let fits = if long64 { canonical(rip) } else { rip >> 32 == 0 };
        check(fits, || format!("RIP {rip:#x}"))
    }

    fn check_control(&self, c: &ControlRegisters) -> Result<(), HypervisorError> {
        let cr0 = Cr0::from_bits_retain(c.cr0);
        let efer = Efer::from_bits_retain(c.efer);
        let paging = cr0.contains(Cr0::PG);
        let cr0_fine = c.cr0 & !Cr0::all().bits() == 0
            && (!paging || cr0.contains(Cr0::PE))
            && (!cr0.contains(Cr0::NW) || cr0.contains(Cr0::CD));
        check(cr0_fine, || format!("CR0 {:#x}", c.cr0))?;
        check(c.cr4 & !cr4_bits(&self.model) == 0, || {
            format!("CR4 {:#x} on a CPU model that lacks some of it", c.cr4)
        })?;
        check(c.efer & !(efer_bits(&self.model) | Efer::LMA.bits()) == 0, || {
            format!("EFER {:#x}", c.efer)
        })?;
        let active = efer.contains(Efer::LME) && paging;
        let consistent = active == efer.contains(Efer::LMA)
            && (!active || c.cr4 & Cr4::PAE.bits() != 0)
            && (active || c.cr4 & Cr4::PCIDE.bits() == 0);
        check(consistent, || {
            format!("CR0 {:#x}, CR4 {:#x} and EFER {:#x} contradict", c.cr0, c.cr4, c.efer)
        })?;
        check(c.cr3 & !self.physical_mask & !0xFFF == 0, || format!("CR3 {:#x}", c.cr3))?;
        check(c.cr8 & !0xF == 0, || format!("CR8 {:#x}", c.cr8))?;
        check(xcr0_valid(&self.model, c.xcr0), || format!("XCR0 {:#x}", c.xcr0))
    }
}

fn check_segments(s: &Segments) -> Result<(), HypervisorError> {
    for (name, segment) in [
        ("CS", &s.cs),
        ("DS", &s.ds),
        ("ES", &s.es),
        ("FS", &s.fs),
        ("GS", &s.gs),
        ("SS", &s.ss),
        ("TR", &s.tr),
        ("LDTR", &s.ldt),
    ] {
        let Segment { base, attributes: SegmentAttributes(bits), .. } = *segment;
        check(canonical(base) && bits & !ATTRIBUTES == 0, || {
            format!("{name} with base {base:#x} and attributes {bits:#x}")
        })?;
    }
    for (name, DescriptorTable { base, .. }) in [("GDTR", s.gdt), ("IDTR", s.idt)] {
        check(canonical(base), || format!("{name} with base {base:#x}"))?;
    }
    Ok(())
}

fn check_pending(pending: Pending) -> Result<(), HypervisorError> {
    match pending {
        Pending::Exception(e) => {
            check(e.vector < 32, || format!("a pending exception {}", e.vector))
        }
        _ => Ok(()),
    }
}
