//! Who learns of a write to guest memory: a dirty bitmap, and a watch on lines that hold code.
//!
//! Dirty bits are per 4 KiB page and recorded only while dirty tracking is on. Watched lines are
//! 64 bytes: the software processor marks the lines it has decoded, and a write to one of them,
//! by whomever, calls the region's [`WriteWatch`].

#![allow(unsafe_code, reason = "zeroed memory that is not touched has no safe constructor")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a watched line: 64 of them make a page, one bit each in a `u64`.
pub const LINE_SIZE: u64 = 64;

/// Told of writes to watched lines. Called on the writing thread, after the write.
pub trait WriteWatch: Send + Sync {
    /// Bytes `offset .. offset + len` of the region were written and overlap a watched line.
    fn written(&self, offset: u64, len: u64);
}

/// A dirty bitmap: one bit per 4 KiB page of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// An all-clean bitmap for a region of `bytes`.
    pub fn for_bytes(bytes: u64) -> Self {
        Self { words: vec![0; bytes.div_ceil(PAGE_SIZE * 64) as usize] }
    }

    /// Marks `page`; a page past the end is ignored.
    pub fn mark(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    /// True if `page` is marked.
    pub fn is_marked(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0)
    }

    /// Marks what `words` marks: bit n of word m is page `64 * m + n`.
    pub fn merge(&mut self, words: &[u64]) {
        for (to, from) in self.words.iter_mut().zip(words) {
            *to |= from;
        }
    }

    /// The marked pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| i as u64 * 64 + bit)
        })
    }

    /// Number of marked pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }
}

/// The write tracker of one region. Cloning shares it.
#[derive(Clone, Default)]
pub struct WriteTracker {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    len: u64,
    read_only: bool,
    tracking: AtomicBool,
    dirty: Box<[AtomicU64]>,
    lines: Box<[AtomicU64]>,
    watch: OnceLock<Arc<dyn WriteWatch>>,
}

impl std::fmt::Debug for WriteTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteTracker").field("len", &self.inner.len).finish_non_exhaustive()
    }
}

/// Zeroed words that the host gives pages to only when they are touched.
fn zeroed(count: u64) -> Box<[AtomicU64]> {
    // SAFETY: zero is a value of `AtomicU64`, which has the layout of `u64`.
    unsafe { Box::new_zeroed_slice(count as usize).assume_init() }
}

impl WriteTracker {
    /// A tracker for a region of `len` bytes.
    pub fn new(len: u64) -> Self {
        Self::with(len, false)
    }

    /// A tracker for a region of `len` bytes that devices may only read.
    pub(crate) fn read_only(len: u64) -> Self {
        Self::with(len, true)
    }

    fn with(len: u64, read_only: bool) -> Self {
        let pages = len.div_ceil(PAGE_SIZE);
        Self {
            inner: Arc::new(Inner {
                len,
                read_only,
                tracking: AtomicBool::new(false),
                dirty: zeroed(pages.div_ceil(64)),
                lines: zeroed(pages),
                watch: OnceLock::new(),
            }),
        }
    }

    /// True if devices may only read the region.
    #[inline]
    pub(crate) fn is_read_only(&self) -> bool {
        self.inner.read_only
    }

    /// Turns dirty tracking on or off. Bits already set stay.
    pub fn set_tracking(&self, on: bool) {
        self.inner.tracking.store(on, Ordering::Release);
    }

    /// True while dirty tracking is on.
    pub fn tracking(&self) -> bool {
        self.inner.tracking.load(Ordering::Acquire)
    }

    /// Takes and clears the dirty bits, merging them into `into`.
    pub fn take_dirty(&self, into: &mut DirtyBitmap) {
        for (to, from) in into.words.iter_mut().zip(self.inner.dirty.iter()) {
            if from.load(Ordering::Relaxed) != 0 {
                *to |= from.swap(0, Ordering::AcqRel);
            }
        }
    }

    /// Sets the one who is told of writes to watched lines. The first call wins and returns true.
    pub fn set_watch(&self, watch: Arc<dyn WriteWatch>) -> bool {
        self.inner.watch.set(watch).is_ok()
    }

