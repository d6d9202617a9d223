//! Real-mode guests of a few instructions that do nothing but leave the guest, and their memory.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "benchmarks fail by panicking")]

use vmkit_memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout};

/// `mov dx, 0x300; out dx, al; jmp $-1`.
pub const PORT_WRITE: &[u8] = &[0xBA, 0x00, 0x03, 0xEE, 0xEB, 0xFD];
/// `mov dx, 0x300; in al, dx; jmp $-1`.
pub const PORT_READ: &[u8] = &[0xBA, 0x00, 0x03, 0xEC, 0xEB, 0xFD];
/// `mov ax, 0xD000; mov ds, ax; mov [0], al; jmp`: nothing is mapped at 0xD0000.
pub const MMIO_WRITE: &[u8] = &[0xB8, 0x00, 0xD0, 0x8E, 0xD8, 0xA2, 0x00, 0x00, 0xEB, 0xFB];
/// `mov ax, 0xD000; mov ds, ax; mov al, [0]; jmp`.
pub const MMIO_READ: &[u8] = &[0xB8, 0x00, 0xD0, 0x8E, 0xD8, 0xA0, 0x00, 0x00, 0xEB, 0xFB];
/// Sets the 8259 pair up (vectors 0x20 and 0x28, only input 5 open), then `sti; hlt; jmp`. The handler,
/// `HANDLER_CODE`, writes port 0x300, ends the interrupt and returns.
pub const HALT: &[u8] = &[
    0xB0, 0x11, 0xE6, 0x20, 0xE6, 0xA0, // ICW1
    0xB0, 0x20, 0xE6, 0x21, 0xB0, 0x28, 0xE6, 0xA1, // ICW2
    0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x02, 0xE6, 0xA1, // ICW3
    0xB0, 0x01, 0xE6, 0x21, 0xE6, 0xA1, // ICW4
    0xB0, 0xDF, 0xE6, 0x21, 0xB0, 0xFF, 0xE6, 0xA1, // masks
    0xBA, 0x00, 0x03, // mov dx, 0x300
    0xEE, // out dx, al: ready
    0xFB, 0xF4, 0xEB, 0xFC, // sti; hlt; jmp to sti
];
/// `out dx, al; mov al, 0x20; out 0x20, al; iret`.
const HANDLER_CODE: &[u8] = &[0xEE, 0xB0, 0x20, 0xE6, 0x20, 0xCF];
/// `mov dx, 0x310; mov cx, 1000; out dx, al; loop; mov dx, 0x300; out dx, al; jmp`.
pub const DOORBELL: &[u8] =
    &[0xBA, 0x10, 0x03, 0xB9, 0xE8, 0x03, 0xEE, 0xE2, 0xFD, 0xBA, 0x00, 0x03, 0xEE, 0xEB, 0xF1];

/// The exits that are timed one by one: a name, and the guest that makes one after the other.
pub const EXITS: [(&str, &[u8]); 4] = [
    ("port write", PORT_WRITE),
    ("port read", PORT_READ),
    ("mmio write", MMIO_WRITE),
    ("mmio read", MMIO_READ),
];

/// Port of the exits.
pub const PORT: u16 = 0x300;
/// Where nothing is mapped.
pub const MMIO: u64 = 0xD_0000;
/// The doorbell's port.
pub const BELL: u16 = 0x310;
/// Port writes of [`DOORBELL`] between two exits.
pub const RINGS: u64 = 1000;
/// Where guests start.
pub const START: u64 = 0x1000;
/// The handler of the interrupt.
const HANDLER: u64 = 0x1100;
/// Bytes of memory.
pub const RAM: u64 = 0x8_0000;
/// Input 5 of the 8259 pair.
pub const GSI: u32 = 5;

/// Memory with `guest` in it, and the handler of [`GSI`].
pub fn ram(guest: &[u8]) -> GuestRam {
    let layout = RamLayout::pc(RAM).unwrap();
    let ram = vmkit_memory::allocate(&layout, Backing::Memfd).unwrap();
    ram.write_slice(guest, GuestAddress(START)).unwrap();
    ram.write_slice(HANDLER_CODE, GuestAddress(HANDLER)).unwrap();
    // Interrupt vector 0x25: 0000:1100.
    ram.write_obj(HANDLER as u32, GuestAddress(0x25 * 4)).unwrap();
    ram
}
