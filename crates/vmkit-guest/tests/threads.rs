//! No thread stays behind for a command that has timed out or for a guest that nobody holds any more,
//! whatever its agent does. One test, because it counts the threads of its process.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{PATIENCE, eventually};
use vmkit_guest::protocol::{ToAgent, ToHost, VERSION, WINDOW, split_frame};
use vmkit_guest::{Guest, GuestError, Stdio};

fn say(mut stream: &UnixStream, channel: u32, message: &ToHost<'_>) {
    let mut bytes = [0; 64];
    let len = message.encode(channel, &mut bytes).unwrap();
    stream.write_all(&bytes[..len]).unwrap();
}

/// An agent that starts whatever it is told to and never says another word of it.
fn start_everything(mut stream: UnixStream) {
    say(&stream, 0, &ToHost::Hello(VERSION));
    let mut heard = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return,
            Ok(count) => heard.extend(&piece[..count]),
        }
        while let Some((frame, rest)) = split_frame(&heard) {
            if let Ok(ToAgent::Exec(_)) = ToAgent::parse(&frame) {
                say(&stream, frame.channel, &ToHost::Started(42));
            }
            heard = rest.to_vec();
        }
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn nothing_waits_for_ever_for_an_agent_that_is_silent() {
    let before = threads();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || start_everything(theirs));
    let guest = Guest::connected(ours).timeout(PATIENCE);
    guest.wait_ready().unwrap();
    let idle = threads();

    // Threads for input and both outputs, and who collects them.
    let much = vec![0; 2 * WINDOW as usize];
    let limit = Duration::from_millis(20);
    for _ in 0..4 {
        let outcome = guest.exec("x").input(much.clone()).timeout(limit).status();
        assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
        let outcome = guest.exec("x").input(much.clone()).timeout(limit).output();
        assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
    }
    eventually("only the connection's threads are left", || threads() == idle);

    // Those that carry bytes do not keep the connection open.
    let child = guest.exec("x").input(much).spawn().unwrap();
    let mut other = guest.exec("x").stdout(Stdio::Piped).spawn().unwrap();
    let mut stdout = other.stdout.take().unwrap();
    drop((child, other, guest));
    // One who reads does.
    stdout.set_timeout(Some(limit));
    assert_eq!(stdout.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    drop(stdout);
    eventually("the connection ends", || agent.is_finished());
    agent.join().unwrap();
    eventually("no thread is left", || threads() == before);
}
