//! The socket device, with programs of the host on Unix sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use vmkit::virtio::Vsock;
use vmkit_examples::devices::Transport;
use vmkit_tests::linux::{BOOT_PATIENCE, start};
use vmkit_tests::program::install;
use vmkit_tests::vsock_echo;

use crate::on_backends;

/// Ports of the host and of the guest.
const DIALLED: u32 = 5001;
const ANSWERED: u32 = 5002;

#[test]
fn a_guest_program_echoes_on_a_connection_of_either_side() {
    let program = vsock_echo::program(DIALLED, ANSWERED);
    let script = format!("set -e\n{}/echo\n", install("/echo", &program));
    on_backends(|parts| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(format!("{}_{DIALLED}", path.display())).unwrap();
        let vsock = Vsock::new(3).unwrap().sockets(&path).unwrap();
        let drivers = ["vmw_vsock_virtio_transport"];
        let plugs = parts.plugs(Transport::Pci, &drivers, "", &script);
        let guest = start(plugs.plug(vsock).finish());

        listener.set_nonblocking(true).unwrap();
        let dialled = guest.wait_until("a connection", || listener.accept().ok()).0;
        dialled.set_nonblocking(false).unwrap();
        assert_echo(dialled);
        assert_echo(connect(&path));
        guest.assert_success();
        drop(guest);
        assert!(!path.exists(), "the socket goes with the device");
    });
}

/// Connects to the guest, which begins to listen at some moment.
fn connect(path: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(BOOT_PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {ANSWERED}").unwrap();
        // A reset is no answer either; and nothing is echoed before something was sent.
        let mut answer = String::new();
        let _ = BufReader::new(&stream).read_line(&mut answer);
        if answer.starts_with("OK ") {
            return stream;
        }
        assert!(began.elapsed() < BOOT_PATIENCE, "the guest does not listen: {answer:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sends more than both sides together can have on the way, and expects it back.
fn assert_echo(stream: UnixStream) {
    let sent: Vec<u8> = (0..3_u32 << 20).map(|n| (n >> 9) as u8 ^ n as u8).collect();
    let mut received = vec![0; sent.len()];
    stream.set_read_timeout(Some(BOOT_PATIENCE)).unwrap();
    stream.set_write_timeout(Some(BOOT_PATIENCE)).unwrap();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| (&stream).write_all(&sent));
        (&stream).read_exact(&mut received).unwrap();
        sender.join().unwrap().unwrap();
    });
    assert!(received == sent, "what came back is not what was sent");
    stream.shutdown(std::net::Shutdown::Both).unwrap();
}
