//! General, segment, control and debug registers, and events: KVM's structures to neutral ones and
//! back.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI,
    kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_vcpu_events, kvm_xcrs,
};
use vmkit_hypervisor::x86::{
    DebugRegisters, DescriptorTable, Efer, Events, Exception, GeneralRegisters, Interrupt, Pending,
    Segment, SegmentAttributes,
};
use vmkit_hypervisor::{Feature, HypervisorError, Result, StateSet, VcpuState};

use super::KvmVcpu;
use crate::error::{host, io_error};

impl KvmVcpu {
    pub(super) fn general(&self) -> Result<GeneralRegisters> {
        let r = self.fd.get_regs().map_err(host("read general registers"))?;
        Ok(GeneralRegisters {
            gpr: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
        })
    }

    pub(super) fn set_general(&self, from: &GeneralRegisters) -> Result<()> {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
            from.gpr;
        let regs = kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: from.rip,
            rflags: from.rflags | 2,
        };
        self.fd.set_regs(&regs).map_err(host("set general registers"))
    }

    /// Reads segments and control registers, which come in one structure.
    pub(super) fn system(&self, what: StateSet, out: &mut VcpuState) -> Result<()> {
        let s = self.fd.get_sregs().map_err(host("read system registers"))?;
        if what.contains(StateSet::SEGMENTS) {
            let to = &mut out.segments;
            for (to, from) in [
                (&mut to.cs, &s.cs),
                (&mut to.ds, &s.ds),
                (&mut to.es, &s.es),
                (&mut to.fs, &s.fs),
                (&mut to.gs, &s.gs),
                (&mut to.ss, &s.ss),
                (&mut to.tr, &s.tr),
                (&mut to.ldt, &s.ldt),
            ] {
                *to = segment(from);
            }
            to.gdt = DescriptorTable { base: s.gdt.base, limit: s.gdt.limit };
            to.idt = DescriptorTable { base: s.idt.base, limit: s.idt.limit };
        }
        if what.contains(StateSet::CONTROL) {
            let to = &mut out.control;
            (to.cr0, to.cr2, to.cr3, to.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
            (to.cr8, to.efer) = (s.cr8, s.efer);
            to.xcr0 = self.xcr0()?;
        }
        Ok(())
    }

    /// Sets segments, control registers and the local APIC's base, as far as `what` names them.
    pub(super) fn set_system(&self, what: StateSet, from: &VcpuState) -> Result<()> {
        let mut s = self.fd.get_sregs().map_err(host("read system registers"))?;
        if what.contains(StateSet::SEGMENTS) {
            let seg = &from.segments;
            s.cs = kvm_segment_of(&seg.cs);
            s.ds = kvm_segment_of(&seg.ds);
            s.es = kvm_segment_of(&seg.es);
            s.fs = kvm_segment_of(&seg.fs);
            s.gs = kvm_segment_of(&seg.gs);
            s.ss = kvm_segment_of(&seg.ss);
            s.tr = kvm_segment_of(&seg.tr);
            s.ldt = kvm_segment_of(&seg.ldt);
            s.gdt = kvm_dtable { base: seg.gdt.base, limit: seg.gdt.limit, padding: [0; 3] };
            s.idt = kvm_dtable { base: seg.idt.base, limit: seg.idt.limit, padding: [0; 3] };
        }
        if what.contains(StateSet::CONTROL) {
            let c = &from.control;
            (s.cr0, s.cr2, s.cr3, s.cr4) = (c.cr0, c.cr2, c.cr3, c.cr4);
            (s.cr8, s.efer) = (c.cr8, c.efer);
        }
        if what.contains(StateSet::LAPIC)
            && let Some(lapic) = &from.lapic
        {
            s.apic_base = lapic.apic_base;
        }
        // Interrupts in flight are events; left in here they would be queued a second time.
        s.interrupt_bitmap = [0; 4];
        self.fd.set_sregs(&s).map_err(|error| refused("control registers or segments", &error))?;
        if what.contains(StateSet::CONTROL) {
            // Without a local APIC this one counts, and not the system registers' (KVM_RUN sets CR8 to it).
            self.page.set_cr8(from.control.cr8);
            self.set_xcr0(from.control.xcr0)?;
        }
        Ok(())
    }

    fn xcr0(&self) -> Result<u64> {
        if !self.model.has(Feature::Xsave) {
            return Ok(1);
        }
        let xcrs = self.fd.get_xcrs().map_err(host("read XCR0"))?;
        let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        let found = xcrs.xcrs.iter().take(count).find(|xcr| xcr.xcr == 0);
        Ok(found.map_or(1, |xcr| xcr.value))
    }

    fn set_xcr0(&self, value: u64) -> Result<()> {
        if !self.model.has(Feature::Xsave) {
            return Ok(());
        }
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0].value = value;
        self.fd.set_xcrs(&xcrs).map_err(|error| refused("XCR0", &error))
    }

    pub(super) fn debug(&self) -> Result<DebugRegisters> {
        let d = self.fd.get_debug_regs().map_err(host("read debug registers"))?;
        Ok(DebugRegisters { dr: d.db, dr6: d.dr6, dr7: d.dr7 })
    }

    pub(super) fn set_debug(&self, from: &DebugRegisters) -> Result<()> {
        let regs =
            kvm_debugregs { db: from.dr, dr6: from.dr6, dr7: from.dr7, ..kvm_debugregs::default() };
        self.fd.set_debug_regs(&regs).map_err(|error| refused("debug registers", &error))
    }

    pub(super) fn events(&self) -> Result<Events> {
        let e = self.fd.get_vcpu_events().map_err(host("read pending events"))?;
        let pending = if e.exception.injected != 0 || e.exception.pending != 0 {
            Pending::Exception(Exception {
                vector: e.exception.nr,
                error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
            })
        } else if e.interrupt.injected != 0 {
            Pending::Interrupt(Interrupt {
                vector: e.interrupt.nr,
                software: e.interrupt.soft != 0,
            })
        } else {
            Pending::None
        };
        // An NMI that was injected and not yet delivered is, to the guest, one that waits; KVM masks
        // further ones as soon as it injects.
        let injected = e.nmi.injected != 0;
        Ok(Events {
            pending,
            nmi_pending: e.nmi.pending != 0 || injected,
            nmi_masked: e.nmi.masked != 0 && !injected,
            interrupt_shadow: e.interrupt.shadow != 0,
        })
    }

    pub(super) fn set_events(&self, from: &Events) -> Result<()> {
        let mut e = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..kvm_vcpu_events::default()
        };
        match from.pending {
            Pending::None => {}
            Pending::Exception(Exception { vector, error_code }) => {
                e.exception.injected = 1;
                e.exception.nr = vector;
                e.exception.has_error_code = u8::from(error_code.is_some());
                e.exception.error_code = error_code.unwrap_or(0);
            }
            Pending::Interrupt(Interrupt { vector, software }) => {
                e.interrupt.injected = 1;
                e.interrupt.nr = vector;
                e.interrupt.soft = u8::from(software);
            }
            other => return Err(HypervisorError::state(format!("pending event {other:?}"))),
        }
        e.nmi.pending = u8::from(from.nmi_pending);
        e.nmi.masked = u8::from(from.nmi_masked);
        e.interrupt.shadow = if from.interrupt_shadow { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
        self.fd.set_vcpu_events(&e).map_err(|error| refused("pending events", &error))
    }

    /// Checks what can be checked before anything is changed.
    pub(super) fn check(&self, what: StateSet, from: &VcpuState) -> Result<()> {
        let wrong = |text: String| Err(HypervisorError::state(text));
        if what.contains(StateSet::CONTROL) {
            let c = &from.control;
            let mask = self.model.xcr0_mask();
            if c.xcr0 & !mask != 0 || c.xcr0 & 1 == 0 {
                return wrong(format!("XCR0 {:#x} is outside the model's {mask:#x}", c.xcr0));
            }
            let known = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
            if c.efer & !known.bits() != 0 || c.cr8 > 15 {
                return wrong(format!("EFER {:#x}, CR8 {:#x}", c.efer, c.cr8));
            }
        }
        if what.contains(StateSet::DEBUG) && (from.debug.dr6 | from.debug.dr7) >> 32 != 0 {
            return wrong("DR6 or DR7 has bits above 31".into());
        }
        if what.contains(StateSet::EVENTS)
            && let Pending::Exception(Exception { vector, .. }) = from.events.pending
            && (vector > 31 || vector == 2)
        {
            return wrong(format!("exception vector {vector}"));
        }
        if what.contains(StateSet::XSAVE) {
            self.check_xsave(&from.xsave)?;
        }
        if what.contains(StateSet::LAPIC) {
            match &from.lapic {
                Some(lapic) => self.check_lapic(lapic)?,
                None if self.has_lapic() => return wrong("no local APIC in the state".into()),
                None => {}
            }
        }
        Ok(())
    }
}

