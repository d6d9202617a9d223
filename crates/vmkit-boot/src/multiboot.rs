//! Multiboot 1 (Multiboot Specification 0.6.96): a 32-bit entry with a machine description in EBX.
//!
//! ELF images of both classes are taken, since many 64-bit kernels keep a 32-bit entry.

use std::path::Path;

use crate::elf::Elf;
use crate::image::{Image, View};
use crate::place::{EBDA_START, HIGH_START, Placement};
use crate::{Boot, BootContext, BootError, CpuMode, Entry, cpu, e820, firmware};

/// The header is searched in this many bytes, at multiples of four (§3.1).
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1BAD_B002;
const LOADER_MAGIC: u64 = 0x2BAD_B002;
const NAME: &[u8] = b"vmkit\0";

/// Flags of the header (§3.1.2). The first three are requests; what is not listed in the lower
/// half is a requirement that no loader of this version can meet.
const WANTS_VIDEO: u32 = 1 << 2;
const REQUIREMENTS: u32 = 0xFFFF;
const KNOWN: u32 = 0b111;
const HAS_ADDRESSES: u32 = 1 << 16;

/// A multiboot 1 kernel.
///
/// The kernel sees the file's name before the command line, as other loaders pass it; that of a
/// kernel in memory is `kernel`.
pub struct Multiboot {
    image: Image,
    cmdline: String,
    modules: Vec<(Image, String)>,
}

impl std::fmt::Debug for Multiboot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Multiboot")
            .field("image", &self.image.name)
            .field("modules", &self.modules.len())
            .finish_non_exhaustive()
    }
}

impl Multiboot {
    /// The kernel at `path`.
    ///
    /// # Errors
    /// [`BootError`] if it cannot be read or has no multiboot header.
    pub fn new(path: impl AsRef<Path>) -> Result<Self, BootError> {
        Self::checked(Image::open(path.as_ref())?)
    }

    /// A kernel in memory.
    ///
    /// # Errors
    /// [`BootError::Format`] if it has no multiboot header.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, BootError> {
        Self::checked(Image::new("kernel", bytes))
    }

    /// Sets the command line.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Adds the file at `path` as a module with its own string.
    ///
    /// # Errors
    /// [`BootError::Read`] or [`BootError::TooLarge`].
    pub fn module(
        mut self,
        path: impl AsRef<Path>,
        cmdline: impl Into<String>,
    ) -> Result<Self, BootError> {
        self.modules.push((Image::open(path.as_ref())?, cmdline.into()));
        Ok(self)
    }

    /// Adds `bytes` as a module with its own string.
    pub fn module_bytes(mut self, bytes: Vec<u8>, cmdline: impl Into<String>) -> Self {
        self.modules.push((Image::new("module", bytes), cmdline.into()));
        self
    }

    fn checked(image: Image) -> Result<Self, BootError> {
        Header::find(image.view())?;
        Ok(Self { image, cmdline: String::new(), modules: Vec::new() })
    }
}

/// True if `bytes` holds a multiboot header.
pub(crate) fn is_multiboot(bytes: &[u8]) -> bool {
    find_magic(bytes).is_some()
}

/// Offset of the first word of a header whose checksum is right.
fn find_magic(bytes: &[u8]) -> Option<(u64, u32)> {
    let head = &bytes[..bytes.len().min(SEARCH)];
    (0..head.len()).step_by(4).find_map(|at| {
        let word = |n: usize| -> Option<u32> {
            Some(u32::from_le_bytes(head.get(at + 4 * n..at + 4 * n + 4)?.try_into().ok()?))
        };
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        (magic == HEADER_MAGIC && sum == 0).then_some((at as u64, flags))
    })
}

/// The multiboot header.
struct Header {
    at: u64,
    /// The addresses that replace an ELF header, if there are any.
    addresses: Option<Addresses>,
}

/// The address fields of a header (§3.1.3): what to load where, all physical.
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

impl Header {
    fn find(view: View<'_>) -> Result<Self, BootError> {
        let head = view.get("the head of the image", 0, view.len().min(SEARCH as u64))?;
        let (at, flags) = find_magic(&head).ok_or_else(|| {
            view.format("multiboot kernel", 0, "no header in the first 8192 bytes")
        })?;
        if flags & REQUIREMENTS & !KNOWN != 0 {
            let what = format!("multiboot header flags {:#x}", flags & REQUIREMENTS & !KNOWN);
            return Err(view.unsupported(what));
        }
        if flags & WANTS_VIDEO != 0 {
            log::warn!("{}: asks for a video mode; the machine has no display", view.name);
        }
        let addresses = if flags & HAS_ADDRESSES != 0 {
            let word = |n: u64| view.u32("the multiboot address fields", at + 12 + 4 * n);
            Some(Addresses {
                header: word(0)?,
                load: word(1)?,
                load_end: word(2)?,
                bss_end: word(3)?,
                entry: word(4)?,
            })
        } else {
            None
        };
        Ok(Self { at, addresses })
    }
}

