//! The world outside a case's vCPU: records every access, answers reads, ends runs.

use std::collections::VecDeque;

use vmkit_device::IoFlow;

use super::guest::{FAULT_PORT, STOP_PORT};
use crate::VcpuIo;

/// One access: where, how many bytes, and for writes the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Of a port.
    In(u16, usize),
    /// To a port.
    Out(u16, usize, u64),
    /// Of memory.
    Read(u64, usize),
    /// To memory.
    Write(u64, usize, u64),
}

/// Records accesses. Writes to the stop and fault ports end the run and are not in the log.
#[derive(Default)]
pub(super) struct Recorder {
    /// What was accessed, in order.
    pub log: Vec<Access>,
    /// What reads are answered with, in order; after that each byte counts on from one.
    pub answers: VecDeque<u64>,
    /// Every access ends the run.
    pub stop_always: bool,
    /// What the last write to the stop port wrote.
    pub stopped: Option<u64>,
    /// The last run ended in the handler of an exception.
    pub faulted: bool,
    next: u8,
}

impl Recorder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers reads with `answers`.
    pub fn answering(answers: impl IntoIterator<Item = u64>) -> Self {
        Self { answers: answers.into_iter().collect(), ..Self::default() }
    }

    /// The values written to port `port`.
    pub fn written(&self, port: u16) -> Vec<u64> {
        let of = |access: &Access| match *access {
            Access::Out(at, _, value) if at == port => Some(value),
            _ => None,
        };
        self.log.iter().filter_map(of).collect()
    }

    fn answer(&mut self, data: &mut [u8]) {
        if let Some(value) = self.answers.pop_front() {
            for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
            return;
        }
        for byte in data {
            self.next = self.next.wrapping_add(1);
            *byte = self.next;
        }
    }

    fn flow(&self) -> IoFlow {
        if self.stop_always { IoFlow::Stop } else { IoFlow::Continue }
    }
}

fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl VcpuIo for Recorder {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> IoFlow {
        self.log.push(Access::In(port, data.len()));
        self.answer(data);
        self.flow()
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> IoFlow {
        match u32::from(port) {
            STOP_PORT => self.stopped = Some(value(data)),
            FAULT_PORT => self.faulted = true,
            _ => {
                self.log.push(Access::Out(port, data.len(), value(data)));
                return self.flow();
            }
        }
        IoFlow::Stop
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) -> IoFlow {
        self.log.push(Access::Read(address, data.len()));
        self.answer(data);
        self.flow()
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) -> IoFlow {
        self.log.push(Access::Write(address, data.len(), value(data)));
        self.flow()
    }
}
