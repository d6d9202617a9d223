//! The registers of a 16550A (National Semiconductor PC16550D data sheet) without a host around
//! them: bytes in, bytes out, and one interrupt level.
//!
//! Registers, receive FIFO and loopback are vm-superio's. It reports interrupts as edges and lets
//! any read of IIR forget them all, so the level, IIR and FCR are derived here instead: a guest
//! that shares its wire or masks and unmasks interrupts needs the true level.

use std::convert::Infallible;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

const DATA: u8 = 0;
const IER: u8 = 1;
/// Interrupt identification when read, FIFO control when written.
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_MASK: u8 = 0x0F;
const IIR_NOTHING: u8 = 0x01;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFOS_ON: u8 = 0xC0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// FIFO enable, DMA mode and trigger level; the two clear bits clear themselves.
const FCR_MASK: u8 = 0xC9;
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1F;
const LSR_READY: u8 = 1 << 0;
const LSR_TRANSMIT_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD: a terminal is there.
const MSR_CONNECTED: u8 = 0xB0;

/// Depth of a 16550A's receive FIFO (what the host feeds; loopback may use all of vm-superio's).
const FIFO: usize = 16;
/// Depth of vm-superio's.
const FIFO_MAX: usize = 64;

/// The transmitter: holds the byte just sent.
struct Transmitter(Option<u8>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = bytes.last().copied();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// vm-superio's edges, unused.
struct NoTrigger;

impl Trigger for NoTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A UART's state as saved: format version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UartState {
    divisor: u16,
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    transmit_empty_pending: bool,
    received: Vec<u8>,
}

/// The register file.
pub(super) struct Uart {
    registers: Serial<NoTrigger, NoEvents, Transmitter>,
    interrupt_enable: u8,
    fifo_control: u8,
    /// The transmitter ran empty and the guest has not been told through IIR.
    transmit_empty: bool,
    poll: Poll,
}

/// Whether a guest that uses no receive interrupt asks for input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Poll {
    No,
    /// It read LSR once, which drivers also do to start up and to transmit.
    Once,
    /// And again: it waits for a byte.
    Waiting,
}

impl Uart {
    pub(super) fn new() -> Self {
        Self {
            registers: Serial::new(NoTrigger, Transmitter(None)),
            interrupt_enable: 0,
            fifo_control: 0,
            transmit_empty: false,
            poll: Poll::No,
        }
    }

