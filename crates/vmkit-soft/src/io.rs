//! The processor's way out: ports and memory that nothing is mapped at.
//!
//! The interrupt controllers answer first; the rest goes to the embedder's [`VcpuIo`]. A callback
//! that answers Stop completes the access and ends the block after the current instruction.

#![allow(unsafe_code, reason = "holds the run's callbacks by pointer")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vmkit_hypervisor::{IoFlow, VcpuIo};
use vmkit_irqchip::Board;
use vmkit_memory::WriteTracker;

use crate::cpu::Cpu;
use crate::cpu::trap::Trap;
use crate::exec::branch;
use crate::shared::Message;

impl Cpu {
    /// The run loop is to look around, at the next block end.
    #[inline(always)]
    pub fn due(&self) -> bool {
        self.instructions >= self.shared.poll_at.load(Ordering::Relaxed)
    }

    /// Something wants the run loop's eye. Long instructions ask between their steps.
    #[inline]
    pub fn attention(&mut self) -> bool {
        // Time passes in a long instruction, though no instruction is counted: let the run loop look
        // at its timers now and then.
        self.long_steps = self.long_steps.wrapping_add(1);
        if self.long_steps & 63 == 0 {
            self.shared.ask();
        }
        self.due()
    }

    /// Asks the world outside.
    fn ask(&mut self, f: impl FnOnce(&mut dyn VcpuIo) -> IoFlow) {
        let Some(mut io) = self.io else { return };
        self.fp_leave();
        self.shared.leave();
        // SAFETY: `io` was made from a `&mut dyn VcpuIo` that outlives the run, and `run` is the only
        // one to use it until it returns; `self` is not reachable from it.
        let flow = f(unsafe { io.as_mut() });
        self.shared.enter();
        self.fp_enter();
        if self.shared.asked() {
            self.read_inbox();
        }
        if flow == IoFlow::Stop {
            self.stop = true;
        }
    }

    /// After an access to a device's memory: if the callback answered Stop, the block ends here. Port
    /// instructions end their block anyway.
    fn stop_in_block(&mut self) {
        if self.stop {
            self.cut_block();
        }
    }

    /// Ends the running block after the current instruction.
    pub fn cut_block(&mut self) {
        if self.block.is_null() {
            return;
        }
        let block = self.block;
        let key = self.running().key();
        // The block's operations are spoilt: it must be decoded again.
        self.code.invalidate(
            key.pa & !0xFFF,
            WriteTracker::lines_of(key.pa, key.pa),
            std::ptr::null(),
        );
        self.code.cut(block, branch::cut_off);
        self.code_changed();
    }

