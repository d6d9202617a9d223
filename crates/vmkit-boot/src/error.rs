//! What can go wrong between an image and the first instruction.

use std::io;

use thiserror::Error;
use vmkit_memory::GuestMemoryError;

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file could not be read.
    #[error("{image}: {source}")]
    Read {
        /// The file.
        image: String,
        /// What the host said.
        source: io::Error,
    },
    /// The file is larger than any image this crate would load.
    #[error("{image}: larger than the {limit} bytes an image may have")]
    TooLarge {
        /// The file.
        image: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The file ends before something its own headers announce.
    #[error(
        "{image}: truncated: {what} takes {len:#x} bytes at offset {offset:#x}, the file has {has:#x}"
    )]
    Truncated {
        /// The file.
        image: String,
        /// What is missing.
        what: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// How long it is, in bytes.
        len: u64,
        /// Length of the file, in bytes.
        has: u64,
    },
    /// The file is not of the format it was loaded as.
    #[error("{image}: not a {format}: {reason} (offset {offset:#x})")]
    Format {
        /// The file.
        image: String,
        /// The format.
        format: &'static str,
        /// Where in the file the difference shows.
        offset: u64,
        /// What was expected there.
        reason: &'static str,
    },
    /// A header contradicts itself.
    #[error("{image}: malformed at offset {offset:#x}: {reason}")]
    Malformed {
        /// The file.
        image: String,
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The image is well-formed, but nothing here can run it.
    #[error("{image}: unsupported: {what}")]
    Unsupported {
        /// The file.
        image: String,
        /// What is not supported.
        what: String,
    },
    /// The compressed kernel inside a bzImage does not decompress.
    #[error("{image}: the {method} payload at offset {offset:#x} is corrupt: {reason}")]
    Decompress {
        /// The file.
        image: String,
        /// The compression, by its usual name.
        method: &'static str,
        /// Where the payload starts in the file.
        offset: u64,
        /// What the decoder said.
        reason: String,
    },
    /// The machine has too little RAM.
    #[error(
        "{image}: {what} needs {} MiB of RAM, the machine has {} MiB",
        mib_up(*needs),
        has >> 20
    )]
    NotEnoughRam {
        /// The file.
        image: String,
        /// What needs it.
        what: &'static str,
        /// Bytes of RAM with which it would fit.
        needs: u64,
        /// Bytes of RAM of the machine.
        has: u64,
    },
    /// Something would lie where there is no RAM, or where something else lies already.
    #[error("{image}: {what} at {start:#x} of {len:#x} bytes {reason}")]
    Placement {
        /// The file.
        image: String,
        /// What is to be placed.
        what: &'static str,
        /// First guest-physical address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// What is in the way.
        reason: &'static str,
    },
    /// The command line is too long for the kernel, or holds a NUL.
    #[error("{image}: command line of {len} bytes: {reason} (the limit is {max})")]
    CommandLine {
        /// The kernel's file.
        image: String,
        /// Length of the command line, in bytes.
        len: usize,
        /// Longest command line the kernel takes, in bytes.
        max: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More vCPUs than any table could describe.
    #[error("firmware tables: {vcpus} vCPUs, there may be at most {max}")]
    Vcpus {
        /// How many there are.
        vcpus: u32,
        /// How many there may be.
        max: u32,
    },
    /// More vCPUs or devices than the firmware tables have room for.
    #[error("firmware tables: {what} take {len:#x} bytes, there is room for {room:#x}")]
    Tables {
        /// Which tables.
        what: &'static str,
        /// Their length, in bytes.
        len: u64,
        /// The room there is, in bytes.
        room: u64,
    },
    /// Guest memory refused a write inside the machine's own layout.
    #[error("guest memory at {address:#x}: {source}")]
    Memory {
        /// Guest-physical address of the write.
        address: u64,
        /// What the memory said.
        source: GuestMemoryError,
    },
}

fn mib_up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
