//! What happens to each side when the other one misbehaves or goes away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{Agent, PATIENCE, eventually, guest, lives, noise};
use vmkit_guest::protocol::{Exec, Exit, Flow, Stream, ToAgent, ToHost, VERSION, WINDOW, flags};
use vmkit_guest::{Guest, GuestError, ProtocolError, Stdio};

fn to_host(channel: u32, message: &ToHost<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 70_000];
    let len = message.encode(channel, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn to_agent(channel: u32, message: &ToAgent<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 70_000];
    let len = message.encode(channel, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

/// A guest whose agent is this test.
fn impostor() -> (UnixStream, Guest) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (theirs, Guest::connected(ours).timeout(PATIENCE))
}

/// Has a command started by an agent that then says `words`. Returns what the host makes of it.
fn after_start(words: &[(u32, ToHost<'_>)]) -> GuestError {
    let (mut agent, guest) = impostor();
    agent.write_all(&to_host(0, &ToHost::Hello(VERSION))).unwrap();
    let thread = std::thread::spawn({
        let guest = guest.clone();
        move || guest.exec("x").stdout(Stdio::Piped).stderr(Stdio::Null).spawn()
    });
    // The hello is 14 bytes; what opens the channel follows, which is number 1.
    agent.read_exact(&mut [0; 15]).unwrap();
    agent.write_all(&to_host(1, &ToHost::Started(42))).unwrap();
    let mut child = thread.join().unwrap().unwrap();
    for (channel, word) in words {
        // The host may have hung up already.
        let _ = agent.write_all(&to_host(*channel, word));
    }
    child.wait().unwrap_err()
}

#[test]
fn an_agent_that_says_what_none_says_is_cut_off() {
    let piece = noise(30_000);
    let data = ToHost::Flow(Stream::Output, Flow::Data(&piece));
    let protocol = |error| match error {
        GuestError::Protocol(error) => error,
        other => panic!("{other:?}"),
    };
    // More than there is room for.
    let flood: Vec<_> = (0..=WINDOW as usize / piece.len()).map(|_| (1, data)).collect();
    assert_eq!(protocol(after_start(&flood)), ProtocolError::Window(1));
    // A stream that was not asked for, one that has ended, one that does not come from there.
    let error = ToHost::Flow(Stream::Error, Flow::Data(b"x"));
    assert_eq!(protocol(after_start(&[(1, error)])), ProtocolError::OutOfPlace(1));
    let end = ToHost::Flow(Stream::Output, Flow::End);
    assert_eq!(protocol(after_start(&[(1, end), (1, data)])), ProtocolError::OutOfPlace(1));
    let input = ToHost::Flow(Stream::Input, Flow::Data(b"x"));
    assert_eq!(protocol(after_start(&[(1, input)])), ProtocolError::OutOfPlace(1));
    // Channels that nobody opened, and a second hello.
    assert_eq!(protocol(after_start(&[(2, data)])), ProtocolError::Channel(2));
    let hello = ToHost::Hello(VERSION);
    assert_eq!(protocol(after_start(&[(0, hello)])), ProtocolError::Channel(0));
    assert_eq!(protocol(after_start(&[(1, hello)])), ProtocolError::OutOfPlace(1));
    // Words of files about a command, and the same word twice.
    assert_eq!(protocol(after_start(&[(1, ToHost::Stored)])), ProtocolError::OutOfPlace(1));
    let started = ToHost::Started(43);
    assert_eq!(protocol(after_start(&[(1, started)])), ProtocolError::OutOfPlace(1));
}

#[test]
fn noise_in_place_of_an_agent_is_told_from_one() {
    for (bytes, version) in
        [(noise(100_000), None), (to_host(0, &ToHost::Hello(0)), Some(0)), (vec![1; 8], None)]
    {
        let (mut agent, guest) = impostor();
        // Whoever is at the other end may hang up first.
        let _ = agent.write_all(&bytes);
        let _ = agent.shutdown(Shutdown::Write);
        match (guest.timeout(Duration::from_secs(5)).wait_ready(), version) {
            (Err(GuestError::Protocol(ProtocolError::Version(heard))), Some(said)) => {
                assert_eq!(heard, said);
            }
            (Err(GuestError::Protocol(_) | GuestError::Disconnected), None) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_agent_that_says_nothing_is_not_waited_for_longer_than_asked() {
    let (_agent, guest) = impostor();
    let before = Instant::now();
    let outcome = guest.timeout(Duration::from_millis(100)).exec("true").status();
    assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
    assert!(before.elapsed() < PATIENCE);
    let (mut agent, guest) = impostor();
    agent.write_all(&to_host(0, &ToHost::Hello(VERSION))).unwrap();
    let outcome = guest.timeout(Duration::from_millis(100)).exec("true").status();
    assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
}

#[test]
fn a_dialler_that_stays_silent_does_not_keep_a_guest_from_being_closed() {
    let (_agent, guest) = impostor();
    let waiting = std::thread::spawn({
        let guest = guest.timeout(Duration::from_secs(3600));
        move || guest.wait_ready()
    });
    // Most likely it listens for the hello by then.
    std::thread::sleep(Duration::from_millis(100));
    guest.close();
    assert!(matches!(waiting.join().unwrap(), Err(GuestError::Disconnected)));
}

#[test]
fn each_caller_waits_for_a_silent_dialler_as_long_as_itself_wants() {
    let (mut agent, guest) = impostor();
    let patient = std::thread::spawn({
        let guest = guest.timeout(Duration::from_secs(3600));
        move || guest.wait_ready()
    });
    std::thread::sleep(Duration::from_millis(100));
    let outcome = guest.timeout(Duration::from_millis(200)).wait_ready();
    let in_vain = matches!(outcome, Err(GuestError::TimedOut(_) | GuestError::NotReady(_)));
    assert!(in_vain, "{outcome:?}");
    // The other one has not been robbed of its dialler, which only was slow.
    let hello = to_host(0, &ToHost::Hello(VERSION));
    for byte in &hello {
        agent.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    patient.join().unwrap().unwrap();
}

#[test]
fn a_dialler_that_stays_silent_makes_way_for_the_next() {
    let (silent, ours) = UnixStream::pair().unwrap();
    let (mut agent, next) = UnixStream::pair().unwrap();
    agent.write_all(&to_host(0, &ToHost::Hello(VERSION))).unwrap();
    let mut streams = vec![next, ours];
    let accept = move |_| streams.pop().ok_or_else(|| std::io::ErrorKind::NotConnected.into());
    Guest::listening(accept).timeout(PATIENCE).wait_ready().unwrap();
    // It has been hung up on.
    assert_eq!((&silent).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_lost_agent_ends_what_waits_for_it() {
    let (mut agent, guest) = guest();
    let mut child = guest.exec("sleep").arg("1000").stdout(Stdio::Piped).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || stdout.read(&mut [0]));
    let process = child.id();
    agent.process.kill().unwrap();
    agent.process.wait().unwrap();
    assert!(matches!(child.wait(), Err(GuestError::Disconnected | GuestError::Stream(_))));
    assert!(reader.join().unwrap().is_err());
    // The command does not outlive its agent.
    eventually("the command ends", || !lives(process));
}

#[test]
fn a_lost_host_ends_what_was_done_for_it() {
    let (mut agent, guest) = guest();
    let mut command = guest.exec("sh");
    command.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(Stdio::Piped);
    let mut child = command.spawn().unwrap();
    let mut line = [0; 32];
    let count = child.stdout.as_mut().unwrap().read(&mut line).unwrap();
    let inner: u32 = String::from_utf8_lossy(&line[..count]).trim().parse().unwrap();
    let outer = child.id();
    guest.close();
    assert!(matches!(child.wait(), Err(GuestError::Disconnected)));
    assert!(agent.wait().success());
    eventually("both end", || !lives(outer) && !lives(inner));
    assert!(matches!(guest.exec("true").status(), Err(GuestError::Disconnected)));
}

/// An agent whose host is this test, after the hellos.
fn greeted() -> (Agent, UnixStream) {
    let (agent, mut host) = Agent::start();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut hello = [0; 14];
    host.read_exact(&mut hello).unwrap();
    assert_eq!(hello.to_vec(), to_host(0, &ToHost::Hello(VERSION)));
    host.write_all(&to_agent(0, &ToAgent::Hello(VERSION))).unwrap();
    (agent, host)
}

fn cat() -> Exec<'static> {
    Exec {
        flags: flags::INPUT,
        size: Default::default(),
        arguments: 2,
        environment: 0,
        strings: b"\0sleep\x001000\0",
    }
}

#[test]
fn a_host_that_says_what_none_says_is_left() {
    let piece = noise(30_000);
    let data = to_agent(1, &ToAgent::Flow(Stream::Input, Flow::Data(&piece)));
    let exec = to_agent(1, &ToAgent::Exec(cat()));
    let flow = |stream, flow| to_agent(1, &ToAgent::Flow(stream, flow));
    for words in [
        noise(200_000),
        // More than there is room for: a sleeper reads nothing.
        [exec.clone(), data.repeat(12)].concat(),
        // The same channel twice.
        [exec.clone(), exec.clone()].concat(),
        // Data on streams of the agent.
        [exec.clone(), flow(Stream::Output, Flow::Data(b"x"))].concat(),
        [exec.clone(), flow(Stream::Input, Flow::Credit(1))].concat(),
        // The connection itself is no channel; a second hello.
        to_agent(0, &ToAgent::Exec(cat())),
        to_agent(0, &ToAgent::Hello(VERSION)),
    ] {
        let (mut agent, mut host) = greeted();
        let _ = host.write_all(&words);
        assert!(agent.wait().success());
    }
    // Another version than was offered, or none.
    for words in [to_agent(0, &ToAgent::Hello(VERSION + 1)), exec, noise(200_000)] {
        let (mut agent, mut host) = Agent::start();
        host.read_exact(&mut [0; 14]).unwrap();
        let _ = host.write_all(&words);
        assert!(agent.wait().success());
    }
}

#[test]
fn what_is_said_of_channels_that_are_gone_is_void() {
    let (_agent, mut host) = greeted();
    for word in [
        ToAgent::Signal(9),
        ToAgent::Flow(Stream::Input, Flow::Data(b"x")),
        ToAgent::Flow(Stream::Output, Flow::Close),
        ToAgent::Flow(Stream::Error, Flow::Credit(1)),
    ] {
        host.write_all(&to_agent(77, &word)).unwrap();
    }
    let exec = Exec { flags: 0, arguments: 1, strings: b"\0true\0", ..cat() };
    host.write_all(&to_agent(5, &ToAgent::Exec(exec))).unwrap();
    let mut started = [0; 12];
    host.read_exact(&mut started).unwrap();
    assert_eq!((started[0], started[4]), (64, 5));
    let mut exited = [0; 10];
    host.read_exact(&mut exited).unwrap();
    assert_eq!(exited.to_vec(), to_host(5, &ToHost::Exited(Exit::Code(0))));
}

#[test]
fn an_agent_whose_host_takes_nothing_waits_and_keeps_little() {
    let (agent, mut host) = greeted();
    // Answers to these would fill any buffer.
    let missing = to_agent(1, &ToAgent::Read(b"/nowhere\0"));
    host.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let batch = missing.repeat(1000);
    let mut accepted = 0_usize;
    while let Ok(count) = host.write(&batch) {
        accepted += count;
        assert!(accepted < 256 << 20, "the agent takes everything");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 2048, "{kib} KiB");
    // It goes on when it is listened to, and every answer comes.
    let mut expected = accepted / missing.len();
    let answer = 11;
    let mut piece = vec![0; answer];
    while expected > 0 {
        host.read_exact(&mut piece).unwrap();
        assert_eq!(piece[0], 66);
        expected -= 1;
    }
}
