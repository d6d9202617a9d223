//! A stock Debian kernel with busybox, as the whole-machine tests boot it.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "test helpers")]

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmkit::boot::Linux;
use vmkit::{Backend, Capture, End, RunningVm, Serial, VmBuilder};
use vmkit_examples::Failure;
use vmkit_examples::console::Console;
use vmkit_examples::debian::{self, Flavour};
use vmkit_examples::initramfs::{Job, Network, Userland};
use vmkit_examples::modules::Modules;

use crate::is_wanted;

/// Booting takes some 5 s in software; the machine may be loaded, and the build unoptimised.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(300);

/// What every kernel here is told: where its console is, to ask for a reset when it panics, and not
/// to spend time on tests of its own.
pub const WORDS: &str = "console=ttyS0 panic=-1 cryptomgr.notests";

/// One boot at a time: the host's processors are few, and some tests look at the clock.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a guest is made of.
pub struct Files {
    /// The bzImage.
    pub kernel: PathBuf,
    /// A static busybox.
    pub busybox: Vec<u8>,
}

impl Files {
    /// Kernel and busybox. What cannot be had here is said on standard error, and the test that
    /// asked then proves nothing; with `VMKIT_TEST_REQUIRE` in the environment it fails.
    pub fn find(flavour: Flavour) -> Option<Self> {
        found(debian::kernel(flavour).and_then(|kernel| {
            let busybox = debian::busybox()?;
            let busybox = std::fs::read(&busybox).map_err(Failure::file(busybox))?;
            Ok(Self { kernel, busybox })
        }))
    }

    /// The kernel's modules, as [`find`](Self::find).
    pub fn modules(&self) -> Option<Modules> {
        let none = || Failure::Other(format!("{}: no modules", self.kernel.display()));
        found(debian::modules(&self.kernel).and_then(|modules| modules.ok_or_else(none)))
    }

    /// The stock kernel, running `command` after it has loaded `drivers`, with more words on its
    /// command line; those of `VMKIT_TEST_WORDS` are added.
    pub fn linux(&self, modules: &Modules, drivers: &[&str], words: &str, command: &str) -> Linux {
        let modules = modules.with_dependencies(drivers).unwrap();
        let job = Job::Run(command.into());
        let network = Network::Untouched;
        let userland = Userland { busybox: &self.busybox, job, modules: &modules, network };
        Linux::bzimage(&self.kernel)
            .unwrap()
            .initrd_bytes(userland.build())
            .cmdline(format!("{WORDS} {words} {}", env("VMKIT_TEST_WORDS")))
    }
}

/// A variable of the environment; nothing if it is not set.
fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn found<T>(what: Result<T, Failure>) -> Option<T> {
    let required = std::env::var_os("VMKIT_TEST_REQUIRE").is_some();
    what.inspect_err(|failure| {
        assert!(!required, "{failure}");
        eprintln!("not run: {failure}");
    })
    .ok()
}

/// The backends that run stock kernels here; of these, the ones that `VMKIT_TEST_BACKENDS` names, if it
/// is set. They are named on standard error.
pub fn full_backends() -> Vec<Backend> {
    let reports = vmkit::preflight().into_iter();
    let usable = reports.filter(|report| report.is_usable());
    usable
        .filter(|report| is_wanted(report.backend))
        .inspect(|report| eprintln!("stock kernels on {}", report.backend))
        .map(|report| report.backend.into())
        .collect()
}

/// A machine that runs a command in Linux, and what it says.
pub struct Guest {
    /// The machine.
    pub vm: RunningVm,
    /// The guest's console.
    pub text: Capture,
    /// What `/init` reports.
    pub console: Console,
}

/// Starts a machine with the serial ports that [`Guest`] reads.
pub fn start(builder: VmBuilder) -> Guest {
    let text = Capture::with_limit(1 << 20);
    let console = Console::default();
    let vm = builder
        .device(Serial::com1().output(text.clone()))
        .device(Serial::com2().on_output(console.watch_init()))
        .build()
        .unwrap()
        .start()
        .unwrap();
    Guest { vm, text, console }
}

impl Guest {
    /// Waits for the end and gives the command's status.
    pub fn status(&self) -> Option<u8> {
        let end = self.vm.wait_timeout(BOOT_PATIENCE).unwrap();
        assert_eq!(end, Some(End::PoweredOff), "the console:\n{}", self.text.text());
        self.console.status()
    }

    /// Waits until the guest has said `text`.
    pub fn wait_for(&self, text: &str) {
        let said = self.text.wait_for(text, BOOT_PATIENCE);
        assert!(said, "no {text:?} on the console:\n{}", self.text.text());
    }

    /// Waits for what `look` finds, as long as the guest runs: `what` is to come of it.
    pub fn wait_until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            // One more look after the end: it may have come just before.
            let end = self.vm.wait_timeout(Duration::from_millis(10)).unwrap();
            if let Some(found) = look() {
                return found;
            }
            let waits = end.is_none() && began.elapsed() < BOOT_PATIENCE;
            assert!(waits, "{what}: {end:?}, the console:\n{}", self.text.text());
        }
    }

    /// What the guest said after `label`, to the end of that line.
    pub fn said(&self, label: &str) -> String {
        let text = self.text.text();
        let line = text.lines().find_map(|line| line.strip_prefix(label));
        assert!(line.is_some(), "no {label:?} on the console:\n{text}");
        line.unwrap_or_default().trim().to_owned()
    }

    /// Asserts that the command succeeded and nothing upset the kernel.
    pub fn assert_success(&self) {
        assert_eq!(self.status(), Some(0), "the console:\n{}", self.text.text());
        self.assert_healthy();
    }

    /// Asserts that the kernel complained of nothing.
    pub fn assert_healthy(&self) {
        let text = self.text.text();
        for complaint in [
            "BUG:",
            "WARNING:",
            "Oops",
            "soft lockup",
            "rcu_sched",
            "clocksource: timekeeping watchdog",
        ] {
            assert!(!text.contains(complaint), "{complaint} on the console:\n{text}");
        }
    }
}
