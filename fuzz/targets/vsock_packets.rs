//! Packets of a hostile vsock driver, with a listener on the host's side.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmkit_virtio::testing::fuzz::vsock_packets(bytes));
