//! ACPI power management (ACPI 6.5 §4.8): the PM timer, the power button, soft off, and the reset
//! register.
//!
//! The machine is always in ACPI mode: there is no SMI command port and SCI_EN reads as one. The
//! only sleep state is S5; the only event is the power button (the timer's carry raises none).

use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use vmkit_device::{
    Announcement, Clock, Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed,
    IrqLine, IrqNeed, Needs, Resources, Saved, Section, SectionFormat,
};

use crate::access::{lock, read_register, write_bytes};

const NAME: &str = "acpi-pm";
const FORMAT: SectionFormat = SectionFormat { kind: "acpi-pm", version: 1 };

/// Region of the PM1a event block: status, then enable (§4.8.3.1).
const EVENT: usize = 0;
/// Region of the PM1a control register (§4.8.3.2).
const CONTROL: usize = 1;
/// Region of the PM timer (§4.8.3.3).
const TIMER: usize = 2;
/// Region of the reset register (§4.8.3.6).
const RESET: usize = 3;
/// Region of the power-off port that Bochs had and small kernels still try.
const OLD_POWER_OFF: usize = 4;

/// Frequency of the PM timer in hertz.
const TIMER_HZ: u64 = 3_579_545;
/// The system control interrupt's usual input.
const SCI: u32 = 9;

const POWER_BUTTON: u16 = 1 << 8;
/// Enable bits that exist: timer, global lock, power and sleep button, RTC.
const ENABLE_MASK: u16 = 0x0721;
/// Control bits that are kept: bus master reload and SLP_TYP.
const CONTROL_MASK: u16 = 0x1C02;
const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
/// SLP_TYP of S5. Zero, so that the bare 0x2000 which small kernels write means it.
const S5: u8 = 0;

/// Value the firmware tables give for the reset register: a hard reset in the style of Intel's
/// port 0xCF9, where bit 2 pulls the line.
const RESET_VALUE: u8 = 0x06;
const RESET_PULL: u8 = 1 << 2;

/// ACPI power management of a PC.
///
/// | ports | what |
/// |---|---|
/// | 0x600 to 0x603 | PM1a event block |
/// | 0x604, 0x605 | PM1a control; the 0x2000 of small kernels powers off |
/// | 0x608 to 0x60B | PM timer, 32 bits |
/// | 0xCF9 | reset register: 0x06 or 0x0E resets |
/// | 0xB004, 0xB005 | 0x2000 powers off, as in old emulators |
///
/// ```
/// let pm = vmkit_chipset::AcpiPm::new();
/// let button = pm.power_button();
/// // Ask the guest to shut down, from any thread; it does once its ACPI driver is up.
/// assert!(!button.press(), "no guest listens yet");
/// ```
#[derive(Debug)]
pub struct AcpiPm {
    reset_port: u16,
    shared: Arc<Shared>,
}

impl AcpiPm {
    /// At its usual ports, on interrupt 9.
    pub fn new() -> Self {
        Self { reset_port: 0xCF9, shared: Arc::default() }
    }

    /// Has the reset register at `port`, where a PCI host bridge takes 0xCF8 to 0xCFF.
    pub fn reset_port(mut self, port: u16) -> Self {
        self.reset_port = port;
        self
    }

