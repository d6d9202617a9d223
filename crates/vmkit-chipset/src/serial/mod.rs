//! Serial ports: 16550A UARTs at the four traditional places of a PC.
//!
//! The device is a register file ([`uart`]) between an output ([`crate::output`]) and an input
//! queue ([`input`]). It never touches terminal modes: whoever owns the terminal does.

mod input;
mod uart;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, IoFlow, IoNeed, IrqLine, IrqNeed, Needs,
    Resources, Saved, Section, SectionFormat,
};

pub use input::SerialInput;
use input::{Pump, Source};
use uart::{Uart, UartState};

use crate::access::{lock, read_bytes, write_bytes};
use crate::output::{Outlet, OutputProbe, SerialOutput, Watcher};

const PORTS: u16 = 8;
const FORMAT: SectionFormat = SectionFormat { kind: "16550", version: 1 };

/// A serial port, before it lives.
///
/// ```
/// use vmkit_chipset::{Capture, Serial};
///
/// let console = Capture::with_limit(1 << 20);
/// let serial = Serial::com1()
///     .output(console.clone())
///     .on_output(|bytes| eprintln!("{} bytes", bytes.len()));
/// let keyboard = serial.input();
/// keyboard.push(b"root\n");
/// ```
pub struct Serial {
    name: String,
    port: u16,
    gsi: u32,
    output: SerialOutput,
    watchers: Vec<Watcher>,
    probe: OutputProbe,
    input: SerialInput,
    source: Option<Source>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial")
            .field("name", &self.name)
            .field("port", &self.port)
            .field("gsi", &self.gsi)
            .field("output", &self.output)
            .finish_non_exhaustive()
    }
}

impl Serial {
    /// The first serial port (`ttyS0`): ports 0x3F8 to 0x3FF, interrupt 4. Output goes nowhere
    /// until [`output`](Self::output) says where.
    pub fn com1() -> Self {
        Self::at("serial0", 0x3F8, 4)
    }

    /// The second serial port (`ttyS1`): ports 0x2F8 to 0x2FF, interrupt 3.
    pub fn com2() -> Self {
        Self::at("serial1", 0x2F8, 3)
    }

    /// The third serial port (`ttyS2`): ports 0x3E8 to 0x3EF, interrupt 4.
    pub fn com3() -> Self {
        Self::at("serial2", 0x3E8, 4)
    }

    /// The fourth serial port (`ttyS3`): ports 0x2E8 to 0x2EF, interrupt 3.
    pub fn com4() -> Self {
        Self::at("serial3", 0x2E8, 3)
    }

    /// A serial port called `name` at the eight ports from `port`, on interrupt `gsi`.
    pub fn at(name: impl Into<String>, port: u16, gsi: u32) -> Self {
        Self {
            name: name.into(),
            port,
            gsi,
            output: SerialOutput::sink(),
            watchers: Vec::new(),
            probe: OutputProbe::default(),
            input: SerialInput::default(),
            source: None,
        }
    }

    /// [`com1`](Self::com1) between the program's standard input and output.
    ///
    /// While the machine runs, a thread of its own reads standard input; it ends when the machine
    /// pauses or is dropped. The terminal stays in the mode it is in. Standard output that nobody reads
    /// holds up the guest, and for a moment whoever stops it: see [`SerialOutput::writer`].
    pub fn stdio() -> Self {
        let mut serial = Self::com1().output(SerialOutput::stdout());
        serial.source = Some(Source::Stdin);
        serial
    }

    /// Sends output there.
    pub fn output(mut self, output: impl Into<SerialOutput>) -> Self {
        self.output = output.into();
        self
    }

    /// Shows all output to `watcher` as well, in pieces as they are written. It is called from
    /// vCPU threads and may push input (a chat script), but should not take long. If it panics there,
    /// the machine ends as it does when a device panics; what it was shown counts as
    /// [lost](OutputProbe::lost).
    pub fn on_output(mut self, watcher: impl FnMut(&[u8]) + Send + 'static) -> Self {
        self.watchers.push(Box::new(watcher));
        self
    }

    /// Reads input from `fd` while the machine runs, besides what [`input`](Self::input) gets.
    pub fn input_from(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.source = Some(Source::Fd(fd.into()));
        self
    }

