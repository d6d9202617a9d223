//! The host's side of vsock: who listens, and who wants to connect to the guest.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::Wake;

/// Connections that wait for the embedder to accept or for the device to look.
pub(super) const MOST_WAITING: usize = 64;

/// A wish of the embedder to connect to a guest port, with the device's end of the stream.
type Request = (u32, UnixStream);

/// Who is there on the host.
pub(super) struct Host {
    pub listener: Option<UnixListener>,
    path: Option<PathBuf>,
    in_process: HashMap<u32, SyncSender<UnixStream>>,
    requests: Receiver<Request>,
    pub wake: Wake,
}

impl Host {
    pub(super) fn new(requests: Receiver<Request>, wake: Wake) -> Self {
        Self { listener: None, path: None, in_process: HashMap::new(), requests, wake }
    }

    pub(super) fn listen_at(&mut self, listener: UnixListener, path: &Path) {
        self.listener = Some(listener);
        self.path = Some(path.to_owned());
    }

    pub(super) fn listen_in_process(&mut self, port: u32, sender: SyncSender<UnixStream>) {
        self.in_process.insert(port, sender);
    }

    /// The next wish of the embedder.
    pub(super) fn request(&self) -> Option<Request> {
        self.requests.try_recv().ok()
    }

    /// Connects to who listens at `port`, if anybody does.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let stream = if let Some(sender) = self.in_process.get(&port) {
            let (ours, theirs) = UnixStream::pair()?;
            sender.try_send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
            ours
        } else {
            let mut path =
                self.path.clone().ok_or(io::ErrorKind::ConnectionRefused)?.into_os_string();
            path.push(format!("_{port}"));
            // Without waiting: a program that does not accept must not hold up the others.
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            UnixStream::from(socket)
        };
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Whoever removed it before had a reason.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Accepts connections of guest programs.
#[derive(Debug)]
pub struct VsockListener {
    receiver: Receiver<UnixStream>,
}

impl VsockListener {
    pub(super) fn new(receiver: Receiver<UnixStream>) -> Self {
        Self { receiver }
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// `ConnectionAborted` once the device is gone.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.receiver.recv().map_err(|_| io::ErrorKind::ConnectionAborted.into())
    }

    /// Waits for the next connection, but not longer than `timeout`.
    ///
    /// # Errors
    /// `TimedOut`, or `ConnectionAborted` once the device is gone.
    pub fn accept_timeout(&self, timeout: Duration) -> io::Result<UnixStream> {
        self.receiver.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            RecvTimeoutError::Disconnected => io::ErrorKind::ConnectionAborted.into(),
        })
    }

    /// The next connection, if there is one.
    ///
    /// # Errors
    /// `WouldBlock`, or `ConnectionAborted` once the device is gone.
    pub fn try_accept(&self) -> io::Result<UnixStream> {
        self.receiver.try_recv().map_err(|error| match error {
            TryRecvError::Empty => io::ErrorKind::WouldBlock.into(),
            TryRecvError::Disconnected => io::ErrorKind::ConnectionAborted.into(),
        })
    }
}

/// Connects to guest programs. Clones do the same.
#[derive(Clone, Debug)]
pub struct VsockConnector {
    requests: SyncSender<Request>,
    wake: Wake,
    plugged: Arc<AtomicBool>,
}

impl VsockConnector {
    pub(super) fn new() -> io::Result<(Self, Receiver<Request>)> {
        let (requests, receiver) = std::sync::mpsc::sync_channel(MOST_WAITING);
        Ok((Self { requests, wake: Wake::new()?, plugged: Arc::default() }, receiver))
    }

    pub(super) fn wake(&self) -> Wake {
        self.wake.clone()
    }

    pub(super) fn plug(&self) {
        self.plugged.store(true, Ordering::Release);
    }

    /// True once the device has been built into a machine.
    pub fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Acquire)
    }

    /// Connects to `port` of the guest. The stream is there at once; what is written to it arrives
    /// when the guest accepts, and it ends if the guest refuses.
    ///
    /// # Errors
    /// `WouldBlock` if too many wait already, `ConnectionAborted` once the device is gone, or what
    /// the host said.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        self.requests.try_send((port, theirs)).map_err(|error| match error {
            std::sync::mpsc::TrySendError::Full(_) => io::ErrorKind::WouldBlock,
            std::sync::mpsc::TrySendError::Disconnected(_) => io::ErrorKind::ConnectionAborted,
        })?;
        self.wake.wake();
        Ok(ours)
    }
}