    /// A handle to the power button.
    pub fn power_button(&self) -> PowerButton {
        PowerButton { shared: self.shared.clone() }
    }
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceBuilder for AcpiPm {
    fn name(&self) -> String {
        NAME.into()
    }

    fn needs(&self) -> Needs {
        let ports = [(0x600, 4), (0x604, 2), (0x608, 4), (self.reset_port, 1), (0xB004, 2)];
        Needs {
            io: ports.map(|(port, len)| IoNeed::ports(port, len)).into(),
            irqs: vec![IrqNeed::Fixed(SCI)],
        }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let line = crate::required_line(NAME, &resources, 0)?;
        let port = |region: usize| resources.io.get(region).map_or(0, |&at| at as u16);
        let announcements = vec![
            Announcement::PmEvent { port: port(EVENT), gsi: line.gsi() },
            Announcement::PmControl { port: port(CONTROL), s5: S5 },
            Announcement::PmTimer { port: port(TIMER), wide: true },
            Announcement::ResetPort { port: port(RESET), value: RESET_VALUE },
        ];
        // A builder is built once: this value's line cannot be there yet.
        let _ = self.shared.sci.set(line);
        let Resources { clock, end, .. } = resources;
        Ok(Arc::new(PmDevice { shared: self.shared, clock, end, announcements }))
    }
}

/// The power button of a machine; clones press the same button.
#[derive(Clone, Debug)]
pub struct PowerButton {
    shared: Arc<Shared>,
}

impl PowerButton {
    /// Presses the button: the guest is asked to shut down. True if it listens. A press that comes
    /// too early is kept until the guest enables the button or clears its status.
    pub fn press(&self) -> bool {
        let mut registers = lock(&self.shared.registers);
        registers.state.status |= POWER_BUTTON;
        self.shared.settle(&registers);
        registers.state.enable & POWER_BUTTON != 0
    }
}

/// What the device and the button share.
#[derive(Debug, Default)]
struct Shared {
    registers: Mutex<Registers>,
    sci: OnceLock<IrqLine>,
}

#[derive(Debug, Default)]
struct Registers {
    state: PmState,
    running: bool,
}

/// The registers as saved, format version 1. The timer is the machine's clock, and saved with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PmState {
    status: u16,
    enable: u16,
    control: u16,
    reset: u8,
}

impl PmState {
    fn interrupt(&self) -> bool {
        self.status & self.enable != 0
    }

    fn is_possible(&self) -> bool {
        self.status & !POWER_BUTTON == 0
            && self.enable & !ENABLE_MASK == 0
            && self.control & !CONTROL_MASK == 0
            && self.reset & RESET_PULL == 0
    }

    /// Writes a byte of the event block: status bits are cleared by ones.
    fn write_event(&mut self, offset: u64, value: u8) {
        let (low, high) = (u16::from(value), u16::from(value) << 8);
        match offset {
            0 => self.status &= !low,
            1 => self.status &= !high,
            2 => self.enable = ((self.enable & 0xFF00) | low) & ENABLE_MASK,
            3 => self.enable = ((self.enable & 0x00FF) | high) & ENABLE_MASK,
            _ => {}
        }
    }

    /// Writes a byte of the control register; true if that puts the machine to S5.
    fn write_control(&mut self, offset: u64, value: u8) -> bool {
        let written = match offset {
            0 => (self.control & 0xFF00) | u16::from(value),
            1 => (self.control & 0x00FF) | u16::from(value) << 8,
            _ => return false,
        };
        self.control = written & CONTROL_MASK;
        let sleep_type = (written >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        written & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5)
    }
}

impl Shared {
    /// Lets the SCI follow the registers, unless the machine rests.
    fn settle(&self, registers: &Registers) {
        if let Some(sci) = self.sci.get().filter(|_| registers.running) {
            sci.set(registers.state.interrupt());
        }
    }
}

struct PmDevice {
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    end: EndSignal,
    announcements: Vec<Announcement>,
}

impl PmDevice {
    fn timer(&self) -> u32 {
        let now = self.clock.now();
        let part = u64::from(now.subsec_nanos()) * TIMER_HZ / 1_000_000_000;
        now.as_secs().wrapping_mul(TIMER_HZ).wrapping_add(part) as u32
    }
}