/// Loads the kernel and returns its entry.
fn load_kernel(view: View<'_>, place: &mut Placement<'_>) -> Result<u64, BootError> {
    let header = Header::find(view)?;
    match header.addresses {
        Some(addresses) => load_by_addresses(view, place, header.at, &addresses),
        None => {
            let elf = Elf::parse(view)?;
            elf.reserve("the image", place)?;
            firmware::write_if_free(place)?;
            elf.write(place)?;
            Ok(elf.entry())
        }
    }
}

fn load_by_addresses(
    view: View<'_>,
    place: &mut Placement<'_>,
    header_at: u64,
    addresses: &Addresses,
) -> Result<u64, BootError> {
    let &Addresses { header, load, load_end, bss_end, entry } = addresses;
    let start = header
        .checked_sub(load)
        .and_then(|before| header_at.checked_sub(before.into()))
        .ok_or_else(|| view.malformed(header_at + 16, "the load address is not in the file"))?;
    let len = match load_end {
        0 => view.len() - start,
        end => end.checked_sub(load).map(u64::from).ok_or_else(|| {
            view.malformed(header_at + 20, "the load end is before the load address")
        })?,
    };
    view.check("the multiboot image", start, len)?;
    let size =
        match bss_end {
            0 => len,
            end => end.checked_sub(load).map(u64::from).filter(|size| *size >= len).ok_or_else(
                || view.malformed(header_at + 24, "the bss end is before the load end"),
            )?,
        };
    place.reserve("the image", load.into(), size)?;
    firmware::write_if_free(place)?;
    place.copy(load.into(), view, start, len, size)?;
    Ok(entry.into())
}

impl Boot for Multiboot {
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError> {
        let view = self.image.view();
        let mut place = Placement::new(ctx, &self.image.name);
        let entry = load_kernel(view, &mut place)?;
        if entry > u64::from(u32::MAX) {
            return Err(view.unsupported(format!("multiboot entry {entry:#x} past 4 GiB")));
        }
        let info = self.put_info(&mut place)?;
        let mut entry = cpu::entry(&mut place, CpuMode::Protected32, entry)?;
        entry.state.general.set_rax(LOADER_MAGIC);
        entry.state.general.set_rbx(info);
        Ok(entry)
    }
}

impl Multiboot {
    /// Writes modules, strings and the information structure (§3.3); returns its address.
    fn put_info(&self, place: &mut Placement<'_>) -> Result<u64, BootError> {
        const MEMORY: u32 = 1;
        const CMDLINE: u32 = 1 << 2;
        const MODULES: u32 = 1 << 3;
        const MEMORY_MAP: u32 = 1 << 6;
        const LOADER_NAME: u32 = 1 << 9;

        let mut modules = Vec::new();
        for (image, string) in &self.modules {
            let len = image.view().len();
            let start = place.lowest("a module", HIGH_START, len, 4096)?;
            place.copy(start, image.view(), 0, len, len)?;
            let string = self.put_string(place, string)?;
            for word in [start, start + len, string, 0] {
                modules.extend_from_slice(&(word as u32).to_le_bytes());
            }
        }
        let modules_at = place.put_low("the module list", &modules, 16)?;
        let name = Path::new(&self.image.name).file_name().unwrap_or_default().to_string_lossy();
        let separator = if self.cmdline.is_empty() { "" } else { " " };
        let cmdline = self.put_string(place, &format!("{name}{separator}{}", self.cmdline))?;
        let map = memory_map(place.ctx);
        let map_at = place.put_low("the memory map", &map, 16)?;
        let name_at = place.put_low("the loader's name", NAME, 4)?;

        let low_end = place.low_ram_end();
        let mut info = [0_u8; 120];
        let mut set = |offset: usize, value: u64| {
            info[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
        };
        set(0, (MEMORY | CMDLINE | MODULES | MEMORY_MAP | LOADER_NAME).into());
        set(4, low_end.min(EBDA_START) >> 10);
        set(8, low_end.saturating_sub(HIGH_START) >> 10);
        set(16, cmdline);
        set(20, self.modules.len() as u64);
        set(24, modules_at);
        set(44, map.len() as u64);
        set(48, map_at);
        set(64, name_at);
        place.put_low("the multiboot information", &info, 16)
    }

    fn put_string(&self, place: &mut Placement<'_>, string: &str) -> Result<u64, BootError> {
        /// No kernel parses more; the limit keeps strings in low memory.
        const MAX: usize = 0x4000;
        let error = |reason| BootError::CommandLine {
            image: self.image.name.clone(),
            len: string.len(),
            max: MAX,
            reason,
        };
        if string.contains('\0') {
            return Err(error("holds a NUL byte"));
        }
        if string.len() > MAX {
            return Err(error("too long"));
        }
        place.put_low("a command line", &[string.as_bytes(), &[0]].concat(), 4)
    }
}

/// The memory map as multiboot has it: each entry after its own size.
fn memory_map(ctx: &BootContext<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for range in e820::memory_map(ctx) {
        bytes.extend_from_slice(&20_u32.to_le_bytes());
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.len.to_le_bytes());
        bytes.extend_from_slice(&(range.kind as u32).to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests;
