//! Linux's own virtio drivers against the device models, in whole machines: Debian's cloud kernel and
//! busybox on every backend that can run them. What cannot be had here is said so on standard error,
//! and the test then proves nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod block;
mod memory;
mod net;
mod pmem;
mod ports;
mod sockets;

use std::io::Write;

use tempfile::NamedTempFile;
use vmkit::{Backend, Vm, VmBuilder};
use vmkit_examples::debian::Flavour;
use vmkit_examples::devices::{Plugs, Transport};
use vmkit_examples::modules::Modules;
use vmkit_tests::linux::{Files, full_backends};

/// What guests are made of.
struct Parts {
    files: Files,
    modules: Modules,
    backend: Backend,
}

/// Runs `test` on every backend that can run a stock kernel, if there is one to be had.
fn on_backends(test: impl Fn(&Parts)) {
    let _alone = vmkit_tests::linux::alone();
    for backend in full_backends() {
        let Some(files) = Files::find(Flavour::Cloud) else { return };
        let Some(modules) = files.modules() else { return };
        test(&Parts { files, modules, backend });
    }
}

impl Parts {
    /// A machine that loads `drivers` and the transport's, and runs `command`.
    fn machine(
        &self,
        transport: Transport,
        drivers: &[&str],
        words: &str,
        command: &str,
    ) -> VmBuilder {
        let drivers: Vec<&str> = [transport.module()].into_iter().chain(drivers.to_vec()).collect();
        let linux = self.files.linux(&self.modules, &drivers, words, command);
        Vm::builder().backend(self.backend.clone()).memory(256 << 20).boot(linux)
    }

    /// As [`machine`](Self::machine), ready for devices.
    fn plugs(&self, transport: Transport, drivers: &[&str], words: &str, command: &str) -> Plugs {
        Plugs::new(self.machine(transport, drivers, words, command), transport)
    }
}

/// A file that holds `bytes`, gone when the test is.
fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}
