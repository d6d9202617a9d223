//! Where a byte-wise console's output goes, and when.
//!
//! Guests write consoles a byte at a time; a host write per byte would cost more than the guest's
//! own work. Bytes therefore gather in a small buffer that is passed on at each newline, when it is
//! full, and by a thread of its own a few milliseconds after output paused without a newline (a
//! prompt). A capture buffer or a sink needs none of this and gets each byte at once.
//!
//! A writer may block for as long as it likes, so only that thread calls it ([`backlog`]).

mod backlog;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmkit_device::{DeviceError, thread_builder};

use crate::access::lock;
use backlog::{Backlog, Hands, LIMITS, Limits, Turn, Writer};

/// Longest run of bytes held back.
const BUFFER: usize = 4096;
/// How long a byte without a newline may wait.
const IDLE: Duration = Duration::from_millis(5);
/// How often [`Capture::wait_for`] looks.
const LOOK: Duration = Duration::from_millis(2);
/// What a [`Capture`] holds unless told otherwise.
const CAPTURE_LIMIT: usize = 1 << 20;

/// Where a console's output goes.
///
/// ```
/// use vmkit_chipset::SerialOutput;
///
/// let to_a_file = SerialOutput::writer(std::fs::File::create("/dev/null")?);
/// let (to_memory, capture) = SerialOutput::capture();
/// # drop((to_a_file, to_memory, capture));
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct SerialOutput {
    target: Target,
}

enum Target {
    Sink,
    Capture(Capture),
    Writer(Writer),
}

impl SerialOutput {
    /// Throws all output away.
    pub fn sink() -> Self {
        Self { target: Target::Sink }
    }

    /// The program's standard output.
    pub fn stdout() -> Self {
        Self::writer(io::stdout())
    }

    /// Any writer. It may block: it is called from a thread of its own. What it refuses is lost,
    /// counted, and logged once. If it panics, the machine ends as it does when a device panics, once
    /// the guest begins another line.
    ///
    /// While the machine runs nothing is lost to a reader that is slow or does not read: with 16 KiB
    /// on their way, the guest waits. Who pauses, stops or drops the machine does not wait with it. It
    /// waits until all output is written, but no longer than one second in which the writer takes nothing,
    /// and ten seconds in all (each for every such output). A pause leaves the rest on its way; when
    /// the machine is dropped, the rest is [lost](OutputProbe::lost), and a thread that is still inside
    /// the writer is left to itself, with the writer and nothing else, until that returns.
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self { target: Target::Writer(Box::new(writer)) }
    }

    /// Memory, and a handle to read it from any thread. Keeps the newest mebibyte.
    pub fn capture() -> (Self, Capture) {
        let capture = Capture::with_limit(CAPTURE_LIMIT);
        (capture.clone().into(), capture)
    }

    fn is_immediate(&self) -> bool {
        !matches!(self.target, Target::Writer(_))
    }
}

impl Default for SerialOutput {
    fn default() -> Self {
        Self::sink()
    }
}

impl From<Capture> for SerialOutput {
    fn from(capture: Capture) -> Self {
        Self { target: Target::Capture(capture) }
    }
}

impl fmt::Debug for SerialOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.target {
            Target::Sink => "SerialOutput::sink",
            Target::Capture(_) => "SerialOutput::capture",
            Target::Writer(_) => "SerialOutput::writer",
        })
    }
}

/// Output kept in memory, readable from any thread; clones share it.
///
/// It is bounded, because a guest can write for ever: past its limit the oldest bytes go.
///
/// ```
/// use std::time::Duration;
/// use vmkit_chipset::{Capture, Serial};
///
/// let console = Capture::with_limit(64 << 10);
/// let serial = Serial::com1().output(console.clone());
/// // … run a machine with `serial` …
/// # drop(serial);
/// assert!(!console.wait_for("login:", Duration::from_millis(1)));
/// assert_eq!(console.text(), "");
/// ```
#[derive(Clone)]
pub struct Capture {
    inner: Arc<CaptureInner>,
}

struct CaptureInner {
    kept: Mutex<Kept>,
    limit: usize,
}

#[derive(Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// How many bytes ever came.
    total: u64,
    dropped: u64,
}

impl Capture {
    /// An empty buffer for the newest `limit` bytes.
    pub fn with_limit(limit: usize) -> Self {
        let inner = CaptureInner { kept: Mutex::default(), limit };
        Self { inner: Arc::new(inner) }
    }

