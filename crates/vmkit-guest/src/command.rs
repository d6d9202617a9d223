//! A command that is to be run in the guest.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::process::{ExitStatus, Output};
use std::time::Duration;

use crate::channel::Purpose;
use crate::protocol::{Exec, MAX_STRINGS, Size, ToAgent, flags};
use crate::{Child, Guest, GuestError};

/// Bytes that [`Command::output`] collects of each stream, if nobody says.
pub(crate) const MOST_OUTPUT: usize = 64 << 20;

/// What a standard stream of a command is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stdio {
    /// Nothing: the guest's `/dev/null`.
    Null,
    /// A stream of the [`Child`].
    Piped,
    /// The same stream of this process. A thread carries the bytes. Who waits for the command also
    /// waits for the end of its outputs, which others that it started may hold open. What was read of
    /// standard input and not by the command is lost.
    Inherit,
}

/// A command for a guest, in the manner of [`std::process::Command`].
///
/// It runs as the agent's user (most often root), leads a session and a process group of its own, and
/// is killed with its group when the connection to the agent ends.
#[derive(Debug)]
pub struct Command {
    guest: Guest,
    arguments: Vec<OsString>,
    /// A value, or none to remove the name.
    environment: Vec<(OsString, Option<OsString>)>,
    clear_environment: bool,
    directory: OsString,
    stdin: Option<Stdio>,
    stdout: Option<Stdio>,
    stderr: Option<Stdio>,
    input: Option<Vec<u8>>,
    terminal: Option<Size>,
    limit: Option<Duration>,
    most_output: usize,
}

impl Command {
    pub(crate) fn new(guest: Guest, program: &OsStr) -> Self {
        Self {
            guest,
            arguments: vec![program.to_owned()],
            environment: Vec::new(),
            clear_environment: false,
            directory: OsString::new(),
            stdin: None,
            stdout: None,
            stderr: None,
            input: None,
            terminal: None,
            limit: None,
            most_output: MOST_OUTPUT,
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable. The command gets the agent's others.
    pub fn env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.set(name.as_ref(), Some(value.as_ref().to_owned()))
    }

    /// Sets environment variables.
    pub fn envs(
        &mut self,
        variables: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> &mut Self {
        for (name, value) in variables {
            self.env(name, value);
        }
        self
    }

    /// Removes an environment variable.
    pub fn env_remove(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.set(name.as_ref(), None)
    }

    /// Starts from an empty environment.
    pub fn env_clear(&mut self) -> &mut Self {
        self.environment.clear();
        self.clear_environment = true;
        self
    }

    fn set(&mut self, name: &OsStr, value: Option<OsString>) -> &mut Self {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.to_owned(), value));
        self
    }

    /// The directory of the guest to run in; the agent's if not said.
    pub fn current_dir(&mut self, directory: impl AsRef<OsStr>) -> &mut Self {
        self.directory = directory.as_ref().to_owned();
        self
    }

    /// What the command reads; [`Stdio::Null`] if not said.
    pub fn stdin(&mut self, stdio: Stdio) -> &mut Self {
        self.stdin = Some(stdio);
        self
    }

    /// Where its output goes. If not said, [`Stdio::Piped`] for [`output`](Self::output) and
    /// [`Stdio::Inherit`] otherwise.
    pub fn stdout(&mut self, stdio: Stdio) -> &mut Self {
        self.stdout = Some(stdio);
        self
    }

    /// Where its error messages go; as for [`stdout`](Self::stdout).
    pub fn stderr(&mut self, stdio: Stdio) -> &mut Self {
        self.stderr = Some(stdio);
        self
    }

    /// The command reads `bytes`, and then the end of its input.
    pub fn input(&mut self, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.input = Some(bytes.into());
        self
    }

    /// Gives the command a terminal of that size. What it reads and writes are
    /// [`Child::stdin`] and [`Child::stdout`] if nothing else is said of them, errors among them;
    /// ending the input types the end-of-file character.
    pub fn pty(&mut self, rows: u16, columns: u16) -> &mut Self {
        self.terminal = Some(Size { rows, columns });
        self
    }

    /// How long the command may run in [`output`](Self::output) and [`status`](Self::status), which
    /// then kill it and fail with [`GuestError::TimedOut`]. For ever if not said. That the host's own
    /// output takes what is [inherited](Stdio::Inherit) is part of it.
    pub fn timeout(&mut self, limit: Duration) -> &mut Self {
        self.limit = Some(limit);
        self
    }

