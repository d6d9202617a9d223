//! The programs as their users meet them: exit statuses, one-line errors, signals.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

/// A program of this package, which `cargo test` has built beside this test.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not built", path.display());
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}

/// A file that holds `bytes`, gone when the test is.
fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn run_guest(file: &Path, options: &[&str]) -> Output {
    program("run_guest").arg(file).args(options).output().unwrap()
}

fn assert_one_line(output: &Output, status: i32, part: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert!(text.contains(part), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
}

#[test]
fn a_guests_exit_code_is_the_programs() {
    // mov dx, 0x3f8; mov al, '!'; out dx, al; mov al, 0x10; out 0xf4, al
    let code = [0x66, 0xBA, 0xF8, 0x03, 0xB0, b'!', 0xEE, 0xB0, 0x10, 0xE6, 0xF4];
    let guest = file(&code);
    let output = run_guest(guest.path(), &["--memory", "8M", "--backend", "soft"]);
    assert_eq!(output.status.code(), Some(0x21), "{output:?}");
    assert_eq!(output.stdout, b"!");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn the_exit_port_can_be_elsewhere() {
    // mov dx, 0x501; mov al, 1; out dx, al
    let guest = file(&[0x66, 0xBA, 0x01, 0x05, 0xB0, 0x01, 0xEE]);
    let options = ["--debug-exit", "0x501", "--backend", "soft"];
    assert_eq!(run_guest(guest.path(), &options).status.code(), Some(3));
}

#[test]
fn a_guest_that_goes_on_for_ever_meets_its_time_limit() {
    let guest = file(&[0xEB, 0xFE]);
    let output = run_guest(guest.path(), &["--timeout", "0.2", "--backend", "soft"]);
    assert_one_line(&output, 124, "still runs after 0.2 s");
}

#[test]
fn a_dead_guest_and_a_crashed_one_are_told_apart() {
    let halted = file(&[0xFA, 0xF4]);
    assert_one_line(&run_guest(halted.path(), &["--backend", "soft"]), 123, "halted");
    // lidt [zeros]; ud2; zeros: (rip-relative by 2)
    let code = [0x0F, 0x01, 0x1D, 2, 0, 0, 0, 0x0F, 0x0B, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let crashed = file(&code);
    assert_one_line(&run_guest(crashed.path(), &["--backend", "soft"]), 122, "triple fault");
}

#[test]
fn a_signal_stops_the_guest() {
    // mov dx, 0x3f8; mov al, '!'; out dx, al; jmp $
    let guest = file(&[0x66, 0xBA, 0xF8, 0x03, 0xB0, b'!', 0xEE, 0xEB, 0xFE]);
    let mut child = program("run_guest")
        .arg(guest.path())
        .args(["--backend", "soft"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The handler is there before the guest runs; without it the signal would end the program.
    let mut said = [0];
    child.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"!");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// Waits for the end of `child`, which must come.
fn end_of(child: &mut Child) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        let patient = begin.elapsed() < Duration::from_secs(120);
        if !patient {
            child.kill().unwrap();
        }
        assert!(patient, "the program does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_whose_output_nobody_reads_can_be_ended() {
    // mov dx, 0x3f8; again: out dx, al; jmp again
    let guest = file(&[0x66, 0xBA, 0xF8, 0x03, 0xEE, 0xEB, 0xFD]);
    let start = |options: &[&str]| {
        let mut command = program("run_guest");
        command.arg(guest.path()).args(["--backend", "soft"]).args(options);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // More than enough to fill a pipe.
    let mut child = start(&["--timeout", "1"]);
    assert_eq!(end_of(&mut child).code(), Some(124));
    let mut child = start(&[]);
    let mut said = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(end_of(&mut child).code(), Some(143));
}

#[test]
fn what_cannot_be_booted_is_said_in_one_line() {
    let missing = Path::new("/nonexistent/kernel");
    assert_one_line(&run_guest(missing, &[]), 125, "/nonexistent/kernel: No such file");
    let rubbish = file(&[0x5A; 4096]);
    let boot = |options: &[&str]| program("boot_linux").args(options).output().unwrap();
    let kernel = rubbish.path().to_str().unwrap();
    let initrd = rubbish.path().to_str().unwrap();
    assert_one_line(&boot(&["--kernel", kernel, "--initrd", initrd]), 125, "not a bzImage");
    assert_one_line(&boot(&["--kernel", "/nonexistent/k"]), 125, "/nonexistent/k: No such file");
    let output = boot(&["--memory", "much"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`much` is no size"));
    let output = boot(&["--disk", "a.img,queues=0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`0` is no number of queues"));
    let output = boot(&["--pmem", "a.img,rw"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`rw` is not known: want ro"));
}
