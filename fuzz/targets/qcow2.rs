//! A qcow2 image that anybody may have made, and a driver that uses the disk in it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmkit_virtio::testing::fuzz::qcow2(bytes));
