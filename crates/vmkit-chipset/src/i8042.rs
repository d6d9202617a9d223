//! The i8042 keyboard controller: reset, the A20 gate, and enough of its commands that a driver's
//! probe ends at once (IBM PC/AT Technical Reference, "Keyboard Controller").
//!
//! Nothing is attached to it. The keyboard port answers what a controller says when no keyboard
//! takes a byte; the auxiliary port reports a dead line. Every command that promises a byte
//! delivers one, because a driver waits half a second for one that does not come.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed, IrqLine,
    IrqNeed, Needs, Resources, Saved, Section, SectionFormat,
};

use crate::access::lock;

const NAME: &str = "i8042";
const FORMAT: SectionFormat = SectionFormat { kind: "i8042", version: 1 };

/// Region of port 0x60: data.
const DATA: usize = 0;
/// Region of port 0x64: status when read, command when written.
const COMMAND: usize = 1;
/// Region of port 0x92: system control port A, the fast way to A20 and reset.
const CONTROL_A: usize = 2;

/// A byte waits at port 0x60.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// The self test passed (copy of the configuration byte's bit 2).
const STATUS_SYSTEM: u8 = 1 << 2;
/// The last write was to port 0x64.
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard is not locked by its key.
const STATUS_UNLOCKED: u8 = 1 << 4;
/// The keyboard did not take a byte in time.
const STATUS_TIMEOUT: u8 = 1 << 6;

/// Configuration: interrupt 1 when a byte of the keyboard's waits.
const CONFIG_INTERRUPT: u8 = 1 << 0;
const CONFIG_SYSTEM: u8 = 1 << 2;
/// Configuration: the keyboard's clock is off.
const CONFIG_DISABLED: u8 = 1 << 4;
/// Configuration: the auxiliary port's clock is off.
const CONFIG_AUX_DISABLED: u8 = 1 << 5;
const CONFIG_TRANSLATE: u8 = 1 << 6;
const CONFIG_POWER_ON: u8 =
    CONFIG_INTERRUPT | CONFIG_SYSTEM | CONFIG_AUX_DISABLED | CONFIG_TRANSLATE;

/// Output port: the processor's reset line, active low.
const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
/// Control port A: pulses the reset line.
const CONTROL_A_RESET: u8 = 1 << 0;

const SELF_TEST_PASSED: u8 = 0x55;
const NO_PASSWORD: u8 = 0xF1;
const LINE_STUCK: u8 = 0x01;
const KEYBOARD_RESEND: u8 = 0xFE;

/// The keyboard controller of a PC, with no keyboard.
///
/// Software resets the machine through it (command 0xFE, the output port, or port 0x92); that ends
/// the machine with [`GuestEnd::Reset`]. The A20 gate can be written and read back but does not
/// gate: address line 20 is always on, as on every machine since it last mattered.
///
/// ```
/// use vmkit_chipset::I8042;
/// use vmkit_device::{DeviceBuilder, IoNeed};
///
/// let ports = [0x60, 0x64, 0x92].map(|port| IoNeed::ports(port, 1));
/// assert_eq!(I8042::new().needs().io, ports);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct I8042 {
    _private: (),
}

impl I8042 {
    /// At ports 0x60, 0x64 and 0x92, on interrupt 1.
    pub fn new() -> Self {
        Self::default()
    }
}

impl DeviceBuilder for I8042 {
    fn name(&self) -> String {
        NAME.into()
    }

    fn needs(&self) -> Needs {
        let io = [0x60, 0x64, 0x92].map(|port| IoNeed::ports(port, 1));
        Needs { io: io.into(), irqs: vec![IrqNeed::Fixed(1)] }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let line = crate::required_line(NAME, &resources, 0)?;
        let state = Mutex::new(Controller::default());
        Ok(Arc::new(I8042Device { state, line, end: resources.end }))
    }
}

