//! What the program was asked to do.

use crate::protocol::PORT;
use crate::sys;

/// The host's address (virtio 1.2 §5.10.4).
const HOST: u32 = 2;

/// Where the host is.
pub(crate) enum Peer {
    /// At the other end of a socket that was open from the start.
    Inherited(i32),
    Dialled {
        cid: u32,
        port: u32,
    },
}

pub(crate) struct Options {
    pub(crate) peer: Peer,
}

impl Options {
    /// Understands the arguments, each with its zero byte; none if they make no sense.
    pub(crate) fn parse<'a>(mut arguments: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let (mut cid, mut port, mut fd) = (None, None, None);
        while let Some(option) = arguments.next() {
            let value = number(arguments.next()?.strip_suffix(b"\0")?)?;
            match option {
                b"--cid\0" => cid = Some(value),
                b"--port\0" => port = Some(value),
                b"--fd\0" => fd = Some(value),
                _ => return None,
            }
        }
        if let Some(fd) = fd {
            let alone = cid.is_none() && port.is_none();
            let peer = i32::try_from(fd).ok().map(Peer::Inherited);
            return peer.filter(|_| alone).map(|peer| Self { peer });
        }
        let port = port.or_else(port_of_command_line).unwrap_or(PORT);
        Some(Self { peer: Peer::Dialled { cid: cid.unwrap_or(HOST), port } })
    }
}

/// The port that the kernel command line names, if /proc is there.
fn port_of_command_line() -> Option<u32> {
    let mut bytes = [0; 4096];
    let line = sys::read_small(b"/proc/cmdline\0", &mut bytes);
    let mut words = line.split(u8::is_ascii_whitespace);
    words.find_map(|word| number(word.strip_prefix(b"vmkit.agent=")?))
}

fn number(digits: &[u8]) -> Option<u32> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}
