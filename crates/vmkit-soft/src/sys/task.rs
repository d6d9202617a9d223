//! Task switches by hardware, 32-bit and 16-bit (Intel SDM vol. 3A chapter 8).
//!
//! Faults found before the new task is committed belong to the old one and undo everything; those
//! found while loading its segments belong to the new task: they are left in `cpu.trap` and the
//! switch counts as done.

use vmkit_hypervisor::x86::{Cr0, Segment, SegmentAttributes};

use super::descriptor::{BUSY, TSS, TSS16, null_segment};
use super::exception::Event;
use super::stack::Stack;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, flags};
use crate::mem::MODE_SUPERVISOR;

/// How the new task relates to the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// JMP: the old task is left.
    Leave,
    /// CALL, exception or interrupt: the new task returns to the old one.
    Nest,
    /// IRET: back to the task that was nested in.
    Return,
}

/// What a TSS holds of a task.
#[derive(Default)]
struct Image {
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    /// T: #DB at the first instruction.
    trap: bool,
}

/// Offsets in a TSS of one width.
struct Layout {
    bytes: u64,
    min_limit: u32,
    eip: u64,
    gpr: u64,
    selectors: u64,
    selector_count: usize,
    ldt: u64,
}

const WIDE: Layout = Layout {
    bytes: 4,
    min_limit: 0x67,
    eip: 0x20,
    gpr: 0x28,
    selectors: 0x48,
    selector_count: 6,
    ldt: 0x60,
};

const NARROW: Layout = Layout {
    bytes: 2,
    min_limit: 0x2B,
    eip: 0x0E,
    gpr: 0x12,
    selectors: 0x22,
    selector_count: 4,
    ldt: 0x2A,
};

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &WIDE } else { &NARROW }
}

impl Cpu {
    fn task_field(&mut self, base: u64, offset: u64, bytes: u64) -> Result<u64, Trap> {
        let at = self.wrap_linear(base.wrapping_add(offset));
        match bytes {
            2 => self.load_as::<u16>(at, MODE_SUPERVISOR).map(u64::from),
            _ => self.load_as::<u32>(at, MODE_SUPERVISOR).map(u64::from),
        }
    }

    fn set_task_field(
        &mut self,
        base: u64,
        offset: u64,
        bytes: u64,
        value: u64,
    ) -> Result<(), Trap> {
        let at = self.wrap_linear(base.wrapping_add(offset));
        match bytes {
            2 => self.store_as(at, value as u16, MODE_SUPERVISOR),
            _ => self.store_as(at, value as u32, MODE_SUPERVISOR),
        }
    }

    fn read_task(&mut self, base: u64, kind: u8) -> Result<Image, Trap> {
        let l = layout(kind);
        let mut image = Image::default();
        if l.bytes == 4 {
            image.cr3 = Some(self.task_field(base, 0x1C, 4)?);
            image.trap = self.task_field(base, 0x64, 2)? & 1 != 0;
        }
        image.eip = self.task_field(base, l.eip, l.bytes)?;
        image.eflags = self.task_field(base, l.eip + l.bytes, l.bytes)?;
        for (i, gpr) in (0..).zip(&mut image.gpr) {
            *gpr = self.task_field(base, l.gpr + i * l.bytes, l.bytes)?;
        }
        for (i, selector) in (0..).zip(image.selectors.iter_mut().take(l.selector_count)) {
            *selector = self.task_field(base, l.selectors + i * l.bytes, 2)? as u16;
        }
        image.ldt = self.task_field(base, l.ldt, 2)? as u16;
        Ok(image)
    }

    /// Saves the running task into its TSS.
    fn save_task(&mut self, rflags: u64) -> Result<(), Trap> {
        let (base, limit) = (self.tr.base, self.tr.limit);
        let l = layout(self.tr.attributes.kind());
        if self.tr.attributes.unusable() || limit < l.min_limit {
            return Err(self.selector_fault(trap::TS, self.tr.selector, 0));
        }
        self.set_task_field(base, l.eip, l.bytes, self.rip)?;
        self.set_task_field(base, l.eip + l.bytes, l.bytes, rflags)?;
        for i in 0..8 {
            self.set_task_field(base, l.gpr + i * l.bytes, l.bytes, self.regs[i as usize])?;
        }
        for i in 0..l.selector_count {
            let selector = u64::from(self.segs[i].selector);
            self.set_task_field(base, l.selectors + i as u64 * l.bytes, 2, selector)?;
        }
        Ok(())
    }

    /// Switches to the task of the TSS that `selector` names, with RFLAGS as they are.
    pub(super) fn switch_task(&mut self, selector: u16, link: Link, ext: u32) -> Result<(), Trap> {
        let rflags = self.flags.all() & !flags::RF;
        self.switch_task_from(selector, link, ext, rflags)
    }

