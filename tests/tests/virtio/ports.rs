//! Console, named ports and the entropy source.

use std::io::Write;
use std::sync::{Arc, Mutex};

use vmkit::virtio::{Console, Rng};
use vmkit_examples::devices::Transport;
use vmkit_tests::linux::start;

use crate::on_backends;

const SCRIPT: &str = "\
set -e
port=$(ls /dev/vport*p1)
echo name $(cat /sys/class/virtio-ports/${port#/dev/}/name)
exec 5<>$port
read -r line <&5
echo heard $line
echo \"back from the guest\" >&5
head -c 100000 /dev/zero | tr '\\0' x >&5
echo hello >/dev/hvc0
exec 6</dev/hvc0
sleep 1
echo size $(stty size <&6)
echo source $(cat /sys/class/misc/hw_random/rng_current)
echo bytes $(head -c 4 /dev/hwrng | xxd -p)
";

/// Keeps what is written to it.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn ports_carry_both_ways_and_random_bytes_are_the_hosts() {
    on_backends(|parts| {
        for transport in [Transport::Pci, Transport::Mmio] {
            let (screen, heard) = (Kept::default(), Kept::default());
            let mut console = Console::new(screen.clone()).unwrap().size(132, 43);
            let port = console.port("org.example.test", heard.clone()).unwrap();
            let rng = Rng::from_source(|bytes| bytes.fill(0xA5));
            // On PCI without MSI-X here, so that the functions' pins are used.
            let drivers = ["virtio_console", "virtio_rng"];
            let plugs = parts.plugs(transport, &drivers, "pci=nomsi", SCRIPT);
            assert_eq!(port.send(b"a line from the host\n"), 21);
            let guest = start(plugs.plug(console).plug(rng).finish());

            guest.assert_success();
            assert_eq!(guest.said("name "), "org.example.test");
            assert_eq!(guest.said("heard "), "a line from the host");
            assert_eq!(guest.said("size "), "43 132");
            assert_eq!(guest.said("source "), "virtio_rng.0");
            assert_eq!(guest.said("bytes "), "a5a5a5a5");
            let heard = heard.0.lock().unwrap().clone();
            let text = String::from_utf8(heard).unwrap();
            assert_eq!(text.strip_prefix("back from the guest\n"), Some(&*"x".repeat(100_000)));
            assert_eq!(*screen.0.lock().unwrap(), b"hello\r\n");
        }
    });
}
