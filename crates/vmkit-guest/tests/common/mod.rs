//! The agent as a process of this host.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, dead_code, reason = "tests")]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use vmkit_guest::Guest;

/// Only a test that fails waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An agent that runs on this host, ended when dropped.
pub struct Agent {
    pub process: Child,
}

/// The agent's program. Written before any process is made, so that none has it open for writing.
pub fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let fresh = home.join(format!("vmkit-agent-{}", std::process::id()));
        let _ = std::fs::remove_file(&fresh);
        vmkit_guest::write_agent(&fresh).unwrap();
        // One for all tests; those that run another keep it.
        let path = home.join("vmkit-agent");
        std::fs::rename(fresh, &path).unwrap();
        path
    })
}

impl Agent {
    /// Starts one and gives the host's end of its stream.
    pub fn start() -> (Self, UnixStream) {
        Self::start_with(|_| ())
    }

    pub fn start_with(setup: impl FnOnce(&mut Command)) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(program());
        command.args(["--fd", "0"]).stdin(OwnedFd::from(theirs));
        setup(&mut command);
        (Self { process: command.spawn().unwrap() }, ours)
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An agent and the guest it makes of this host.
pub fn guest() -> (Agent, Guest) {
    let (agent, stream) = Agent::start();
    (agent, Guest::connected(stream).timeout(PATIENCE))
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} does not come true");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that look like none.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// True while process `id` is there and not a zombie.
pub fn lives(id: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}
