//! The handle on a guest, and how it comes by a connection.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::connection::Connection;
use crate::hello::Dialler;
use crate::{Command, GuestError};

/// How long to wait for the guest if nobody says.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait for a dial or for a hello before looking whether it is still wanted.
const SLICE: Duration = Duration::from_millis(50);
/// How long one who dialled may take for its hello before the next one has its turn.
const HELLO: Duration = Duration::from_secs(5);

/// Waits for an agent to dial in, at most as long as it is told.
type Accept = Box<dyn FnMut(Duration) -> io::Result<UnixStream> + Send>;

struct Shared {
    /// None if nobody listens.
    door: Option<Door>,
    closed: AtomicBool,
    current: Mutex<Option<Arc<Connection>>>,
}

/// Where agents dial in. One caller at a time listens there, and the others wait for their turn.
struct Door {
    /// None while somebody listens.
    listening: Mutex<Option<Listening>>,
    /// Somebody has stopped listening.
    free: Condvar,
}

struct Listening {
    accept: Accept,
    /// Who has dialled and not said hello. It stays when the caller that heard it gives up.
    dialler: Option<Dialler>,
    /// How long it may take for that.
    patience: Duration,
}

/// The right to listen, which goes back when dropped.
struct Turn<'a> {
    door: &'a Door,
    listening: Option<Listening>,
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, Option<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to listen, at most as long as it is told.
    fn turn(&self, limit: Duration) -> Option<Turn<'_>> {
        let taken =
            self.free.wait_timeout_while(self.lock(), limit, |listening| listening.is_none());
        let listening = taken.unwrap_or_else(PoisonError::into_inner).0.take()?;
        Some(Turn { door: self, listening: Some(listening) })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.door.lock() = self.listening.take();
        self.door.free.notify_one();
    }
}

impl Listening {
    /// Waits for somebody to dial, or for the one who has to say hello, at most as long as it is told.
    /// Returns an agent that has.
    fn round(&mut self, limit: Duration) -> Result<Option<Dialler>, GuestError> {
        let Some(mut dialler) = self.dialler.take() else {
            match (self.accept)(limit) {
                Ok(stream) => self.dialler = Some(Dialler::new(stream)),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(_) => return Err(GuestError::Disconnected),
            }
            return Ok(None);
        };
        match dialler.hear(limit) {
            Ok(true) => return Ok(Some(dialler)),
            Ok(false) if dialler.age() < self.patience => self.dialler = Some(dialler),
            Ok(false) => {
                log::warn!("somebody in the guest dialled its agent's port and said nothing")
            }
            // An agent that dialled and gave up, or that was there before a reset.
            Err(GuestError::Disconnected | GuestError::Stream(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(None)
    }
}

/// A guest, through the agent that runs in it.
///
/// Making one does not wait: the first command or copy waits until the agent has dialled in, and the
/// next one after a lost connection waits until it has dialled again. Clones are the same guest.
#[derive(Clone)]
pub struct Guest {
    shared: Arc<Shared>,
    timeout: Duration,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Guest {
    fn new(listening: Option<(Accept, Duration)>) -> Self {
        let door = listening.map(|(accept, patience)| {
            let listening = Listening { accept, dialler: None, patience };
            Door { listening: Mutex::new(Some(listening)), free: Condvar::new() }
        });
        let shared = Shared { door, closed: AtomicBool::new(false), current: Mutex::default() };
        Self { shared: Arc::new(shared), timeout: PATIENCE }
    }

    /// A guest whose agent is at the other end of `stream`.
    pub fn connected(stream: UnixStream) -> Self {
        let mut stream = Some(stream);
        // There is no second one: it may take its time, and whoever asks for another waits in vain.
        let accept = move |_| stream.take().ok_or_else(|| io::ErrorKind::NotConnected.into());
        Self::new(Some((Box::new(accept), Duration::MAX)))
    }

    /// A guest whose agent dials in. `accept` waits for that, at most as long as it is told, and
    /// fails with [`TimedOut`](io::ErrorKind::TimedOut) then. One who dials and does not say hello
    /// within 5 s is dropped for the next one.
    pub fn listening(
        accept: impl FnMut(Duration) -> io::Result<UnixStream> + Send + 'static,
    ) -> Self {
        Self::new(Some((Box::new(accept), HELLO)))
    }

    /// A guest that nobody can reach: everything fails with [`GuestError::NoAgent`].
    pub fn unreachable() -> Self {
        Self::new(None)
    }

    /// The same guest with another limit on how long to wait for it: for the agent to dial in, for
    /// an answer, for the next bytes of a copy, for room for what is sent. 30 s if not said. It is no
    /// limit on how long a command runs.
    #[must_use]
    pub fn timeout(&self, limit: Duration) -> Self {
        Self { shared: self.shared.clone(), timeout: limit }
    }

    pub(crate) fn limit(&self) -> Duration {
        self.timeout
    }

    /// A command that runs `program` in the guest.
    pub fn exec(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(self.clone(), program.as_ref())
    }

    /// Waits until the agent has dialled in.
    ///
    /// # Errors
    /// [`GuestError::NotReady`] if it does not, [`GuestError::TimedOut`] if somebody did and said
    /// nothing, [`GuestError::Disconnected`] if nobody can any longer.
    pub fn wait_ready(&self) -> Result<(), GuestError> {
        self.connection().map(drop)
    }

    /// Ends the connection, and every command of it. Nothing can be done with this guest any more.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        let current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connection) = current {
            connection.close();
        }
    }

    fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// The connection there is.
    fn current(&self) -> Option<Arc<Connection>> {
        let current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone().filter(|connection| connection.is_alive())
    }

    /// The connection there is, or the next one.
    pub(crate) fn connection(&self) -> Result<Arc<Connection>, GuestError> {
        let door = self.shared.door.as_ref().ok_or(GuestError::NoAgent)?;
        let deadline = Instant::now().checked_add(self.timeout);
        let mut somebody = false;
        loop {
            if self.is_closed() {
                return Err(GuestError::Disconnected);
            }
            if let Some(connection) = self.current() {
                return Ok(connection);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let slice = left.unwrap_or(SLICE).min(SLICE);
            if slice.is_zero() {
                return Err(match somebody {
                    true => GuestError::TimedOut(self.timeout),
                    false => GuestError::NotReady(self.timeout),
                });
            }
            let Some(mut turn) = door.turn(slice) else { continue };
            // Somebody else may have had the connection while this one waited.
            if self.current().is_some() {
                continue;
            }
            let Some(listening) = &mut turn.listening else { continue };
            if let Some(agent) = listening.round(slice)? {
                return self.greet(agent);
            }
            somebody = listening.dialler.is_some();
        }
    }

    /// Makes the connection to an agent that has said hello.
    fn greet(&self, agent: Dialler) -> Result<Arc<Connection>, GuestError> {
        let connection = Arc::new(Connection::new(agent)?);
        let mut current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(connection.clone());
        drop(current);
        if self.is_closed() {
            self.close();
        }
        Ok(connection)
    }
}
