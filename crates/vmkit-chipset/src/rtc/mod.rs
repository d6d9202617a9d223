//! The PC's real-time clock and CMOS memory: an MC146818 at ports 0x70 and 0x71, on interrupt 8.
//!
//! The chip itself is [`chip`], driven by accesses. Only a guest that enables one of its interrupts
//! makes it need a thread, which then sleeps until the next one is due. Under a machine clock that
//! is not the host's, an interrupt can come late by as much as that clock runs slower.

mod calendar;
mod chip;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmkit_device::memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRam};
use vmkit_device::{
    Announcement, Clock, Device, DeviceBuilder, DeviceError, IoFlow, IoNeed, IrqLine, IrqNeed,
    Needs, Resources, Saved, Section, SectionFormat, thread_builder,
};

use self::chip::{Chip, Now, RtcState, SIZE};
use crate::access::{lock, read_bytes, write_bytes};

const NAME: &str = "rtc";
const FORMAT: SectionFormat = SectionFormat { kind: "mc146818", version: 1 };
const PORT: u16 = 0x70;
const GSI: u32 = 8;
/// Offset of the index port; the data port follows.
const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Shortest sleep of the thread: bounds what a guest can make it cost.
const SHORTEST_WAIT: Duration = Duration::from_micros(100);

/// The real-time clock of a PC.
///
/// It shows the host's time in UTC until the guest sets another, which then runs on beside the
/// host's. Its memory tells the size of the machine's RAM where a PC's firmware would.
///
/// ```
/// use vmkit_chipset::Rtc;
/// use vmkit_device::{DeviceBuilder, IoNeed, IrqNeed};
///
/// let needs = Rtc::new().needs();
/// assert_eq!((needs.io, needs.irqs), (vec![IoNeed::ports(0x70, 2)], vec![IrqNeed::Fixed(8)]));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtc {
    _private: (),
}

impl Rtc {
    /// At ports 0x70 and 0x71, on interrupt 8.
    pub fn new() -> Self {
        Self::default()
    }
}

impl DeviceBuilder for Rtc {
    fn name(&self) -> String {
        NAME.into()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(PORT, 2)], irqs: vec![IrqNeed::Fixed(GSI)] }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let line = crate::required_line(NAME, &resources, 0)?;
        let clock = resources.clock;
        let now = Now { running: clock.now(), wall: clock.wall() };
        let chip = Chip::new(&cmos_memory(&resources.memory), now);
        let inner = Mutex::new(Inner { chip, running: false, thread: None });
        Ok(Arc::new(RtcDevice(Arc::new(Shared { inner, wake: Condvar::new(), clock, line }))))
    }
}

/// What a PC's firmware leaves in CMOS memory about `ram`.
fn cmos_memory(ram: &GuestRam) -> [u8; SIZE] {
    const LIMIT_4G: u64 = 1 << 32;
    const M: u64 = 1 << 20;
    let mut below = 0;
    let mut above = 0;
    for region in ram.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        if start < LIMIT_4G {
            below = below.max(end.min(LIMIT_4G));
        }
        above += end.saturating_sub(start.max(LIMIT_4G));
    }
    let base_kib = (below >> 10).min(640);
    let over_1m_kib = (below.saturating_sub(M) >> 10).min(0xFFFF);
    let over_16m = (below.saturating_sub(16 * M) >> 16).min(0xFFFF);
    let over_4g = (above >> 16).min(0xFF_FFFF);

    let mut bytes = [0; SIZE];
    let mut put = |at: usize, value: u64, len: usize| {
        for (byte, value) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()).take(len) {
            *byte = value;
        }
    };
    // Equipment: a coprocessor, no drives, no keyboard to speak of.
    put(0x14, 0x02, 1);
    put(0x15, base_kib, 2);
    put(0x17, over_1m_kib, 2);
    put(0x30, over_1m_kib, 2);
    put(0x34, over_16m, 2);
    put(0x5B, over_4g, 3);
    // The checksum of 0x10 to 0x2D, high byte first.
    let sum = bytes.iter().skip(0x10).take(0x1E).map(|&byte| u16::from(byte)).sum::<u16>();
    [bytes[0x2E], bytes[0x2F]] = sum.to_be_bytes();
    bytes
}

