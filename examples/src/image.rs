//! From a file to what boots it, by what the file says it is.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use vmkit::Boot;
use vmkit::boot::{
    BootContext, BootError, CpuMode, Elf, Entry, Flat, ImageKind, Linux, Multiboot, detect,
};

use crate::Failure;

/// A guest of any format.
pub struct Guest(Box<dyn Boot>);

impl Boot for Guest {
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError> {
        self.0.load(ctx)
    }
}

/// Where a flat image is loaded.
pub const FLAT_BASE: u64 = 0x10_0000;

/// The guest in `file`, with a command line and an initial RAM disk (a module, for multiboot).
///
/// # Errors
/// [`Failure`] if the file cannot be read, or its format takes no RAM disk.
pub fn open(file: &Path, cmdline: &str, initrd: Option<&Path>) -> Result<Guest, Failure> {
    let guest: Box<dyn Boot> = match kind(file)? {
        ImageKind::BzImage => {
            Box::new(with_initrd(Linux::bzimage(file)?, initrd)?.cmdline(cmdline))
        }
        ImageKind::PvhElf | ImageKind::LinuxElf => {
            Box::new(with_initrd(Linux::vmlinux(file)?, initrd)?.cmdline(cmdline))
        }
        ImageKind::Multiboot => {
            let kernel = Multiboot::new(file)?.cmdline(cmdline);
            Box::new(match initrd {
                Some(module) => kernel.module(module, "")?,
                None => kernel,
            })
        }
        kind if initrd.is_some() => {
            return Err(Failure::Other(format!(
                "{}: {kind:?} images take no --initrd",
                file.display()
            )));
        }
        ImageKind::Elf32 | ImageKind::Elf64 => Box::new(Elf::new(file)?),
        _ => Box::new(Flat::open(FLAT_BASE, file)?.mode(CpuMode::Long64)),
    };
    Ok(Guest(guest))
}

/// What the file is. Most say so in their first bytes, and the rest is read only if they do not.
fn kind(file: &Path) -> Result<ImageKind, Failure> {
    let mut head = Vec::new();
    let mut opened = File::open(file).map_err(Failure::file(file))?;
    opened.by_ref().take(64 << 10).read_to_end(&mut head).map_err(Failure::file(file))?;
    let kind = detect(&head);
    if matches!(kind, ImageKind::BzImage | ImageKind::Multiboot) {
        return Ok(kind);
    }
    opened.read_to_end(&mut head).map_err(Failure::file(file))?;
    Ok(detect(&head))
}

fn with_initrd(linux: Linux, initrd: Option<&Path>) -> Result<Linux, Failure> {
    Ok(match initrd {
        Some(file) => linux.initrd(file)?,
        None => linux,
    })
}

/// The Linux kernel in `file`, bzImage or ELF.
///
/// # Errors
/// [`Failure`] if the file cannot be read or is no Linux kernel.
pub fn linux(file: &Path) -> Result<Linux, Failure> {
    let mut magic = [0; 4];
    let mut opened = File::open(file).map_err(Failure::file(file))?;
    // A shorter file is no kernel of either kind, which the loader says.
    let is_elf = opened.read_exact(&mut magic).is_ok() && &magic == b"\x7fELF";
    Ok(if is_elf { Linux::vmlinux(file)? } else { Linux::bzimage(file)? })
}
