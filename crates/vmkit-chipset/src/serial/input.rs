//! The host's side of a UART's receiver: a bounded queue that any thread may fill, and a thread
//! that fills it from a file descriptor.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;

use vmkit_device::{DeviceError, EventFd, thread_builder};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Core;
use crate::access::lock;

/// Most bytes that wait for the guest.
const CAPACITY: usize = 64 << 10;
/// How long the reading thread waits when the queue is full, in milliseconds.
const FULL_WAIT: i32 = 20;

/// Types into a guest's serial port, from any thread, before or while the machine runs; clones
/// type into the same port.
///
/// Bytes wait in a queue of 64 KiB until the guest listens, and then reach it as fast as it reads
/// them. What waits is the host's, not the machine's: it is not part of saved state.
///
/// ```
/// let serial = vmkit_chipset::Serial::com1();
/// let keyboard = serial.input();
/// assert_eq!(keyboard.push(b"uname -a\n"), 9);
/// assert_eq!(keyboard.pending(), 9);
/// ```
#[derive(Clone, Debug, Default)]
pub struct SerialInput {
    queue: Arc<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Mutex<VecDeque<u8>>,
    /// `bytes` is not empty; lets the device's every access skip the lock.
    waiting: AtomicBool,
    device: OnceLock<Weak<Core>>,
}

impl SerialInput {
    /// Queues `bytes` for the guest and returns how many found room.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut queued = lock(&self.queue.bytes);
        let accepted = bytes.len().min(CAPACITY.saturating_sub(queued.len()));
        queued.extend(bytes.iter().take(accepted));
        self.queue.waiting.store(!queued.is_empty(), Ordering::Release);
        drop(queued);
        if let Some(core) = self.queue.device.get().and_then(Weak::upgrade) {
            core.input_came();
        }
        accepted
    }

    /// How many bytes wait for the guest.
    pub fn pending(&self) -> usize {
        lock(&self.queue.bytes).len()
    }

    /// How many bytes [`push`](Self::push) would take.
    pub fn free(&self) -> usize {
        CAPACITY.saturating_sub(self.pending())
    }

    /// Tells the queue whom to wake. A second device is ignored.
    pub(super) fn connect(&self, core: Weak<Core>) {
        let _ = self.queue.device.set(core);
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.queue.waiting.load(Ordering::Acquire)
    }

    /// Hands at most `room` of the oldest bytes to `take`.
    pub(super) fn take(&self, room: usize, mut take: impl FnMut(&[u8])) {
        let mut queued = lock(&self.queue.bytes);
        let (front, _) = queued.as_slices();
        let count = front.len().min(room);
        take(front.get(..count).unwrap_or_default());
        queued.drain(..count);
        self.queue.waiting.store(!queued.is_empty(), Ordering::Release);
    }
}

/// Where a [`Pump`] reads.
#[derive(Debug)]
pub(super) enum Source {
    /// The program's standard input.
    Stdin,
    Fd(OwnedFd),
}

impl Source {
    fn open(&self) -> io::Result<File> {
        match self {
            Self::Stdin => open_again(io::stdin().as_fd()),
            Self::Fd(fd) => open_again(fd.as_fd()),
        }
    }
}

/// Opens what `fd` reads so that a read never waits, where that can be done: another reader may take
/// the bytes that made it readable, and the thread would wait in the read, out of reach of its end.
///
/// The descriptor's own flags are shared with whoever else has it, so pipes and terminals are opened
/// anew. Of others the descriptor is cloned: to open them anew would begin at a file's start,
/// make another terminal of a terminal's master, and is refused for sockets.
fn open_again(fd: BorrowedFd<'_>) -> io::Result<File> {
    let file = File::from(fd.try_clone_to_owned()?);
    let kind = file.metadata()?;
    if !kind.file_type().is_fifo() && (!file.is_terminal() || is_master(kind.rdev())) {
        return Ok(file);
    }
    let again = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    // Refused without `/proc`, or if the terminal is another user's.
    Ok(again.unwrap_or(file))
}

