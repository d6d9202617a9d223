//! What this process holds of the host, for tests that nothing stays behind. Tests that use it want a
//! process of their own.

use std::fs;
use std::io::{self, ErrorKind};

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
    /// Mappings.
    pub mappings: usize,
    /// Resident memory, in KiB.
    pub resident_kib: usize,
}

impl Footprint {
    /// This process's, now.
    ///
    /// # Errors
    /// Where `/proc` is missing or says nothing of it.
    pub fn now() -> io::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|words| words.split_whitespace().next()?.parse().ok());
        Ok(Self {
            threads: fs::read_dir("/proc/self/task")?.count(),
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            mappings: fs::read_to_string("/proc/self/maps")?.lines().count(),
            resident_kib: resident.ok_or(ErrorKind::InvalidData)?,
        })
    }

    /// Threads and open descriptors, which do not change by themselves.
    pub fn handles(&self) -> (usize, usize) {
        (self.threads, self.descriptors)
    }
}
