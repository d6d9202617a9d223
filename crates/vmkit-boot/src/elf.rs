//! Reads executable ELF images of either class: their segments, entry and PVH note. Loads segments
//! at their physical addresses. Never looks at sections or symbols, never relocates.

use std::ops::Range;

use crate::BootError;
use crate::image::View;
use crate::place::Placement;

/// The magic every ELF file starts with.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, `public/elfnote.h`).
const PHYS32_ENTRY: u32 = 18;
/// Bytes of notes that are looked at; a kernel has some hundreds.
const NOTES_LIMIT: u64 = 64 << 10;

/// Word size of the file's own structures; says nothing certain about the code in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Elf32,
    Elf64,
}

/// A loadable segment.
#[derive(Clone, Debug)]
pub(crate) struct LoadSegment {
    vaddr: u64,
    pub(crate) paddr: u64,
    offset: u64,
    filesz: u64,
    memsz: u64,
}

impl LoadSegment {
    fn physical(&self) -> Range<u64> {
        self.paddr..self.paddr + self.memsz
    }
}

/// A parsed image. All offsets and sizes in it have been checked against the file.
#[derive(Clone, Debug)]
pub(crate) struct Elf<'a> {
    view: View<'a>,
    pub(crate) class: Class,
    entry: u64,
    pub(crate) segments: Vec<LoadSegment>,
    /// The 32-bit entry of a PVH note, if there is one.
    pub(crate) pvh_entry: Option<u64>,
}

/// One program header, both classes.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

impl ProgramHeader {
    fn read(view: View<'_>, class: Class, at: u64) -> Result<Self, BootError> {
        let what = "a program header";
        let word = |at| view.u32(what, at).map(u64::from);
        let long = |at| view.u64(what, at);
        Ok(match class {
            Class::Elf32 => Self {
                kind: view.u32(what, at)?,
                offset: word(at + 4)?,
                vaddr: word(at + 8)?,
                paddr: word(at + 12)?,
                filesz: word(at + 16)?,
                memsz: word(at + 20)?,
                align: word(at + 28)?,
            },
            Class::Elf64 => Self {
                kind: view.u32(what, at)?,
                offset: long(at + 8)?,
                vaddr: long(at + 16)?,
                paddr: long(at + 24)?,
                filesz: long(at + 32)?,
                memsz: long(at + 40)?,
                align: long(at + 48)?,
            },
        })
    }
}

