//! Disks: what is written stays, what must not be written is not, what is given back is gone.

use std::os::unix::fs::MetadataExt;

use vmkit::virtio::Block;
use vmkit_examples::devices::Transport;
use vmkit_tests::linux::start;

use crate::{file, on_backends};

const MIB: usize = 1 << 20;

/// What the first machine does with its disks: a file system and a file on vda, an attempt to write
/// vdb, and a mebibyte of vdc discarded.
const FILL: &str = "\
set -e
echo serial $(cat /sys/block/vda/serial)
mke2fs /dev/vda >/dev/null
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/data bs=1M count=12 2>/dev/null
sync
echo sum $(sha256sum </mnt/data)
umount /mnt
echo readonly $(cat /sys/block/vdb/ro)
! dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null
blkdiscard -o 1048576 -l 1048576 /dev/vdc
";

/// What the second does with the first disk.
const CHECK: &str = "\
set -e
mount -t ext4 -o ro /dev/vda /mnt
echo sum $(sha256sum </mnt/data)
umount /mnt
echo queues $(ls /sys/block/vda/mq | wc -l)
";

#[test]
fn a_file_system_outlives_its_machine_and_the_change_of_transport() {
    on_backends(|parts| {
        let disk = file(&vec![0; 48 * MIB]);
        let precious = file(&[0x5A; 4096]);
        let spent = file(&vec![0xAA; 4 * MIB]);
        let blocks = std::fs::metadata(spent.path()).unwrap().blocks();

        let guest = {
            let vda = Block::file(disk.path()).unwrap().serial("vmkit-0001");
            let vdb = Block::read_only_file(precious.path()).unwrap().named("block1");
            let vdc = Block::file(spent.path()).unwrap().named("block2");
            let plugs = parts.plugs(Transport::Pci, &["virtio_blk", "ext4"], "", FILL);
            start(plugs.plug(vda).plug(vdb).plug(vdc).finish())
        };
        guest.assert_success();
        assert_eq!(guest.said("serial "), "vmkit-0001");
        assert_eq!(guest.said("readonly "), "1");
        let sum = guest.said("sum ");
        drop(guest);

        assert_eq!(std::fs::read(precious.path()).unwrap(), [0x5A; 4096]);
        let left = std::fs::read(spent.path()).unwrap();
        for (number, part) in left.chunks(MIB).enumerate() {
            let wanted = if number == 1 { 0 } else { 0xAA };
            assert!(part.iter().all(|byte| *byte == wanted), "MiB {number} of the discarded disk");
        }
        spent.as_file().sync_all().unwrap();
        let given_back = blocks - std::fs::metadata(spent.path()).unwrap().blocks();
        assert_eq!(given_back * 512, MIB as u64, "the host got its place back");

        let guest = {
            let vda = Block::read_only_file(disk.path()).unwrap().queues(2);
            let plugs = parts.plugs(Transport::Mmio, &["virtio_blk", "ext4"], "", CHECK);
            start(plugs.plug(vda).finish().vcpus(2))
        };
        guest.assert_success();
        assert_eq!(guest.said("sum "), sum);
        assert_eq!(guest.said("queues "), "2");
    });
}