    pub fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let ([byte], Some(value)) = (&mut *data, self.partition.read_chip_port(port)) {
            *byte = value;
            return;
        }
        self.ask(|io| io.pio_read(port, data));
    }

    pub fn pio_write(&mut self, port: u16, data: &[u8]) {
        if let [byte] = *data
            && self.partition.write_chip_port(port, byte)
        {
            return;
        }
        self.ask(|io| io.pio_write(port, data));
    }

    /// The offset of `pa` in this processor's local APIC page, if it is there.
    fn apic_offset(&self, pa: u64) -> Option<u64> {
        if pa >> 32 != 0 || pa < Board::IOAPIC_BASE || !self.partition.has_chips {
            return None;
        }
        let base = self.shared.apic().mmio_base()?;
        (pa & !0xFFF == base).then_some(pa & 0xFFF)
    }

    fn ioapic_offset(&self, pa: u64) -> Option<u64> {
        Board::ioapic_offset(pa).filter(|_| self.partition.has_chips)
    }

    /// Reads bytes that lie in one page and are not RAM, in accesses of 1, 2, 4 and 8 bytes.
    pub fn mmio_read(&mut self, pa: u64, bytes: &mut [u8]) {
        let mut at = pa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = piece(at, rest.len());
            let (now, later) = rest.split_at_mut(n);
            if let Some(offset) = self.apic_offset(at) {
                let ns = self.partition.clock_ns();
                self.shared.apic().read_mmio(offset, now, ns);
            } else if let Some(offset) = self.ioapic_offset(at) {
                self.partition.read_ioapic(offset, now);
            } else {
                now.fill(0xFF);
                self.ask(|io| io.mmio_read(at, now));
                self.stop_in_block();
            }
            at += n as u64;
            rest = later;
        }
    }

    /// Writes bytes that lie in one page and are not writable RAM.
    pub fn mmio_write(&mut self, pa: u64, bytes: &[u8]) {
        let mut at = pa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = piece(at, rest.len());
            let (now, later) = rest.split_at(n);
            if let Some(offset) = self.apic_offset(at) {
                let ns = self.partition.clock_ns();
                let action = self.shared.apic().write_mmio(offset, now, ns);
                self.apic_written(action);
            } else if let Some(offset) = self.ioapic_offset(at) {
                self.partition.write_ioapic(offset, now);
            } else {
                self.ask(|io| io.mmio_write(at, now));
                self.stop_in_block();
            }
            at += n as u64;
            rest = later;
        }
    }

    /// Follows up on a write to the local APIC: interrupts may be due now, or a timer set.
    pub fn apic_written(&mut self, action: vmkit_irqchip::LapicAction) {
        let partition = self.partition.clone();
        partition.handle_apic_action(self.index, action);
        self.shared.ask();
    }

    /// Code is decoded from `bytes` bytes at `pa`, which lie in one page: whoever writes to their lines
    /// after this tells of it.
    pub fn watch(&mut self, pa: u64, bytes: usize) {
        let partition = self.partition.clone();
        if partition.vcpu_limit() == 1 {
            self.watch_lines(pa, bytes);
            return;
        }
        loop {
            let map = self.map.clone();
            let watching = partition.watching(pa);
            watching.fetch_add(1, Ordering::SeqCst);
            // A page that was watched is heeded by all, unless who watched it first is still at it.
            if !self.watch_lines(pa, bytes) || watching.load(Ordering::SeqCst) != 1 {
                self.make_writes_slow(pa & !0xFFF);
            }
            watching.fetch_sub(1, Ordering::SeqCst);
            // Else there is another page by now, which nobody watches.
            if Arc::ptr_eq(&map, &self.map) {
                return;
            }
        }
    }

    /// Watches lines; true if their page was watched already, or there is no RAM.
    fn watch_lines(&mut self, pa: u64, bytes: usize) -> bool {
        let Some(slot) = self.map.find(pa) else { return true };
        let lines = WriteTracker::lines_of(pa, pa + bytes.max(1) as u64 - 1);
        let before = slot.tracker.watch_lines(slot.page(pa), lines);
        if before == 0 {
            self.tlb.page_holds_code(pa & !0xFFF);
        }
        before != 0
    }

    /// True if all lines that [`watch`](Self::watch) was asked for are watched still.
    pub fn watches(&self, pa: u64, bytes: usize) -> bool {
        let lines = WriteTracker::lines_of(pa, pa + bytes.max(1) as u64 - 1);
        self.map.find(pa).is_none_or(|slot| !slot.tracker.watched_lines(slot.page(pa)) & lines == 0)
    }

    /// Has every vCPU look at the watch when it writes to a page.
    fn make_writes_slow(&mut self, page: u64) {
        let partition = self.partition.clone();
        self.tlb.page_holds_code(page);
        partition.post_others(Message::CodePage { page, from: self.index }, self.index);
        while !partition.others_settled(self.index) {
            // They may be waiting for this one in turn.
            self.read_inbox();
            std::hint::spin_loop();
            std::thread::yield_now();
        }
    }

    /// Bytes of a page that holds code were written by this processor.
    pub fn wrote_code(&mut self, pa: u64, bytes: usize) {
        let page = pa & !0xFFF;
        let lines = WriteTracker::lines_of(pa, pa + bytes as u64 - 1);
        if let Some(slot) = self.map.find(pa) {
            if slot.tracker.watched_lines(slot.page(pa)) & lines == 0 {
                return;
            }
            slot.tracker.unwatch_lines(slot.page(pa), lines);
        }
        fence(Ordering::SeqCst);
        self.drop_code(page, lines);
        let partition = self.partition.clone();
        if partition.vcpu_limit() > 1 {
            partition.post_others(Message::Invalidate { page, lines }, self.index);
        }
    }

    /// Drops the code decoded from some lines. If the running block is among it, the block ends after
    /// the current instruction.
    fn drop_code(&mut self, page: u64, lines: u64) {
        let running = self.block;
        let (dropped, hit) = self.code.invalidate(page, lines, running);
        if dropped {
            self.code_changed();
        }
        if hit {
            self.code.cut(running, branch::cut_off);
        }
    }

    /// Does what other threads have asked for.
    pub fn read_inbox(&mut self) {
        for message in self.shared.take_messages() {
            match message {
                Message::Invalidate { page, lines } => self.drop_code(page, lines),
                Message::CodePage { page, from } => {
                    // Stores to it were fast until now: what the other has decoded may be old.
                    let fast = self.tlb.writes_fast(page);
                    self.tlb.page_holds_code(page);
                    if fast {
                        let partition = self.partition.clone();
                        partition.post(Message::Invalidate { page, lines: u64::MAX }, from);
                    }
                }
                Message::FlushWrites => self.tlb.flush_writes(),
                Message::MapChanged => {
                    self.map = self.partition.memory_map();
                    self.tlb.flush(true);
                    self.code.forget();
                    self.code_changed();
                    if !self.block.is_null() {
                        let running = self.block;
                        self.code.cut(running, branch::cut_off);
                    }
                }
            }
        }
    }

    /// CMPXCHG16B: compares 16 aligned bytes with `expected`, replaces them by `new` if they are equal,
    /// and returns what was there.
    pub fn exchange_wide(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Trap> {
        let exchange = |host: *mut u8| {
            // SAFETY: `locked` hands out the aligned address of 16 bytes that the guest may write, and is
            // asked only if the processor has the instruction.
            unsafe { exchange_host(host.cast(), expected, new) }
        };
        if std::arch::is_x86_feature_detected!("cmpxchg16b")
            && let Some(old) = self.locked(linear, 16, exchange)?
        {
            return Ok(old);
        }
        let partition = self.partition.clone();
        let _split = self.split_lock(&partition, linear, 16)?;
        let old = self.load::<u128>(linear)?;
        self.store(linear, if old == expected { new } else { old })?;
        Ok(old)
    }

    /// Lends the embedder's callbacks to the processor for one run.
    ///
    /// The pointer is cleared by [`Cpu::return_io`], which the caller must reach before `io` ends.
    pub fn lend_io(&mut self, io: &mut dyn VcpuIo) {
        let io: NonNull<dyn VcpuIo + '_> = NonNull::from(io);
        // SAFETY: only the lifetime changes; the pointer is used in `ask` only, inside the run whose
        // caller holds the reference.
        self.io = Some(unsafe {
            std::mem::transmute::<NonNull<dyn VcpuIo + '_>, NonNull<dyn VcpuIo>>(io)
        });
    }

    pub fn return_io(&mut self) {
        self.io = None;
    }
}

/// CMPXCHG16B on the host.
///
/// # Safety
/// The host has the instruction; `at` is valid for reads and writes of 16 bytes and aligned.
unsafe fn exchange_host(at: *mut u128, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: the caller vouches for `at`. RBX is the compiler's, so it is exchanged around the
    // instruction with a register that holds the low half of `new`.
    unsafe {
        core::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{at}]",
            "mov rbx, {new_low}",
            at = in(reg) at,
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low,
            inout("rdx") (expected >> 64) as u64 => high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

/// The largest naturally aligned access at `at` within `left` bytes.
fn piece(at: u64, left: usize) -> usize {
    let aligned = 1_usize << at.trailing_zeros().min(3);
    let mut n = aligned;
    while n > left {
        n /= 2;
    }
    // An access whose whole length is a power of two goes out whole, aligned or not.
    if matches!(left, 2 | 4 | 8) && (at & 0xFFF) as usize + left <= 0x1000 { left } else { n }
}