    /// Watches `lines` (bit n: bytes `64 * n ..` of the page) of page number `page`; returns the
    /// lines that were watched before. A page past the end is ignored.
    pub fn watch_lines(&self, page: u64, lines: u64) -> u64 {
        self.inner.lines.get(page as usize).map_or(0, |w| w.fetch_or(lines, Ordering::SeqCst))
    }

    /// Stops watching `lines` of `page`.
    pub fn unwatch_lines(&self, page: u64, lines: u64) {
        if let Some(w) = self.inner.lines.get(page as usize) {
            w.fetch_and(!lines, Ordering::SeqCst);
        }
    }

    /// The watched lines of page number `page`.
    pub fn watched_lines(&self, page: u64) -> u64 {
        self.inner.lines.get(page as usize).map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Marks page number `page` dirty if tracking is on.
    pub fn mark_page(&self, page: u64) {
        if self.inner.tracking.load(Ordering::Relaxed)
            && let Some(word) = self.inner.dirty.get((page / 64) as usize)
        {
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }

    /// The lines of one page that bytes `start ..= last` of that page touch.
    pub fn lines_of(start: u64, last: u64) -> u64 {
        let first = (start % PAGE_SIZE) / LINE_SIZE;
        let last = (last % PAGE_SIZE) / LINE_SIZE;
        (u64::MAX >> (63 - last)) & (u64::MAX << first)
    }

    fn report(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let watch = self.inner.watch.get();
        if watch.is_some() {
            // The write before the look at the watch: who decodes sets the watch and then reads.
            fence(Ordering::SeqCst);
        }
        let last = offset.saturating_add(len - 1).min(self.inner.len.saturating_sub(1));
        let (first_page, last_page) = (offset / PAGE_SIZE, last / PAGE_SIZE);
        let mut watched = false;
        for page in first_page..=last_page {
            self.mark_page(page);
            let from = if page == first_page { offset % PAGE_SIZE } else { 0 };
            let to = if page == last_page { last % PAGE_SIZE } else { PAGE_SIZE - 1 };
            watched |= self.watched_lines(page) & Self::lines_of(from, to) != 0;
        }
        if watched && let Some(watch) = watch {
            watch.written(offset, last - offset + 1);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteTracker {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.report(offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        let word = self.inner.dirty.get((page / 64) as usize);
        word.is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteTracker {
    fn with_len(len: usize) -> Self {
        Self::new(len as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);
    impl WriteWatch for Log {
        fn written(&self, offset: u64, len: u64) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn only_writes_to_watched_lines_are_told() {
        let tracker = WriteTracker::new(4 * PAGE_SIZE);
        let log = Arc::new(Log::default());
        assert!(tracker.set_watch(log.clone()));
        tracker.watch_lines(1, 0b10);
        tracker.mark_dirty(4096, 64);
        tracker.mark_dirty(4096 + 128, 64);
        assert!(log.0.lock().unwrap().is_empty());
        tracker.mark_dirty(4096 + 127, 1);
        tracker.mark_dirty(0, 3 * 4096);
        assert_eq!(*log.0.lock().unwrap(), [(4096 + 127, 1), (0, 3 * 4096)]);
        tracker.unwatch_lines(1, 0b10);
        tracker.mark_dirty(4096 + 64, 1);
        assert_eq!(log.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn dirty_pages_are_recorded_only_while_tracking() {
        let tracker = WriteTracker::new(200 * PAGE_SIZE);
        tracker.mark_dirty(0, 1);
        tracker.set_tracking(true);
        tracker.mark_dirty(70 * 4096 - 1, 2);
        let mut bitmap = DirtyBitmap::for_bytes(200 * PAGE_SIZE);
        tracker.take_dirty(&mut bitmap);
        assert_eq!(bitmap.pages().collect::<Vec<_>>(), [69, 70]);
        let mut again = DirtyBitmap::for_bytes(200 * PAGE_SIZE);
        tracker.take_dirty(&mut again);
        assert_eq!(again.count(), 0);
    }

    #[test]
    fn lines_cover_both_ends() {
        assert_eq!(WriteTracker::lines_of(0, 63), 1);
        assert_eq!(WriteTracker::lines_of(63, 64), 3);
        assert_eq!(WriteTracker::lines_of(0, 4095), u64::MAX);
    }
}
