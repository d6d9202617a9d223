//! Boots a stock Linux kernel: a shell on this terminal, or one command.
//!
//! `cargo run --release --example boot_linux -- --exec 'uname -a'`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use vmkit::boot::Linux;
use vmkit::memory::Backing;
use vmkit::{End, OutputProbe, RunningVm, Serial, SerialInput, SerialOutput, Vm};
use vmkit_examples::agent;
use vmkit_examples::args::{AgentArg, BackendArg, IrqchipArg, Size};
use vmkit_examples::console::Console;
use vmkit_examples::debian::{self, Flavour};
use vmkit_examples::devices::Devices;
use vmkit_examples::initramfs::{Job, Userland};
use vmkit_examples::keyboard::{self, Keyboard};
use vmkit_examples::modules::Module;
use vmkit_examples::signals::{self, Caught};
use vmkit_examples::terminal::{self, RawTerminal};
use vmkit_examples::timing::Table;
use vmkit_examples::{Failure, exit, image, logging};

/// Boots a stock Linux kernel in a virtual machine. Without arguments it finds or fetches Debian's
/// cloud kernel and busybox and gives a shell on this terminal; Ctrl-A x ends it.
#[derive(Debug, Parser)]
#[command(name = "boot_linux", after_help = exit::HELP)]
struct Args {
    /// Kernel: bzImage or vmlinux. Debian's cloud kernel if not given.
    #[arg(long, value_name = "F")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system of your own; the program then just boots it.
    #[arg(long, value_name = "F")]
    initrd: Option<PathBuf>,
    /// Statically linked busybox for the shell. Debian's if not given.
    #[arg(long, value_name = "F", conflicts_with = "initrd")]
    busybox: Option<PathBuf>,
    /// More words for the kernel's command line.
    #[arg(long, value_name = "STR", default_value = "")]
    append: String,
    /// Guest memory, with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// What runs the guest.
    #[arg(long, value_enum, value_name = "B", default_value_t)]
    backend: BackendArg,
    /// Where the interrupt controllers are.
    #[arg(long, value_enum, value_name = "I", default_value_t)]
    irqchip: IrqchipArg,
    /// Runs one command in the guest, without the kernel's log, and exits with its status. The
    /// command has this program's standard input, output and error.
    #[arg(long, value_name = "CMD", conflicts_with = "initrd")]
    exec: Option<String>,
    /// How --exec's command is run.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    agent: AgentArg,
    /// Shows when the stages of the boot were reached, and the guest's speed.
    #[arg(long)]
    timing: bool,
    /// Without the kernel's log.
    #[arg(long)]
    quiet: bool,
    /// Boots Debian's full kernel instead of its cloud kernel.
    #[arg(long, conflicts_with = "kernel")]
    full: bool,
    #[command(flatten)]
    devices: Devices,
}

/// How long a kernel that panicked may take to act on it.
const PANIC_GRACE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    logging::start();
    let result = run(&Args::parse());
    terminal::restore();
    exit::report("boot_linux", result)
}

/// The handles on the guest's serial ports.
struct Ports {
    console: Console,
    keyboard: SerialInput,
    probe: OutputProbe,
}

fn run(args: &Args) -> Result<u8, Failure> {
    let (guest, agent) = guest(args)?;
    let console = Console::default();
    let com1 = Serial::com1().output(SerialOutput::stdout()).on_output(console.watch_kernel());
    let ports = Ports { keyboard: com1.input(), probe: com1.probe(), console };
    let builder = Vm::builder()
        .memory(args.memory.0)
        // Nobody else maps it, so it may come in huge pages, with which a kernel starts sooner.
        .memory_backing(Backing::Anonymous)
        .vcpus(args.vcpus)
        .backend(args.backend.into())
        .interrupt_controllers(args.irqchip.into())
        .boot(guest)
        .device(com1)
        .device(Serial::com2().on_output(ports.console.watch_init()));
    let (builder, _helper) = args.devices.plug(builder, agent)?;
    let vm = builder.build()?;
    let caught = signals::stop_on_signal(vm.handle())?;
    let raw = match args.exec {
        None => RawTerminal::enter(&std::io::stdin())?,
        Some(_) => None,
    };
    let vm = vm.start()?;
    let keyboard = keyboard(args, &vm, &ports)?;
    if agent {
        agent::start(&vm, ports.console.clone())?;
    }
    let end = wait(&vm, &ports);
    drop(raw);
    if agent && ports.console.init_ran_it() {
        log::warn!("the guest has no drivers for an agent: its command ran on the console");
    }
    let status = status(args, end?, &ports.console, &caught, &keyboard);
    if args.timing {
        eprint!("{}", timing(&vm, &ports));
    }
    status
}