    /// A handle to type with.
    pub fn input(&self) -> SerialInput {
        self.input.clone()
    }

    /// A handle to figures about the output.
    pub fn probe(&self) -> OutputProbe {
        self.probe.clone()
    }
}

impl DeviceBuilder for Serial {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(self.port, PORTS)], irqs: vec![IrqNeed::Fixed(self.gsi)] }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let Self { name, port, output, watchers, probe, input, source, .. } = *self;
        let line = crate::required_line(&name, &resources, 0)?;
        let core = Arc::new(Core {
            inner: Mutex::new(Inner { uart: Uart::new(), running: false }),
            line,
            input: input.clone(),
        });
        input.connect(Arc::downgrade(&core));
        Ok(Arc::new(SerialDevice {
            name,
            port,
            core,
            outlet: Outlet::new(output, watchers, probe),
            pump: source.map(|source| Pump::new(source, input)),
        }))
    }
}

/// The part that input handles reach.
#[derive(Debug)]
struct Core {
    inner: Mutex<Inner>,
    line: IrqLine,
    input: SerialInput,
}

struct Inner {
    uart: Uart,
    running: bool,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Core {
    /// Lets waiting input in and the wire follow the registers.
    fn settle(&self, inner: &mut Inner) {
        if inner.running && self.input.is_waiting() {
            let room = inner.uart.room();
            if room > 0 {
                self.input.take(room, |bytes| inner.uart.receive(bytes));
            }
        }
        // All changes of the level happen under this lock, so the comparison saves the wire's.
        let level = inner.uart.interrupt();
        if level != self.line.level() {
            self.line.set(level);
        }
    }

    fn input_came(&self) {
        let mut inner = lock(&self.inner);
        if inner.running {
            self.settle(&mut inner);
        }
    }
}

struct SerialDevice {
    name: String,
    port: u16,
    core: Arc<Core>,
    outlet: Outlet,
    pump: Option<Pump>,
}

/// The register at `offset` of the only region.
fn register(offset: u64) -> u8 {
    (offset % u64::from(PORTS)) as u8
}

impl Device for SerialDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn announce(&self) -> Vec<Announcement> {
        vec![Announcement::Serial { port: self.port, gsi: self.core.line.gsi() }]
    }

    fn read(&self, _region: usize, offset: u64, data: &mut [u8]) {
        let mut inner = lock(&self.core.inner);
        read_bytes(offset, data, |offset| {
            let value = inner.uart.read(register(offset));
            self.core.settle(&mut inner);
            value
        });
    }

    fn write(&self, _region: usize, offset: u64, data: &[u8]) -> IoFlow {
        write_bytes(offset, data, |offset, value| {
            let mut inner = lock(&self.core.inner);
            let sent = inner.uart.write(register(offset), value);
            self.core.settle(&mut inner);
            drop(inner);
            if let Some(byte) = sent {
                self.outlet.put(byte);
            }
        });
        IoFlow::Continue
    }

    fn start(&self) -> Result<(), DeviceError> {
        self.outlet.start(&self.name)?;
        let mut inner = lock(&self.core.inner);
        inner.running = true;
        self.core.settle(&mut inner);
        drop(inner);
        self.pump.as_ref().map_or(Ok(()), |pump| pump.start(&self.name))
    }

    fn stop_waiting(&self) {
        self.outlet.release();
    }

    fn pause(&self) {
        if let Some(pump) = &self.pump {
            pump.pause();
        }
        lock(&self.core.inner).running = false;
        self.outlet.pause();
    }

    fn reset(&self) {
        let mut inner = lock(&self.core.inner);
        inner.uart = Uart::new();
        self.core.settle(&mut inner);
    }

    fn save(&self) -> Saved {
        FORMAT.save(&lock(&self.core.inner).uart.save())
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: UartState = FORMAT.load(&self.name, sections)?;
        let uart = Uart::load(state).map_err(|reason| FORMAT.malformed(&self.name, reason))?;
        let mut inner = lock(&self.core.inner);
        self.core.line.restore(uart.interrupt());
        inner.uart = uart;
        Ok(())
    }
}

impl Drop for SerialDevice {
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(test)]
mod tests;