struct Shared {
    inner: Mutex<Inner>,
    wake: Condvar,
    clock: Arc<dyn Clock>,
    line: IrqLine,
}

struct Inner {
    chip: Chip,
    running: bool,
    /// Waits for the next interrupt; started when the guest first wants one.
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    fn now(&self) -> Now {
        Now { running: self.clock.now(), wall: self.clock.wall() }
    }

    /// After a change of the chip: the wire follows, and the thread looks again.
    fn settle(self: &Arc<Self>, inner: &mut Inner) -> std::io::Result<()> {
        self.line.set(inner.chip.interrupt());
        if inner.thread.is_some() {
            self.wake.notify_one();
        } else if inner.running && inner.chip.is_armed() {
            let shared = self.clone();
            let builder = thread_builder(NAME);
            inner.thread = Some(builder.spawn(move || shared.tick())?);
        }
        Ok(())
    }

    /// The thread: raises the wire when an interrupt is due.
    fn tick(&self) {
        let mut inner = lock(&self.inner);
        while inner.running {
            let now = self.now();
            inner.chip.advance(now);
            self.line.set(inner.chip.interrupt());
            inner = match inner.chip.next_interrupt(now) {
                Some(wait) => self.sleep(inner, wait.max(SHORTEST_WAIT)),
                None => self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn sleep<'a>(&self, inner: MutexGuard<'a, Inner>, wait: Duration) -> MutexGuard<'a, Inner> {
        self.wake.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0
    }
}

struct RtcDevice(Arc<Shared>);

impl RtcDevice {
    /// [`Shared::settle`] where no error can be returned: the guest goes without interrupts.
    fn settle(&self, inner: &mut Inner) {
        if let Err(error) = self.0.settle(inner) {
            log::warn!("{NAME}: cannot start its interrupt thread: {error}");
        }
    }
}

impl Device for RtcDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn announce(&self) -> Vec<Announcement> {
        vec![Announcement::Rtc { port: PORT, gsi: self.0.line.gsi() }]
    }

    fn read(&self, _region: usize, offset: u64, data: &mut [u8]) {
        let mut inner = lock(&self.0.inner);
        read_bytes(offset, data, |offset| match offset {
            INDEX => inner.chip.selected(),
            DATA => {
                let value = inner.chip.read(self.0.now());
                self.settle(&mut inner);
                value
            }
            _ => 0xFF,
        });
    }

    fn write(&self, _region: usize, offset: u64, data: &[u8]) -> IoFlow {
        let mut inner = lock(&self.0.inner);
        write_bytes(offset, data, |offset, value| match offset {
            INDEX => inner.chip.select(value),
            DATA => {
                inner.chip.write(value, self.0.now());
                self.settle(&mut inner);
            }
            _ => {}
        });
        IoFlow::Continue
    }

    fn start(&self) -> Result<(), DeviceError> {
        let mut inner = lock(&self.0.inner);
        inner.running = true;
        self.0.settle(&mut inner).map_err(|source| DeviceError::Host {
            device: NAME.into(),
            what: "cannot start its interrupt thread".into(),
            source,
        })
    }

    fn pause(&self) {
        let mut inner = lock(&self.0.inner);
        inner.running = false;
        let thread = inner.thread.take();
        drop(inner);
        self.0.wake.notify_one();
        if let Some(thread) = thread {
            // It has no way to panic, and nothing to say if it did.
            let _ = thread.join();
        }
    }

    fn reset(&self) {
        let mut inner = lock(&self.0.inner);
        inner.chip.reset();
        self.settle(&mut inner);
    }

    fn save(&self) -> Saved {
        FORMAT.save(&lock(&self.0.inner).chip.save())
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: RtcState = FORMAT.load(NAME, sections)?;
        let chip =
            Chip::load(state, self.0.now()).map_err(|reason| FORMAT.malformed(NAME, reason))?;
        let mut inner = lock(&self.0.inner);
        self.0.line.restore(chip.interrupt());
        inner.chip = chip;
        Ok(())
    }
}

