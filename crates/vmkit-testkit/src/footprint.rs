//! What this process holds of the host, for tests that nothing stays behind. Tests that use it want a
//! process of their own.

use std::fs;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

/// How long threads and descriptors may take to go: only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
    /// Mappings.
    pub mappings: usize,
    /// Resident memory, in KiB, without that of files: the host takes it back and gives it again.
    pub resident_kib: usize,
}

impl Footprint {
    /// This process's, now.
    ///
    /// # Errors
    /// Where `/proc` is missing or says nothing of it.
    pub fn now() -> io::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let kib = |name: &str| -> Option<usize> {
            let words = status.lines().find_map(|line| line.strip_prefix(name))?;
            words.split_whitespace().next()?.parse().ok()
        };
        let resident = kib("RssAnon:").zip(kib("RssShmem:")).map(|(anon, shared)| anon + shared);
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

    /// What the process holds once it has the [`handles`](Self::handles) of this one, or after a minute
    /// in which it has not: a thread that was joined may be listed for a moment longer.
    ///
    /// # Errors
    /// As [`now`](Self::now).
    pub fn settled(&self) -> io::Result<Self> {
        let began = Instant::now();
        loop {
            let now = Self::now()?;
            if now.handles() == self.handles() || began.elapsed() > PATIENCE {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