    /// Writes a register (0 to 7). Returns the byte this put on the line, if any.
    pub(super) fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        self.poll = Poll::No;
        let divisor = self.line_control() & LCR_DIVISOR != 0;
        let value = match register {
            IIR_FCR => {
                self.write_fifo_control(value);
                return None;
            }
            IER if !divisor => {
                let enabled = value & !self.interrupt_enable;
                self.interrupt_enable = value & IER_MASK;
                // The transmitter is always empty: being told so is due as soon as it is wanted.
                self.transmit_empty |= enabled & IER_TRANSMIT_EMPTY != 0;
                value
            }
            MCR => value & MCR_MASK,
            _ => value,
        };
        // Neither the transmitter nor the trigger can fail.
        let _ = self.registers.write(register, value);
        let sent = self.registers.writer_mut().0.take();
        if register == DATA && !divisor {
            self.transmit_empty = true;
        }
        sent
    }

    /// Reads a register (0 to 7).
    pub(super) fn read(&mut self, register: u8) -> u8 {
        self.poll = match (register, self.poll) {
            (LSR, Poll::No) => Poll::Once,
            (LSR, _) => Poll::Waiting,
            (DATA, poll) => poll,
            _ => Poll::No,
        };
        if register == IIR_FCR {
            return self.identify_interrupt();
        }
        self.registers.read(register)
    }

    fn write_fifo_control(&mut self, value: u8) {
        let toggled = (self.fifo_control ^ value) & FCR_ENABLE != 0;
        // The other bits count only while the FIFOs are on; turning them on or off clears them.
        self.fifo_control = if value & FCR_ENABLE != 0 { value & FCR_MASK } else { 0 };
        if toggled || value & FCR_CLEAR_RECEIVER != 0 {
            let line_control = self.line_control();
            let _ = self.registers.write(LCR, line_control & !LCR_DIVISOR);
            while self.received() > 0 {
                self.registers.read(DATA);
            }
            let _ = self.registers.write(LCR, line_control);
        }
    }

    fn identify_interrupt(&mut self) -> u8 {
        let source = if self.receive_interrupt() {
            IIR_RECEIVED
        } else if self.transmit_interrupt() {
            // Only the read that reports the transmitter acknowledges it.
            self.transmit_empty = false;
            IIR_TRANSMIT_EMPTY
        } else {
            IIR_NOTHING
        };
        if self.fifo_control & FCR_ENABLE != 0 { source | IIR_FIFOS_ON } else { source }
    }

    fn receive_interrupt(&self) -> bool {
        self.interrupt_enable & IER_RECEIVED != 0 && self.received() > 0
    }

    fn transmit_interrupt(&self) -> bool {
        self.interrupt_enable & IER_TRANSMIT_EMPTY != 0 && self.transmit_empty
    }

    /// The level of the interrupt output. Not gated by MCR's OUT2, as in other virtual machines:
    /// small kernels forget to set it.
    pub(super) fn interrupt(&self) -> bool {
        self.receive_interrupt() || self.transmit_interrupt()
    }

    fn line_control(&mut self) -> u8 {
        self.registers.read(LCR)
    }

    fn received(&self) -> usize {
        FIFO_MAX - self.registers.fifo_capacity()
    }

    /// How many bytes the guest would take now.
    ///
    /// None before it listens: drivers empty the FIFO while they start up, which would cost the
    /// first bytes of piped input. A guest listens that has enabled the receive interrupt, or
    /// that reads LSR time and again.
    pub(super) fn room(&mut self) -> usize {
        if self.registers.read(MCR) & MCR_LOOP != 0 {
            return 0;
        }
        let depth = match (self.interrupt_enable & IER_RECEIVED != 0, self.poll) {
            (true, _) if self.fifo_control & FCR_ENABLE != 0 => FIFO,
            (true, _) | (_, Poll::Waiting) => 1,
            _ => 0,
        };
        depth.saturating_sub(self.received())
    }

    /// Receives bytes from the line; those beyond [`room`](Self::room) are lost.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        let _ = self.registers.enqueue_raw_bytes(bytes);
    }

    pub(super) fn save(&self) -> UartState {
        let state = self.registers.state();
        UartState {
            divisor: u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]),
            interrupt_enable: self.interrupt_enable,
            fifo_control: self.fifo_control,
            line_control: state.line_control,
            modem_control: state.modem_control,
            scratch: state.scratch,
            transmit_empty_pending: self.transmit_empty,
            received: state.in_buffer,
        }
    }

    /// A UART in the saved state, or what is wrong with it.
    pub(super) fn load(state: UartState) -> Result<Self, &'static str> {
        if state.interrupt_enable & !IER_MASK != 0
            || state.modem_control & !MCR_MASK != 0
            || state.fifo_control & !FCR_MASK != 0
            || (state.fifo_control != 0 && state.fifo_control & FCR_ENABLE == 0)
        {
            return Err("a register has bits that do not exist");
        }
        if state.received.len() > FIFO_MAX {
            return Err("the receive FIFO is longer than it can be");
        }
        let [baud_divisor_low, baud_divisor_high] = state.divisor.to_le_bytes();
        let ready = if state.received.is_empty() { 0 } else { LSR_READY };
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: IIR_NOTHING,
            line_control: state.line_control,
            line_status: LSR_TRANSMIT_EMPTY | ready,
            modem_control: state.modem_control,
            modem_status: MSR_CONNECTED,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let registers = Serial::from_state(&registers, NoTrigger, NoEvents, Transmitter(None))
            .map_err(|_| "the receive FIFO is longer than it can be")?;
        Ok(Self {
            registers,
            interrupt_enable: state.interrupt_enable,
            fifo_control: state.fifo_control,
            transmit_empty: state.transmit_empty_pending,
            poll: Poll::No,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn listening() -> Uart {
        let mut uart = Uart::new();
        uart.write(IIR_FCR, 0x07);
        uart.write(IER, IER_RECEIVED);
        uart
    }

    #[test]
    fn received_data_holds_the_level_until_it_is_read_whatever_iir_is_asked() {
        let mut uart = listening();
        assert!(!uart.interrupt());
        uart.receive(b"ab");
        for _ in 0..3 {
            assert!(uart.interrupt());
            assert_eq!(uart.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS_ON);
        }
        assert_eq!(uart.read(DATA), b'a');
        assert!(uart.interrupt());
        assert_eq!(uart.read(DATA), b'b');
        assert!(!uart.interrupt());
        assert_eq!(uart.read(IIR_FCR), IIR_NOTHING | IIR_FIFOS_ON);
    }

    #[test]
    fn an_empty_transmitter_is_reported_once_per_byte_and_when_first_asked_for() {
        let mut uart = Uart::new();
        assert_eq!(uart.write(DATA, b'x'), Some(b'x'));
        assert!(!uart.interrupt());
        uart.write(IER, IER_TRANSMIT_EMPTY);
        assert!(uart.interrupt());
        assert_eq!(uart.read(IIR_FCR), IIR_TRANSMIT_EMPTY);
        assert!(!uart.interrupt());
        uart.write(IER, IER_TRANSMIT_EMPTY);
        assert!(!uart.interrupt(), "writing the same enables asks for nothing new");
        uart.write(DATA, b'y');
        assert!(uart.interrupt());
        uart.write(IER, 0);
        assert!(!uart.interrupt());
    }

    #[test]
    fn received_data_comes_before_the_transmitter_and_does_not_hide_it() {
        let mut uart = listening();
        uart.write(IER, IER_RECEIVED | IER_TRANSMIT_EMPTY);
        uart.receive(b"k");
        assert_eq!(uart.read(IIR_FCR) & 0x0F, IIR_RECEIVED);
        uart.read(DATA);
        assert!(uart.interrupt());
        assert_eq!(uart.read(IIR_FCR) & 0x0F, IIR_TRANSMIT_EMPTY);
        assert!(!uart.interrupt());
    }

    #[test]
    fn masking_and_unmasking_keeps_received_data_pending() {
        let mut uart = listening();
        uart.receive(b"k");
        uart.write(IER, 0);
        assert!(!uart.interrupt());
        uart.write(IER, IER_RECEIVED);
        assert!(uart.interrupt());
    }

    #[test]
    fn clearing_the_fifo_works_while_the_divisor_is_mapped() {
        let mut uart = listening();
        uart.receive(b"abc");
        uart.write(LCR, 0x83);
        uart.write(DATA, 0x34);
        uart.write(IER, 0x12);
        uart.write(IIR_FCR, 0x03);
        assert_eq!((uart.read(DATA), uart.read(IER), uart.read(LCR)), (0x34, 0x12, 0x83));
        uart.write(LCR, 0x03);
        assert_eq!(uart.read(LSR) & LSR_READY, 0);
        assert_eq!(uart.read(IER), IER_RECEIVED);
        assert!(!uart.interrupt());
    }

    #[test]
    fn the_driver_of_linux_sees_a_16550a() {
        let mut uart = Uart::new();
        uart.write(IER, 0x0F);
        assert_eq!(uart.read(IER), 0x0F);
        uart.write(IER, 0);
        // Loopback: RTS and OUT2 out, DCD and CTS in.
        uart.write(MCR, MCR_LOOP | 0x0A);
        assert_eq!(uart.read(6) & 0xF0, 0x90);
        uart.write(MCR, 0);
        uart.write(IIR_FCR, 0x01);
        assert_eq!(uart.read(IIR_FCR) >> 6, 3, "FIFOs that work");
        uart.write(IIR_FCR, 0x21);
        assert_eq!(uart.read(IIR_FCR) & 0x20, 0, "not a 16750");
        uart.write(IIR_FCR, 0);
        assert_eq!(uart.read(IIR_FCR) >> 6, 0);
        uart.write(IER, 0x40);
        assert_eq!(uart.read(IER), 0, "no XScale unit enable");
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let mut uart = Uart::new();
        assert_eq!(uart.room(), 0);
        // The start-up sequence of a driver: clear, then read everything once.
        uart.write(IIR_FCR, 0x07);
        for register in [LSR, DATA, IIR_FCR, 6] {
            uart.read(register);
            assert_eq!(uart.room(), 0);
        }
        // A polled transmitter.
        for _ in 0..3 {
            uart.read(LSR);
            assert_eq!(uart.room(), 0);
            uart.write(DATA, b'x');
        }
        // A polled receiver.
        uart.read(LSR);
        uart.read(LSR);
        assert_eq!(uart.room(), 1);
        uart.receive(b"a");
        assert_eq!(uart.room(), 0);
        assert_eq!(uart.read(LSR) & LSR_READY, LSR_READY);
        assert_eq!(uart.read(DATA), b'a');
        assert_eq!(uart.room(), 1);
        uart.write(IER, IER_RECEIVED);
        assert_eq!(uart.room(), FIFO);
        uart.write(MCR, MCR_LOOP);
        assert_eq!(uart.room(), 0);
    }

    #[test]
    fn impossible_saved_state_is_refused() {
        let good = listening().save();
        assert!(Uart::load(good.clone()).is_ok());
        let bad = [
            UartState { interrupt_enable: 0x10, ..good.clone() },
            UartState { modem_control: 0x20, ..good.clone() },
            UartState { fifo_control: 0x08, ..good.clone() },
            UartState { received: vec![0; FIFO_MAX + 1], ..good },
        ];
        for state in bad {
            assert!(Uart::load(state.clone()).is_err(), "{state:?}");
        }
    }

    proptest! {
        /// Whatever a guest does: the level is what IIR says, the FIFO stays bounded, and saved
        /// state is the whole state.
        #[test]
        fn the_level_is_what_iir_reports(
            accesses in prop::collection::vec((any::<bool>(), 0_u8..8, any::<u8>()), 0..200),
        ) {
            let mut uart = Uart::new();
            for (write, register, value) in accesses {
                if write {
                    uart.write(register, value);
                } else {
                    uart.read(register);
                }
                let room = uart.room();
                uart.receive(&vec![value; room]);
                prop_assert!(uart.received() <= FIFO_MAX);
                let saved = uart.save();
                let mut copy = Uart::load(saved.clone()).unwrap();
                prop_assert_eq!(copy.save(), saved);
                prop_assert_eq!(copy.interrupt(), uart.interrupt());
                prop_assert_eq!(copy.interrupt(), copy.read(IIR_FCR) & IIR_NOTHING == 0);
            }
        }
    }
}
