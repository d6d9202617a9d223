//! A descriptor chain, read once and checked, and cursors over its two halves.
//!
//! Nothing here keeps a reference into guest memory between calls, and nothing is read twice.

use vmkit_memory::{
    Bytes, GuestAddress, GuestBuffers, GuestMemory, GuestMemoryBackend, GuestRam, Permissions,
    may_write, slice_to_write,
};

use crate::Fault;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address. Not checked.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A chain of buffers (virtio 1.2 §2.7.5): those the device may read, then those it may write.
/// Reused from request to request, so that a request allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) segments: Vec<Segment>,
    pub(crate) readable: usize,
}

impl Chain {
    /// An empty chain, to be filled by [`VirtQueue::pop`](crate::VirtQueue::pop).
    pub fn new() -> Self {
        Self::default()
    }

    /// The number the driver knows the chain by.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers the device may read.
    #[inline]
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// The buffers the device may write.
    #[inline]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// A reader of what the driver gave.
    #[inline]
    pub fn reader<'a>(&'a self, memory: &'a GuestRam) -> Reader<'a> {
        Reader { cursor: Cursor::new(memory, self.readable()) }
    }

    /// A writer to what the driver lent.
    #[inline]
    pub fn writer<'a>(&'a self, memory: &'a GuestRam) -> Writer<'a> {
        let cursor = Cursor::new(memory, self.writable());
        let size = cursor.left;
        Writer { cursor, size }
    }
}

#[derive(Clone)]
struct Cursor<'a> {
    memory: &'a GuestRam,
    segments: &'a [Segment],
    /// Bytes of the first segment that are done.
    done: u32,
    left: u64,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn new(memory: &'a GuestRam, segments: &'a [Segment]) -> Self {
        let left = segments.iter().map(|s| u64::from(s.len)).sum();
        Self { memory, segments, done: 0, left }
    }

    /// The next piece of at most `most` bytes, without stepping over it. An address that wraps
    /// stays where it is at the top, outside of any RAM.
    #[inline]
    fn piece(&mut self, most: u64) -> Option<(GuestAddress, u32)> {
        loop {
            let first = self.segments.first()?;
            let rest = first.len - self.done;
            if rest > 0 {
                let len = u64::from(rest).min(most) as u32;
                let at = first.addr.saturating_add(self.done.into());
                return Some((GuestAddress(at), len));
            }
            self.segments = self.segments.get(1..).unwrap_or_default();
            self.done = 0;
        }
    }

    /// Steps over `count` bytes of the first segment, which has them.
    #[inline]
    fn step(&mut self, count: u32) {
        self.done += count;
        self.left -= u64::from(count);
    }

    /// All that is left, piece by piece.
    fn pieces(&mut self) -> impl Iterator<Item = (GuestAddress, u32)> {
        std::iter::from_fn(|| {
            let (at, len) = self.piece(self.left)?;
            self.step(len);
            (len > 0).then_some((at, len))
        })
    }

    #[inline]
    fn skip(&mut self, count: u64) {
        // A cursor that was split off ends before its segments do.
        let mut count = count.min(self.left);
        while count > 0 {
            let Some((_, len)) = self.piece(count) else { return };
            self.step(len);
            count -= u64::from(len);
        }
    }

    /// A cursor over the next `count` bytes only; this one steps over them.
    #[inline]
    fn split(&mut self, count: u64) -> Self {
        let mut front = self.clone();
        front.left = count.min(self.left);
        self.skip(count);
        front
    }

    #[inline]
    fn buffers(&mut self, into: &mut GuestBuffers<'a>, access: Permissions) -> Result<(), Fault> {
        while self.left > 0 && !into.is_full() {
            let Some((at, len)) = self.piece(self.left) else { return Ok(()) };
            let found = if access == Permissions::Write {
                slice_to_write(self.memory, at, len as usize)
            } else {
                GuestMemoryBackend::get_slice(self.memory, at, len as usize).ok()
            };
            if let Some(slice) = found {
                if !into.push(slice) {
                    return Ok(());
                }
                self.step(len);
                continue;
            }
            // It spans regions, or is not there.
            let outside = || Fault::Memory { at: at.0, len: len.into() };
            if access == Permissions::Write && !may_write(self.memory, at, len as usize) {
                return Err(outside());
            }
            let slices = GuestMemory::get_slices(self.memory, at, len as usize, access)
                .map_err(|_| outside())?;
            for slice in slices {
                let slice = slice.map_err(|_| outside())?;
                let count = slice.len() as u32;
                if !into.push(slice) {
                    return Ok(());
                }
                self.step(count);
            }
        }
        Ok(())
    }
}