/// What the next byte written to port 0x60 is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    /// The keyboard.
    Keyboard,
    /// The controller's RAM at this address; 0 is the configuration byte.
    Ram(u8),
    OutputPort,
    /// Back to the reader, as if the keyboard or the auxiliary device had sent it.
    Loop,
    /// The auxiliary device.
    Auxiliary,
}

/// The byte at port 0x60.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    value: u8,
    from: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    /// The answer to a command. Its reader waits for it and needs no interrupt.
    Controller,
    /// The keyboard, as far as the reader can tell.
    Keyboard,
    /// The controller again, because the keyboard is silent.
    Timeout,
}

/// The controller; also its saved state, format version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Controller {
    config: u8,
    output_port: u8,
    output: Option<Output>,
    /// What port 0x60 gives when nothing waits: the last byte again.
    last: u8,
    command_last: bool,
    expect: Expect,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            config: CONFIG_POWER_ON,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
            output: None,
            last: 0,
            command_last: false,
            expect: Expect::Keyboard,
        }
    }
}

/// The guest pulled the reset line.
struct ResetLine;

impl Controller {
    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.config & CONFIG_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.command_last {
            status |= STATUS_COMMAND;
        }
        if let Some(output) = self.output {
            status |= STATUS_OUTPUT_FULL;
            if output.from == Source::Timeout {
                status |= STATUS_TIMEOUT;
            }
        }
        status
    }

    fn read_data(&mut self) -> u8 {
        if let Some(output) = self.output.take() {
            self.last = output.value;
        }
        self.last
    }

    fn reply(&mut self, value: u8) {
        self.output = Some(Output { value, from: Source::Controller });
    }

    fn command(&mut self, command: u8) -> Option<ResetLine> {
        self.command_last = true;
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.reply(self.config),
            0x21..=0x3F => self.reply(0),
            // The firmware's version, the diagnostic dump, the mode and the test inputs: nothing.
            0xA1 | 0xAC | 0xCA | 0xE0 => self.reply(0),
            0x60..=0x7F => self.expect = Expect::Ram(command & 0x1F),
            0xA4 => self.reply(NO_PASSWORD),
            0xA7 => self.config |= CONFIG_AUX_DISABLED,
            0xA8 => self.config &= !CONFIG_AUX_DISABLED,
            0xA9 => self.reply(LINE_STUCK),
            0xAA => {
                self.config |= CONFIG_SYSTEM;
                self.reply(SELF_TEST_PASSED);
            }
            0xAB => self.reply(0),
            0xAD => self.config |= CONFIG_DISABLED,
            0xAE => self.config &= !CONFIG_DISABLED,
            // The input port: keyboard not locked, nothing else strapped.
            0xC0 => self.reply(0x80),
            0xD0 => self.reply(self.output_port),
            0xD1 => self.expect = Expect::OutputPort,
            0xD2 | 0xD3 => self.expect = Expect::Loop,
            0xD4 => self.expect = Expect::Auxiliary,
            // Pulses the output port's low bits that are zero in the command.
            0xF0..=0xFF if command & OUTPUT_NOT_RESET == 0 => return Some(ResetLine),
            _ => {}
        }
        None
    }

    fn write_data(&mut self, value: u8) -> Option<ResetLine> {
        self.command_last = false;
        match std::mem::replace(&mut self.expect, Expect::Keyboard) {
            Expect::Ram(0) => self.config = value,
            Expect::Ram(_) => {}
            Expect::OutputPort => return self.write_output_port(value),
            Expect::Loop => self.output = Some(Output { value, from: Source::Keyboard }),
            Expect::Keyboard | Expect::Auxiliary => {
                self.config &= !CONFIG_DISABLED;
                self.output = Some(Output { value: KEYBOARD_RESEND, from: Source::Timeout });
            }
        }
        None
    }

    fn write_output_port(&mut self, value: u8) -> Option<ResetLine> {
        self.output_port = value | OUTPUT_NOT_RESET;
        (value & OUTPUT_NOT_RESET == 0).then_some(ResetLine)
    }

    fn control_a(&self) -> u8 {
        self.output_port & OUTPUT_A20
    }

    fn write_control_a(&mut self, value: u8) -> Option<ResetLine> {
        self.output_port = (self.output_port & !OUTPUT_A20) | (value & OUTPUT_A20);
        (value & CONTROL_A_RESET != 0).then_some(ResetLine)
    }

    fn interrupt(&self) -> bool {
        self.output.is_some_and(|output| output.from != Source::Controller)
            && self.config & CONFIG_INTERRUPT != 0
    }
}

