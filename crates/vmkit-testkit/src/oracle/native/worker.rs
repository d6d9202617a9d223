//! The worker process: maps the case's address space, installs the handlers, runs batches.
//!
//! It lives after fork() in a process whose other threads are gone, so it neither allocates nor
//! locks, and it ends only by `_exit` or a signal.

#![allow(unsafe_code, reason = "fixed mappings, signal handlers and signal frames")]

use std::ptr::{self, addr_of, addr_of_mut};
use std::sync::atomic::Ordering;

use super::super::case::{Case, Ending, Outcome};
use super::super::layout::{self, CODE, CODE_LEN, DATA, DATA_LEN, LINE, PAGE, READ_ONLY};
use super::Shared;
use super::entry::{self, ENTRY};

/// The signals that exceptions become.
const SYNCHRONOUS: [i32; 5] =
    [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGBUS];
/// Room for a signal frame with AVX-512 and AMX state.
const STACK_LEN: usize = 128 << 10;
/// Exit status of a worker that could not set itself up.
pub(super) const SETUP_FAILED: i32 = 71;
/// RFLAGS bits that POPF may set for a case: arithmetic flags, DF and AC.
const LOADABLE: u64 = 0x4_0CD5;

/// The worker's own view of the mappings.
struct Space {
    /// Writable alias of the code pages.
    code: *mut u8,
    /// XSTATE_BV for XRSTOR: what of x87, SSE and AVX the kernel has enabled.
    components: u8,
}

/// Runs batches from `shared` for ever.
pub(super) fn serve(shared: *mut Shared) -> ! {
    // SAFETY: this process is a fresh single-threaded child; `shared` is a mapping that it shares with
    // its parent, which leaves cases and outcomes alone while a batch is submitted.
    unsafe {
        let Some(space) = set_up() else { libc::_exit(SETUP_FAILED) };
        let state = &(*shared).state;
        loop {
            state.wait_until(super::SUBMITTED, None);
            let (first, count) = ((*shared).first, (*shared).count);
            for i in first..count {
                (*shared).current.store(i, Ordering::Release);
                let case = &*addr_of!((*shared).cases[i as usize]);
                let outcome = &mut *addr_of_mut!((*shared).outcomes[i as usize]);
                space.execute(case, outcome);
            }
            state.set(super::DONE);
        }
    }
}

/// # Safety
/// Must be called once, in a single-threaded process.
unsafe fn set_up() -> Option<Space> {
    // SAFETY: the ranges are fixed, small and refused if anything is there; handlers are naked
    // functions that keep to `entry`'s rules; the stack is leaked on purpose.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let fixed = anonymous | libc::MAP_FIXED_NOREPLACE;
        let map = |at: u64, len: u64, prot, flags, fd| {
            let p = libc::mmap(at as *mut _, len as usize, prot, flags, fd, 0);
            (p != libc::MAP_FAILED && (at == 0 || p as u64 == at)).then_some(p.cast::<u8>())
        };
        let data = map(DATA, DATA_LEN, rw, fixed, -1)?;
        ptr::copy_nonoverlapping(layout::background().as_ptr(), data, DATA_LEN as usize);
        let read_only = map(READ_ONLY, PAGE, rw, fixed, -1)?;
        ptr::copy_nonoverlapping(layout::read_only().as_ptr(), read_only, PAGE as usize);
        libc::mprotect(read_only.cast(), PAGE as usize, libc::PROT_READ);

        let file = libc::memfd_create(c"oracle-code".as_ptr(), libc::MFD_CLOEXEC);
        libc::ftruncate(file, CODE_LEN as i64);
        let shared = libc::MAP_SHARED | libc::MAP_POPULATE;
        let code = map(0, CODE_LEN, rw, shared, file)?;
        ptr::write_bytes(code, 0xCC, CODE_LEN as usize);
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        map(CODE, CODE_LEN, rx, shared | libc::MAP_FIXED_NOREPLACE, file)?;
        libc::close(file);

        let stack = map(0, STACK_LEN as u64, rw, anonymous, -1)?;
        let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: STACK_LEN };
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut blocked);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry::on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let mut failed = libc::sigaltstack(&stack, ptr::null_mut());
        for signal in SYNCHRONOUS {
            failed |= libc::sigaction(signal, &action, ptr::null_mut());
            libc::sigdelset(&mut blocked, signal);
        }
        failed |= libc::sigprocmask(libc::SIG_SETMASK, &blocked, ptr::null_mut());
        let xcr0 = std::arch::x86_64::_xgetbv(0);
        (failed == 0).then_some(Space { code, components: (xcr0 & 7) as u8 })
    }
}