impl Drop for RtcDevice {
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Rig, abuses};

    fn read(rig: &Rig, register: u8) -> u8 {
        let _ = rig.outb(0x70, register);
        rig.inb(0x71)
    }

    fn write(rig: &Rig, register: u8, value: u8) {
        // Index and data in one write, as 16-bit code does.
        let _ = rig.outl(0x70, 2, u32::from(value) << 8 | u32::from(register));
    }

    fn word(rig: &Rig, register: u8) -> u64 {
        u64::from(read(rig, register)) | u64::from(read(rig, register + 1)) << 8
    }

    #[test]
    fn the_clock_answers_at_its_ports() {
        let rig = Rig::new(Rtc::new());
        assert_eq!(rig.device.announce(), [Announcement::Rtc { port: 0x70, gsi: 8 }]);
        assert_eq!([0x32, 9, 8, 7].map(|r| read(&rig, r)), [0x20, 0x24, 0x02, 0x29]);
        assert_eq!(read(&rig, 0x84), 0x23, "the NMI mask bit does not change the index");
        assert_eq!(rig.inb(0x70), 0x84);
        write(&rig, 0x50, 0xAB);
        assert_eq!(read(&rig, 0x50), 0xAB);
    }

    #[test]
    fn cmos_memory_tells_the_size_of_ram() {
        for (size, over_1m, over_16m, over_4g) in [
            (1 << 20, 0, 0, 0),
            (16 << 20, 15 << 10, 0, 0),
            (512 << 20, 0xFFFF, 496 << 4, 0),
            (6 << 30, 0xFFFF, 0xBF00, 3 << 14),
        ] {
            let rig = Rig::with_memory(Rtc::new(), size);
            assert_eq!(word(&rig, 0x15), 640);
            assert_eq!((word(&rig, 0x17), word(&rig, 0x30)), (over_1m, over_1m));
            assert_eq!(word(&rig, 0x34), over_16m);
            assert_eq!(word(&rig, 0x5B) | u64::from(read(&rig, 0x5D)) << 16, over_4g);
        }
    }

    #[test]
    fn an_enabled_interrupt_comes_without_an_access_and_goes_when_read() {
        let rig = Rig::new(Rtc::new());
        write(&rig, 0x0B, 0x12);
        rig.clock.advance(Duration::from_secs(1));
        // The thread may have gone to sleep before the clock moved: then it takes a real second.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !rig.level(8) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(read(&rig, 0x0C) & 0x90, 0x90);
        assert!(!rig.level(8));
    }

    #[test]
    fn pausing_ends_the_thread_and_starting_finds_what_was_due() {
        let rig = Rig::new(Rtc::new());
        write(&rig, 0x0B, 0x12);
        rig.device.pause();
        rig.clock.advance(Duration::from_secs(2));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!rig.level(8));
        rig.device.start().unwrap();
        assert_eq!(read(&rig, 0x0C) & 0x90, 0x90);
    }

    #[test]
    fn flags_come_without_interrupts() {
        let rig = Rig::new(Rtc::new());
        rig.clock.advance(Duration::from_secs(5));
        assert_eq!(read(&rig, 0x0C), 0x70, "midnight, the alarm's power-on value, passed");
        assert_eq!(rig.rises(8), 0);
    }

    #[test]
    fn saved_state_keeps_the_time_a_guest_set() {
        let from = Rig::new(Rtc::new());
        write(&from, 0x04, 0x05);
        let to = Rig::new(Rtc::new());
        to.device.pause();
        from.check_saved_state(&to);
        to.device.start().unwrap();
        assert_eq!(read(&to, 0x04), 0x05);
    }

    proptest! {
        #[test]
        fn no_access_harms_the_device(accesses in abuses()) {
            let rig = Rig::new(Rtc::new());
            rig.abuse(&accesses);
            rig.device.pause();
            let other = Rig::new(Rtc::new());
            other.device.pause();
            rig.check_saved_state(&other);
        }
    }
}
