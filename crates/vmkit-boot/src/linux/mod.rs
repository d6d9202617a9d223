//! Linux kernels: bzImage and ELF, by the 64-bit (or 32-bit) boot protocol or by PVH.
//!
//! A bzImage's kernel is decompressed here, on the host, and loaded where it was linked; the guest
//! then starts in the kernel proper. Only a kernel whose compression is unknown runs its own
//! decompressor. Kernel address space randomisation is a service of that decompressor and does
//! not take place otherwise.

mod checksum;
mod header;
mod payload;
mod pvh;
mod zero_page;

#[cfg(test)]
mod tests;

use std::path::Path;

use linux_loader::bootparam::setup_header;
use vmkit_device::Announcement;

pub use self::payload::extract_vmlinux;

pub(crate) use self::header::is_bzimage;

use self::header::{ENTRY_64, SetupHeader, starts_as_bzimage};
use self::payload::Payload;
use crate::elf::{Class, Elf};
use crate::firmware;
use crate::image::{Image, View};
use crate::place::{HIGH_START, Placement};
use crate::{Boot, BootContext, BootError, CpuMode, Entry, cpu};

/// Longest command line of a kernel that does not say: x86's `COMMAND_LINE_SIZE` without its NUL.
const DEFAULT_CMDLINE_MAX: usize = 2047;
/// Highest address of an initrd for a kernel that does not say.
const DEFAULT_INITRD_MAX: u64 = 0x7FFF_FFFF;

/// A Linux kernel.
///
/// ```no_run
/// use vmkit_boot::Linux;
/// let linux = Linux::bzimage("/boot/vmlinuz")?
///     .initrd("/boot/initrd.img")?
///     .cmdline("console=ttyS0 panic=-1");
/// # Ok::<(), vmkit_boot::BootError>(())
/// ```
pub struct Linux {
    image: Image,
    initrd: Option<Image>,
    cmdline: String,
    virtio_mmio_words: bool,
}

impl std::fmt::Debug for Linux {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Linux")
            .field("image", &self.image.name)
            .field("initrd", &self.initrd.as_ref().map(|initrd| &initrd.name))
            .finish_non_exhaustive()
    }
}

/// Where the parts of the guest are that both protocols point to.
struct Guest {
    cmdline: u64,
    initrd: Option<(u64, u64)>,
    rsdp: u64,
}

/// What a kernel allows a loader.
struct Limits {
    cmdline: usize,
    initrd: u64,
}

impl Linux {
    /// The bzImage at `path`: what distributions install as `vmlinuz`.
    ///
    /// # Errors
    /// [`BootError`] if it cannot be read or its setup header is not that of a bzImage. The
    /// compressed kernel is looked at when the guest is loaded.
    pub fn bzimage(path: impl AsRef<Path>) -> Result<Self, BootError> {
        let image = Image::open(path.as_ref())?;
        SetupHeader::parse(image.view())?;
        Ok(Self::of(image))
    }

    /// The ELF kernel at `path`: `vmlinux` of a build, with or without debug information, or
    /// what [`extract_vmlinux`] gives.
    ///
    /// # Errors
    /// [`BootError`] if it cannot be read or is not an x86 ELF executable.
    pub fn vmlinux(path: impl AsRef<Path>) -> Result<Self, BootError> {
        let image = Image::open(path.as_ref())?;
        Elf::parse(image.view())?;
        Ok(Self::of(image))
    }

    /// A kernel in memory, of either format.
    ///
    /// # Errors
    /// [`BootError`] if it is neither.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, BootError> {
        let image = Image::new("Linux kernel", bytes);
        if starts_as_bzimage(image.view()) {
            SetupHeader::parse(image.view())?;
        } else {
            Elf::parse(image.view())?;
        }
        Ok(Self::of(image))
    }

    /// Sets the initial RAM disk or file system to the file at `path`.
    ///
    /// # Errors
    /// [`BootError::Read`] or [`BootError::TooLarge`].
    pub fn initrd(mut self, path: impl AsRef<Path>) -> Result<Self, BootError> {
        self.initrd = Some(Image::open(path.as_ref())?);
        Ok(self)
    }

    /// Sets the initial RAM disk or file system to `bytes`, an archive of
    /// [`Initramfs`](crate::Initramfs) for example.
    pub fn initrd_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.initrd = Some(Image::new("initrd", bytes));
        self
    }

    /// Sets the command line.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Adds a `virtio_mmio.device=` word to the command line for each virtio-mmio device. For
    /// kernels without ACPI only: others would find each device twice.
    pub fn virtio_mmio_words(mut self) -> Self {
        self.virtio_mmio_words = true;
        self
    }

    fn of(image: Image) -> Self {
        Self { image, initrd: None, cmdline: String::new(), virtio_mmio_words: false }
    }
}

impl Boot for Linux {
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError> {
        let view = self.image.view();
        if !starts_as_bzimage(view) {
            return self.load_elf(ctx, view, None);
        }
        let header = SetupHeader::parse(view)?;
        match payload::unpack(view, &header, ctx.layout.bytes())? {
            Payload::Elf(bytes) => {
                self.load_elf(ctx, payload::named(view, bytes).view(), Some(&header))
            }
            Payload::Opaque(reason) => {
                log::info!("{}: the guest decompresses its kernel itself: {reason}", view.name);
                self.load_code(ctx, view, &header)
            }
        }
    }
}