/// Reads the readable half of a chain, front to back.
#[derive(Clone)]
pub struct Reader<'a> {
    cursor: Cursor<'a>,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("remaining", &self.remaining()).finish_non_exhaustive()
    }
}

impl<'a> Reader<'a> {
    /// Bytes not read yet.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.cursor.left
    }

    /// Fills `into`.
    ///
    /// # Errors
    /// [`Fault::Short`] if the chain ends before, [`Fault::Memory`] if it leaves guest memory.
    #[inline]
    pub fn read_exact(&mut self, into: &mut [u8]) -> Result<(), Fault> {
        let missing = (into.len() as u64).saturating_sub(self.cursor.left);
        if missing > 0 {
            return Err(Fault::Short { missing });
        }
        self.read(into).map(|_| ())
    }

    /// Reads as much as there is, at most `into`.
    ///
    /// # Errors
    /// [`Fault::Memory`] if the chain leaves guest memory.
    #[inline]
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, Fault> {
        let mut done = 0;
        let most = (into.len() as u64).min(self.cursor.left);
        while (done as u64) < most {
            let Some((at, len)) = self.cursor.piece(most - done as u64) else { break };
            let end = done + len as usize;
            let Some(part) = into.get_mut(done..end) else { break };
            match GuestMemoryBackend::get_slice(self.cursor.memory, at, part.len()) {
                Ok(slice) => {
                    slice.copy_to(part);
                }
                // It spans regions, or is not there.
                Err(_) => self
                    .cursor
                    .memory
                    .read_slice(part, at)
                    .map_err(|_| Fault::Memory { at: at.0, len: len.into() })?,
            }
            self.cursor.step(len);
            done = end;
        }
        Ok(done)
    }

    /// Reads an array, as headers are.
    ///
    /// # Errors
    /// As [`read_exact`](Self::read_exact).
    #[inline]
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Steps over `count` bytes, or all that are left.
    pub fn skip(&mut self, count: u64) {
        self.cursor.skip(count);
    }

    /// A reader of the next `count` bytes only; this one steps over them.
    #[must_use]
    pub fn split(&mut self, count: u64) -> Self {
        Self { cursor: self.cursor.split(count) }
    }

    /// Adds what is left to `into`, as far as there is room, and steps over it.
    ///
    /// # Errors
    /// [`Fault::Memory`] if the chain leaves guest memory.
    pub fn buffers(&mut self, into: &mut GuestBuffers<'a>) -> Result<(), Fault> {
        self.cursor.buffers(into, Permissions::Read)
    }

    /// Steps over all that is left, piece by piece, which may lie outside of guest memory.
    pub(crate) fn pieces(&mut self) -> impl Iterator<Item = (GuestAddress, u32)> {
        self.cursor.pieces()
    }
}

/// Writes the writable half of a chain, front to back.
#[derive(Clone)]
pub struct Writer<'a> {
    cursor: Cursor<'a>,
    size: u64,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("remaining", &self.remaining())
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<'a> Writer<'a> {
    /// Bytes not written yet.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.cursor.left
    }

    /// Bytes written, as the used ring wants to know.
    #[inline]
    pub fn written(&self) -> u32 {
        u32::try_from(self.size - self.cursor.left).unwrap_or(u32::MAX)
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// [`Fault::Short`] if the chain ends before, [`Fault::Memory`] if it leaves guest memory
    /// or what devices may write of it.
    #[inline]
    pub fn write_all(&mut self, from: &[u8]) -> Result<(), Fault> {
        let missing = (from.len() as u64).saturating_sub(self.cursor.left);
        if missing > 0 {
            return Err(Fault::Short { missing });
        }
        let mut rest = from;
        while !rest.is_empty() {
            let Some((at, len)) = self.cursor.piece(rest.len() as u64) else { break };
            let Some((part, after)) = rest.split_at_checked(len as usize) else { break };
            match slice_to_write(self.cursor.memory, at, part.len()) {
                Some(slice) => slice.copy_from(part),
                // It spans regions, is not there, or is not to be written.
                None => {
                    let memory = self.cursor.memory;
                    let whole = may_write(memory, at, part.len());
                    let done = whole && memory.write_slice(part, at).is_ok();
                    done.then_some(()).ok_or(Fault::Memory { at: at.0, len: len.into() })?;
                }
            }
            self.cursor.step(len);
            rest = after;
        }
        Ok(())
    }

    /// Steps over `count` bytes as if they had been written.
    pub fn skip(&mut self, count: u64) {
        self.cursor.skip(count);
    }

    /// A writer of the next `count` bytes only; this one steps over them.
    #[must_use]
    pub fn split(&mut self, count: u64) -> Self {
        let cursor = self.cursor.split(count);
        let size = cursor.left;
        Self { cursor, size }
    }

    /// Adds what is left to `into`, as far as there is room, and steps over it.
    ///
    /// # Errors
    /// [`Fault::Memory`] if the chain leaves guest memory
    /// or what devices may write of it.
    pub fn buffers(&mut self, into: &mut GuestBuffers<'a>) -> Result<(), Fault> {
        self.cursor.buffers(into, Permissions::Write)
    }

    /// Steps over all that is left, piece by piece, which may lie outside of guest memory.
    pub(crate) fn pieces(&mut self) -> impl Iterator<Item = (GuestAddress, u32)> {
        self.cursor.pieces()
    }
}

