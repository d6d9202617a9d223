//! Of outputs.

use std::io::Read;
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::backlog::ROOM;
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

/// Long enough for a loaded machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn outlet(output: SerialOutput) -> (Outlet, OutputProbe) {
    let probe = OutputProbe::default();
    (Outlet::new(output, Vec::new(), probe.clone()), probe)
}

fn put_all(outlet: &Outlet, bytes: &[u8]) {
    bytes.iter().for_each(|&b| outlet.put(b));
}

/// Waits until `done`, which comes sooner or later.
fn until(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Calls `act`, which ends sooner or later.
fn ends<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(act()));
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what} does not end"))
}

#[test]
fn a_line_is_one_host_write() {
    let writes = Writes::default();
    let (outlet, probe) = outlet(SerialOutput::writer(writes.clone()));
    // Before the thread is there, which may come at any moment.
    put_all(&outlet, b"Linux version 6\nnext");
    outlet.start("serial0").unwrap();
    until("the line is written", || probe.written() >= 16);
    drop(outlet);
    assert_eq!(*lock(&writes.0), [b"Linux version 6\n".to_vec(), b"next".to_vec()]);
}

#[test]
fn a_line_without_end_is_written_in_pieces_and_held_bounded() {
    let writes = Writes::default();
    let (outlet, probe) = outlet(SerialOutput::writer(writes.clone()));
    put_all(&outlet, &[b'x'; 3 * BUFFER + 1]);
    assert_eq!(outlet.shared.backlog.on_its_way(), 3 * BUFFER);
    assert_eq!(lock(&outlet.shared.line).bytes.len(), 1);
    outlet.start("serial0").unwrap();
    outlet.pause();
    assert_eq!(probe.written(), 3 * BUFFER as u64 + 1);
    assert!(lock(&writes.0).iter().all(|write| write.len() <= BUFFER));
}

#[test]
fn two_machines_on_one_file_mix_lines_and_not_what_is_in_them() {
    let writes = Writes::default();
    let outlets = [b'a', b'b'].map(|letter| {
        let (outlet, _) = outlet(SerialOutput::writer(writes.clone()));
        for len in 0..120 {
            put_all(&outlet, &vec![letter; len]);
            outlet.put(b'\n');
        }
        outlet
    });
    outlets.iter().for_each(|outlet| outlet.start("serial0").unwrap());
    drop(outlets);
    let writes = lock(&writes.0);
    assert_eq!(writes.concat().len(), 2 * (119 * 120 / 2 + 120));
    // More than one each, and others come between whole writes only.
    assert!(writes.len() > 2 && writes.iter().all(|write| write.ends_with(b"\n")));
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
    outlet.start("serial0").unwrap();
    put_all(&outlet, b"ab\ncd\n");
    until("the output refuses", || probe.lost() == 6);
    assert_eq!(probe.written(), 0);
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
        // Whole before the thread is there, which would take it in parts.
        outlet.put(b'a');
        let line = catch_unwind(AssertUnwindSafe(|| outlet.put(b'\n')));
        outlet.start("serial0").unwrap();
        until("the callback panics", || probe.lost() == 2);
        let next = catch_unwind(AssertUnwindSafe(|| outlet.put(b'b')));
        assert_eq!((line.is_err(), next.is_err()), (watched, !watched), "who writes hears of it");
        assert_eq!(lock(&outlet.shared.line).bytes.capacity(), BUFFER);
        // Whoever pauses does not, and the destructor finds nothing.
        outlet.pause();
        drop(outlet);
        assert_eq!(std::mem::take(&mut *lock(&seen)), b"a\nb");
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

/// Lets through what it is allowed to, and keeps it.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<Passed>, Condvar)>);

#[derive(Default)]
struct Passed {
    allowed: usize,
    bytes: Vec<u8>,
}

impl Gate {
    fn allow(&self, bytes: usize) {
        lock(&self.0.0).allowed += bytes;
        self.0.1.notify_all();
    }

    fn passed(&self) -> Vec<u8> {
        lock(&self.0.0).bytes.clone()
    }
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (gate, changed) = &*self.0;
        let mut gate = changed.wait_while(lock(gate), |gate| gate.allowed == 0).unwrap();
        let len = bytes.len().min(gate.allowed);
        gate.allowed -= len;
        gate.bytes.extend(&bytes[..len]);
        Ok(len)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The `at`th byte of what [`Guest`]s write.
fn byte(at: usize) -> u8 {
    (at % 251) as u8
}

fn assert_in_order(bytes: &[u8]) {
    assert!(bytes.iter().enumerate().all(|(at, &b)| b == byte(at)));
}

/// A vCPU that writes for ever.
struct Guest {
    outlet: Arc<Outlet>,
    put: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(outlet: Outlet) -> Self {
        let outlet = Arc::new(outlet);
        Self { outlet, put: Arc::default(), stop: Arc::default(), thread: None }
    }

    fn run(&mut self) {
        self.outlet.start("serial0").unwrap();
        self.stop.store(false, Ordering::SeqCst);
        let (outlet, put, stop) = (self.outlet.clone(), self.put.clone(), self.stop.clone());
        self.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                outlet.put(byte(put.fetch_add(1, Ordering::SeqCst)));
            }
        }));
    }

    fn await_full(&self) {
        until("the guest waits", || self.outlet.shared.backlog.waiters() > 0);
    }

    /// As a machine does it: the vCPU leaves, then the device pauses. Answers what was written.
    fn pause(&mut self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        self.outlet.release();
        let thread = self.thread.take().unwrap();
        ends("the guest's access", move || thread.join().unwrap());
        let outlet = self.outlet.clone();
        ends("the pause", move || outlet.pause());
        self.put.load(Ordering::SeqCst)
    }

    fn drop_outlet(self) {
        ends("the drop", move || drop(self.outlet));
    }
}