/// The kernel, its RAM file system and its command line, and whether an agent is in it.
fn guest(args: &Args) -> Result<(Linux, bool), Failure> {
    let kernel = match &args.kernel {
        Some(file) => file.clone(),
        None => debian::kernel(if args.full { Flavour::Full } else { Flavour::Cloud })?,
    };
    let mut cmdline = "console=ttyS0 panic=-1".to_owned();
    if args.quiet || args.exec.is_some() {
        // Only what is about to end the kernel.
        cmdline += " loglevel=1";
    }
    if !args.append.is_empty() {
        cmdline = format!("{cmdline} {}", args.append);
    }
    let linux = image::linux(&kernel)?.cmdline(cmdline);
    if let Some(initrd) = &args.initrd {
        return Ok((linux.initrd(initrd)?, false));
    }
    let busybox = match &args.busybox {
        Some(file) => file.clone(),
        None => debian::busybox()?,
    };
    let on_disk = args.append.split_whitespace().any(|word| word.starts_with("root="));
    let (modules, agent) = drivers(args, &kernel)?;
    let job = match &args.exec {
        Some(_) if on_disk => {
            return Err(Failure::Other("--exec does not boot the system of root=".into()));
        }
        Some(command) if agent => Job::Serve(command.clone()),
        Some(command) => Job::Run(command.clone()),
        None if on_disk => Job::Disk,
        None => Job::Shell(terminal::size()),
    };
    let busybox = read(&busybox)?;
    let network = args.devices.network();
    let userland = Userland { busybox: &busybox, job, modules: &modules, network };
    Ok((linux.initrd_bytes(userland.build()), agent))
}

/// The modules that the guest needs for its devices, and whether the agent is among those: nobody asked
/// for it, so that it may be missing.
fn drivers(args: &Args, kernel: &Path) -> Result<(Vec<Module>, bool), Failure> {
    if args.exec.is_some() && args.agent == AgentArg::Auto {
        match modules(kernel, &args.devices.modules(true)) {
            Ok(modules) => return Ok((modules, true)),
            Err(failure) => log::warn!("the command runs on the console: {failure}"),
        }
    }
    Ok((modules(kernel, &args.devices.modules(false))?, false))
}

/// The modules of these names and what they need. A kernel without modules may have their drivers built
/// in.
fn modules(kernel: &Path, names: &[&str]) -> Result<Vec<Module>, Failure> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    match debian::modules(kernel)? {
        Some(modules) => modules.with_dependencies(names),
        None => {
            let kernel = kernel.display();
            eprintln!("boot_linux: {kernel}: no modules found; its drivers must be built in");
            Ok(Vec::new())
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(file).map_err(Failure::file(file))
}

/// Connects standard input, unless the guest has nobody to read it.
fn keyboard(args: &Args, vm: &RunningVm, ports: &Ports) -> Result<Keyboard, Failure> {
    let terminal = std::io::stdin().is_terminal();
    if args.exec.is_some() || (args.initrd.is_some() && !terminal) {
        return Ok(Keyboard::default());
    }
    let console = ports.console.clone();
    let ready = move || console.init().is_some();
    keyboard::attach(ports.keyboard.clone(), vm.handle(), terminal, ready)
}

/// Waits for the end. A kernel that panicked and neither resets nor tells anybody is stopped, and
/// so is one that nobody can hear.
fn wait(vm: &RunningVm, ports: &Ports) -> Result<End, Failure> {
    let console = &ports.console;
    let end = loop {
        if let Some(end) = vm.wait_timeout(Duration::from_millis(200))? {
            break end;
        }
        if ports.probe.lost() > 0 {
            vm.stop()?;
            return Err(Failure::Other("standard output is closed".into()));
        }
        if console.panicked().is_some_and(|at| at.elapsed() > PANIC_GRACE) {
            vm.stop()?;
            break End::GuestPanicked;
        }
    };
    // With `panic=-1` a kernel without a panic notifier asks for a reset.
    Ok(if end == End::Reset && console.panicked().is_some() { End::GuestPanicked } else { end })
}

fn status(
    args: &Args,
    end: End,
    console: &Console,
    caught: &Caught,
    keyboard: &Keyboard,
) -> Result<u8, Failure> {
    if let Some(status) = caught.status() {
        return Ok(status);
    }
    if keyboard.quit() {
        return Ok(0);
    }
    if keyboard.nothing_came() {
        let advice = "nobody can type at the shell; --exec CMD runs a command without it";
        return Err(Failure::Other(format!("standard input is closed: {advice}")));
    }
    exit::tell("boot_linux", &end);
    match (end, console.status()) {
        (End::PoweredOff, Some(status)) => Ok(status),
        (End::PoweredOff, None) if args.exec.is_some() => {
            Err(Failure::Other("the guest powered off without the command's status".into()))
        }
        _ => Ok(exit::status(&end)),
    }
}

fn timing(vm: &RunningVm, ports: &Ports) -> String {
    let times = vm.timeline();
    let mut table = Table::from(times.build_began);
    table.mark("machine", Some(times.load_began));
    table.mark("load", Some(times.loaded));
    table.mark("build", Some(times.built));
    table.mark("first instruction", times.first_instruction);
    table.mark("kernel's first console byte", ports.probe.first_byte());
    table.mark("/init running", ports.console.init());
    table.mark("end", times.ended);
    let since = |at: Option<Instant>| Some(at?.saturating_duration_since(times.first_instruction?));
    table.figure("backend", vm.capabilities().name);
    for (index, stats) in vm.vcpu_stats().iter().enumerate() {
        let (ports, memory, nobody) = (stats.pio, stats.mmio, stats.unclaimed);
        let what = format!("{ports} of ports, {memory} of memory, {nobody} of them nobody's");
        table.figure("accesses of vCPU", format!("{index}: {what}"));
    }
    table.instructions(vm.instructions(), since(times.ended));
    table.memory();
    table.render()
}