#[cfg(test)]
mod tests {
    use vmkit_memory::{Backing, RamLayout, allocate};

    use super::*;

    fn chain(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Chain {
        let both = readable.iter().chain(writable);
        Chain {
            head: 0,
            segments: both.map(|&(addr, len)| Segment { addr, len }).collect(),
            readable: readable.len(),
        }
    }

    #[test]
    fn cursors_cross_segments_and_stop_at_the_end() {
        let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
        let chain = chain(&[(0x10, 3), (0x50, 0), (0x20, 4)], &[(0x30, 2), (0x40, 6)]);
        let mut writer = chain.writer(&ram);
        writer.write_all(b"abcde").unwrap();
        assert_eq!((writer.written(), writer.remaining()), (5, 3));
        assert!(matches!(writer.write_all(b"wxyz"), Err(Fault::Short { missing: 1 })));
        ram.write_slice(b"one", GuestAddress(0x10)).unwrap();
        ram.write_slice(b"four", GuestAddress(0x20)).unwrap();
        let mut reader = chain.reader(&ram);
        let mut front = reader.split(5);
        assert_eq!(&front.read_array::<5>().unwrap(), b"onefo");
        let mut rest = [0; 8];
        assert_eq!(reader.read(&mut rest).unwrap(), 2);
        assert_eq!(&rest[..2], b"ur");
        assert!(matches!(reader.read_array::<1>(), Err(Fault::Short { missing: 1 })));
    }

    #[test]
    fn what_was_split_off_has_no_more_however_far_one_steps() {
        let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
        let chain = chain(&[(0x10, 8)], &[(0x20, 8)]);
        let mut whole = chain.reader(&ram);
        let mut front = whole.split(3);
        front.skip(5);
        assert_eq!((front.remaining(), front.split(2).remaining()), (0, 0));
        let mut other = chain.reader(&ram).split(3);
        assert_eq!((other.split(7).remaining(), other.remaining()), (3, 0));
        let mut front = chain.writer(&ram).split(3);
        front.skip(u64::MAX);
        assert_eq!((front.remaining(), front.written()), (0, 3));
        assert_eq!(whole.remaining(), 5);
    }

    #[test]
    fn a_buffer_may_cross_from_one_region_into_the_next() {
        use std::sync::Arc;
        use vmkit_memory::region_at;
        let region =
            |at| Arc::new(region_at(GuestAddress(at), 0x1000, Backing::Anonymous).unwrap());
        let ram = GuestRam::from_arc_regions(vec![region(0), region(0x1000)]).unwrap();
        let chain = chain(&[(0xFFD, 6)], &[(0xFFD, 6)]);
        chain.writer(&ram).write_all(b"across").unwrap();
        assert_eq!(&chain.reader(&ram).read_array::<6>().unwrap(), b"across");
        let mut buffers = GuestBuffers::new();
        chain.reader(&ram).buffers(&mut buffers).unwrap();
        assert_eq!(buffers.slices().iter().map(|s| s.len()).collect::<Vec<_>>(), [3, 3]);
        assert_eq!(buffers.bytes(), 6);
    }

    #[test]
    fn addresses_outside_of_memory_are_faults_however_they_wrap() {
        let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
        for (at, len) in [(1 << 20, 4), ((1 << 20) - 2, 4), (u64::MAX - 1, 4), (u64::MAX, u32::MAX)]
        {
            let chain = chain(&[(at, len)], &[(at, len)]);
            let mut byte = [0; 4];
            assert!(matches!(chain.reader(&ram).read(&mut byte), Err(Fault::Memory { .. })));
            let result = chain.writer(&ram).write_all(&byte);
            assert!(matches!(result, Err(Fault::Memory { .. })), "{at:#x}");
            let mut buffers = GuestBuffers::new();
            assert!(chain.reader(&ram).buffers(&mut buffers).is_err());
        }
    }
}
