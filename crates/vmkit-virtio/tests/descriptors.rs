//! A process that has no descriptor left for a while. Its limit is the whole process's: the test is
//! alone in its own.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::process::{Resource, getrlimit, setrlimit};
use vmkit_virtio::testing::{FREE, Rig};
use vmkit_virtio::{Mmio, Vsock};

#[test]
fn host_programs_that_connect_meanwhile_are_served_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let rig = Rig::new(Mmio::new(Vsock::new(3).unwrap().sockets(&path).unwrap()));
    let mut rings = rig.activate(0, 16);
    rings[0].add(&[], &[(FREE, 4096)]);
    rig.notify(0);
    let program = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let before = getrlimit(Resource::Nofile);
    let lowest_free = File::open("/dev/null").unwrap().as_raw_fd() as u64;
    let mut none_left = before;
    none_left.current = Some(lowest_free);
    setrlimit(Resource::Nofile, none_left).unwrap();
    connect(&program, &SocketAddrUnix::new(path).unwrap()).unwrap();
    let mut program = UnixStream::from(program);
    program.write_all(b"CONNECT 1000\n").unwrap();
    // Time to find that there is none. If the device is slower, it has nothing to wait for.
    std::thread::sleep(Duration::from_millis(50));
    setrlimit(Resource::Nofile, before).unwrap();
    assert_eq!(rings[0].wait_used(), (0, 44));
}
