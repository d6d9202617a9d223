//! One port: what the host typed and the guest has not read, and where its output goes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::Wake;

/// Most bytes of input that wait for the guest.
const MOST_INPUT: usize = 64 << 10;

/// Control messages the driver has still to be sent about a port, as bits: however often a driver
/// asks, each is owed once.
pub(super) mod owed {
    pub const ADD: u8 = 1;
    pub const CONSOLE: u8 = 2;
    pub const NAME: u8 = 4;
    pub const OPEN: u8 = 8;
    pub const SIZE: u8 = 16;
    pub const ALL: u8 = 31;
}

pub(super) struct Port {
    pub name: String,
    pub is_console: bool,
    pub wake: Wake,
    pub owed: AtomicU8,
    /// A program in the guest has the port open.
    pub open: AtomicBool,
    input: Mutex<VecDeque<u8>>,
    output: Mutex<Box<dyn Write + Send>>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    name: String,
    owed: u8,
    open: bool,
    input: Vec<u8>,
}

impl Port {
    pub(super) fn new(
        name: String,
        is_console: bool,
        output: Box<dyn Write + Send>,
    ) -> io::Result<Self> {
        Ok(Self {
            name,
            is_console,
            wake: Wake::new()?,
            owed: AtomicU8::new(0),
            open: AtomicBool::new(false),
            input: Mutex::default(),
            output: Mutex::new(output),
        })
    }

    pub(super) fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn output(&self) -> MutexGuard<'_, Box<dyn Write + Send>> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver is gone. What was typed waits for the next.
    pub(super) fn reset(&self) {
        self.owed.store(0, Ordering::Release);
        self.open.store(false, Ordering::Release);
    }

    pub(super) fn save(&self) -> PortState {
        PortState {
            name: self.name.clone(),
            owed: self.owed.load(Ordering::Acquire),
            open: self.open.load(Ordering::Acquire),
            input: self.input().iter().copied().collect(),
        }
    }

    pub(super) fn fits(&self, state: &PortState) -> bool {
        state.name == self.name && state.input.len() <= MOST_INPUT && state.owed & !owed::ALL == 0
    }

    pub(super) fn load(&self, state: PortState) {
        self.owed.store(state.owed, Ordering::Release);
        self.open.store(state.open, Ordering::Release);
        *self.input() = state.input.into();
    }
}

/// The host's way to type on a port. Clones type on the same.
#[derive(Clone)]
pub struct PortInput {
    port: Option<Arc<Port>>,
}

impl std::fmt::Debug for PortInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortInput")
            .field("port", &self.port.as_ref().map(|port| &port.name))
            .finish_non_exhaustive()
    }
}

impl PortInput {
    pub(super) fn new(port: Option<Arc<Port>>) -> Self {
        Self { port }
    }

    /// Has the guest read `bytes`. Returns how many were taken: no more than 64 KiB wait for a
    /// guest that does not read.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let Some(port) = &self.port else { return 0 };
        let mut input = port.input();
        let room = MOST_INPUT.saturating_sub(input.len()).min(bytes.len());
        input.extend(bytes.iter().take(room));
        drop(input);
        port.wake.wake();
        room
    }

    /// True if a program in the guest has the port open; always false for the console itself.
    pub fn is_open(&self) -> bool {
        self.port.as_ref().is_some_and(|port| port.open.load(Ordering::Acquire))
    }
}

/// Writes what there is room for; `WouldBlock` if there is none.
impl Write for PortInput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.send(bytes) {
            0 if !bytes.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