    fn append(&self, bytes: &[u8]) {
        let mut kept = lock(&self.inner.kept);
        kept.bytes.extend(bytes);
        kept.total += bytes.len() as u64;
        let excess = kept.bytes.len().saturating_sub(self.inner.limit);
        if excess > 0 {
            kept.bytes.drain(..excess);
            kept.dropped += excess as u64;
        }
    }

    /// What is kept, oldest first.
    pub fn contents(&self) -> Vec<u8> {
        lock(&self.inner.kept).bytes.iter().copied().collect()
    }

    /// What is kept, as text; bytes that are not UTF-8 become U+FFFD.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.contents()).into_owned()
    }

    /// What is kept, which is then forgotten.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.inner.kept).bytes).into()
    }

    /// How many bytes the limit has cost so far.
    pub fn dropped(&self) -> u64 {
        lock(&self.inner.kept).dropped
    }

    /// Waits until the guest has written `text`, in what is kept now or what comes; false if it has
    /// not after `timeout`.
    ///
    /// Looks every few milliseconds: waking a thread per byte would slow the guest down.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> bool {
        let begin = Instant::now();
        let text = text.as_bytes();
        let mut searched = 0;
        loop {
            let kept = lock(&self.inner.kept);
            // A match may begin in the last bytes of what was searched before.
            let fresh = kept.total.saturating_sub(searched).saturating_add(text.len() as u64);
            let skip =
                kept.bytes.len().saturating_sub(usize::try_from(fresh).unwrap_or(usize::MAX));
            let bytes: Vec<u8> = kept.bytes.range(skip..).copied().collect();
            searched = kept.total;
            drop(kept);
            if text.is_empty() || bytes.windows(text.len()).any(|window| window == text) {
                return true;
            }
            let left = timeout.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("limit", &self.inner.limit).finish_non_exhaustive()
    }
}

/// Figures about a console's output, readable from any thread while the machine runs.
#[derive(Clone, Debug, Default)]
pub struct OutputProbe {
    figures: Arc<Mutex<Figures>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    first: Option<Instant>,
    written: u64,
    lost: u64,
}

impl OutputProbe {
    /// When the guest wrote its first byte.
    pub fn first_byte(&self) -> Option<Instant> {
        lock(&self.figures).first
    }

    /// Bytes that reached the output. A few may still be on their way there.
    pub fn written(&self) -> u64 {
        lock(&self.figures).written
    }

    /// Bytes the output refused, those over which it or a watcher panicked, and those it had not
    /// taken when the machine was dropped (of which a last piece may have reached it in part).
    pub fn lost(&self) -> u64 {
        lock(&self.figures).lost
    }
}

/// Something that is shown all output.
pub(crate) type Watcher = Box<dyn FnMut(&[u8]) + Send>;

/// The host's end of a console: an output, those who watch it, and the thread that keeps a prompt
/// from waiting and a vCPU from being kept. Its locks are never taken inside a device's, so a watcher
/// may call the device.
pub(crate) struct Outlet {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    line: Mutex<Line>,
    backlog: Backlog,
    immediate: bool,
}

/// The line that has begun, and who sees it first. Its lock is held while a watcher is called.
struct Line {
    bytes: Vec<u8>,
    watchers: Vec<Watcher>,
    capture: Option<Capture>,
    /// What the watchers have seen goes to a writer.
    queued: bool,
    probe: OutputProbe,
    begun: bool,
}

impl Line {
    /// Shows the line to the watchers and passes it on.
    fn pass_on(&mut self, backlog: &Backlog) {
        if self.bytes.is_empty() {
            return;
        }
        // Whoever takes the bytes next finds them gone, even if a callback panics: to show them again
        // in the destructor that follows would be a second panic, which ends the process.
        let mut bytes = std::mem::take(&mut self.bytes);
        let shown = catch_unwind(AssertUnwindSafe(|| {
            self.watchers.iter_mut().for_each(|watcher| watcher(&bytes));
        }));
        if let (Ok(()), Some(capture)) = (&shown, &self.capture) {
            capture.append(&bytes);
        }
        let len = bytes.len() as u64;
        match &shown {
            Ok(()) if self.queued => {}
            Ok(()) => lock(&self.probe.figures).written += len,
            Err(_) => lock(&self.probe.figures).lost += len,
        }
        if self.queued && shown.is_ok() {
            backlog.end_line(&bytes);
        } else if self.queued || !self.watchers.is_empty() {
            backlog.end_line(&[]);
        }
        bytes.clear();
        self.bytes = bytes;
        if let Err(panic) = shown {
            // The panic's own message has been printed.
            resume_unwind(panic);
        }
    }
}

