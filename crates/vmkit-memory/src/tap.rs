//! Tap interfaces of the host, opened and told what may be left to do on a frame. Frames themselves are read
//! and written like a file's bytes, elsewhere.

#![allow(unsafe_code, reason = "the kernel's tap driver is set up by ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Bytes of the header before each frame: a `virtio_net_hdr` without the number of buffers.
const HEADER: libc::c_int = 10;

/// What a tap interface may leave to the reader of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapOffloads {
    /// To finish its checksum.
    pub checksum: bool,
    /// To cut it into segments, if it is TCP over IPv4. Only with `checksum`.
    pub tcp4: bool,
    /// To cut it into segments, if it is TCP over IPv6. Only with `checksum`.
    pub tcp6: bool,
}

/// Opens the tap interface `name`, which is made if there is none and the process may. Each frame comes and
/// goes after a `virtio_net_hdr` of ten bytes, least significant byte first, and nothing is left to do on it before
/// [`set_tap_offloads`]. Reads and writes do not wait.
///
/// # Errors
/// `InvalidInput` if no interface can have that name; otherwise what the host said.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero request is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A `%` has the kernel choose a number; the last byte ends the name.
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%';
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(good) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let mut options = File::options();
    options.read(true).write(true);
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let tap = options.open("/dev/net/tun")?;
    // SAFETY: the request points to an `ifreq`, which the kernel reads and writes during the call only.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    // An interface that outlives its users keeps what the last one set.
    set_number(&tap, libc::TUNSETVNETHDRSZ, HEADER)?;
    set_number(&tap, libc::TUNSETVNETLE, 1)?;
    set_tap_offloads(&tap, TapOffloads::default())?;
    Ok(tap.into())
}

/// Sets one of the interface's numbers, of which the kernel is given the address.
fn set_number(tap: &File, request: libc::Ioctl, number: libc::c_int) -> io::Result<()> {
    // SAFETY: the requests that come here read one `int` during the call only.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), request, &raw const number) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Says what may be left to do on the frames that are read from `tap` from now on.
///
/// # Errors
/// What the host said.
pub fn set_tap_offloads(tap: &impl AsFd, offloads: TapOffloads) -> io::Result<()> {
    let TapOffloads { checksum, tcp4, tcp6 } = offloads;
    let pick = |wanted: bool, flag| if checksum && wanted { flag } else { 0 };
    let flags =
        pick(true, libc::TUN_F_CSUM) | pick(tcp4, libc::TUN_F_TSO4) | pick(tcp6, libc::TUN_F_TSO6);
    let fd = tap.as_fd().as_raw_fd();
    // SAFETY: the argument is a number.
    let set = unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "a/b", "tap%d", "sixteen-bytes-ab", "nul\0", "b\u{e4}r", "two words"] {
            assert_eq!(open_tap(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }

    #[test]
    fn a_persistent_interface_forgets_how_its_last_user_wanted_headers() {
        let number = |tap: &OwnedFd, request| {
            let mut found: libc::c_int = -1;
            // SAFETY: the requests below write one `int` during the call only.
            assert!(unsafe { libc::ioctl(tap.as_raw_fd(), request, &raw mut found) } >= 0);
            found
        };
        let name = format!("vmkp{}", std::process::id());
        let first = match open_tap(&name) {
            Ok(tap) => File::from(tap),
            Err(error) => return eprintln!("ignored: {error}"),
        };
        set_number(&first, libc::TUNSETVNETHDRSZ, 12).unwrap();
        set_number(&first, libc::TUNSETVNETLE, 0).unwrap();
        let keep = |tap: &File, yes: libc::c_ulong| {
            // SAFETY: the argument is a number.
            assert!(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, yes) } >= 0);
        };
        keep(&first, 1);
        drop(first);
        let second = open_tap(&name);
        let again = second
            .as_ref()
            .map(|tap| (number(tap, libc::TUNGETVNETHDRSZ), number(tap, libc::TUNGETVNETLE)));
        assert_eq!(again.ok(), Some((10, 1)));
        keep(&File::from(second.unwrap()), 0);
    }

    #[test]
    fn what_is_no_tap_interface_has_no_offloads() {
        let file = File::open("/dev/null").unwrap();
        assert!(set_tap_offloads(&file, TapOffloads::default()).is_err());
    }
}
