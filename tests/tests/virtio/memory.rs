//! The balloon: what the guest does not need goes back to the host, which shows in this process's
//! resident memory.

use std::io::sink;
use std::time::{Duration, Instant};

use vmkit::virtio::{Balloon, Block, Console};
use vmkit_examples::devices::Transport;
use vmkit_tests::linux::{BOOT_PATIENCE, start};

use crate::on_backends;

const MIB: u64 = 1 << 20;

/// Fills memory and frees it, fills the page cache, and fills memory again; each when it is told to.
const SCRIPT: &str = "\
set -e
exec 5<$(ls /dev/vport*p1)
mount -t tmpfs -o size=200m tmpfs /tmp
fill() { dd if=/dev/vda of=/tmp/file bs=1M count=96 iflag=direct 2>/dev/null; }
fill; echo filled; read -r go <&5
rm /tmp/file; echo freed; read -r go <&5
cat /dev/vda >/dev/null; echo cached; read -r go <&5
fill; echo sum $(md5sum </tmp/file) and $(dd if=/dev/vda iflag=direct bs=1M 2>/dev/null | md5sum)
";

#[test]
fn memory_goes_back_to_the_host_by_reports_by_balloon_and_by_hints() {
    on_backends(|parts| {
        let mut console = Console::new(sink()).unwrap();
        let control = console.port("control", sink()).unwrap();
        let balloon = Balloon::new().hints();
        let handle = balloon.handle();
        let bytes = (0..96 * MIB).map(|n| (n >> 9) as u8 ^ n as u8).collect();
        let drivers = ["virtio_console", "virtio_balloon", "virtio_blk"];
        let plugs = parts.plugs(Transport::Pci, &drivers, "", SCRIPT);
        let disk = Block::memory(bytes).unwrap().read_only();
        let guest = start(plugs.plug(console).plug(balloon).plug(disk).finish());
        let go = || assert_eq!(control.send(b"\n"), 1);

        guest.wait_for("filled\n");
        let filled = resident();
        go();
        guest.wait_for("freed\n");
        until("free pages are reported", || {
            resident() + 64 * MIB < filled && handle.given() >= 64 * MIB
        });

        // Pages of the cache are in use: nothing but the balloon makes the guest part with them.
        go();
        guest.wait_for("cached\n");
        let cached = resident();
        handle.set_target(160 * MIB);
        until("the balloon is full", || handle.actual() == 160 * MIB);
        until("the cache is given up", || resident() + 32 * MIB < cached);
        handle.set_target(0);
        until("the balloon is empty", || handle.actual() == 0);

        let before = handle.given();
        handle.ask_for_hints();
        until("free pages are told", || handle.hinted());
        assert!(handle.given() > before);
        handle.end_hints();

        // What came back is as good as it was.
        go();
        guest.assert_success();
        let sums = guest.said("sum ");
        let (copy, original) = sums.split_once(" and ").unwrap();
        assert_eq!(copy, original);
    });
}

/// Bytes of shared memory, which guest memory is, that this process has resident.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < BOOT_PATIENCE, "{what}: not yet, with {} MiB", resident() / MIB);
        std::thread::sleep(Duration::from_millis(20));
    }
    eprintln!("{what} after {:?}, with {} MiB resident", began.elapsed(), resident() / MIB);
}
