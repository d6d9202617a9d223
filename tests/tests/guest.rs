//! The agent in a stock Debian kernel, on every backend that can run one. A kernel that cannot be had
//! is said so on standard error, and the test then proves nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmkit::boot::{Initramfs, Linux};
use vmkit::guest::protocol::PORT;
use vmkit::guest::{AGENT, GuestError, Stdio};
use vmkit::virtio::{Pci, Vsock};
use vmkit::{Capture, End, Guest, RunningVm, Serial, Vm, VmBuilder};
use vmkit_examples::agent;
use vmkit_examples::console::Console;
use vmkit_examples::debian::Flavour;
use vmkit_examples::initramfs::{Job, Network, Userland};
use vmkit_examples::modules::Module;
use vmkit_tests::linux::{BOOT_PATIENCE, Files, WORDS, alone, full_backends};

/// A kernel, busybox, and the modules for vsock; none if not to be had here.
fn files(transport: &str) -> Option<(Files, Vec<Module>)> {
    let files = Files::find(Flavour::Cloud)?;
    let modules = files.modules()?.with_dependencies(&[transport, "vmw_vsock_virtio_transport"]);
    Some((files, modules.unwrap()))
}

/// A kernel, and a RAM file system whose `/init` becomes the agent; none if not to be had here.
fn linux(transport: &str) -> Option<Linux> {
    let (files, modules) = files(transport)?;
    let linux = Linux::bzimage(&files.kernel).unwrap();
    Some(linux.initrd_bytes(initrd(&files.busybox, &modules)).cmdline(WORDS))
}

fn initrd(busybox: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Initramfs::new();
    for directory in ["/bin", "/dev", "/modules", "/proc", "/root", "/sys", "/tmp"] {
        archive = archive.dir(directory);
    }
    let mut init = "#!/bin/busybox sh\n\
                    /bin/busybox --install -s /bin\n\
                    export PATH=/bin\n\
                    mount -t proc proc /proc\n\
                    mount -t devtmpfs devtmpfs /dev\n\
                    mkdir -p /dev/pts\n\
                    mount -t devpts devpts /dev/pts\n"
        .to_owned();
    for Module { name, bytes } in modules {
        archive = archive.file(&format!("/modules/{name}.ko"), 0o644, bytes);
        init += &format!("insmod /modules/{name}.ko\n");
    }
    // As the first process it also buries what nobody else does.
    init += "exec /bin/vmkit-agent\n";
    archive
        .device("/dev/console", 5, 1)
        .file("/bin/busybox", 0o755, busybox)
        .symlink("/bin/sh", "busybox")
        .file("/bin/vmkit-agent", 0o755, AGENT)
        .file("/init", 0o755, init.as_bytes())
        .finish()
}

