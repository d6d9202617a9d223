//! Where a byte-wise console's output goes, and when.
//!
//! Guests write consoles a byte at a time; a host write per byte would cost more than the guest's
//! own work. Bytes therefore gather in a small buffer that is written at each newline, when it is
//! full, and by a thread of its own a few milliseconds after output paused without a newline (a
//! prompt). A capture buffer or a sink needs none of this and gets each byte at once.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmkit_device::{DeviceError, thread_builder};

use crate::access::lock;

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
    Writer(Box<dyn Write + Send>),
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

    /// Any writer. It is called from vCPU threads: while it blocks, the guest's write blocks. What
    /// it refuses is lost, counted, and logged once.
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

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.target {
            Target::Sink => Ok(()),
            Target::Capture(capture) => {
                capture.append(bytes);
                Ok(())
            }
            Target::Writer(writer) => writer.write_all(bytes).and_then(|()| writer.flush()),
        }
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

    /// Bytes the output refused, and those over which it or a watcher panicked.
    pub fn lost(&self) -> u64 {
        lock(&self.figures).lost
    }
}

/// Something that is shown all output.
pub(crate) type Watcher = Box<dyn FnMut(&[u8]) + Send>;

/// The host's end of a console: an output, those who watch it, and the thread that keeps a prompt
/// from waiting. Its lock is never taken inside a device's, so a watcher may call the device.
pub(crate) struct Outlet {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    immediate: bool,
}

struct State {
    output: SerialOutput,
    watchers: Vec<Watcher>,
    probe: OutputProbe,
    buffer: Vec<u8>,
    begun: bool,
    complained: bool,
    /// The thread waits for a first byte (and not for the idle time to pass).
    parked: bool,
    stopping: bool,
}

impl State {
    fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        // Whoever takes the bytes next finds them gone, even if a callback panics: to show them again
        // in the destructor that follows would be a second panic, which ends the process.
        let mut bytes = std::mem::take(&mut self.buffer);
        let len = bytes.len() as u64;
        let shown = catch_unwind(AssertUnwindSafe(|| {
            self.watchers.iter_mut().for_each(|watcher| watcher(&bytes));
            self.output.write(&bytes)
        }));
        bytes.clear();
        self.buffer = bytes;
        let mut figures = lock(&self.probe.figures);
        match shown {
            Ok(Ok(())) => figures.written += len,
            Ok(Err(error)) => {
                figures.lost += len;
                if !std::mem::replace(&mut self.complained, true) {
                    log::warn!("console output is lost: {error}");
                }
            }
            // The panic's own message has been printed.
            Err(panic) => {
                figures.lost += len;
                drop(figures);
                resume_unwind(panic);
            }
        }
    }
}