    fn switch_task_from(
        &mut self,
        selector: u16,
        link: Link,
        ext: u32,
        rflags: u64,
    ) -> Result<(), Trap> {
        let wrong = if link == Link::Return { trap::TS } else { trap::GP };
        if selector & 4 != 0 {
            return Err(self.selector_fault(wrong, selector, ext));
        }
        let tss = self.descriptor(selector, wrong, ext)?;
        let busy = if link == Link::Return { BUSY } else { 0 };
        let kind = match tss.system_kind() {
            Some(kind) if kind == TSS | busy || kind == TSS16 | busy => kind,
            _ => return Err(self.selector_fault(wrong, selector, ext)),
        };
        if !tss.present() {
            return Err(self.selector_fault(trap::NP, selector, ext));
        }
        let mut new = tss.segment();
        if new.limit < layout(kind).min_limit {
            return Err(self.selector_fault(trap::TS, selector, ext));
        }
        let image = self.read_task(new.base, kind)?;
        let saved = if link == Link::Return { rflags & !flags::NT } else { rflags };
        self.save_task(saved)?;
        let old = self.tr.selector;
        if link == Link::Nest {
            self.set_task_field(new.base, 0, 2, u64::from(old))?;
        } else if let Some(at) = self.descriptor_place(old & !7, 8) {
            self.mark_busy(at, false)?;
        }
        if link != Link::Return {
            self.mark_busy(tss.at, true)?;
        }
        new.attributes.0 |= u32::from(BUSY);
        self.tr = new;
        self.enter_task(&image, link);
        Ok(())
    }

    /// The point of no return: everything that cannot fault.
    fn enter_task(&mut self, image: &Image, link: Link) {
        self.control.cr0 |= Cr0::TS.bits();
        if let Some(cr3) = image.cr3
            && self.cr0().contains(Cr0::PG)
            && !self.write_cr3(cr3)
        {
            // PAE entries with reserved bits: the new task cannot run.
            let _ = self.raise_with(trap::TS, u32::from(self.tr.selector & 0xFFFC));
        }
        let nested = if link == Link::Nest { flags::NT } else { 0 };
        self.flags.set_all(image.eflags | nested);
        self.interrupts_on();
        self.rip = image.eip;
        self.regs[..8].copy_from_slice(&image.gpr);
        self.clear_local_breakpoints();
        for (segment, &selector) in self.segs.iter_mut().zip(&image.selectors) {
            *segment = null_segment(selector, 0);
        }
        self.ldt = null_segment(image.ldt, 0);
        let v86 = image.eflags & flags::VM != 0;
        if v86 {
            for (segment, &selector) in self.segs.iter_mut().zip(&image.selectors) {
                *segment =
                    Segment { attributes: SegmentAttributes(0xF3), ..Segment::real(selector) };
            }
        } else {
            let cpl = (image.selectors[CS] & 3) as u8;
            self.segs[SS] = null_segment(image.selectors[SS], cpl);
        }
        self.update_mode();
        let loaded = self.load_task_segments(image, v86);
        self.update_mode();
        if loaded.is_ok() && image.trap {
            let _ = self.raise_task_trap();
        }
    }

    /// Loads LDTR and the segments of the new task, raising in its context (Intel SDM vol. 3A
    /// table 8-1).
    fn load_task_segments(&mut self, image: &Image, v86: bool) -> Result<(), Trap> {
        self.load_ldt(image.ldt, trap::TS, 0)?;
        if v86 {
            return Ok(());
        }
        let selector = image.selectors[CS];
        let cpl = (selector & 3) as u8;
        if selector & 0xFFFC == 0 {
            return Err(self.raise_with(trap::TS, 0));
        }
        let mut code = self.descriptor(selector, trap::TS, 0)?;
        let fits = if code.conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        if !code.is_code() || !fits {
            return Err(self.selector_fault(trap::TS, selector, 0));
        }
        if !code.present() {
            return Err(self.selector_fault(trap::NP, selector, 0));
        }
        self.mark_accessed(&mut code)?;
        self.segs[CS] = code.segment();
        self.segs[SS] = self.stack_descriptor(image.selectors[SS], cpl, trap::TS, 0)?;
        for seg in [DS, ES, FS, GS] {
            self.segs[seg] = self.checked_data_segment(image.selectors[seg], trap::TS, 0)?;
        }
        Ok(())
    }

    /// An event through a task gate: the error code goes onto the new task's stack.
    pub(super) fn deliver_by_task(&mut self, selector: u16, event: &Event) -> Result<(), Trap> {
        let rflags = self.pushed_flags(event);
        self.switch_task_from(selector, Link::Nest, event.ext(), rflags)?;
        if let Some(error) = event.error
            && self.trap == crate::cpu::TrapKind::None
        {
            let bytes = layout(self.tr.attributes.kind()).bytes;
            let mut stack = Stack::current(self, event.ext());
            if stack.push(self, bytes, u64::from(error)).is_ok() {
                stack.commit(self);
            }
        }
        Ok(())
    }
}
