//! Commands in a guest that is this host.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use common::{Agent, PATIENCE, eventually, guest, lives, noise, program};
use vmkit_guest::protocol::Step;
use vmkit_guest::{Guest, GuestError, Stdio};

#[test]
fn a_command_gives_its_outputs_and_its_status() {
    let (_agent, guest) = guest();
    let output = guest.exec("sh").args(["-c", "echo out; echo err >&2; exit 7"]).output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
    assert!(guest.exec("true").status().unwrap().success());
}

#[test]
fn arguments_arrive_as_they_are() {
    let (_agent, guest) = guest();
    let arguments = ["a b", "", "'\"$HOME*", "\u{fc}\n"];
    let output = guest.exec("printf").arg("<%s>").args(arguments).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "<a b><><'\"$HOME*><\u{fc}\n>");
}

#[test]
fn the_environment_is_the_agents_with_the_callers_changes() {
    let (_agent, stream) = Agent::start_with(|command| {
        command.env_clear().env("KEPT", "1").env("CHANGED", "2").env("GONE", "3");
    });
    let guest = Guest::connected(stream).timeout(PATIENCE);
    let lines = |command: &mut vmkit_guest::Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let mut command = guest.exec("env");
    command.env("CHANGED", "new").env("ADDED", "x=y").env_remove("GONE");
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(lines(&mut command), ["ADDED=x=y", "CHANGED=new", "KEPT=1", path]);
    assert_eq!(lines(guest.exec("/usr/bin/env").env_clear().env("A", "b")), ["A=b"]);
}