/// The error for a state that KVM refuses.
pub(super) fn refused(what: &str, error: &vmm_sys_util::errno::Error) -> HypervisorError {
    HypervisorError::State {
        reason: format!("KVM refuses the {what}: {error}"),
        source: Some(io_error(*error)),
    }
}

fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: SegmentAttributes(
            u32::from(s.type_ & 0xF)
                | bit(s.s, 4)
                | u32::from(s.dpl & 3) << 5
                | bit(s.present, 7)
                | bit(s.avl, 12)
                | bit(s.l, 13)
                | bit(s.db, 14)
                | bit(s.g, 15)
                | bit(s.unusable, 16),
        ),
    }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    let a = s.attributes;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: a.kind(),
        present: u8::from(a.present()),
        dpl: a.dpl(),
        db: u8::from(a.big()),
        s: u8::from(a.code_or_data()),
        l: u8::from(a.long()),
        g: u8::from(a.granular()),
        avl: (a.0 >> 12 & 1) as u8,
        unusable: u8::from(a.unusable()),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_bit_survives_the_way_to_kvm_and_back() {
        for bit in (0..8).chain(12..17) {
            let there = Segment {
                selector: 0x1234,
                base: u64::MAX - 5,
                limit: 0x8_9ABC,
                attributes: SegmentAttributes(1 << bit),
            };
            assert_eq!(segment(&kvm_segment_of(&there)), there, "bit {bit}");
        }
    }
}