impl Outlet {
    pub(crate) fn new(output: SerialOutput, watchers: Vec<Watcher>, probe: OutputProbe) -> Self {
        let immediate = output.is_immediate() && watchers.is_empty();
        let state = State {
            output,
            watchers,
            probe,
            buffer: Vec::with_capacity(BUFFER),
            begun: false,
            complained: false,
            parked: false,
            stopping: false,
        };
        let shared = Shared { state: Mutex::new(state), wake: Condvar::new(), immediate };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Takes one byte of the guest's.
    pub(crate) fn put(&self, byte: u8) {
        let mut state = lock(&self.shared.state);
        if !std::mem::replace(&mut state.begun, true) {
            lock(&state.probe.figures).first = Some(Instant::now());
        }
        state.buffer.push(byte);
        if self.shared.immediate || byte == b'\n' || state.buffer.len() >= BUFFER {
            state.flush();
        } else if std::mem::replace(&mut state.parked, false) {
            self.shared.wake.notify_one();
        }
    }

    /// Starts the thread that writes what waits.
    pub(crate) fn start(&self, device: &str) -> Result<(), DeviceError> {
        let mut thread = lock(&self.thread);
        if self.shared.immediate || thread.is_some() {
            return Ok(());
        }
        lock(&self.shared.state).stopping = false;
        let shared = self.shared.clone();
        let handle = thread_builder(format!("{device}-out"))
            .spawn(move || shared.write_when_idle())
            .map_err(|source| DeviceError::Host {
                device: device.into(),
                what: "cannot start its output thread".into(),
                source,
            })?;
        *thread = Some(handle);
        Ok(())
    }

    /// Writes all that waits and ends the thread.
    pub(crate) fn pause(&self) {
        let thread = lock(&self.thread).take();
        let mut state = lock(&self.shared.state);
        state.stopping = true;
        // An embedder's callback that panics here has said so itself, as it has in the thread. Its
        // panic is no word about the machine that is paused or dropped, perhaps by another panic.
        let _ = catch_unwind(AssertUnwindSafe(|| state.flush()));
        drop(state);
        self.shared.wake.notify_one();
        if let Some(thread) = thread {
            // It can only have panicked in an embedder's callback, which has said so itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.pause();
    }
}

impl Shared {
    fn write_when_idle(&self) {
        let mut state = lock(&self.state);
        while !state.stopping {
            if state.buffer.is_empty() {
                state.parked = true;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.parked = false;
            } else {
                state =
                    self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner).0;
                state.flush();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<Vec<u8>>>>);
    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).push(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn outlet(output: SerialOutput) -> (Outlet, OutputProbe) {
        let probe = OutputProbe::default();
        (Outlet::new(output, Vec::new(), probe.clone()), probe)
    }

    fn put_all(outlet: &Outlet, bytes: &[u8]) {
        bytes.iter().for_each(|&b| outlet.put(b));
    }

    #[test]
    fn a_line_is_one_host_write() {
        let writes = Writes::default();
        let (outlet, probe) = outlet(SerialOutput::writer(writes.clone()));
        put_all(&outlet, b"Linux version 6\nnext");
        assert_eq!(*lock(&writes.0), [b"Linux version 6\n".to_vec()]);
        assert_eq!(probe.written(), 16);
        drop(outlet);
        assert_eq!(lock(&writes.0)[1], b"next");
    }

    #[test]
    fn a_line_without_end_is_written_in_pieces_and_held_bounded() {
        let writes = Writes::default();
        let (outlet, probe) = outlet(SerialOutput::writer(writes.clone()));
        put_all(&outlet, &[b'x'; 3 * BUFFER + 1]);
        assert_eq!(probe.written(), 3 * BUFFER as u64);
        assert_eq!(lock(&outlet.shared.state).buffer.len(), 1);
    }

    #[test]
    fn a_prompt_without_newline_does_not_wait_for_more() {
        let capture = Capture::with_limit(100);
        let sink = capture.clone();
        let watcher: Watcher = Box::new(move |bytes| sink.append(bytes));
        let outlet = Outlet::new(SerialOutput::sink(), vec![watcher], OutputProbe::default());
        outlet.start("serial0").unwrap();
        for round in 0..3 {
            std::thread::sleep(2 * IDLE);
            put_all(&outlet, format!("{round}# ").as_bytes());
            // Generous, for a loaded machine; without the thread it would never come.
            assert!(capture.wait_for(&format!("{round}# "), Duration::from_secs(5)));
        }
    }

    #[test]
    fn pausing_writes_what_waits_and_ends_the_thread() {
        let writes = Writes::default();
        let (outlet, _) = outlet(SerialOutput::writer(writes.clone()));
        for _ in 0..2 {
            outlet.start("serial0").unwrap();
            put_all(&outlet, b"$ ");
            outlet.pause();
            assert!(lock(&outlet.thread).is_none());
        }
        assert_eq!(lock(&writes.0).concat(), b"$ $ ");
    }

    #[test]
    fn refused_output_is_counted_and_not_kept() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (outlet, probe) = outlet(SerialOutput::writer(Closed));
        put_all(&outlet, b"ab\ncd\n");
        assert_eq!((probe.written(), probe.lost()), (0, 6));
        assert!(probe.first_byte().is_some());
    }

    #[test]
    fn bytes_over_which_a_callback_panics_are_not_shown_again() {
        struct Panics(Arc<Mutex<Vec<u8>>>);
        impl Write for Panics {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                lock(&self.0).extend(bytes);
                panic!("an embedder's bug");
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let seen = Arc::new(Mutex::new(Vec::new()));
        for watched in [false, true] {
            let mut callback = Panics(seen.clone());
            let probe = OutputProbe::default();
            let outlet = if watched {
                let watcher: Watcher = Box::new(move |bytes| drop(callback.write(bytes)));
                Outlet::new(SerialOutput::sink(), vec![watcher], probe.clone())
            } else {
                Outlet::new(SerialOutput::writer(callback), Vec::new(), probe.clone())
            };
            outlet.put(b'a');
            let line = catch_unwind(AssertUnwindSafe(|| outlet.put(b'\n')));
            assert!(line.is_err(), "who writes hears of it");
            assert_eq!(std::mem::take(&mut *lock(&seen)), b"a\n");
            assert_eq!(lock(&outlet.shared.state).buffer.capacity(), BUFFER);
            outlet.put(b'b');
            // Whoever pauses does not, and the destructor finds nothing.
            outlet.pause();
            drop(outlet);
            assert_eq!(std::mem::take(&mut *lock(&seen)), b"b");
            assert_eq!((probe.written(), probe.lost()), (0, 3));
        }
    }

    #[test]
    fn waiting_finds_text_that_comes_in_pieces_and_gives_up_in_time() {
        let capture = Capture::with_limit(64);
        let writer = capture.clone();
        let thread = std::thread::spawn(move || {
            for &byte in b"..........................................Debian login: " {
                writer.append(&[byte]);
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        assert!(capture.wait_for("login:", Duration::MAX));
        thread.join().unwrap();
        assert!(capture.wait_for("Debian", Duration::ZERO));
        assert!(!capture.wait_for("root@", Duration::from_millis(5)));
    }

    #[test]
    fn a_capture_keeps_the_newest_bytes() {
        let capture = Capture::with_limit(4);
        let (outlet, _) = outlet(capture.clone().into());
        put_all(&outlet, b"abcdef");
        assert_eq!((capture.text().as_str(), capture.dropped()), ("cdef", 2));
        assert_eq!(capture.take(), b"cdef");
        assert_eq!(capture.contents(), b"");
    }
}
