//! What the host learns from a Linux guest's serial ports: that `/init` runs, the status of its
//! command, and that the kernel panicked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

const PANIC: &[u8] = b"Kernel panic - not syncing";

/// What was learnt so far; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Console(Arc<Mutex<Learnt>>);

#[derive(Debug, Default)]
struct Learnt {
    panicked: Option<Instant>,
    init: Option<Instant>,
    status: Option<u8>,
    from_init: bool,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, Learnt> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the kernel said that it panicked.
    pub fn panicked(&self) -> Option<Instant> {
        self.lock().panicked
    }

    /// When `/init` said that it runs.
    pub fn init(&self) -> Option<Instant> {
        self.lock().init
    }

    /// The exit status that `/init` reported.
    pub fn status(&self) -> Option<u8> {
        self.lock().status
    }

    /// True if it was `/init` that reported a status: it ran the command itself.
    pub fn init_ran_it(&self) -> bool {
        self.lock().from_init
    }

    /// Takes note of the exit status, heard in another way.
    pub fn learn_status(&self, status: u8) {
        self.lock().status = Some(status);
    }

    /// A watcher for the console: looks for the kernel's last words.
    pub fn watch_kernel(&self) -> impl FnMut(&[u8]) + Send + use<> {
        let console = self.clone();
        let mut matched = 0;
        move |bytes| {
            for &byte in bytes {
                matched = match PANIC.get(matched) {
                    Some(&next) if next == byte => matched + 1,
                    _ => usize::from(byte == PANIC[0]),
                };
                if matched == PANIC.len() {
                    matched = 0;
                    console.lock().panicked.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    /// A watcher for the second port: reads the reports of [`initramfs`](crate::initramfs).
    pub fn watch_init(&self) -> impl FnMut(&[u8]) + Send + use<> {
        let console = self.clone();
        let mut line = Vec::new();
        move |bytes| {
            for &byte in bytes {
                if byte != b'\n' {
                    // Longer lines are not ours; do not let a guest fill memory.
                    if line.len() < 80 {
                        line.push(byte);
                    }
                    continue;
                }
                let text = String::from_utf8_lossy(&line);
                let text = text.trim();
                if text == "init" {
                    console.lock().init.get_or_insert_with(Instant::now);
                } else if let Some(status) = text.strip_prefix("exit ") {
                    let mut learnt = console.lock();
                    learnt.status = status.parse().ok();
                    learnt.from_init = true;
                }
                line.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read_whatever_the_pieces() {
        let console = Console::default();
        let mut watch = console.watch_init();
        watch(b"in");
        assert!(console.init().is_none());
        watch(b"it\r\nexi");
        watch(b"t 7\n");
        assert!(console.init().is_some());
        assert_eq!(console.status(), Some(7));
        assert!(console.init_ran_it());
    }

    #[test]
    fn a_status_from_elsewhere_is_not_inits() {
        let console = Console::default();
        console.learn_status(7);
        assert_eq!((console.status(), console.init_ran_it()), (Some(7), false));
    }

    #[test]
    fn a_panic_is_recognised_across_pieces() {
        let console = Console::default();
        let mut watch = console.watch_kernel();
        watch(b"[    1.2] Kernel pKernel panic - not ");
        assert!(console.panicked().is_none());
        watch(b"syncing: VFS");
        assert!(console.panicked().is_some());
    }
}
