//! Two ports that swallow bytes: the debug console at 0xE9, which boot loaders and small kernels
//! print to, and the POST port at 0x80, whose writes are how PC software waits a microsecond.

use std::sync::Arc;

use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, IoFlow, IoNeed, Needs, Resources, Saved,
    Section,
};

use crate::output::{Outlet, OutputProbe, SerialOutput, Watcher};
use crate::stateless::{Ports, Stateless, load_nothing};

/// The Bochs debug console: a byte written to port 0xE9 is printed.
///
/// ```
/// use vmkit_chipset::{Capture, DebugPort};
///
/// let console = Capture::with_limit(64 << 10);
/// let port = DebugPort::new().output(console.clone());
/// # drop(port);
/// ```
#[derive(Debug)]
pub struct DebugPort {
    port: u16,
    output: SerialOutput,
    watchers: Watchers,
}

#[derive(Default)]
struct Watchers(Vec<Watcher>);

impl std::fmt::Debug for Watchers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} watchers", self.0.len())
    }
}

impl DebugPort {
    /// At port 0xE9. Output goes nowhere until [`output`](Self::output) says where.
    pub fn new() -> Self {
        Self::at(0xE9)
    }

    /// At `port`. Software that probes for the console expects it at 0xE9 only.
    pub fn at(port: u16) -> Self {
        Self { port, output: SerialOutput::sink(), watchers: Watchers::default() }
    }

    /// Sends output there.
    pub fn output(mut self, output: impl Into<SerialOutput>) -> Self {
        self.output = output.into();
        self
    }

    /// Shows all output to `watcher` as well.
    pub fn on_output(mut self, watcher: impl FnMut(&[u8]) + Send + 'static) -> Self {
        self.watchers.0.push(Box::new(watcher));
        self
    }
}

impl Default for DebugPort {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceBuilder for DebugPort {
    fn name(&self) -> String {
        DEBUG_CONSOLE.into()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(self.port, 1)], irqs: Vec::new() }
    }

    fn build(self: Box<Self>, _: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Arc::new(DebugConsole(Outlet::new(
            self.output,
            self.watchers.0,
            OutputProbe::default(),
        ))))
    }
}

const DEBUG_CONSOLE: &str = "debug-console";
/// What a read gives: the port's own number, by which software knows that somebody listens.
const PRESENT: u8 = 0xE9;

struct DebugConsole(Outlet);

impl Device for DebugConsole {
    fn name(&self) -> &str {
        DEBUG_CONSOLE
    }

    fn announce(&self) -> Vec<Announcement> {
        Vec::new()
    }

    fn read(&self, _region: usize, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _region: usize, _offset: u64, data: &[u8]) -> IoFlow {
        data.iter().for_each(|&byte| self.0.put(byte));
        IoFlow::Continue
    }

    fn start(&self) -> Result<(), DeviceError> {
        self.0.start(DEBUG_CONSOLE)
    }

    fn stop_waiting(&self) {
        self.0.release();
    }

    fn pause(&self) {
        self.0.pause();
    }

    fn reset(&self) {}

    fn save(&self) -> Saved {
        Saved::Stateless
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        load_nothing(DEBUG_CONSOLE, sections)
    }
}

/// The POST code port, 0x80: writes do nothing, as fast as can be. Without it they would do the
/// same but count as accesses that no device answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct PostPort;

impl PostPort {
    /// At port 0x80.
    pub fn new() -> Self {
        Self
    }
}

impl DeviceBuilder for PostPort {
    fn name(&self) -> String {
        "post".into()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(0x80, 1)], irqs: Vec::new() }
    }

    fn build(self: Box<Self>, _: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Arc::new(Stateless { name: "post", ports: Post }))
    }
}

struct Post;

impl Ports for Post {
    fn read(&self, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write(&self, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::output::Capture;
    use crate::testing::{Rig, abuses};

    #[test]
    fn software_finds_the_debug_console_and_prints() {
        let console = Capture::with_limit(100);
        let rig = Rig::new(DebugPort::new().output(console.clone()));
        assert_eq!(rig.inb(0xE9), 0xE9);
        for &byte in b"hello" {
            assert_eq!(rig.outb(0xE9, byte), IoFlow::Continue);
        }
        assert_eq!(console.text(), "hello");
    }

    #[test]
    fn post_codes_go_nowhere() {
        let rig = Rig::new(PostPort::new());
        assert_eq!(rig.outb(0x80, 0x55), IoFlow::Continue);
        assert_eq!(rig.inb(0x80), 0xFF);
    }

    proptest! {
        #[test]
        fn no_access_harms_the_devices(accesses in abuses()) {
            let rig = Rig::new(PostPort::new());
            rig.abuse(&accesses);
            rig.check_saved_state(&Rig::new(PostPort::new()));
            let rig = Rig::new(DebugPort::new());
            rig.abuse(&accesses);
            rig.check_saved_state(&Rig::new(DebugPort::new()));
        }
    }
}
