//! From standard input to the guest's serial port, with a way out: Ctrl-A x ends the machine.

use std::io::{ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmkit::device::thread_builder;
use vmkit::{SerialInput, VmHandle};

use crate::Failure;

const CTRL_A: u8 = 0x01;
const CTRL_D: u8 = 0x04;
/// Between two looks at a guest that does not read yet.
const PATIENCE: Duration = Duration::from_millis(10);

/// What the keyboard thread has to tell.
#[derive(Clone, Debug, Default)]
pub struct Keyboard {
    nothing_came: Arc<AtomicBool>,
    quit: Arc<AtomicBool>,
}

impl Keyboard {
    /// Standard input ended before it gave a single byte.
    pub fn nothing_came(&self) -> bool {
        self.nothing_came.load(Ordering::Acquire)
    }

    /// Ctrl-A x was typed.
    pub fn quit(&self) -> bool {
        self.quit.load(Ordering::Acquire)
    }
}

/// What a byte typed means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    /// It goes to the guest.
    Guest(u8),
    /// It is the first half of an escape.
    Pending,
    /// End the machine.
    Quit,
    /// Say what the escapes are.
    Help,
}

/// The escapes of QEMU's terminal: Ctrl-A x, Ctrl-A h, Ctrl-A Ctrl-A.
#[derive(Debug, Default)]
struct Escapes {
    armed: bool,
}

impl Escapes {
    fn take(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.armed) {
            self.armed = byte == CTRL_A;
            return if self.armed { Key::Pending } else { Key::Guest(byte) };
        }
        match byte {
            b'x' | b'X' => Key::Quit,
            b'h' | b'?' => Key::Help,
            b'a' => Key::Guest(CTRL_A),
            other => Key::Guest(other),
        }
    }
}

/// Reads standard input on a thread of its own and types it into `serial`. On a terminal, Ctrl-A
/// is an escape. Input from elsewhere waits until the guest is `ready` to read it, and its end is
/// typed as Ctrl-D; if nothing came before the end, the machine is stopped, because nobody could
/// type at its shell.
///
/// # Errors
/// If the host refuses the thread.
pub fn attach(
    serial: SerialInput,
    vm: VmHandle,
    is_terminal: bool,
    ready: impl Fn() -> bool + Send + 'static,
) -> Result<Keyboard, Failure> {
    let keyboard = Keyboard::default();
    let told = keyboard.clone();
    let typist = Typist { serial, vm };
    let body = move || {
        if is_terminal { typist.terminal(&told) } else { typist.stream(&told, ready) }
    };
    thread_builder("keyboard").spawn(body).map_err(Failure::host("keyboard thread"))?;
    Ok(keyboard)
}

/// Who types into the guest's serial port.
struct Typist {
    serial: SerialInput,
    vm: VmHandle,
}

impl Typist {
    fn terminal(&self, told: &Keyboard) {
        let mut escapes = Escapes::default();
        let mut buffer = [0; 4096];
        while let Some(bytes) = read(&mut buffer) {
            for &byte in bytes {
                match escapes.take(byte) {
                    Key::Guest(byte) => self.type_all(&[byte]),
                    Key::Pending => {}
                    Key::Help => eprint!("\r\nCtrl-A x: end the machine; Ctrl-A a: Ctrl-A\r\n"),
                    Key::Quit => {
                        told.quit.store(true, Ordering::Release);
                        self.vm.stop();
                        return;
                    }
                }
            }
        }
        // The terminal is gone.
        self.vm.stop();
    }

    fn stream(&self, told: &Keyboard, ready: impl Fn() -> bool) {
        let mut buffer = [0; 4096];
        let mut last = None;
        while let Some(bytes) = read(&mut buffer) {
            while !ready() && !self.vm.has_ended() {
                std::thread::sleep(PATIENCE);
            }
            self.type_all(bytes);
            last = bytes.last().copied();
        }
        match last {
            None => {
                told.nothing_came.store(true, Ordering::Release);
                self.vm.stop();
            }
            // A line editor takes Ctrl-D for the end on an empty line only.
            Some(b'\n') => self.type_all(&[CTRL_D]),
            Some(_) => self.type_all(&[b'\n', CTRL_D]),
        }
    }

    /// Types `bytes`, waiting for the guest where its queue is full.
    fn type_all(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.vm.has_ended() {
            let taken = self.serial.push(bytes);
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                std::thread::sleep(PATIENCE);
            }
        }
    }
}

/// What standard input has next; none at its end.
fn read(buffer: &mut [u8]) -> Option<&[u8]> {
    loop {
        match std::io::stdin().lock().read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return None,
            Ok(count) => return Some(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_escape_itself_is_kept_from_the_guest() {
        let mut escapes = Escapes::default();
        let keys: Vec<Key> =
            b"l\x03\x01\x01\x01a\x01x".iter().map(|&byte| escapes.take(byte)).collect();
        assert_eq!(
            keys,
            [
                Key::Guest(b'l'),
                Key::Guest(0x03),
                Key::Pending,
                Key::Guest(CTRL_A),
                Key::Pending,
                Key::Guest(CTRL_A),
                Key::Pending,
                Key::Quit,
            ]
        );
    }
}
