//! Compiles the agent, a freestanding program for the guest, so that the library can hold it.
//!
//! It needs rustc and the linker that cargo itself uses, no other target and no C library.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=agent");
    println!("cargo::rerun-if-changed=src/protocol.rs");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    if let Err(why) = compile() {
        println!("cargo::error=the guest agent cannot be compiled: {why}");
    }
}

fn compile() -> Result<(), String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let output = Path::new(&variable("OUT_DIR")?).join("vmkit-agent");
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc.args(["--edition", "2024", "--crate-name", "vmkit_agent", "--crate-type", "bin"]);
    // Of what both sides share, each uses a part.
    rustc.args(["--allow", "dead_code"]);
    for option in [
        "opt-level=s",
        "panic=abort",
        "codegen-units=1",
        "lto=fat",
        "strip=symbols",
        "relocation-model=static",
        "target-feature=+crt-static",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        // The same bytes from the same source, wherever it is compiled.
        "link-arg=-Wl,--build-id=none",
    ] {
        rustc.args(["-C", option]);
    }
    // Guests are x86-64 Linux, and so are hosts: the compiler's own target has its `core` here.
    if !variable("HOST")?.starts_with("x86_64-unknown-linux") {
        rustc.args(["--target", &variable("TARGET")?]);
    } else if let Ok(linker) = env::var("RUSTC_LINKER")
        && variable("HOST")? == variable("TARGET")?
    {
        rustc.args(["-C", &format!("linker={linker}")]);
    }
    rustc.arg("-o").arg(&output).arg("agent/main.rs");
    let compiled = rustc.output().map_err(|error| format!("{rustc:?}: {error}"))?;
    if compiled.status.success() {
        return Ok(());
    }
    // Cargo's messages are lines.
    Err(String::from_utf8_lossy(&compiled.stderr).replace('\n', " "))
}
