//! Runs `--exec`'s command through the guest's agent, where the guest has a socket device.

use std::io::IsTerminal;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use vmkit::guest::{Guest, GuestError, Stdio};
use vmkit::{RunningVm, VmHandle};

use crate::Failure;
use crate::console::Console;
use crate::initramfs::{COMMAND, POWER_OFF};

/// A boot may take long where the host is slow; the end of the machine ends the waiting too.
const PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a guest may take to power itself off.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// Waits on a thread of its own for the agent, has it run the command, tells `console` its status and
/// powers the guest off. A guest without an agent ends in another way, and the thread with it.
///
/// # Errors
/// [`Failure`] if the thread cannot be had.
pub fn start(vm: &RunningVm, console: Console) -> Result<(), Failure> {
    let (guest, handle) = (vm.guest().timeout(PATIENCE), vm.handle());
    let work = move || run(&guest, &handle, &console);
    let thread = std::thread::Builder::new().name("exec".into()).spawn(work);
    thread.map(drop).map_err(Failure::host("a thread"))
}

fn run(guest: &Guest, vm: &VmHandle, console: &Console) {
    match command(guest) {
        Ok(status) => console.learn_status(code(status)),
        // The machine has ended, or does its work without an agent.
        Err(GuestError::Disconnected) => return,
        Err(error) => {
            eprintln!("boot_linux: {error}");
            vm.stop();
            return;
        }
    }
    if !power_off(guest) {
        vm.stop();
    }
}

/// Has the guest power itself off. False if it does not.
fn power_off(guest: &Guest) -> bool {
    let guest = guest.timeout(LAST_PATIENCE);
    match guest.exec("sh").args(["-c", POWER_OFF]).timeout(LAST_PATIENCE).status() {
        Ok(status) => status.success(),
        // The answer was lost with the guest, which is what was wanted.
        Err(error) => matches!(error, GuestError::Disconnected),
    }
}

fn command(guest: &Guest) -> Result<ExitStatus, GuestError> {
    guest.exec("sh").arg(COMMAND).stdin(input()).status()
}

/// What the command reads: standard input, unless that is a terminal which belongs to somebody else.
/// Reading it would stop a program in the background.
fn input() -> Stdio {
    let stdin = std::io::stdin();
    let ours = || tcgetpgrp(&stdin).is_ok_and(|group| group == getpgrp());
    if stdin.is_terminal() && !ours() { Stdio::Null } else { Stdio::Inherit }
}

/// A status as a shell tells it.
fn code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let signalled = || 128 + status.signal().unwrap_or(127);
    u8::try_from(status.code().unwrap_or_else(signalled)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_status_is_the_one_a_shell_would_tell() {
        assert_eq!(code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(code(ExitStatus::from_raw(15)), 143);
    }
}