    /// How many bytes of each stream [`output`](Self::output) collects at most; it then kills the
    /// command and fails with [`GuestError::TooMuch`]. 64 MiB if not said.
    pub fn output_limit(&mut self, bytes: usize) -> &mut Self {
        self.most_output = bytes;
        self
    }

    /// Starts the command and returns when it runs.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Refused`] if the guest could not execute it.
    pub fn spawn(&mut self) -> Result<Child, GuestError> {
        let terminal = self.terminal.is_some();
        self.spawn_with(if terminal { Stdio::Piped } else { Stdio::Inherit })
    }

    /// Runs the command to its end and collects what it writes.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn), [`GuestError::TimedOut`] and [`GuestError::TooMuch`].
    pub fn output(&mut self) -> Result<Output, GuestError> {
        let child = self.spawn_with(Stdio::Piped)?;
        child.collect(self.limit, self.most_output)
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn), and [`GuestError::TimedOut`].
    pub fn status(&mut self) -> Result<ExitStatus, GuestError> {
        let mut child = self.spawn_with(Stdio::Inherit)?;
        // As in the standard library, there is nobody to write.
        drop(child.stdin.take());
        child.finish(self.limit)
    }

    fn spawn_with(&mut self, default: Stdio) -> Result<Child, GuestError> {
        let terminal = self.terminal.is_some();
        let stdin =
            if self.input.is_some() { Stdio::Piped } else { self.stdin.unwrap_or(Stdio::Null) };
        let stdout = self.stdout.unwrap_or(default);
        let stderr = self.stderr.unwrap_or(default);
        let mut asked = 0;
        for (stdio, flag) in
            [(stdin, flags::INPUT), (stdout, flags::OUTPUT), (stderr, flags::ERROR)]
        {
            if stdio != Stdio::Null && !terminal {
                asked |= flag;
            }
        }
        if terminal {
            asked |= flags::TERMINAL;
        }
        if self.clear_environment {
            asked |= flags::CLEAR_ENVIRONMENT;
        }
        let mut child = self.start(asked)?;
        match child.forward(self.input.take(), stdin == Stdio::Inherit, stdout, stderr) {
            Ok(()) => Ok(child),
            Err(error) => {
                child.give_up();
                Err(error)
            }
        }
    }

    /// Has the agent start it.
    fn start(&self, asked: u8) -> Result<Child, GuestError> {
        let name = self.name();
        let strings = self.strings()?;
        let count = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
        let exec = Exec {
            flags: asked,
            size: self.terminal.unwrap_or_default(),
            arguments: count(self.arguments.len()),
            environment: count(self.environment.len()),
            strings: &strings,
        };
        if self.arguments.len() + self.environment.len() > MAX_STRINGS {
            return Err(GuestError::TooLong(name));
        }
        let connection = self.guest.connection()?;
        let limit = self.guest.limit();
        let opened = connection.open(Purpose::Command(asked), &ToAgent::Exec(exec), limit);
        let channel = opened.map_err(|error| match error {
            GuestError::TooLong(_) => GuestError::TooLong(name.clone()),
            other => other,
        })?;
        let child = Child::new(connection, channel, name, asked, limit);
        child.wait_started()
    }

    fn name(&self) -> String {
        self.arguments.first().map(|program| program.to_string_lossy().into()).unwrap_or_default()
    }

    /// Directory, arguments, environment, as the protocol wants them.
    fn strings(&self) -> Result<Vec<u8>, GuestError> {
        let mut strings = Vec::new();
        push(&mut strings, [self.directory.as_os_str()])?;
        for argument in &self.arguments {
            push(&mut strings, [argument.as_os_str()])?;
        }
        if self.arguments.first().is_none_or(|program| program.is_empty()) {
            return Err(GuestError::InvalidString(String::new()));
        }
        for (name, value) in &self.environment {
            if name.is_empty() || name.as_bytes().contains(&b'=') {
                return Err(GuestError::InvalidString(name.to_string_lossy().into()));
            }
            match value {
                Some(value) => push(&mut strings, [name, OsStr::new("="), value])?,
                None => push(&mut strings, [name.as_os_str()])?,
            }
        }
        Ok(strings)
    }
}

/// Appends a string of several parts and its zero byte.
fn push<const N: usize>(strings: &mut Vec<u8>, parts: [&OsStr; N]) -> Result<(), GuestError> {
    for part in parts {
        if part.as_bytes().contains(&0) {
            return Err(GuestError::InvalidString(part.to_string_lossy().into()));
        }
        strings.extend(part.as_bytes());
    }
    strings.push(0);
    Ok(())
}
