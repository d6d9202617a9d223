//! Runs a guest kernel with its first serial port on standard output.
//!
//! `cargo run --release --example run_guest -- kernel.elf`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vmkit::{DebugExit, Serial, SerialOutput, Vm};
use vmkit_examples::args::{BackendArg, Size, port};
use vmkit_examples::{Failure, exit, image, logging, signals};

/// Runs an ELF, multiboot, Linux or flat guest with its serial port on standard output. A flat image
/// is loaded at 1 MiB and entered in long mode.
#[derive(Debug, Parser)]
#[command(name = "run_guest", after_help = exit::HELP)]
struct Args {
    /// The guest: ELF, multiboot 1, Linux bzImage or vmlinux, or a flat image.
    file: PathBuf,
    /// Command line for the guest.
    #[arg(long, value_name = "STR", default_value = "")]
    append: String,
    /// Guest memory, with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    memory: Size,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// What runs the guest.
    #[arg(long, value_enum, value_name = "B", default_value_t)]
    backend: BackendArg,
    /// Port that ends the guest: writing V exits with status (V << 1) | 1.
    #[arg(long, value_name = "PORT", default_value = "0xf4", value_parser = port)]
    debug_exit: u16,
    /// Initial RAM disk of a Linux kernel, or first module of a multiboot one.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Gives up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
}

fn main() -> ExitCode {
    logging::start();
    exit::report("run_guest", run(&Args::parse()))
}

fn run(args: &Args) -> Result<u8, Failure> {
    let limit = args.timeout.map(Duration::try_from_secs_f64).transpose();
    let limit = limit.map_err(|_| Failure::Other("--timeout wants a positive number".into()))?;
    let vm = Vm::builder()
        .memory(args.memory.0)
        .vcpus(args.vcpus)
        .backend(args.backend.into())
        .boot(image::open(&args.file, &args.append, args.initrd.as_deref())?)
        .device(Serial::com1().output(SerialOutput::stdout()))
        .device(DebugExit::at(args.debug_exit))
        .build()?;
    let caught = signals::stop_on_signal(vm.handle())?;
    let vm = vm.start()?;
    let end = match limit {
        None => vm.wait()?,
        Some(limit) => match vm.wait_timeout(limit)? {
            Some(end) => end,
            None => {
                vm.stop()?;
                eprintln!("run_guest: the guest still runs after {} s", limit.as_secs_f64());
                return Ok(exit::TIMED_OUT);
            }
        },
    };
    if let Some(status) = caught.status() {
        return Ok(status);
    }
    exit::tell("run_guest", &end);
    Ok(exit::status(&end))
}