impl Device for PmDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn announce(&self) -> Vec<Announcement> {
        self.announcements.clone()
    }

    fn read(&self, region: usize, offset: u64, data: &mut [u8]) {
        if region == TIMER {
            // One sample for all bytes, and no lock: this can be the guest's clock.
            return read_register(&self.timer().to_le_bytes(), offset, data);
        }
        let registers = lock(&self.shared.registers);
        let PmState { status, enable, control, reset } = registers.state;
        let value = match region {
            EVENT => u32::from(status) | u32::from(enable) << 16,
            CONTROL => u32::from(control | SCI_ENABLED) | 0xFFFF_0000,
            RESET => u32::from(reset) | 0xFFFF_FF00,
            _ => u32::MAX,
        };
        read_register(&value.to_le_bytes(), offset, data);
    }

    fn write(&self, region: usize, offset: u64, data: &[u8]) -> IoFlow {
        let mut registers = lock(&self.shared.registers);
        let mut end = None;
        write_bytes(offset, data, |offset, value| match region {
            EVENT => registers.state.write_event(offset, value),
            CONTROL if registers.state.write_control(offset, value) => {
                end = Some(GuestEnd::PowerOff);
            }
            RESET if offset == 0 => {
                registers.state.reset = value & !RESET_PULL;
                if value & RESET_PULL != 0 {
                    end = Some(GuestEnd::Reset);
                }
            }
            OLD_POWER_OFF if offset == 1 && u16::from(value) << 8 & SLEEP_ENABLE != 0 => {
                end = Some(GuestEnd::PowerOff);
            }
            _ => {}
        });
        self.shared.settle(&registers);
        drop(registers);
        match end {
            Some(end) => {
                self.end.raise(end);
                IoFlow::Stop
            }
            None => IoFlow::Continue,
        }
    }

    fn start(&self) -> Result<(), DeviceError> {
        let mut registers = lock(&self.shared.registers);
        registers.running = true;
        self.shared.settle(&registers);
        Ok(())
    }

    fn pause(&self) {
        lock(&self.shared.registers).running = false;
    }

    fn reset(&self) {
        let mut registers = lock(&self.shared.registers);
        registers.state = PmState::default();
        if let Some(sci) = self.shared.sci.get() {
            sci.set(false);
        }
    }

    fn save(&self) -> Saved {
        FORMAT.save(&lock(&self.shared.registers).state)
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: PmState = FORMAT.load(NAME, sections)?;
        if !state.is_possible() {
            return Err(FORMAT.malformed(NAME, "a register has bits that do not exist"));
        }
        let mut registers = lock(&self.shared.registers);
        if let Some(sci) = self.shared.sci.get() {
            sci.restore(state.interrupt());
        }
        registers.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Rig, abuses};

    const STATUS: u16 = 0x600;
    const ENABLE: u16 = 0x602;
    const CONTROL: u16 = 0x604;

    fn rig() -> (Rig, PowerButton) {
        let pm = AcpiPm::new();
        let button = pm.power_button();
        (Rig::new(pm), button)
    }

    #[test]
    fn the_timer_ticks_at_3_58_megahertz_and_wraps_at_32_bits() {
        let (rig, _) = rig();
        assert_eq!(rig.inl(0x608, 4), 0);
        rig.clock.advance(Duration::from_millis(1500));
        assert_eq!(rig.inl(0x608, 4), 5_369_317);
        assert_eq!(rig.inl(0x608, 2), 5_369_317 & 0xFFFF);
        assert_eq!(rig.inb(0x60A), (5_369_317 >> 16) as u8);
        rig.clock.advance(Duration::from_millis(1_200_000 - 1500));
        assert_eq!(u64::from(rig.inl(0x608, 4)), 1200 * TIMER_HZ % (1 << 32));
    }

    #[test]
    fn every_way_to_power_off_does() {
        for (port, width, value) in
            [(CONTROL, 2, 0x2000), (0x605, 1, 0x20), (CONTROL, 2, 0x2001), (0xB004, 2, 0x2000)]
        {
            let (rig, _) = rig();
            assert_eq!(rig.outl(port, width, value), IoFlow::Stop, "{port:#x}");
            assert_eq!(rig.ended(), Some(GuestEnd::PowerOff));
        }
    }

    #[test]
    fn linux_powers_off_in_two_writes_and_other_sleep_states_are_none() {
        let (rig, _) = rig();
        for sleep_type in 1..8 {
            let value = sleep_type << SLEEP_TYPE_SHIFT | u32::from(SLEEP_ENABLE);
            assert_eq!(rig.outl(CONTROL, 2, value), IoFlow::Continue);
        }
        assert_eq!(rig.outl(CONTROL, 2, 0x0001), IoFlow::Continue);
        assert_eq!(rig.inl(CONTROL, 2), 0x0001);
        assert_eq!(rig.ended(), None);
        assert_eq!(rig.outl(CONTROL, 2, 0x2001), IoFlow::Stop);
    }

    #[test]
    fn the_reset_register_resets_on_bit_2_only() {
        for (value, flow) in [(0x02, IoFlow::Continue), (0x06, IoFlow::Stop), (0x0E, IoFlow::Stop)]
        {
            let (rig, _) = rig();
            assert_eq!(rig.outb(0xCF9, value), flow);
            assert_eq!(rig.ended(), (flow == IoFlow::Stop).then_some(GuestEnd::Reset));
            assert_eq!(rig.inb(0xCF9), value & !RESET_PULL);
        }
        let moved = Rig::new(AcpiPm::new().reset_port(0x60C));
        assert_eq!(moved.outb(0x60C, RESET_VALUE), IoFlow::Stop);
        let says = Announcement::ResetPort { port: 0x60C, value: RESET_VALUE };
        assert!(moved.device.announce().contains(&says));
    }

    #[test]
    fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
        let (rig, button) = rig();
        assert!(!button.press(), "the guest does not listen");
        assert!(!rig.level(SCI));
        let _ = rig.outl(ENABLE, 2, POWER_BUTTON.into());
        assert!(rig.level(SCI));
        assert_eq!(rig.inl(STATUS, 4), 0x0100_0100);
        let _ = rig.outl(STATUS, 2, POWER_BUTTON.into());
        assert!(!rig.level(SCI));
        assert!(button.press());
        assert_eq!(rig.rises(SCI), 2);
        let _ = rig.outl(STATUS, 4, 0x0000_0100);
        assert_eq!((rig.level(SCI), rig.inl(ENABLE, 2)), (false, 0));
    }

    #[test]
    fn a_press_while_paused_waits_for_the_start() {
        let (rig, button) = rig();
        let _ = rig.outl(ENABLE, 2, POWER_BUTTON.into());
        rig.device.pause();
        button.press();
        assert!(!rig.level(SCI));
        rig.device.start().unwrap();
        assert!(rig.level(SCI));
        rig.device.reset();
        assert!(!rig.level(SCI));
    }

    #[test]
    fn saved_state_restores_the_sci_without_an_edge() {
        let (from, button) = rig();
        let _ = from.outl(ENABLE, 2, POWER_BUTTON.into());
        button.press();
        let (to, _) = rig();
        to.device.pause();
        from.check_saved_state(&to);
        to.device.start().unwrap();
        assert_eq!(to.rises(SCI), 0);
        let _ = to.outl(STATUS, 2, POWER_BUTTON.into());
        assert!(!to.level(SCI));
    }

    #[test]
    fn impossible_saved_state_is_refused() {
        let (rig, _) = rig();
        for bad in [
            PmState { status: 1, ..PmState::default() },
            PmState { enable: 0x8000, ..PmState::default() },
            PmState { control: SLEEP_ENABLE, ..PmState::default() },
            PmState { reset: RESET_PULL, ..PmState::default() },
        ] {
            let Saved::Sections(sections) = FORMAT.save(&bad) else { panic!("not saved") };
            assert!(rig.device.load(&sections).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_access_harms_the_device(accesses in abuses()) {
            let (rig, _) = rig();
            rig.abuse(&accesses);
            rig.check_saved_state(&super::tests::rig().0);
        }
    }
}
