//! Commands and files in a guest, from the host.
//!
//! [`AGENT`] is a small static program for the guest. It dials the host, and whoever holds the
//! host's end of that stream has a [`Guest`]: commands that look like those of
//! [`std::process`], terminals, and files in and out.
//!
//! ```
//! use std::os::fd::OwnedFd;
//! use std::os::unix::net::UnixStream;
//! use std::process;
//!
//! # let place = std::env::temp_dir().join(format!("vmkit-agent-doc-{}", process::id()));
//! # vmkit_guest::write_agent(&place)?;
//! // Any stream will do. Here the agent is a process of this host.
//! let (ours, theirs) = UnixStream::pair()?;
//! let mut agent = process::Command::new(&place);
//! let mut agent = agent.args(["--fd", "0"]).stdin(OwnedFd::from(theirs)).spawn()?;
//!
//! let guest = vmkit_guest::Guest::connected(ours);
//! let output = guest.exec("echo").arg("hello").output()?;
//! assert_eq!(output.stdout, b"hello\n");
//! # drop(guest);
//! # agent.wait()?;
//! # std::fs::remove_file(&place)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The guest may be hostile: what it sends is checked, kept within bounds, and waited for no longer than
//! [`Guest::timeout`] says. This crate knows no hypervisor and no device, only streams.

mod channel;
mod child;
mod command;
mod connection;
mod copy;
mod error;
mod guest;
mod hello;
mod outgoing;
pub mod protocol;
#[cfg(feature = "testing")]
pub mod testing;

// The agent's modules, so that what is said of the library's code by compiler, tests and lints is said
// of theirs: the program itself is compiled by `build.rs`.
#[cfg(test)]
#[path = "../agent/connection.rs"]
#[allow(dead_code, reason = "the program uses it")]
mod agent_connection;
#[cfg(test)]
#[path = "../agent/options.rs"]
#[allow(dead_code, reason = "the program uses it")]
mod options;
#[cfg(any(test, feature = "testing"))]
#[path = "../agent/service/mod.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod service;
#[cfg(test)]
#[path = "../agent/sys/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the program uses the rest")]
mod sys;

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use self::child::{Child, ChildStderr, ChildStdin, ChildStdout};
pub use self::command::{Command, Stdio};
pub use self::error::{GuestError, ProtocolError};
pub use self::guest::Guest;

/// The agent: a static x86-64 program for any Linux since 4.8. Put it into the guest's file system
/// and start it once vsock works, for example from `/init`: `vmkit-agent &`.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vmkit-agent"));

/// Writes the agent as an executable file.
///
/// # Errors
/// What the host says; a file that exists stays as it is.
pub fn write_agent(path: impl AsRef<Path>) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new();
    file.write(true).create_new(true).mode(0o755).open(path)?.write_all(AGENT)
}