impl Linux {
    /// Loads an ELF kernel, which came out of a bzImage if there is a `header`.
    fn load_elf(
        &self,
        ctx: &BootContext<'_>,
        view: View<'_>,
        header: Option<&SetupHeader>,
    ) -> Result<Entry, BootError> {
        let elf = Elf::parse(view)?;
        let mut place = Placement::new(ctx, &self.image.name);
        if elf.extent().start < HIGH_START {
            return Err(view.unsupported("a Linux kernel that loads below 1 MiB"));
        }
        elf.reserve("the kernel", &mut place)?;
        elf.write(&place)?;
        let limits = header.map_or(
            Limits { cmdline: DEFAULT_CMDLINE_MAX, initrd: DEFAULT_INITRD_MAX },
            |header| Limits { cmdline: header.cmdline_max, initrd: header.initrd_max },
        );
        let guest = self.put_guest(&mut place, elf.extent().end, &limits)?;
        match (header, elf.pvh_entry) {
            (None, Some(entry)) => {
                let info = pvh::put(&mut place, &guest)?;
                let mut entry =
                    cpu::entry(&mut place, CpuMode::Protected32, below_4_gib(view, entry)?)?;
                entry.state.general.set_rbx(info);
                Ok(entry)
            }
            _ => {
                let raw = header.map_or_else(zero_page::synthetic_header, |header| header.raw);
                let mode = match elf.class {
                    Class::Elf32 => CpuMode::Protected32,
                    Class::Elf64 => CpuMode::Long64,
                };
                let entry = below_4_gib(view, elf.entry())?;
                enter(&mut place, raw, &guest, mode, entry)
            }
        }
    }

    /// Loads a bzImage's protected-mode code, which decompresses the kernel in the guest.
    fn load_code(
        &self,
        ctx: &BootContext<'_>,
        view: View<'_>,
        header: &SetupHeader,
    ) -> Result<Entry, BootError> {
        let mut place = Placement::new(ctx, &self.image.name);
        let (start, len) = header.code;
        place.reserve("the kernel", header.load, header.init_size)?;
        place.copy(header.load, view, start, len, len)?;
        let limits = Limits { cmdline: header.cmdline_max, initrd: header.initrd_max };
        let end = header.load + header.init_size;
        let guest = self.put_guest(&mut place, end, &limits)?;
        let mut raw = header.raw;
        raw.code32_start = header.load as u32;
        let (mode, entry) = if header.has_entry_64 {
            (CpuMode::Long64, header.load + ENTRY_64)
        } else {
            (CpuMode::Protected32, header.load)
        };
        enter(&mut place, raw, &guest, mode, entry)
    }

    /// Writes tables, command line and initrd. The kernel ends at `kernel_end`.
    fn put_guest(
        &self,
        place: &mut Placement<'_>,
        kernel_end: u64,
        limits: &Limits,
    ) -> Result<Guest, BootError> {
        let rsdp = firmware::write_tables(place.ctx)?.rsdp;
        let cmdline = self.command_line(place.ctx, limits.cmdline)?;
        let cmdline = place.put_low("the command line", &cmdline, 16)?;
        let mut initrd = None;
        if let Some(image) = self.initrd.as_ref().map(Image::view).filter(|image| image.len() != 0)
        {
            let len = image.len();
            let within = kernel_end..limits.initrd.saturating_add(1);
            let start = place.highest("the initrd", within, len, 4096)?;
            place.copy(start, image, 0, len, len)?;
            initrd = Some((start, len));
        }
        Ok(Guest { cmdline, initrd, rsdp })
    }

    /// The command line with its NUL.
    fn command_line(&self, ctx: &BootContext<'_>, max: usize) -> Result<Vec<u8>, BootError> {
        let mut line = self.cmdline.clone();
        if self.virtio_mmio_words {
            for announcement in ctx.announcements {
                if let Announcement::VirtioMmio { base, len, gsi } = announcement {
                    if !line.is_empty() {
                        line.push(' ');
                    }
                    line.push_str(&format!("virtio_mmio.device={len}@{base:#x}:{gsi}"));
                }
            }
        }
        let error = |reason| BootError::CommandLine {
            image: self.image.name.clone(),
            len: line.len(),
            max,
            reason,
        };
        if line.contains('\0') {
            return Err(error("holds a NUL byte"));
        }
        if line.len() > max {
            return Err(error("too long"));
        }
        line.push('\0');
        Ok(line.into_bytes())
    }
}

/// Enters at `entry` by the boot protocol of `mode`: the zero page in RSI.
fn enter(
    place: &mut Placement<'_>,
    header: setup_header,
    guest: &Guest,
    mode: CpuMode,
    entry: u64,
) -> Result<Entry, BootError> {
    let page = zero_page::put(place, header, guest)?;
    let mut entry = cpu::entry(place, mode, entry)?;
    entry.state.general.set_rsi(page);
    Ok(entry)
}

fn below_4_gib(view: View<'_>, entry: u64) -> Result<u64, BootError> {
    if entry >> 32 != 0 {
        return Err(view.unsupported(format!("entry {entry:#x} past 4 GiB")));
    }
    Ok(entry)
}