#[test]
fn programs_are_looked_for_on_the_commands_path() {
    let (_agent, guest) = guest();
    let missing = guest.exec("env").env("PATH", "/nowhere:/etc").output();
    let Err(GuestError::Refused { step: Step::Execute, source, .. }) = missing else {
        panic!("{missing:?}")
    };
    assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
    assert!(guest.exec("env").env("PATH", "/nowhere:/usr/bin").output().unwrap().status.success());
    // What is there and may not be executed is said so.
    let denied = guest.exec("passwd").env("PATH", "/etc").output();
    let Err(GuestError::Refused { source, .. }) = denied else { panic!("{denied:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn the_directory_is_the_callers() {
    let (_agent, guest) = guest();
    let output = guest.exec("pwd").current_dir("/usr/lib").output().unwrap();
    assert_eq!(output.stdout, b"/usr/lib\n");
    let missing = guest.exec("pwd").current_dir("/nowhere").output();
    assert!(matches!(missing, Err(GuestError::Refused { step: Step::Directory, .. })));
}

#[test]
fn what_is_written_to_a_command_comes_back_whole() {
    let (_agent, guest) = guest();
    let bytes = noise(3_000_001);
    let output = guest.exec("cat").input(bytes.clone()).output().unwrap();
    assert!(output.stdout == bytes);
    assert_eq!(guest.exec("cat").output().unwrap().stdout, b"");
}

#[test]
fn streams_work_while_the_command_runs() {
    let (_agent, guest) = guest();
    let mut child = guest.exec("cat").stdin(Stdio::Piped).stdout(Stdio::Piped).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut echo = [0; 4];
    for _ in 0..100 {
        stdin.write_all(b"ping").unwrap();
        stdout.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"ping");
    }
    assert_eq!(child.try_wait().unwrap(), None);
    drop(stdin);
    assert_eq!(stdout.read(&mut echo).unwrap(), 0);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_reader_that_does_not_read_holds_up_its_own_command_only() {
    let (_agent, guest) = guest();
    let mut stuck = guest.exec("yes").stdout(Stdio::Piped).spawn().unwrap();
    for _ in 0..20 {
        assert_eq!(guest.exec("echo").arg("free").output().unwrap().stdout, b"free\n");
    }
    // It waits for its pipe, and sleeps.
    let stat = format!("/proc/{}/stat", stuck.id());
    eventually("yes sleeps", || std::fs::read_to_string(&stat).unwrap().contains(") S "));
    // What it wrote is all there.
    let mut text = vec![0; 1 << 20];
    stuck.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
    assert!(text.chunks(2).all(|line| line == b"y\n"));
    // Nobody reads any more: its next write fails.
    drop(stuck.stdout.take());
    assert_eq!(stuck.wait().unwrap().signal(), Some(13));
}

#[test]
fn a_command_that_does_not_read_holds_up_its_own_writer_only() {
    let (_agent, guest) = guest();
    let mut child = guest.exec("sleep").arg("1000").stdin(Stdio::Piped).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.set_timeout(Some(Duration::from_millis(200)));
    let error = stdin.write_all(&noise(4 << 20)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(guest.exec("true").status().unwrap().success());
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(stdin.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_command_that_closes_its_input_breaks_the_pipe() {
    let (_agent, guest) = guest();
    let mut command = guest.exec("sh");
    let mut child =
        command.args(["-c", "exec <&-; sleep 1000"]).stdin(Stdio::Piped).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let error = std::iter::repeat_with(|| stdin.write_all(b"x")).find_map(Result::err).unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn signals_reach_the_whole_group() {
    let (_agent, guest) = guest();
    let mut command = guest.exec("sh");
    let mut child =
        command.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(Stdio::Piped).spawn().unwrap();
    let mut line = [0; 32];
    let count = child.stdout.as_mut().unwrap().read(&mut line).unwrap();
    let inner: u32 = String::from_utf8_lossy(&line[..count]).trim().parse().unwrap();
    assert!(lives(child.id()) && lives(inner));
    child.signal(15).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(15));
    eventually("the inner process ends", || !lives(inner));
    // An ended command is not signalled.
    child.signal(15).unwrap();
    assert!(matches!(child.signal(65), Err(GuestError::InvalidString(_))));
}

#[test]
fn signals_that_the_agent_was_told_to_ignore_are_not_ignored_by_commands() {
    // What a shell does to `agent &`.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let script = format!("trap '' INT QUIT TERM PIPE; exec {} --fd 0", program().display());
    let process = std::process::Command::new("sh")
        .args(["-c", &script])
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    let _agent = Agent { process };
    let guest = Guest::connected(ours).timeout(PATIENCE);
    let status = guest.exec("cat").arg("/proc/self/status").output().unwrap().stdout;
    let status = String::from_utf8(status).unwrap();
    for set in ["SigBlk:\t0000000000000000\n", "SigIgn:\t0000000000000000\n"] {
        assert!(status.contains(set), "{status}");
    }
}

#[test]
fn a_command_that_runs_too_long_is_killed() {
    let (_agent, guest) = guest();
    let mut command = guest.exec("sh");
    command.args(["-c", "echo $$; exec sleep 1000"]).timeout(Duration::from_millis(100));
    assert!(matches!(command.output(), Err(GuestError::TimedOut(_))));
    let mut child = guest.exec("sleep").arg("1000").spawn().unwrap();
    let process = child.id();
    assert_eq!(child.wait_timeout(Duration::from_millis(20)).unwrap(), None);
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    eventually("it is gone", || !lives(process));
}

#[test]
fn a_command_that_says_too_much_is_killed() {
    let (_agent, guest) = guest();
    let outcome = guest.exec("yes").output_limit(100_000).output();
    assert!(matches!(outcome, Err(GuestError::TooMuch { limit: 100_000, .. })), "{outcome:?}");
}

#[test]
fn many_commands_run_at_once() {
    let (_agent, guest) = guest();
    let bytes = noise(200_000);
    std::thread::scope(|scope| {
        for number in 0..60 {
            let (guest, bytes) = (&guest, &bytes);
            scope.spawn(move || {
                let script = format!("cat; exit {number}");
                let mut command = guest.exec("sh");
                let output = command.args(["-c", &script]).input(bytes.clone()).output().unwrap();
                assert_eq!(output.status.code(), Some(number));
                assert!(output.stdout == *bytes);
            });
        }
    });
}

#[test]
fn an_agent_has_room_for_so_many_and_says_when_it_has_not() {
    let (_agent, guest) = guest();
    let sleep = || guest.exec("sleep").arg("1000").stdout(Stdio::Null).stderr(Stdio::Null).spawn();
    let mut children: Vec<_> = (0..128).map(|_| sleep().unwrap()).collect();
    assert!(matches!(sleep(), Err(GuestError::Busy(128))));
    for child in &mut children {
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
    assert!(guest.exec("true").status().unwrap().success());
}

#[test]
fn a_child_left_behind_does_not_hold_up_its_parents_status() {
    let (_agent, guest) = guest();
    let mut command = guest.exec("sh");
    let mut child =
        command.args(["-c", "sleep 20 2>&- & exit 3"]).stdout(Stdio::Piped).spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    // Its pipe is still open.
    let mut stdout = child.stdout.take().unwrap();
    stdout.set_timeout(Some(Duration::from_millis(20)));
    assert_eq!(stdout.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn what_cannot_be_a_command_is_refused_here() {
    let (_agent, guest) = guest();
    assert!(matches!(guest.exec("a\0b").output(), Err(GuestError::InvalidString(_))));
    assert!(matches!(guest.exec("").output(), Err(GuestError::InvalidString(_))));
    assert!(matches!(guest.exec("env").env("A=", "b").output(), Err(GuestError::InvalidString(_))));
    let long = "x".repeat(70_000);
    assert!(matches!(guest.exec("echo").arg(long).output(), Err(GuestError::TooLong(_))));
    let many = vec!["x"; 3000];
    assert!(matches!(guest.exec("echo").args(many).output(), Err(GuestError::TooLong(_))));
    assert_eq!(guest.exec("echo").args(vec!["x"; 2000]).output().unwrap().stdout.len(), 4000);
}

#[test]
fn a_terminal_is_one() {
    let (_agent, guest) = guest();
    let mut command = guest.exec("sh");
    command.args(["-c", "tty && stty size && test $(ps -o tpgid= -p $$) = $$ && echo go; cat"]);
    let mut child = command.pty(31, 97).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.set_timeout(Some(PATIENCE));
    let mut seen = String::new();
    let mut read_until = |seen: &mut String, wanted: &str| {
        let mut piece = [0; 256];
        while !seen.contains(wanted) {
            let count = stdout.read(&mut piece).unwrap();
            assert!(count > 0, "{seen:?}");
            seen.push_str(&String::from_utf8_lossy(&piece[..count]));
        }
    };
    read_until(&mut seen, "31 97\r\ngo\r\n");
    assert!(seen.starts_with("/dev/pts/"), "{seen:?}");
    // What is typed is echoed, and then repeated by cat.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").unwrap();
    read_until(&mut seen, "hello\r\nhello\r\n");
    // The end of the input is the end-of-file character.
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

#[test]
fn keys_of_a_terminal_are_signals_and_its_size_can_change() {
    let (_agent, guest) = guest();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut child = guest.exec("bash").args(["-c", script]).pty(24, 80).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.set_timeout(Some(PATIENCE));
    let mut seen = String::new();
    let mut piece = [0; 256];
    while !seen.contains("50 132") {
        let count = stdout.read(&mut piece).unwrap();
        assert!(count > 0, "{seen:?}");
        seen.push_str(&String::from_utf8_lossy(&piece[..count]));
        if seen == "ready\r\n" {
            child.resize(50, 132).unwrap();
        }
    }
    // A shell that runs a program when the key is pressed leaves it to that program.
    let status = loop {
        child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
        if let Some(status) = child.wait_timeout(Duration::from_millis(100)).unwrap() {
            break status;
        }
    };
    assert_eq!(status.signal(), Some(2));
    // The terminal reads as ended when nobody has it open.
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
}