fn start(builder: VmBuilder) -> (RunningVm, Capture) {
    let text = Capture::with_limit(1 << 20);
    let builder = builder.memory(256 << 20).device(Serial::com1().output(text.clone()));
    (builder.build().unwrap().start().unwrap(), text)
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Everything an agent is for, in one guest: booting takes longer than all of it.
fn exercise(guest: &Guest) {
    // Commands.
    let uname = guest.exec("uname").arg("-a").output().unwrap();
    assert!(uname.status.success());
    assert!(text(&uname.stdout).starts_with("Linux "), "{uname:?}");
    let mut command = guest.exec("sh");
    command.args(["-c", "cd / && pwd; echo $COLOUR >&2; exit 7"]).env("COLOUR", "blue");
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(7), "/\n".into()));
    assert_eq!(text(&output.stderr), "blue\n");
    assert!(matches!(guest.exec("nothing").output(), Err(GuestError::Refused { .. })));

    // Streams.
    let bytes = noise(1 << 20);
    assert!(guest.exec("cat").input(bytes.clone()).output().unwrap().stdout == bytes);

    // Signals.
    let mut sleeper = guest.exec("sleep").arg("1000").spawn().unwrap();
    sleeper.signal(15).unwrap();
    assert_eq!(sleeper.wait().unwrap().signal(), Some(15));

    // A terminal.
    let mut shell = guest.exec("sh").pty(31, 97).spawn().unwrap();
    shell.stdin.as_mut().unwrap().write_all(b"stty size; tty; exit 3\n").unwrap();
    let mut said = Vec::new();
    shell.stdout.as_mut().unwrap().read_to_end(&mut said).unwrap();
    assert!(text(&said).contains("31 97\r\n/dev/pts/0\r\n"), "{}", text(&said));
    assert_eq!(shell.wait().unwrap().code(), Some(3));

    // Files.
    let bytes = noise(4 << 20);
    guest.copy_in(&*bytes, "/tmp/noise", 0o640).unwrap();
    assert!(guest.read("/tmp/noise").unwrap() == bytes);
    let sum = guest.exec("sha256sum").arg("/tmp/noise").output().unwrap();
    let again = guest.exec("sha256sum").input(bytes).output().unwrap();
    assert_eq!(text(&sum.stdout).split(' ').next(), text(&again.stdout).split(' ').next());
    let mode = guest.exec("stat").args(["-c", "%a %s", "/tmp/noise"]).output().unwrap();
    assert_eq!(text(&mode.stdout), "640 4194304\n");

    // Many at once.
    std::thread::scope(|scope| {
        for number in 0..16 {
            scope.spawn(move || {
                let script = format!("read word; echo $word {number}; exit {number}");
                let output = guest.exec("sh").args(["-c", &script]).input("word\n").output();
                let output = output.unwrap();
                assert_eq!(text(&output.stdout), format!("word {number}\n"));
                assert_eq!(output.status.code(), Some(number));
            });
        }
    });

    // The first process buries what others left behind.
    let left = guest.exec("sh").args(["-c", "(sleep 0.1 &) >/dev/null 2>&1"]).status().unwrap();
    assert!(left.success());
    let began = Instant::now();
    loop {
        let mut left = guest.exec("sh");
        left.args(["-c", "grep -lE '^State:.Z|^Name:.sleep' /proc/[0-9]*/status"]);
        let left = text(&left.output().unwrap().stdout);
        if left.is_empty() {
            break;
        }
        assert!(began.elapsed() < BOOT_PATIENCE, "not buried: {left}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_does_what_its_agent_is_asked() {
    let _alone = alone();
    for backend in full_backends() {
        let Some(linux) = linux("virtio_mmio") else { return };
        let mut vsock = Vsock::new(3).unwrap();
        let builder = Vm::builder().backend(backend.clone()).boot(linux);
        let (vm, console) = start(builder.guest_agent(&mut vsock).device(vsock));
        let guest = vm.guest().timeout(BOOT_PATIENCE);
        guest.wait_ready().unwrap_or_else(|error| panic!("{error}:\n{}", console.text()));
        exercise(&guest);
        // The machine ends, and with it whatever is asked of it.
        let end = guest.exec("poweroff").arg("-f").status();
        assert!(matches!(end, Err(GuestError::Disconnected) | Ok(_)), "{end:?}");
        assert_eq!(vm.wait_timeout(BOOT_PATIENCE).unwrap(), Some(End::PoweredOff), "{backend:?}");
        assert!(matches!(guest.exec("true").status(), Err(GuestError::Disconnected)));
    }
}

#[test]
fn an_agent_dials_again_after_a_lost_connection_and_ends_what_it_did_for_the_lost_one() {
    let _alone = alone();
    for backend in full_backends() {
        let Some(linux) = linux("virtio_pci") else { return };
        let mut vsock = Vsock::new(3).unwrap();
        let listener = Arc::new(Mutex::new(vsock.listen(PORT)));
        let host = vmkit::pci::PciHost::new().function(Pci::new(vsock));
        let builder = Vm::builder().backend(backend).boot(linux);
        let (vm, console) = start(builder.device(host));
        let connect = || {
            let listener = listener.clone();
            Guest::listening(move |limit| listener.lock().unwrap().accept_timeout(limit))
                .timeout(BOOT_PATIENCE)
        };
        let first = connect();
        first.wait_ready().unwrap_or_else(|error| panic!("{error}:\n{}", console.text()));
        let mut command = first.exec("sleep");
        command.arg("1000").stdout(Stdio::Null).stderr(Stdio::Null);
        let sleeper = command.spawn().unwrap();
        let process = sleeper.id();
        drop((first, command, sleeper));
        let second = connect();
        let lives = || {
            let kill = second.exec("kill").arg("-0").arg(process.to_string()).output();
            kill.unwrap().status.success()
        };
        let deadline = Instant::now() + BOOT_PATIENCE;
        while lives() {
            assert!(Instant::now() < deadline, "the sleeper outlives its connection");
            std::thread::sleep(Duration::from_millis(10));
        }
        // Nobody was asked for when this machine was built.
        assert!(matches!(vm.guest().exec("true").status(), Err(GuestError::NoAgent)));
        vm.stop().unwrap();
    }
}

/// Boots what `boot_linux --exec command` does with a socket device, for which the guest has a driver
/// or not. Returns the command's status and what the console said.
fn serve(command: &str, with_driver: bool) -> Option<(Option<u8>, String)> {
    let (files, mut modules) = files("virtio_mmio")?;
    if !with_driver {
        modules.clear();
    }
    let (job, network) = (Job::Serve(command.into()), Network::Untouched);
    let userland = Userland { busybox: &files.busybox, job, modules: &modules, network };
    let linux = Linux::bzimage(&files.kernel).unwrap().initrd_bytes(userland.build());
    let cmdline = format!("{WORDS} loglevel=1");
    let mut vsock = Vsock::new(3).unwrap();
    let builder = Vm::builder().boot(linux.cmdline(cmdline)).guest_agent(&mut vsock).device(vsock);
    let learnt = Console::default();
    let builder = builder.device(Serial::com2().on_output(learnt.watch_init()));
    let (vm, console) = start(builder);
    agent::start(&vm, learnt.clone()).unwrap();
    assert_eq!(vm.wait_timeout(BOOT_PATIENCE).unwrap(), Some(End::PoweredOff));
    Some((learnt.status(), console.text()))
}

/// Set in the process whose standard streams are looked at.
const INNER: &str = "VMKIT_TESTS_INNER";

#[test]
fn a_command_runs_through_the_agent_or_else_on_the_console() {
    let _alone = alone();
    let command = "echo said; echo complained >&2; exit 7";
    if std::env::var_os(INNER).is_some() {
        assert_eq!(serve(command, true).unwrap(), (Some(7), String::new()));
        return;
    }
    let Some((status, console)) = serve(command, false) else { return };
    assert_eq!((status, console.as_str()), (Some(7), "said\ncomplained\n"));
    // Through the agent, what it writes is this program's: another process of it shows what that is.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["a_command_runs_through_the_agent_or_else_on_the_console", "--exact", "--nocapture"])
        .env(INNER, "")
        .output()
        .unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    let count = |words: &str| (stdout.matches(words).count(), stderr.matches(words).count());
    assert_eq!(count("said\n"), (1, 0), "{stdout}");
    assert_eq!(count("complained\n"), (0, 1), "{stderr}");
}

#[test]
fn a_command_whose_agent_dies_does_not_run_again() {
    let _alone = alone();
    let Some((status, console)) = serve("kill -9 $PPID; sleep 1; echo again", true) else { return };
    // The shell of `/init` says that the agent was killed.
    assert_eq!((status, console.as_str()), (None, "Killed\r\n"));
}

#[test]
fn what_waits_for_a_guest_ends_with_its_machine() {
    let _alone = alone();
    let Some(linux) = linux("virtio_mmio") else { return };
    let mut vsock = Vsock::new(3).unwrap();
    let builder = Vm::builder().boot(linux).guest_agent(&mut vsock).device(vsock);
    let (vm, _) = start(builder);
    let guest = vm.guest().timeout(BOOT_PATIENCE);
    // While it boots: nobody has dialled in.
    let waiting = std::thread::spawn(move || guest.exec("sleep").arg("1000").status());
    std::thread::sleep(Duration::from_millis(200));
    vm.stop().unwrap();
    assert!(matches!(waiting.join().unwrap(), Err(GuestError::Disconnected)));
}
