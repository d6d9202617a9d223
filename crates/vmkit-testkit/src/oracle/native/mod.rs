//! The host's half: runs cases on the processor underneath, in a process of their own.
//!
//! A worker process is forked per [`Native`]; cases and outcomes pass through shared memory in
//! batches, with a futex word to hand them over. Whatever an instruction does to the worker, the
//! parent survives: a worker that dies or hangs costs the one case it was at, and is replaced.

#![allow(unsafe_code, reason = "fork, shared memory and futexes have no safe wrapper")]

mod entry;
mod worker;

use std::io;
use std::ptr::{self, addr_of_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::case::{Case, Ending, Outcome};

/// Most cases of one batch.
pub const BATCH: usize = 256;
/// A case that takes more of a processor's time is stuck, whatever else the host does meanwhile.
const PATIENCE: Duration = Duration::from_millis(500);
/// A case that takes longer, with or without a processor, is stuck too.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// Why the host cannot serve as an oracle.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NativeError {
    /// The processor or the kernel lacks something the harness itself needs.
    #[error("the host lacks {0}, which the oracle's own code needs")]
    Lacks(&'static str),
    /// A worker process could not be made.
    #[error("cannot start a worker process: {0}")]
    Start(#[from] io::Error),
    /// A worker could not map the case's address space or install its handlers.
    #[error("the worker process cannot map its pages: something lies at their addresses")]
    SetUp,
}

/// A word that one process sets and another waits for.
#[repr(transparent)]
struct Word(AtomicU32);

const IDLE: u32 = 0;
const SUBMITTED: u32 = 1;
const DONE: u32 = 2;

impl Word {
    fn set(&self, value: u32) {
        self.0.store(value, Ordering::Release);
        // SAFETY: the futex word outlives the call.
        unsafe { libc::syscall(libc::SYS_futex, &self.0, libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Waits until the word is `value`, at most for `limit`. True if it is.
    fn wait_until(&self, value: u32, limit: Option<Duration>) -> bool {
        let limit = limit.map(|d| libc::timespec {
            tv_sec: d.as_secs() as i64,
            tv_nsec: i64::from(d.subsec_nanos()),
        });
        let timeout = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
        loop {
            let now = self.0.load(Ordering::Acquire);
            if now == value {
                return true;
            }
            // SAFETY: word and timeout outlive the call.
            let result =
                unsafe { libc::syscall(libc::SYS_futex, &self.0, libc::FUTEX_WAIT, now, timeout) };
            if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ETIMEDOUT) {
                return self.0.load(Ordering::Acquire) == value;
            }
        }
    }
}

/// What parent and worker share.
#[repr(C)]
struct Shared {
    state: Word,
    /// The case the worker is at.
    current: AtomicU32,
    /// The first case to run.
    first: u32,
    /// One past the last.
    count: u32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The host's processor as an executor of cases.
pub struct Native {
    shared: *mut Shared,
    worker: libc::pid_t,
    submitted: usize,
    lost: u64,
}

// SAFETY: the shared mapping and the worker belong to this value alone.
unsafe impl Send for Native {}

impl Native {
    /// Starts a worker.
    ///
    /// # Errors
    /// [`NativeError::Lacks`] on a host without XSAVE or FSGSBASE, [`NativeError::Start`] if a process
    /// or memory is refused.
    pub fn new() -> Result<Self, NativeError> {
        /// FSGSBASE in the auxiliary vector's AT_HWCAP2: the kernel allows the instructions.
        const HWCAP2_FSGSBASE: u64 = 1 << 1;
        // SAFETY: getauxval has no preconditions.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE == 0 {
            return Err(NativeError::Lacks("FSGSBASE"));
        }
        if !std::arch::is_x86_feature_detected!("xsave") {
            return Err(NativeError::Lacks("XSAVE"));
        }
        // SAFETY: a fresh anonymous mapping; all-zero bytes are valid for every field of `Shared`.
        let shared = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let mut native = Self { shared: shared.cast(), worker: 0, submitted: 0, lost: 0 };
        native.start()?;
        Ok(native)
    }

    /// Workers lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Hands over up to [`BATCH`] cases; they run while this process goes on. What was submitted
    /// before must have been collected.
    pub fn submit<'a>(&mut self, cases: impl IntoIterator<Item = &'a Case>) {
        let mut count = 0;
        for case in cases.into_iter().take(BATCH) {
            // SAFETY: the worker is idle, so the slots are this process's; `count` < BATCH.
            let slot = unsafe { &mut *addr_of_mut!((*self.shared).cases[count]) };
            slot.copy_from(case);
            count += 1;
        }
        self.submitted = count;
        self.go(0);
    }

    /// Waits for the batch and shows each outcome, in order.
    ///
    /// # Errors
    /// [`NativeError`] if a new worker was needed and could not be had.
    pub fn collect(&mut self, mut see: impl FnMut(usize, &Outcome)) -> Result<(), NativeError> {
        let mut at = (0, Instant::now(), self.worker_time());
        while !self.state().wait_until(DONE, Some(Duration::from_millis(20))) {
            // SAFETY: `shared` is mapped as long as `self` lives.
            let current = unsafe { &(*self.shared).current }.load(Ordering::Acquire);
            if current != at.0 {
                at = (current, Instant::now(), self.worker_time());
            }
            let ending = match self.reap(libc::WNOHANG) {
                Some(status) if libc::WEXITSTATUS(status) == worker::SETUP_FAILED => {
                    return Err(NativeError::SetUp);
                }
                Some(_) => Ending::Died,
                None if self.worker_time().saturating_sub(at.2) > PATIENCE
                    || at.1.elapsed() > LAST_PATIENCE =>
                {
                    self.kill();
                    Ending::Hung
                }
                None => continue,
            };
            self.lost += 1;
            // SAFETY: no worker lives, so the slots are this process's.
            unsafe {
                let outcome = &mut *addr_of_mut!((*self.shared).outcomes[current as usize]);
                outcome.ending = ending;
            }
            self.start()?;
            self.go(current + 1);
            at = (current + 1, Instant::now(), self.worker_time());
        }
        self.state().set(IDLE);
        for i in 0..self.submitted {
            // SAFETY: the worker is idle.
            see(i, unsafe { &*addr_of_mut!((*self.shared).outcomes[i]) });
        }
        self.submitted = 0;
        Ok(())
    }

    /// Runs one case.
    ///
    /// # Errors
    /// As [`collect`](Self::collect).
    pub fn run(&mut self, case: &Case, outcome: &mut Outcome) -> Result<(), NativeError> {
        self.submit([case]);
        self.collect(|_, seen| outcome.copy_from(seen))
    }

    fn state(&self) -> &Word {
        // SAFETY: `shared` is mapped as long as `self` lives.
        unsafe { &(*self.shared).state }
    }

    fn go(&mut self, first: u32) {
        // SAFETY: the worker does not look at these until the state changes.
        unsafe {
            (*self.shared).first = first;
            (*self.shared).count = self.submitted as u32;
            (*self.shared).current.store(first, Ordering::Release);
        }
        self.state().set(SUBMITTED);
    }

    fn start(&mut self) -> Result<(), NativeError> {
        self.state().set(IDLE);
        // SAFETY: the child runs `serve` only, which keeps to what is allowed after fork.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error().into()),
            0 => worker::serve(self.shared),
            pid => self.worker = pid,
        }
        Ok(())
    }

    /// The processor's time that the worker has used; nothing if it is gone.
    fn worker_time(&self) -> Duration {
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the calls write to these two and no more.
        let known = unsafe {
            libc::clock_getcpuclockid(self.worker, &mut clock) == 0
                && libc::clock_gettime(clock, &mut time) == 0
        };
        let time =
            known.then(|| Some((time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?)));
        time.flatten().map_or(Duration::ZERO, |(s, ns)| Duration::new(s, ns))
    }

    fn reap(&mut self, flags: i32) -> Option<i32> {
        let mut status = 0;
        // SAFETY: `worker` is our child, not reaped yet.
        let pid = unsafe { libc::waitpid(self.worker, &mut status, flags) };
        (pid == self.worker).then_some(status)
    }

    fn kill(&mut self) {
        // SAFETY: `worker` is our child, not reaped yet, so the id is still its.
        unsafe { libc::kill(self.worker, libc::SIGKILL) };
        self.reap(0);
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: the mapping was made in `new` and nothing borrows from it.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::Fpu;
    use super::super::layout::{CODE, DATA, DATA_LEN, PAGE, READ_ONLY, USER_CS, USER_SS};
    use super::*;

    fn run(bytes: &[u8], change: impl FnOnce(&mut Case)) -> Outcome {
        let mut case = Case::default();
        case.set_bytes(bytes);
        change(&mut case);
        let mut outcome = Outcome::default();
        Native::new().unwrap().run(&case, &mut outcome).unwrap();
        outcome
    }

    #[test]
    fn an_addition_ends_at_the_int3_with_its_result() {
        // add rax, rbx
        let out = run(&[0x48, 0x01, 0xD8], |case| {
            case.gpr[0] = u64::MAX;
            case.gpr[3] = 2;
            case.gpr[4] = 0x1234_5678;
        });
        assert_eq!((out.ending, out.vector), (Ending::Exception, 3));
        assert_eq!(out.rip, Case::default().at + 4);
        assert_eq!((out.gpr[0], out.gpr[3], out.gpr[4]), (1, 2, 0x1234_5678));
        assert_eq!(out.rflags & 0x8D5, 0x11, "CF and AF");
        assert_eq!((out.selectors.cs, out.selectors.ss), (USER_CS, USER_SS));
    }

    #[test]
    fn stores_are_seen_and_forgotten() {
        let store = [0x48, 0x89, 0x03]; // mov [rbx], rax
        let mut native = Native::new().unwrap();
        let mut case = Case::default();
        case.set_bytes(&store);
        (case.gpr[0], case.gpr[3]) = (0x1122_3344_5566_7788, DATA + 4092);
        let mut out = Outcome::default();
        native.run(&case, &mut out).unwrap();
        assert_eq!(out.memory.read(DATA + 4092, 8), 0x1122_3344_5566_7788);
        assert_eq!(out.memory.iter().count(), 2);
        case.set_bytes(&[0x90]);
        native.run(&case, &mut out).unwrap();
        assert_eq!(out.memory.iter().count(), 0);
    }

    #[test]
    fn page_faults_carry_address_and_error_code() {
        let load = [0x48, 0x8B, 0x03]; // mov rax, [rbx]
        let store = [0x48, 0x89, 0x03];
        let fault = |bytes: &[u8], at| {
            let out = run(bytes, |case| case.gpr[3] = at);
            (out.vector, out.error, out.cr2)
        };
        assert_eq!(fault(&load, DATA - 8), (14, 4, DATA - 8));
        assert_eq!(fault(&load, DATA + DATA_LEN - 4), (14, 4, DATA + DATA_LEN));
        assert_eq!(fault(&store, READ_ONLY + 8), (14, 7, READ_ONLY + 8));
        assert_eq!(fault(&store, CODE), (14, 7, CODE));
        assert_eq!(fault(&load, 1 << 62), (13, 0, 0));
        assert_eq!(fault(&[0xFF, 0xE3], DATA), (14, 0x15, DATA), "jmp rbx to data");
        assert_eq!(fault(&[0xFF, 0xE3], CODE - PAGE), (14, 0x14, CODE - PAGE));
    }

    #[test]
    fn extended_state_goes_in_and_out() {
        // paddd xmm1, xmm2
        let out = run(&[0x66, 0x0F, 0xFE, 0xCA], |case| {
            case.fpu.put(Fpu::XMM + 16, &[1; 16]);
            case.fpu.put(Fpu::XMM + 32, &[2; 16]);
            case.fpu.put(Fpu::XMM + 15 * 16, &[7; 16]);
            case.fpu.put(24, &0x1FBF_u32.to_le_bytes());
        });
        assert_eq!((out.fpu.xmm(1), out.fpu.xmm(15)), (&[3; 16][..], &[7; 16][..]));
        assert_eq!(out.fpu.mxcsr(), 0x1FBF);
        // fld1
        let out = run(&[0xD9, 0xE8], |_| ());
        assert_eq!(out.fpu.st(0), [0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x3F]);
        assert_eq!(out.fpu.ftw(), 0x80);
    }

    #[test]
    fn flags_and_bases_that_a_case_changes_do_not_disturb_the_worker() {
        let mut native = Native::new().unwrap();
        let mut out = Outcome::default();
        let mut case = Case::default();
        // popfq with TF, AC, NT, DF
        case.set_bytes(&[0x9D]);
        case.gpr[4] = DATA + 64;
        case.memory.write(DATA + 64, &0x4_4702_u64.to_le_bytes());
        native.run(&case, &mut out).unwrap();
        assert_eq!(out.rflags & 0x4_4700, 0x4_4700, "{:#x} vector {}", out.rflags, out.vector);
        // wrfsbase rax
        case.set_bytes(&[0xF3, 0x48, 0x0F, 0xAE, 0xD0]);
        (case.gpr[0], case.gs_base) = (0x7777_0000, 0x1234);
        native.run(&case, &mut out).unwrap();
        assert_eq!((out.fs_base, out.gs_base), (0x7777_0000, 0x1234));
        // mov ds, ax
        case.set_bytes(&[0x8E, 0xD8]);
        case.gpr[0] = u64::from(USER_SS);
        native.run(&case, &mut out).unwrap();
        assert_eq!((out.vector, out.selectors.ds), (3, USER_SS));
        case.set_bytes(&[0x90]);
        native.run(&case, &mut out).unwrap();
        assert_eq!((out.vector, out.selectors.ds), (3, 0));
        assert_eq!(native.lost(), 0);
    }

    #[test]
    fn exceptions_keep_their_vectors() {
        let vector = |bytes: &[u8]| {
            let out = run(bytes, |_| ());
            (out.vector, out.error)
        };
        assert_eq!(vector(&[0x0F, 0x0B]), (6, 0), "ud2");
        assert_eq!(vector(&[0xF4]), (13, 0), "hlt");
        assert_eq!(vector(&[0xF7, 0xF1]), (0, 0), "div ecx");
        assert_eq!(vector(&[0xCD, 0x41]), (13, 0x41 * 8 + 2), "int 0x41");
        assert_eq!(vector(&[0x0F, 0x28, 0x45, 0x01]), (13, 0), "movaps xmm0, [rbp + 1]");
    }

    #[test]
    fn a_worker_that_dies_or_hangs_costs_one_case() {
        let mut native = Native::new().unwrap();
        let mut cases = vec![Case::default(); 3];
        cases[0].set_bytes(&[0xEB, 0xFE]); // jmp $
        cases[1].set_bytes(&[0x0F, 0x05]); // syscall: exit(0)
        cases[1].gpr[0] = libc::SYS_exit as u64;
        cases[2].set_bytes(&[0x90]);
        native.submit(&cases);
        let mut endings = Vec::new();
        native.collect(|_, out| endings.push(out.ending)).unwrap();
        assert_eq!(endings, [Ending::Hung, Ending::Died, Ending::Exception]);
        assert_eq!(native.lost(), 2);
    }
}