impl Space {
    /// # Safety
    /// The caller has run [`set_up`].
    unsafe fn execute(&self, case: &Case, outcome: &mut Outcome) {
        let pages = DATA as *mut u8;
        // SAFETY: `set_up` mapped the data pages; the code bytes are clipped to the code pages;
        // `ENTRY` is used by this only thread; `run`'s conditions hold after `set_up`.
        unsafe {
            for (i, line) in case.memory.iter() {
                ptr::copy_nonoverlapping(line.as_ptr(), pages.add(i * LINE), LINE);
            }
            self.place(case.at, case.bytes(), None);

            let entry = &mut *addr_of_mut!(ENTRY);
            entry.fpu.0 = case.fpu.0;
            entry.fpu.0[512] &= self.components;
            entry.gpr = case.gpr;
            entry.rip = case.at;
            entry.rflags = case.rflags & LOADABLE | 0x202;
            entry.fs_base = case.fs_base;
            entry.gs_base = case.gs_base;
            entry::run();
            self.collect(outcome);

            let pages = &mut *pages.cast::<[u8; DATA_LEN as usize]>();
            outcome.memory.capture(pages);
            for (i, _) in outcome.memory.iter().chain(case.memory.iter()) {
                let line = i * LINE..(i + 1) * LINE;
                pages[line.clone()].copy_from_slice(&layout::background()[line]);
            }
            self.place(case.at, case.bytes(), Some(0xCC));
        }
    }

    /// Writes `bytes`, or as many of `instead`, to the code pages at `at`.
    ///
    /// # Safety
    /// The caller has run [`set_up`].
    unsafe fn place(&self, at: u64, bytes: &[u8], instead: Option<u8>) {
        for (i, &byte) in bytes.iter().enumerate() {
            let offset = at.wrapping_add(i as u64).wrapping_sub(CODE);
            if offset < CODE_LEN {
                // SAFETY: the offset is inside the alias.
                unsafe { self.code.add(offset as usize).write(instead.unwrap_or(byte)) };
            }
        }
    }

    /// Reads the signal frame that the last exception left.
    ///
    /// # Safety
    /// [`entry::run`] has just returned.
    unsafe fn collect(&self, outcome: &mut Outcome) {
        /// Where the kernel's frame keeps registers 0 to 15 of the encoding's order.
        const ORDER: [i32; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        // SAFETY: `context` points to the frame on the alternate stack, which nothing has used since;
        // the kernel's extended-state image is at least 832 bytes where AVX is enabled, else 576.
        unsafe {
            let entry = &*addr_of!(ENTRY);
            let context = &(*(entry.context as *const libc::ucontext_t)).uc_mcontext;
            let register = |i: i32| context.gregs[i as usize] as u64;
            outcome.gpr = ORDER.map(register);
            outcome.rip = register(libc::REG_RIP);
            outcome.rflags = register(libc::REG_EFL);
            outcome.vector = register(libc::REG_TRAPNO) as u32;
            outcome.error = register(libc::REG_ERR);
            outcome.cr2 = if outcome.vector == 14 { register(libc::REG_CR2) } else { 0 };
            outcome.selectors = entry.selectors;
            let selectors = register(libc::REG_CSGSFS);
            outcome.selectors.cs = selectors as u16;
            outcome.selectors.ss = (selectors >> 48) as u16;
            outcome.fs_base = entry.fs_base;
            outcome.gs_base = entry.gs_base;
            let len = if self.components & 4 != 0 { 832 } else { 576 };
            let image = context.fpregs.cast::<u8>();
            ptr::copy_nonoverlapping(image, outcome.fpu.0.as_mut_ptr(), len);
            outcome.ending = Ending::Exception;
        }
    }
}
