//! Files of a guest that is this host.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use common::{guest, noise};
use vmkit_guest::GuestError;
use vmkit_guest::protocol::Step;

fn place(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let path = path.join(format!("guest-file-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

#[test]
fn megabytes_go_in_and_come_out_as_they_were() {
    let (_agent, guest) = guest();
    let path = place("large");
    let bytes = noise(9_000_001);
    assert_eq!(guest.copy_in(&*bytes, &path, 0o751).unwrap(), 9_000_001);
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o751);
    assert!(guest.read(&path).unwrap() == bytes);
    // A program that was copied in runs.
    let sum = guest.exec("sha256sum").arg(&path).output().unwrap().stdout;
    let here = std::process::Command::new("sha256sum").arg(&path).output().unwrap().stdout;
    assert_eq!(sum, here);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_file_is_replaced_and_may_be_empty() {
    let (_agent, guest) = guest();
    let path = place("replaced");
    guest.write(&path, "a long text").unwrap();
    guest.write(&path, "").unwrap();
    assert_eq!(guest.read(&path).unwrap(), b"");
    assert_eq!(guest.read("/proc/sys/kernel/ostype").unwrap(), b"Linux\n");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn the_guests_refusals_are_told() {
    let (_agent, guest) = guest();
    let refused = |outcome: Result<(), GuestError>| match outcome {
        Err(GuestError::Refused { step, source, what }) => {
            assert!(!what.is_empty());
            (step, source.raw_os_error())
        }
        other => panic!("{other:?}"),
    };
    let read = |path: &str| refused(guest.read(path).map(drop));
    assert_eq!(read("/nowhere"), (Step::Open, Some(2)));
    assert_eq!(read("/etc"), (Step::Open, Some(21)));
    assert_eq!(refused(guest.write("/etc", "x")), (Step::Open, Some(21)));
    // A device that is always full, met in the middle.
    assert_eq!(refused(guest.write("/dev/full", noise(1 << 20))), (Step::Transfer, Some(28)));
    assert!(matches!(guest.read(""), Err(GuestError::InvalidString(_))));
    // Nothing of this disturbed the connection.
    assert!(guest.exec("true").status().unwrap().success());
}

#[test]
fn a_copy_that_fails_here_is_given_up_there() {
    struct Breaks(usize);
    impl io::Read for Breaks {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.0 -= 1;
            Ok(into.len())
        }
    }
    let (_agent, guest) = guest();
    let path = place("broken");
    for _ in 0..200 {
        let outcome = guest.copy_in(Breaks(2), &path, 0o600);
        assert!(matches!(outcome, Err(GuestError::Host(_))), "{outcome:?}");
        // The one that does not end.
        let outcome = guest.copy_out("/dev/zero", &mut [0; 100_000][..]);
        assert!(matches!(outcome, Err(GuestError::Host(_))), "{outcome:?}");
    }
    // None of them is left.
    assert!(guest.exec("true").status().unwrap().success());
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_file_without_end_is_too_much() {
    let (_agent, guest) = guest();
    assert!(matches!(guest.read("/dev/zero"), Err(GuestError::TooMuch { .. })));
}

#[test]
fn a_pipe_without_a_writer_does_not_hold_up_the_agent() {
    let (_agent, guest) = guest();
    let path = place("fifo");
    assert!(guest.exec("mkfifo").arg(&path).status().unwrap().success());
    // Nobody reads: it cannot be opened for writing.
    assert!(matches!(guest.write(&path, "x"), Err(GuestError::Refused { .. })));
    // Nobody writes: who reads waits for that, and nobody else does.
    let outcome = guest.timeout(Duration::from_millis(50)).read(&path);
    assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
    assert!(guest.exec("true").status().unwrap().success());
    std::fs::remove_file(&path).unwrap();
}