impl Outlet {
    pub(crate) fn new(output: SerialOutput, watchers: Vec<Watcher>, probe: OutputProbe) -> Self {
        Self::with_limits(output, watchers, probe, LIMITS)
    }

    fn with_limits(
        output: SerialOutput,
        watchers: Vec<Watcher>,
        probe: OutputProbe,
        limits: Limits,
    ) -> Self {
        let immediate = output.is_immediate() && watchers.is_empty();
        let (capture, writer) = match output.target {
            Target::Sink => (None, None),
            Target::Capture(capture) => (Some(capture), None),
            Target::Writer(writer) => (None, Some(writer)),
        };
        let line = Line {
            bytes: Vec::with_capacity(BUFFER),
            watchers,
            capture,
            queued: writer.is_some(),
            probe: probe.clone(),
            begun: false,
        };
        let backlog = Backlog::new(writer, limits, probe);
        let shared = Shared { line: Mutex::new(line), backlog, immediate };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Takes one byte of the guest's. Waits while too many are on their way, unless the machine is
    /// about to pause or end.
    pub(crate) fn put(&self, byte: u8) {
        let Shared { line, backlog, immediate } = &*self.shared;
        // Without the lock, which the thread may want before it makes room.
        backlog.await_room();
        let mut line = lock(line);
        if !std::mem::replace(&mut line.begun, true) {
            lock(&line.probe.figures).first = Some(Instant::now());
        }
        line.bytes.push(byte);
        if *immediate {
            return line.pass_on(backlog);
        }
        let panic = if line.bytes.len() == 1 { backlog.begin_line() } else { None };
        if byte == b'\n' || line.bytes.len() >= BUFFER {
            line.pass_on(backlog);
        }
        if let Some(panic) = panic {
            drop(line);
            resume_unwind(panic);
        }
    }

    /// Starts the thread that writes what waits.
    pub(crate) fn start(&self, device: &str) -> Result<(), DeviceError> {
        let mut thread = lock(&self.thread);
        if self.shared.immediate || !self.shared.backlog.start() {
            return Ok(());
        }
        let shared = self.shared.clone();
        let handle = thread_builder(format!("{device}-out")).spawn(move || shared.work()).map_err(
            |source| {
                self.shared.backlog.failed_start();
                DeviceError::Host {
                    device: device.into(),
                    what: "cannot start its output thread".into(),
                    source,
                }
            },
        )?;
        // One that an earlier pause gave up on has ended meanwhile, or there would be no new one.
        *thread = Some(handle);
        Ok(())
    }

    /// Lets vCPUs go that wait for room.
    pub(crate) fn release(&self) {
        self.shared.backlog.release();
    }

    /// Has all that waits written and ends the thread, as far as the writer lets that happen in time.
    pub(crate) fn pause(&self) {
        let Shared { line, backlog, immediate } = &*self.shared;
        if *immediate {
            return;
        }
        let mut thread = lock(&self.thread);
        // An embedder's callback that panics here has said so itself. Its panic is no word about the
        // machine that is paused or dropped, perhaps by another panic.
        let _ = catch_unwind(AssertUnwindSafe(|| lock(line).pass_on(backlog)));
        if backlog.drain()
            && let Some(thread) = thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.pause();
        self.shared.backlog.abandon();
        // A thread that stays behind keeps nothing of the embedder's but the writer.
        let watchers = std::mem::take(&mut lock(&self.shared.line).watchers);
        drop(watchers);
    }
}

impl Shared {
    /// The thread.
    fn work(&self) {
        let mut hands = Hands::default();
        while let Turn::Idle = self.backlog.work(&mut hands) {
            let passed = AssertUnwindSafe(|| lock(&self.line).pass_on(&self.backlog));
            if let Err(panic) = catch_unwind(passed) {
                self.backlog.keep_panic(panic);
            }
        }
    }
}

#[cfg(test)]
mod tests;