/// True for the master's side of pseudo-terminals, by its device number (Linux's `devices.txt`).
fn is_master(device: u64) -> bool {
    libc::major(device) == 2 || device == libc::makedev(5, 2)
}

/// Reads a descriptor into a [`SerialInput`] while the machine runs. End of file and errors end it
/// quietly: a closed stdin is a terminal nobody types at.
pub(super) struct Pump {
    source: Source,
    input: SerialInput,
    running: Mutex<Option<(JoinHandle<()>, EventFd)>>,
}

const INPUT: u64 = 0;
const STOP: u64 = 1;

impl Pump {
    pub(super) fn new(source: Source, input: SerialInput) -> Self {
        Self { source, input, running: Mutex::default() }
    }

    /// Starts reading.
    pub(super) fn start(&self, device: &str) -> Result<(), DeviceError> {
        let mut running = lock(&self.running);
        if running.is_none() {
            *running = Some(self.spawn(device).map_err(|source| DeviceError::Host {
                device: device.into(),
                what: "cannot read its input".into(),
                source,
            })?);
        }
        Ok(())
    }

    fn spawn(&self, device: &str) -> io::Result<(JoinHandle<()>, EventFd)> {
        let stop = EventFd::new(libc::EFD_CLOEXEC)?;
        let reader = Reader::new(self.source.open()?, stop.try_clone()?, self.input.clone())?;
        let name = device.to_owned();
        let thread = thread_builder(format!("{device}-in")).spawn(move || {
            if let Err(error) = reader.run() {
                log::warn!("{name}: input ends: {error}");
            }
        })?;
        Ok((thread, stop))
    }

