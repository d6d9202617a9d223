//! The guest around the instruction under test: page tables, descriptor tables and exception stubs,
//! as bytes for guest-physical memory.
//!
//! Ring 3 sees the data and code pages exactly as the host process does, at linear addresses that are
//! physical ones. Everything of ring 0 is 64 KiB of physical memory from 0, mapped in the upper half
//! as a kernel's is.

use super::super::layout::{CODE, CODE_LEN, DATA, DATA_LEN, PAGE, READ_ONLY};

/// Bytes of the supervisor's memory, from physical address 0.
pub(super) const LOW_LEN: u64 = 0x1_0000;
/// Linear address of the supervisor's memory. The names below are physical addresses.
pub(super) const HIGH: u64 = 0xFFFF_8000_0000_0000;
pub(super) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const LOW_TABLE: u64 = 0x4000;
const DATA_TABLE: u64 = 0x5000;
const CODE_TABLE: u64 = 0x6000;
const HIGH_PDPT: u64 = 0xC000;
const HIGH_DIRECTORY: u64 = 0xD000;
pub(super) const GDT: u64 = 0x7000;
/// Sixteen entries, as Linux has.
pub(super) const GDT_LIMIT: u16 = 16 * 8 - 1;
pub(super) const TSS: u64 = 0x7800;
/// A TSS without an I/O permission map.
pub(super) const TSS_LIMIT: u32 = 0x67;
pub(super) const TSS_SELECTOR: u16 = 0x40;
pub(super) const IDT: u64 = 0x8000;
pub(super) const IDT_LIMIT: u16 = VECTORS * 16 - 1;
const VECTORS: u16 = 32;
/// The stub of vector v is at `HIGH + STUBS + v * STUB_LEN`.
pub(super) const STUBS: u64 = 0x9000;
pub(super) const STUB_LEN: u64 = 16;
/// Top of the ring-0 stack.
pub(super) const STACK_TOP: u64 = 0xB000;
/// The port a stub writes to.
pub(super) const PORT: u16 = 0xF4;
/// Kernel code selector, as on Linux.
pub(super) const KERNEL_CS: u16 = 0x10;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Accessed and dirty, so that no walk writes to the tables.
const USED: u64 = 1 << 5 | 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn entry(&mut self, table: u64, index: u64, value: u64) {
        self.put(table + index % 512 * 8, &value.to_le_bytes());
    }

    fn pages(&mut self, table: u64, at: u64, len: u64, rights: u64) {
        for page in at / PAGE..(at + len) / PAGE {
            self.entry(table, page, (page * PAGE) | rights | PRESENT | USED);
        }
    }
}

/// The supervisor's memory.
pub(super) fn low_memory() -> Vec<u8> {
    let mut image = Image(vec![0; LOW_LEN as usize]);
    let open = PRESENT | WRITE | USER | USED;
    image.entry(PML4, 0, PDPT | open);
    image.entry(PDPT, 0, DIRECTORY | open);
    image.entry(DIRECTORY, DATA >> 21, DATA_TABLE | open);
    image.entry(DIRECTORY, CODE >> 21, CODE_TABLE | open);
    image.entry(PML4, HIGH >> 39, HIGH_PDPT | open);
    image.entry(HIGH_PDPT, 0, HIGH_DIRECTORY | open);
    image.entry(HIGH_DIRECTORY, 0, LOW_TABLE | open);
    image.pages(LOW_TABLE, 0, LOW_LEN, WRITE);
    image.pages(DATA_TABLE, DATA, DATA_LEN, WRITE | USER | NO_EXECUTE);
    image.pages(DATA_TABLE, READ_ONLY, PAGE, USER | NO_EXECUTE);
    image.pages(CODE_TABLE, CODE, CODE_LEN, USER);
    descriptors(&mut image);
    for vector in 0..u64::from(VECTORS) {
        // INT3 and INTO are for everyone, as on Linux.
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let stub = STUBS + vector * STUB_LEN;
        // A 64-bit interrupt gate (Intel SDM vol. 3A §7.14.1); stubs lie in the first 64 KiB.
        let gate = stub | u64::from(KERNEL_CS) << 16 | (0x8E | dpl << 5) << 40;
        image.put(IDT + vector * 16, &gate.to_le_bytes());
        image.put(IDT + vector * 16 + 8, &(HIGH >> 32).to_le_bytes());
        // out PORT, al; hlt
        image.put(stub, &[0xE6, PORT as u8, 0xF4]);
    }
    image.0
}

/// A GDT with the user-visible selectors of 64-bit Linux (arch/x86/include/asm/segment.h lists them).
fn descriptors(image: &mut Image) {
    let flat = |access: u64, flags: u64| 0x000F_0000_0000_FFFF | access << 40 | flags << 52;
    // The upper half of its base is in the entry behind it.
    let tss = u64::from(TSS_LIMIT) | TSS << 16 | 0x8B << 40 | (HIGH >> 24 & 0xFF) << 56;
    let entries = [
        (1, flat(0x9B, 0xC)), // 32-bit kernel code
        (2, flat(0x9B, 0xA)), // kernel code
        (3, flat(0x93, 0xC)), // kernel data
        (4, flat(0xFB, 0xC)), // 32-bit user code
        (5, flat(0xF3, 0xC)), // user data
        (6, flat(0xFB, 0xA)), // user code
        (8, tss),
        (9, HIGH >> 32),
    ];
    for (index, descriptor) in entries {
        image.put(GDT + index * 8, &u64::to_le_bytes(descriptor));
    }
    // RSP0 (Intel SDM vol. 3A §9.7), and no I/O permission map.
    image.put(TSS + 4, &(HIGH + STACK_TOP).to_le_bytes());
    image.put(TSS + 102, &(TSS_LIMIT as u16 + 1).to_le_bytes());
}
