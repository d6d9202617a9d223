//! What a device wants the guest's firmware tables to say of it.

/// A device that cannot be found by probing. The boot crate turns these into ACPI objects and, where
/// the kernel wants that, command-line words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Announcement {
    /// A 16550 UART (ACPI `PNP0501`).
    Serial {
        /// First of its eight ports.
        port: u16,
        /// Its interrupt.
        gsi: u32,
    },
    /// A PC real-time clock (ACPI `PNP0B00`).
    Rtc {
        /// Its index port; the data port follows.
        port: u16,
        /// Its interrupt.
        gsi: u32,
    },
    /// An i8042 keyboard controller (ACPI `PNP0303`), with nothing attached but the reset line.
    I8042,
    /// The ACPI PM timer, a free-running 24- or 32-bit counter at 3.579545 MHz (ACPI 6.5 §4.8.2.1).
    PmTimer {
        /// Its port.
        port: u16,
        /// True if it has 32 bits.
        wide: bool,
    },
    /// The PM1a event block (ACPI 6.5 §4.8.3.1): status then enable, 2 bytes each.
    PmEvent {
        /// First port of the block.
        port: u16,
        /// The SCI's interrupt.
        gsi: u32,
    },
    /// The PM1a control register (ACPI 6.5 §4.8.3.2); S5 is entered by sleep type `s5`.
    PmControl {
        /// Its port.
        port: u16,
        /// SLP_TYP value of S5 (soft off).
        s5: u8,
    },
    /// The ACPI reset register (ACPI 6.5 §4.8.3.6), a port.
    ResetPort {
        /// Its port.
        port: u16,
        /// The value that resets.
        value: u8,
    },
    /// pvpanic (ACPI `QEMU0001`): the guest writes an event mask to the port.
    PvPanic {
        /// Its port.
        port: u16,
    },
    /// A virtio-mmio transport (ACPI `LNRO0005`; command line `virtio_mmio.device=`).
    VirtioMmio {
        /// First guest-physical address of its registers.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// Its interrupt.
        gsi: u32,
    },
    /// A PCI host bridge with one segment and bus (ACPI `PNP0A08`, `MCFG`).
    PciHost {
        /// Guest-physical base of the ECAM window.
        ecam: u64,
        /// Buses in the ECAM window, each 1 MiB.
        buses: u8,
        /// 32-bit MMIO window for BARs: first address and length in bytes.
        mmio32: (u64, u64),
        /// 64-bit MMIO window for BARs: first address and length in bytes.
        mmio64: (u64, u64),
        /// I/O port window for BARs: first port and length.
        io: (u16, u16),
        /// The GSIs of INTA..INTD; device n's pin p uses `(n + p) % 4`.
        intx: [u32; 4],
    },
}
