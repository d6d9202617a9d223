//! A device that counts accesses and notes the time of some.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed, IoSpace,
    Needs, Resources, Saved, Section,
};

use vmkit_benches::guests;

/// Answers the guests' port, and their MMIO page if RAM ends below. Sends the time after every `every` accesses, `times` times, and
/// ends the machine then.
pub struct Counter {
    pub every: u64,
    pub times: u64,
    pub page: bool,
    pub to: Sender<Instant>,
}

struct Counting {
    settings: Counter,
    /// Accesses until the next time is sent, and times to send.
    left: AtomicU64,
    times_left: AtomicU64,
    end: EndSignal,
}

impl DeviceBuilder for Counter {
    fn name(&self) -> String {
        "counter".into()
    }
    fn needs(&self) -> Needs {
        let page = IoNeed { space: IoSpace::Mmio, at: Some(guests::MMIO), len: 4096, align: 1 };
        let port = IoNeed::ports(guests::PORT, 1);
        Needs {
            io: [port].into_iter().chain(self.page.then_some(page)).collect(),
            irqs: Vec::new(),
        }
    }
    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let (left, times_left) = (AtomicU64::new(self.every), AtomicU64::new(self.times));
        Ok(Arc::new(Counting { settings: *self, left, times_left, end: resources.end }))
    }
}

impl Counting {
    fn one(&self) -> IoFlow {
        // One vCPU: no other thread counts.
        let left = self.left.load(Ordering::Relaxed) - 1;
        self.left.store(left, Ordering::Relaxed);
        if left == 0 { self.note() } else { IoFlow::Continue }
    }

    #[cold]
    fn note(&self) -> IoFlow {
        self.settings.to.send(Instant::now()).unwrap();
        self.left.store(self.settings.every, Ordering::Relaxed);
        if self.times_left.fetch_sub(1, Ordering::Relaxed) > 1 {
            return IoFlow::Continue;
        }
        self.end.raise(GuestEnd::ExitCode(0));
        IoFlow::Stop
    }
}

impl Device for Counting {
    fn name(&self) -> &str {
        "counter"
    }
    fn announce(&self) -> Vec<Announcement> {
        Vec::new()
    }
    fn read(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0);
        // A read cannot end the run by itself; the end signal does.
        let _ = self.one();
    }
    fn write(&self, _: usize, _: u64, _: &[u8]) -> IoFlow {
        self.one()
    }
    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn pause(&self) {}
    fn reset(&self) {}
    fn save(&self) -> Saved {
        Saved::Stateless
    }
    fn load(&self, _: &[Section]) -> Result<(), DeviceError> {
        Ok(())
    }
}
