//! What can go wrong with a guest.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::protocol::{Failure, Malformed, Step};

/// Why something could not be done in a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// Nobody was told to listen for the guest's agent.
    #[error("the machine has no agent: none was asked for when it was built")]
    NoAgent,
    /// The agent has not dialled in.
    #[error("no agent dialled in for {0:?}: it does not run, or its kernel has no vsock")]
    NotReady(Duration),
    /// The agent or its kernel did not answer in time.
    #[error("the guest did not answer within {0:?}")]
    TimedOut(Duration),
    /// The connection ended: the machine ended, or the agent did.
    #[error("the connection to the guest's agent has ended")]
    Disconnected,
    /// The connection failed.
    #[error("the connection to the guest's agent failed: {0}")]
    Stream(io::ErrorKind),
    /// The guest said something that no agent says. The connection has been ended.
    #[error("the guest's agent misbehaved: {0}")]
    Protocol(#[from] ProtocolError),
    /// The guest's kernel refused a command or a file.
    #[error("{what}: the guest failed at {step}: {source}")]
    Refused {
        /// The program or the file.
        what: String,
        /// What it was doing.
        step: Step,
        /// Why, as an error number of Linux.
        source: io::Error,
    },
    /// An argument, an environment entry or a path has a zero byte, or a name is empty or has an
    /// equals sign.
    #[error("{0:?} cannot be passed to a program")]
    InvalidString(String),
    /// The strings of a command are too many or too long.
    #[error("{0}: its arguments and environment are too long for the agent")]
    TooLong(String),
    /// As many commands and files are under way as an agent can have.
    #[error("the guest's agent is doing {0} things already")]
    Busy(usize),
    /// A command or a file had more to say than the caller wanted.
    #[error("{what}: more than {limit} bytes came")]
    TooMuch {
        /// The program or the file.
        what: String,
        /// What was wanted at most, in bytes.
        limit: usize,
    },
    /// The host's side of a copy failed, or a thread could not be had.
    #[error("on the host: {0}")]
    Host(#[from] io::Error),
}

impl GuestError {
    pub(crate) fn refused(what: &str, failure: Failure) -> Self {
        Self::Refused {
            what: what.to_owned(),
            step: failure.step,
            source: io::Error::from_raw_os_error(failure.errno.into()),
        }
    }

    /// The same as an error of a stream.
    pub(crate) fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::TimedOut(_) => io::ErrorKind::TimedOut,
            Self::Protocol(_) => io::ErrorKind::InvalidData,
            Self::Stream(kind) => *kind,
            Self::Refused { source, .. } => source.kind(),
            _ => io::ErrorKind::ConnectionAborted,
        };
        io::Error::new(kind, self)
    }
}

/// What a guest's agent did that no agent does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A frame makes no sense.
    #[error("it sent {0}")]
    Malformed(Malformed),
    /// The version it speaks is none that this host speaks.
    #[error("it speaks version {0} of the protocol")]
    Version(u16),
    /// A message for a channel that is not open.
    #[error("it spoke of channel {0}, which is not open")]
    Channel(u32),
    /// A message that does not fit what its channel is for, or how far it has come.
    #[error("it said what does not fit channel {0}")]
    OutOfPlace(u32),
    /// More bytes than the host had room for.
    #[error("it sent more on channel {0} than there was room for")]
    Window(u32),
}

impl From<Malformed> for ProtocolError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// Why a connection is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Ended,
    Stream(io::ErrorKind),
    Protocol(ProtocolError),
}

impl From<Lost> for GuestError {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Ended => Self::Disconnected,
            Lost::Stream(kind) => Self::Stream(kind),
            Lost::Protocol(error) => Self::Protocol(error),
        }
    }
}
