//! Kernels into guest memory for vmkit, and the firmware tables a stock kernel needs.
//!
//! A [`Boot`] writes a guest into RAM and says how the boot vCPU starts:
//!
//! | image | type | first instruction |
//! |---|---|---|
//! | bzImage | [`Linux`] | long mode, the kernel already decompressed |
//! | ELF `vmlinux` | [`Linux`] | PVH if the kernel offers it, else long mode |
//! | multiboot 1 | [`Multiboot`] | 32-bit protected mode |
//! | plain ELF | [`Elf`] | by class, or as asked for |
//! | flat binary | [`Flat`] | as asked for |
//!
//! [`detect`] tells them apart. All loaders write ACPI and MP tables ([`write_tables`]) that describe
//! the vCPUs and what devices announced.
//!
//! Images are hostile: whatever is wrong with one is a [`BootError`] that names the file and where
//! in it, and what is read or decompressed has a limit.
//!
//! ```
//! use vmkit_boot::{Boot, BootContext, CpuMode, Flat};
//! use vmkit_memory::{Backing, RamLayout, allocate};
//!
//! let layout = RamLayout::pc(2 << 20)?;
//! let ram = allocate(&layout, Backing::Anonymous)?;
//! let guest = Flat::at(0x10_0000, vec![0xF4]).mode(CpuMode::Long64); // hlt
//! let entry = guest.load(&BootContext::new(&ram, &layout))?;
//! assert_eq!(entry.state.general.rip, 0x10_0000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod acpi;
mod boot;
mod cpu;
mod decompress;
mod detect;
mod e820;
mod elf;
mod error;
mod firmware;
mod flat;
mod image;
mod initramfs;
mod linux;
mod mptable;
mod multiboot;
mod place;
mod plain;

#[cfg(test)]
mod testimage;

pub use boot::{Boot, BootContext, CpuMode, Entry};
pub use detect::{ImageKind, detect};
pub use e820::{MapRange, RangeKind, memory_map};
pub use error::BootError;
pub use firmware::{TablesPlaced, write_tables};
pub use flat::Flat;
pub use initramfs::Initramfs;
pub use linux::{Linux, extract_vmlinux};
pub use multiboot::Multiboot;
pub use plain::Elf;
