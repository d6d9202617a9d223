//! A driver that does anything, to each virtio device, through MMIO. The first byte picks the device.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((&kind, rest)) = bytes.split_first() {
        vmkit_virtio::testing::fuzz::mmio(kind, rest);
    }
});