#[test]
fn a_reader_that_does_not_read_holds_up_the_guest_and_no_pause() {
    let gate = Gate::default();
    let (outlet, probe) = outlet(SerialOutput::writer(gate.clone()));
    let mut guest = Guest::new(outlet);
    for round in 1..4 {
        guest.run();
        guest.await_full();
        let put = guest.pause();
        // The bound, the line that has begun, and the access that a pause completes.
        assert!((ROOM..ROOM + BUFFER + round + 1).contains(&put), "{put}");
    }
    let put = guest.put.load(Ordering::SeqCst);
    assert_eq!((probe.written(), probe.lost()), (0, 0));
    // The reader reads after all, in a pause.
    gate.allow(usize::MAX);
    until("all is written", || probe.written() == put as u64);
    guest.run();
    until("the guest goes on", || probe.written() > 3 * ROOM as u64);
    let put = guest.pause();
    guest.drop_outlet();
    assert_eq!((probe.written(), probe.lost()), (put as u64, 0));
    assert_eq!(gate.passed().len(), put);
    assert_in_order(&gate.passed());
}

#[test]
fn what_nobody_reads_is_lost_in_the_end_and_its_thread_keeps_only_the_writer() {
    let gate = Gate::default();
    let probe = OutputProbe::default();
    let watched = Arc::new(());
    let watcher: Watcher = {
        let watched = watched.clone();
        Box::new(move |_| drop(watched.clone()))
    };
    let outlet = Outlet::new(SerialOutput::writer(gate.clone()), vec![watcher], probe.clone());
    let mut guest = Guest::new(outlet);
    guest.run();
    gate.allow(3 * ROOM);
    until("some is written", || gate.passed().len() == 3 * ROOM);
    guest.await_full();
    let put = guest.pause();
    assert_eq!(probe.lost(), 0);
    guest.drop_outlet();
    let (written, lost) = (probe.written(), probe.lost());
    // The guest may have been seen to wait while a last piece was told of.
    assert!(lost >= (ROOM - BUFFER) as u64);
    assert_eq!(written + lost, put as u64);
    assert_eq!(Arc::strong_count(&watched), 1);
    assert!(Arc::strong_count(&gate.0) > 1, "the thread is inside the writer");
    gate.allow(usize::MAX);
    until("the thread ends", || Arc::strong_count(&gate.0) == 1);
    assert_eq!((probe.written(), probe.lost()), (written, lost));
}

#[test]
fn a_pipe_that_nobody_reads_keeps_what_was_written_to_it() {
    let (mut reader, writer) = io::pipe().unwrap();
    let (outlet, probe) = outlet(SerialOutput::writer(writer));
    let mut guest = Guest::new(outlet);
    guest.run();
    // Most likely not only for a moment.
    until("the pipe is full", || {
        let before = probe.written();
        std::thread::sleep(Duration::from_millis(50));
        guest.outlet.shared.backlog.waiters() > 0 && probe.written() == before
    });
    let put = guest.pause();
    guest.drop_outlet();
    assert_eq!(probe.written() + probe.lost(), put as u64);
    let mut bytes = Vec::new();
    // Until the thread that was left to itself lets go of the writer.
    reader.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() as u64 >= probe.written());
    assert_in_order(&bytes);
}

/// Takes a byte at a time, and keeps when.
struct Slow(Duration, Arc<Mutex<Vec<Instant>>>);
impl Write for Slow {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        std::thread::sleep(self.0);
        lock(&self.1).push(Instant::now());
        Ok(1)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_pause_waits_for_a_writer_as_long_as_it_takes_something() {
    let limits = Limits { stall: Duration::from_millis(100), all: PATIENCE };
    let taken = Arc::default();
    let output = SerialOutput::writer(Slow(Duration::from_millis(5), Arc::clone(&taken)));
    let outlet = Outlet::with_limits(output, Vec::new(), OutputProbe::default(), limits);
    outlet.start("serial0").unwrap();
    put_all(&outlet, &[b'x'; 100]);
    let begin = Instant::now();
    outlet.pause();
    let times = [vec![begin], lock(&taken).clone(), vec![Instant::now()]].concat();
    // A machine that is loaded enough may make the writer stand still.
    let stood = times.windows(2).any(|pair| pair[1].duration_since(pair[0]) >= limits.stall);
    assert!(times.len() == 102 || stood, "{} bytes taken", times.len() - 2);
}

#[test]
fn a_pause_does_not_wait_for_ever_for_a_writer_that_takes_something() {
    let limits = Limits { stall: PATIENCE, all: Duration::from_millis(50) };
    let output = SerialOutput::writer(Slow(Duration::from_millis(5), Arc::default()));
    let probe = OutputProbe::default();
    let outlet = Outlet::with_limits(output, Vec::new(), probe.clone(), limits);
    // A quarter of a minute's work for the writer.
    put_all(&outlet, &[b'x'; 3000]);
    outlet.start("serial0").unwrap();
    ends("the drop", move || drop(outlet));
    assert_eq!((probe.written(), probe.lost()), (0, 3000));
}
