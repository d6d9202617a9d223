//! Persistent memory: Linux finds a file of the host's in its memory, mounts it without a copy, and keeps
//! what it writes; several machines have one file at the same time.

use std::os::unix::fs::FileExt;

use vmkit::virtio::Pmem;
use vmkit_examples::devices::Transport;
use vmkit_tests::linux::start;

use crate::{file, on_backends};

const MIB: usize = 1 << 20;
const WORD: &[u8] = b"what a guest wrote for its host to read";

const FILL: &str = "\
set -e
mke2fs -b 4096 /dev/pmem0 >/dev/null
mount -t ext4 -o dax /dev/pmem0 /mnt
echo dax $(grep -c ' /mnt ext4 .*dax' /proc/mounts)
dd if=/dev/urandom of=/mnt/data bs=1M count=12 2>/dev/null
echo -n 'what a guest wrote for its host to read' >/mnt/word
sync
echo sum $(sha256sum </mnt/data)
umount /mnt
";

/// The second disk's first page is written, and the file system is read.
const CHECK: &str = "\
set -e
mount -t ext4 -o ro,dax /dev/pmem0 /mnt
echo sum $(sha256sum </mnt/data)
dd if=/dev/zero of=/dev/pmem1 bs=4096 count=1 conv=fsync 2>/dev/null || true
echo 3 >/proc/sys/vm/drop_caches
echo first $(dd if=/dev/pmem1 bs=16 count=1 2>/dev/null)
";

#[test]
fn a_file_is_memory_that_outlives_its_machine_and_several_share() {
    on_backends(|parts| {
        let image = file(&vec![0; 32 * MIB]);
        let precious = file(&[b'x'; 2 * MIB]);
        let drivers = ["virtio_pmem", "nd_pmem", "ext4"];

        let guest = {
            let plugs = parts.plugs(Transport::Mmio, &drivers, "", FILL);
            start(plugs.plug(Pmem::file(image.path()).unwrap()).finish())
        };
        guest.assert_success();
        assert_eq!(guest.said("dax "), "1");
        let sum = guest.said("sum ");
        drop(guest);
        let bytes = std::fs::read(image.path()).unwrap();
        assert!(bytes.windows(WORD.len()).any(|window| window == WORD), "it is in the file");

        let guests = [Transport::Pci, Transport::Mmio].map(|transport| {
            let image = Pmem::read_only_file(image.path()).unwrap();
            let precious = Pmem::read_only_file(precious.path()).unwrap().named("pmem1");
            start(parts.plugs(transport, &drivers, "", CHECK).plug(image).plug(precious).finish())
        });
        for guest in guests {
            guest.assert_success();
            assert_eq!(guest.said("sum "), sum);
            assert_eq!(guest.said("first "), "x".repeat(16));
        }
        let mut first = [0; 4096];
        precious.as_file().read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [b'x'; 4096]);
    });
}