struct I8042Device {
    state: Mutex<Controller>,
    line: IrqLine,
    end: EndSignal,
}

impl Device for I8042Device {
    fn name(&self) -> &str {
        NAME
    }

    fn announce(&self) -> Vec<Announcement> {
        vec![Announcement::I8042]
    }

    fn read(&self, region: usize, _offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.state);
        let value = match region {
            DATA => state.read_data(),
            COMMAND => state.status(),
            CONTROL_A => state.control_a(),
            _ => 0xFF,
        };
        self.line.set(state.interrupt());
        drop(state);
        data.fill(0xFF);
        if let Some(byte) = data.first_mut() {
            *byte = value;
        }
    }

    fn write(&self, region: usize, _offset: u64, data: &[u8]) -> IoFlow {
        let Some(&value) = data.first() else {
            return IoFlow::Continue;
        };
        let mut state = lock(&self.state);
        let reset = match region {
            DATA => state.write_data(value),
            COMMAND => state.command(value),
            CONTROL_A => state.write_control_a(value),
            _ => None,
        };
        self.line.set(state.interrupt());
        drop(state);
        match reset {
            Some(ResetLine) => {
                self.end.raise(GuestEnd::Reset);
                IoFlow::Stop
            }
            None => IoFlow::Continue,
        }
    }

    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn pause(&self) {}

    fn reset(&self) {
        let mut state = lock(&self.state);
        *state = Controller::default();
        self.line.set(state.interrupt());
    }

    fn save(&self) -> Saved {
        FORMAT.save(&*lock(&self.state))
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let loaded: Controller = FORMAT.load(NAME, sections)?;
        if matches!(loaded.expect, Expect::Ram(0x20..)) {
            return Err(FORMAT.malformed(NAME, "the controller's RAM has 32 bytes"));
        }
        if loaded.output_port & OUTPUT_NOT_RESET == 0 {
            return Err(FORMAT.malformed(NAME, "the reset line is held"));
        }
        let mut state = lock(&self.state);
        self.line.restore(loaded.interrupt());
        *state = loaded;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Rig, abuses};

    const DATA: u16 = 0x60;
    const COMMAND: u16 = 0x64;

    fn command(rig: &Rig, command: u8) -> u8 {
        assert_eq!(rig.outb(COMMAND, command), IoFlow::Continue);
        assert_eq!(rig.inb(COMMAND) & 1, 1, "command {command:#x} promises a byte");
        let value = rig.inb(DATA);
        assert_eq!(rig.inb(COMMAND) & 1, 0);
        value
    }

    #[test]
    fn every_way_to_pull_the_reset_line_resets() {
        let ways: [&[(u16, u8)]; 5] = [
            &[(COMMAND, 0xFE)],
            &[(COMMAND, 0xF0)],
            &[(COMMAND, 0xD1), (DATA, 0x02)],
            &[(0x92, 0x01)],
            &[(0x92, 0x03)],
        ];
        for way in ways {
            let rig = Rig::new(I8042::new());
            let flows: Vec<_> = way.iter().map(|&(port, value)| rig.outb(port, value)).collect();
            assert_eq!(flows.last(), Some(&IoFlow::Stop), "{way:x?}");
            assert_eq!(rig.ended(), Some(GuestEnd::Reset));
        }
    }

    #[test]
    fn enabling_a20_by_any_road_resets_nothing() {
        let rig = Rig::new(I8042::new());
        let _ = rig.outb(COMMAND, 0xD1);
        let _ = rig.outb(DATA, 0xDF);
        let _ = rig.outb(COMMAND, 0xFF);
        assert_eq!(command(&rig, 0xD0), 0xDF);
        // What small kernels do: read, set bit 1, write all of it back.
        let value = rig.inb(0x92) | 2;
        assert_eq!(rig.outb(0x92, value), IoFlow::Continue);
        assert_eq!(rig.inb(0x92), 2);
        assert_eq!(rig.ended(), None);
    }

    #[test]
    fn a_probe_meets_no_silence_and_finds_no_auxiliary_device() {
        let rig = Rig::new(I8042::new());
        assert_eq!(rig.inb(COMMAND) & 1, 0, "nothing to flush");
        let config = command(&rig, 0x20);
        assert_eq!(command(&rig, 0x20), config);
        let _ = rig.outb(COMMAND, 0x60);
        let _ = rig.outb(DATA, config & !CONFIG_INTERRUPT | CONFIG_DISABLED);
        assert_eq!(command(&rig, 0x20), config & !CONFIG_INTERRUPT | CONFIG_DISABLED);
        assert_eq!(command(&rig, 0xAA), SELF_TEST_PASSED);
        assert_eq!(command(&rig, 0xAB), 0);
        let _ = rig.outb(COMMAND, 0xD3);
        let _ = rig.outb(DATA, 0x5A);
        assert_eq!(rig.inb(COMMAND) & 0x21, 0x01, "not from an auxiliary device");
        assert_eq!(rig.inb(DATA), 0x5A);
        assert_eq!(command(&rig, 0xA9), LINE_STUCK);
        assert_eq!(rig.rises(1), 0);
    }

    #[test]
    fn every_command_that_promises_a_byte_delivers_it() {
        let rig = Rig::new(I8042::new());
        for asks in (0x20..=0x3F).chain([0xA1, 0xA9, 0xAA, 0xAB, 0xAC, 0xC0, 0xCA, 0xD0, 0xE0]) {
            command(&rig, asks);
        }
        assert_eq!(command(&rig, 0xA4), 0xF1, "no password");
        assert_eq!([0xA1, 0xAC, 0xCA, 0xE0].map(|asks| command(&rig, asks)), [0; 4]);
    }

    #[test]
    fn a_byte_for_the_keyboard_times_out_at_once_with_an_interrupt() {
        let rig = Rig::new(I8042::new());
        let _ = rig.outb(DATA, 0xF2);
        assert!(rig.level(1));
        assert_eq!(rig.inb(COMMAND) & 0x41, 0x41);
        assert_eq!(rig.inb(DATA), KEYBOARD_RESEND);
        assert!(!rig.level(1));
        assert_eq!(rig.inb(COMMAND) & 0x41, 0);
    }

    #[test]
    fn reset_is_power_on() {
        let rig = Rig::new(I8042::new());
        let fresh = rig.sections();
        let _ = rig.outb(DATA, 0xF2);
        let _ = rig.outb(COMMAND, 0xD1);
        rig.device.reset();
        assert!(!rig.level(1));
        assert_eq!(rig.sections(), fresh);
    }

    #[test]
    fn impossible_saved_state_is_refused() {
        let rig = Rig::new(I8042::new());
        for bad in [
            Controller { expect: Expect::Ram(0x20), ..Controller::default() },
            Controller { output_port: OUTPUT_A20, ..Controller::default() },
        ] {
            let Saved::Sections(sections) = FORMAT.save(&bad) else { panic!("not saved") };
            assert!(rig.device.load(&sections).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_access_harms_the_device(accesses in abuses()) {
            let rig = Rig::new(I8042::new());
            rig.abuse(&accesses);
            rig.check_saved_state(&Rig::new(I8042::new()));
        }
    }
}