    /// Ends the thread; what it read stays queued.
    pub(super) fn pause(&self) {
        if let Some((thread, stop)) = lock(&self.running).take() {
            match stop.write(1) {
                Ok(()) => drop(thread.join()),
                Err(error) => log::error!("cannot end the serial input thread: {error}"),
            }
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.pause();
    }
}

struct Reader {
    file: File,
    input: SerialInput,
    /// Waits for the end alone.
    stop: Epoll,
    /// Waits for the end or for bytes; none if the file is always readable (a regular file).
    both: Option<Epoll>,
    _stop_fd: EventFd,
}

impl Reader {
    fn new(file: File, stop_fd: EventFd, input: SerialInput) -> io::Result<Self> {
        let add = |epoll: &Epoll, fd, data| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))
        };
        let (stop, both) = (Epoll::new()?, Epoll::new()?);
        add(&stop, stop_fd.as_raw_fd(), STOP)?;
        add(&both, stop_fd.as_raw_fd(), STOP)?;
        let both = match add(&both, file.as_raw_fd(), INPUT) {
            Ok(()) => Some(both),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { file, input, stop, both, _stop_fd: stop_fd })
    }

    fn run(mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let room = self.input.free().min(buffer.len());
            let stopped = match &self.both {
                _ if room == 0 => wait(&self.stop, FULL_WAIT)?,
                Some(both) => wait(both, -1)?,
                None => wait(&self.stop, 0)?,
            };
            if stopped {
                return Ok(());
            }
            let Some(chunk) = buffer.get_mut(..room).filter(|chunk| !chunk.is_empty()) else {
                continue;
            };
            match self.file.read(chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    self.input.push(chunk.get(..count).unwrap_or_default());
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits for an event; true if it is the end.
fn wait(epoll: &Epoll, timeout: i32) -> io::Result<bool> {
    let mut events = [EpollEvent::default(); 2];
    match epoll.wait(timeout, &mut events) {
        Ok(count) => Ok(events.iter().take(count).any(|event| event.data() == STOP)),
        Err(error) if is_passing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::{Duration, Instant};

    use super::*;

    fn wait_until(mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < deadline, "timed out");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_queue_is_bounded_and_says_so() {
        let input = SerialInput::default();
        assert_eq!(input.push(&vec![1; CAPACITY - 1]), CAPACITY - 1);
        assert_eq!(input.push(&[2, 3]), 1);
        assert_eq!(input.push(&[4]), 0);
        assert_eq!((input.pending(), input.free()), (CAPACITY, 0));
    }

    #[test]
    fn bytes_come_out_in_order_in_any_portions() {
        let input = SerialInput::default();
        let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let mut got = Vec::new();
        for (index, chunk) in sent.chunks(7).enumerate() {
            input.push(chunk);
            input.take(index % 11, |bytes| got.extend_from_slice(bytes));
        }
        while input.is_waiting() {
            input.take(16, |bytes| got.extend_from_slice(bytes));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_pump_carries_bytes_until_the_end_of_file() {
        let (reader, mut writer) = io::pipe().unwrap();
        let input = SerialInput::default();
        let pump = Pump::new(Source::Fd(reader.into()), input.clone());
        pump.start("serial0").unwrap();
        writer.write_all(b"hello").unwrap();
        wait_until(|| input.pending() == 5);
        drop(writer);
        wait_until(|| lock(&pump.running).as_ref().is_none_or(|(t, _)| t.is_finished()));
        // Starting again after the end is harmless.
        pump.pause();
        pump.start("serial0").unwrap();
        pump.pause();
        assert_eq!(input.pending(), 5);
    }

    #[test]
    fn a_pump_that_waits_for_input_or_for_room_ends_promptly() {
        for full in [false, true] {
            let (reader, writer) = io::pipe().unwrap();
            let input = SerialInput::default();
            if full {
                input.push(&vec![0; CAPACITY]);
                (&writer).write_all(b"waits").unwrap();
            }
            let pump = Pump::new(Source::Fd(reader.into()), input);
            pump.start("serial0").unwrap();
            std::thread::sleep(Duration::from_millis(10));
            let begin = Instant::now();
            pump.pause();
            assert!(begin.elapsed() < Duration::from_secs(2));
            assert!(lock(&pump.running).is_none());
        }
    }

    /// Whether reads of `fd` never wait, as Linux tells it.
    fn never_waits(fd: &impl AsRawFd) -> bool {
        let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let info = std::fs::read_to_string(info).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_NONBLOCK != 0
    }

    #[test]
    fn a_pump_does_not_wait_for_bytes_that_another_reader_took() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut opened = open_again(reader.as_fd()).unwrap();
        assert!(never_waits(&opened) && !never_waits(&reader), "the embedder's flags stay");
        writer.write_all(b"ab").unwrap();
        let mut bytes = [0; 2];
        (&reader).read_exact(&mut bytes).unwrap();
        assert!(is_passing(&opened.read(&mut bytes).unwrap_err()));
        writer.write_all(b"c").unwrap();
        drop(writer);
        assert_eq!(opened.read(&mut bytes).unwrap(), 1);
        assert_eq!(opened.read(&mut bytes).unwrap(), 0, "the end of file is still told");
    }

    #[test]
    fn what_cannot_be_opened_anew_is_cloned() {
        let (socket, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
        peer.write_all(b"x").unwrap();
        assert_eq!(open_again(socket.as_fd()).unwrap().read(&mut [0; 2]).unwrap(), 1);
        // Another open of the master would be another terminal.
        let master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        assert!(!never_waits(&open_again(master.as_fd()).unwrap()));
        let mut file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
        let len = file.metadata().unwrap().len() as usize;
        file.read_exact(&mut vec![0; len]).unwrap();
        assert_eq!(
            open_again(file.as_fd()).unwrap().read(&mut [0]).unwrap(),
            0,
            "its place is kept"
        );
    }

    #[test]
    fn a_pump_reads_what_cannot_be_polled() {
        let input = SerialInput::default();
        let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
        let len = file.metadata().unwrap().len() as usize;
        let pump = Pump::new(Source::Fd(file.into()), input.clone());
        pump.start("serial0").unwrap();
        wait_until(|| input.pending() == len);
        pump.pause();
    }
}
