//! Privileged behaviour from the guest's side: small programs, with a handler for every vector that
//! halts, and one look at what it found.

mod legacy;
mod long;

use vmkit_device::memory::{Bytes, GuestAddress};

use super::Taken;
use crate::cpu::{Cpu, TrapKind};
use crate::testing::{Bench, Silence};

const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
/// The handler of vector `v` is at `HANDLERS + 16 * v`.
const HANDLERS: u64 = 0x6000;
const TSS: u64 = 0x7000;
const CODE: u64 = 0x8000;
const USER_CODE: u64 = 0x9000;

const HLT: u8 = 0xF4;

/// What a handler found.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    vector: u64,
    error: Option<u64>,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl Bench {
    fn put(&mut self, at: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn put32(&mut self, at: u64, value: u32) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn get32(&self, at: u64) -> u32 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// Runs until HLT, a callback's stop, or shutdown; false at shutdown.
    fn run(&mut self) -> bool {
        let cpu: &mut Cpu = &mut self.cpu;
        cpu.halted = false;
        cpu.lend_io(&mut Silence);
        let mut alive = true;
        while alive && !cpu.halted && !cpu.stop {
            cpu.shared.begin_looking(cpu.instructions + 100_000);
            cpu.execute();
            if cpu.trap != TrapKind::None {
                alive = cpu.take_trap() == Taken::Go;
            }
        }
        cpu.return_io();
        alive
    }

    /// Runs into a handler; returns its vector, and whether that one pushes an error code.
    fn run_to_handler(&mut self) -> (u64, bool) {
        assert!(self.run(), "shut down at {:#x}", self.cpu.rip);
        let rip = self.cpu.rip;
        assert!((HANDLERS..HANDLERS + 0x1000).contains(&rip), "halted at {rip:#x}");
        let vector = (rip - HANDLERS) / 16;
        (vector, matches!(vector, 8 | 10..=14 | 17))
    }
}