impl<'a> Elf<'a> {
    /// Parses an executable for x86 (System V ABI, chapters 4 and 5).
    pub(crate) fn parse(view: View<'a>) -> Result<Self, BootError> {
        let ident = view.get("the ELF identification", 0, 16)?;
        if !ident.starts_with(MAGIC) {
            return Err(view.format("ELF file", 0, "no ELF magic"));
        }
        let class = match ident[4] {
            1 => Class::Elf32,
            2 => Class::Elf64,
            _ => return Err(view.malformed(4, "ELF class is neither 32 nor 64 bits")),
        };
        if ident[5] != 1 {
            return Err(view.malformed(5, "not little-endian"));
        }
        let what = "the ELF header";
        match view.u16(what, 16)? {
            2 => {}
            3 => return Err(view.unsupported("a position-independent ELF image")),
            _ => return Err(view.malformed(16, "not an executable ELF file")),
        }
        if !matches!(view.u16(what, 18)?, 3 | 62) {
            return Err(view.unsupported("an ELF image for another processor than x86"));
        }
        let (entry, table, size_at, count_at, min_size) = match class {
            Class::Elf32 => (view.u32(what, 24)?.into(), view.u32(what, 28)?.into(), 42, 44, 32),
            Class::Elf64 => (view.u64(what, 24)?, view.u64(what, 32)?, 54, 56, 56),
        };
        let entry_size = u64::from(view.u16(what, size_at)?);
        let count = u64::from(view.u16(what, count_at)?);
        if entry_size < min_size {
            return Err(view.malformed(size_at, "program headers are too small"));
        }
        // Proves that no offset into the table below can wrap.
        view.check("the program headers", table, entry_size * count)?;

        let mut elf = Self { view, class, entry, segments: Vec::new(), pvh_entry: None };
        for at in (0..count).map(|n| table + n * entry_size) {
            let header = ProgramHeader::read(view, class, at)?;
            match header.kind {
                LOAD if header.memsz != 0 => elf.segments.push(load_segment(view, &header, at)?),
                NOTE => {
                    view.check("a note segment", header.offset, header.filesz)?;
                    let len = header.filesz.min(NOTES_LIMIT);
                    let notes = view.get("a note segment", header.offset, len)?;
                    let align = if header.align == 8 { 8 } else { 4 };
                    elf.pvh_entry = elf.pvh_entry.or_else(|| pvh_entry(&notes, align));
                }
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(view.malformed(table, "no segment to load"));
        }
        Ok(elf)
    }

    /// The physical address of the entry. An entry that lies in no segment's physical range but in
    /// one's virtual range is translated, as kernels in the upper half need it.
    pub(crate) fn entry(&self) -> u64 {
        let entry = self.entry;
        if self.segments.iter().any(|s| s.physical().contains(&entry)) {
            return entry;
        }
        self.segments
            .iter()
            .find(|s| entry.checked_sub(s.vaddr).is_some_and(|offset| offset < s.memsz))
            .map_or(entry, |s| entry - s.vaddr + s.paddr)
    }

    /// From the lowest to past the highest physical address that is loaded.
    pub(crate) fn extent(&self) -> Range<u64> {
        let start = self.segments.iter().map(|s| s.paddr).min().unwrap_or(0);
        let end = self.segments.iter().map(|s| s.physical().end).max().unwrap_or(0);
        start..end
    }

    /// True if a segment's virtual address is in the upper half, as a kernel's is.
    pub(crate) fn upper_half(&self) -> bool {
        self.class == Class::Elf64 && self.segments.iter().any(|s| s.vaddr >> 63 != 0)
    }

    /// Takes the RAM of all segments.
    pub(crate) fn reserve(
        &self,
        what: &'static str,
        place: &mut Placement<'_>,
    ) -> Result<(), BootError> {
        // The highest first: if RAM is too small, the error then names the whole need.
        let mut order: Vec<_> = self.segments.iter().collect();
        order.sort_by_key(|s| std::cmp::Reverse(s.paddr));
        order.iter().try_for_each(|s| place.reserve(what, s.paddr, s.memsz))
    }

    /// Writes all segments, whose RAM has been taken.
    pub(crate) fn write(&self, place: &Placement<'_>) -> Result<(), BootError> {
        self.segments
            .iter()
            .try_for_each(|s| place.copy(s.paddr, self.view, s.offset, s.filesz, s.memsz))
    }
}

fn load_segment(view: View<'_>, header: &ProgramHeader, at: u64) -> Result<LoadSegment, BootError> {
    if header.filesz > header.memsz {
        return Err(view.malformed(at, "a segment is longer in the file than in memory"));
    }
    if header.paddr.checked_add(header.memsz).is_none() {
        return Err(view.malformed(at, "a segment wraps around the address space"));
    }
    view.check("a segment", header.offset, header.filesz)?;
    Ok(LoadSegment {
        vaddr: header.vaddr,
        paddr: header.paddr,
        offset: header.offset,
        filesz: header.filesz,
        memsz: header.memsz,
    })
}

/// Looks for the PVH entry among `notes`. Notes end silently where they stop making sense: nothing
/// else depends on them.
fn pvh_entry(notes: &[u8], align: usize) -> Option<u64> {
    let mut rest = notes;
    loop {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(rest.get(at..at + 4)?.try_into().ok()?))
        };
        let (name_len, desc_len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let desc_at = 12_usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let desc_end = desc_at.checked_add(desc_len)?;
        let name = rest.get(12..12 + name_len)?;
        let desc = rest.get(desc_at..desc_end)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            return match desc.len() {
                4 => Some(u32::from_le_bytes(desc.try_into().ok()?).into()),
                8 => Some(u64::from_le_bytes(desc.try_into().ok()?)),
                _ => None,
            };
        }
        rest = rest.get(desc_end.checked_next_multiple_of(align)?..)?;
    }
}
