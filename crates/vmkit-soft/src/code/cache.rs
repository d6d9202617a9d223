//! Blocks of decoded operations, found by guest-physical address and mode.
//!
//! Blocks live in an arena that is only ever emptied whole, between blocks; so a pointer to a block
//! stays good while code runs, and dropping a block means unlinking it and bumping the generation
//! that all links between blocks are stamped with. A vCPU has its own cache.
//!
//! A link leads from a block to another of the same page of the linear address space, and so is good
//! however that page is mapped. Any other way is remembered by its address, under the stamp of the
//! translations it was found by.

#![allow(unsafe_code, reason = "blocks and operations are linked by place within the arena")]

use std::collections::HashMap;
use std::ptr::{NonNull, null, null_mut};

use super::op::{Cold, Op, OpRef};
use crate::cpu::Mode;

/// Operations of one chunk of the arena.
const CHUNK_OPS: usize = 4096;
/// Blocks of one chunk of the arena.
const CHUNK_BLOCKS: usize = 512;
/// The arena is emptied past this many chunks: 512 Ki operations of 32 bytes.
const MAX_CHUNKS: usize = 128;
const BUCKETS: usize = 1 << 16;
const JUMPS: usize = 1 << 12;
const CHUNK_COLD: usize = 1024;

/// No page: page addresses are multiples of 4096.
const NO_PAGE: u64 = u64::MAX;

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Guest-physical address of its first byte.
    pub pa: u64,
    pub mode: Mode,
}

/// A block this one leads to, good while `generation` is the processor's (`Cpu::generation`).
#[derive(Clone, Copy)]
pub(crate) struct Link {
    pub generation: u64,
    pub block: *const Block,
}

/// A link that is never good.
const NO_LINK: Link = Link { generation: 0, block: null() };
/// The generation of a link that must not be made: it leads out of its block's page, which may lie at several
/// addresses, each with its own neighbours.
pub(crate) const ELSEWHERE: u64 = u64::MAX;

/// Whether the last instruction of a block branches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Branch {
    #[default]
    Never,
    /// On a condition.
    Perhaps,
    Always,
}

/// A run of instructions with one entry.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    first: *mut Op,
    /// Operations, the ending one included.
    len: u32,
    /// Instructions.
    pub instructions: u32,
    key: Key,
    /// Bytes of code.
    pub bytes: u32,
    /// Whether its last instruction branches.
    pub branch: Branch,
    /// Guest-physical page that the block's last instruction crosses into, or `NO_PAGE`.
    second_page: u64,
    /// Where it leads: fall-through or not taken, and taken.
    pub links: [Link; 2],
    next_in_bucket: *mut Block,
    next_in_page: *mut Block,
}

impl Block {
    /// The first operation.
    #[inline(always)]
    pub fn first(&self) -> OpRef {
        // SAFETY: `first` points into the arena, which outlives the block, at a finished block.
        unsafe { OpRef::new(NonNull::new_unchecked(self.first)) }
    }

    /// How many instructions of this block come before `op`.
    pub fn position(&self, op: OpRef) -> u64 {
        let ops = (op.as_ptr() as usize - self.first as usize) as u64 / size_of::<Op>() as u64;
        // The look at the code segment's limit is none.
        ops.saturating_sub(self.key.mode.contains(Mode::LIMIT).into())
    }

    /// Guest-physical page that its last instruction crosses into, if it does.
    pub fn second_page(&self) -> Option<u64> {
        (self.second_page != NO_PAGE).then_some(self.second_page)
    }

    /// What it is found by.
    pub fn key(&self) -> Key {
        self.key
    }

    fn lines(&self) -> u64 {
        let last = self.key.pa + u64::from(self.bytes.max(1)) - 1;
        let last = last.min(self.key.pa | 0xFFF);
        vmkit_memory::WriteTracker::lines_of(self.key.pa, last)
    }
}

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    context: u64,
    /// `Cpu::translations` when it was found.
    translations: u64,
    block: *const Block,
}

/// A jump that leads nowhere.
const NO_JUMP: Jump = Jump { rip: 0, context: 0, translations: 0, block: null() };

/// The blocks that overlap a page.
struct Page {
    /// Blocks that start in it.
    head: *mut Block,
    /// Blocks that start in the page before and end in it.
    crossing: Vec<*mut Block>,
}

/// Storage whose elements never move, handed out in order and taken back all at once.
struct Arena<T: Copy> {
    chunks: Vec<*mut T>,
    chunk_len: usize,
    chunk: usize,
    used: usize,
}

impl<T: Copy> Arena<T> {
    fn new(chunk_len: usize) -> Self {
        Self { chunks: Vec::new(), chunk_len, chunk: 0, used: 0 }
    }

    /// Copies `items` (at most a chunk) into a contiguous place.
    fn push(&mut self, items: &[T]) -> *mut T {
        if self.used + items.len() > self.chunk_len {
            self.chunk += 1;
            self.used = 0;
        }
        while self.chunks.len() <= self.chunk {
            let mut chunk = std::mem::ManuallyDrop::new(Vec::with_capacity(self.chunk_len));
            self.chunks.push(chunk.as_mut_ptr());
        }
        let place = self.chunks[self.chunk].wrapping_add(self.used);
        self.used += items.len();
        assert!(items.len() <= self.chunk_len);
        // SAFETY: `place` has room for `items.len()` elements inside its chunk, as checked above.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), place, items.len()) };
        place
    }

    fn clear(&mut self) {
        self.chunk = 0;
        self.used = 0;
    }
}

impl<T: Copy> Drop for Arena<T> {
    fn drop(&mut self) {
        for &chunk in &self.chunks {
            // SAFETY: `chunk` came from a `Vec` of this capacity; elements are `Copy`, nothing to drop.
            drop(unsafe { Vec::from_raw_parts(chunk, 0, self.chunk_len) });
        }
    }
}

/// A processor's decoded code.
pub(crate) struct CodeCache {
    ops: Arena<Op>,
    blocks: Arena<Block>,
    cold: Arena<Cold>,
    buckets: Box<[*mut Block]>,
    pages: HashMap<u64, Page>,
    jumps: Box<[Jump]>,
    /// Instructions decoded since the beginning.
    pub decoded: u64,
}

// SAFETY: the pointers lead into the cache's own arenas, so it moves between threads as a whole.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub fn new() -> Self {
        Self {
            ops: Arena::new(CHUNK_OPS),
            blocks: Arena::new(CHUNK_BLOCKS),
            cold: Arena::new(CHUNK_COLD),
            buckets: vec![null_mut(); BUCKETS].into(),
            pages: HashMap::new(),
            jumps: vec![NO_JUMP; JUMPS].into(),
            decoded: 0,
        }
    }

    fn bucket(key: Key) -> usize {
        let mixed = (key.pa ^ u64::from(key.mode.bits()) << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> 40) as usize & (BUCKETS - 1)
    }

    /// The block for `key`, if it is decoded.
    pub fn find(&self, key: Key) -> Option<&Block> {
        let mut at = self.buckets[Self::bucket(key)];
        while !at.is_null() {
            // SAFETY: bucket chains hold blocks of the arena.
            let block = unsafe { &*at };
            if block.key == key {
                return Some(block);
            }
            at = block.next_in_bucket;
        }
        None
    }

    /// The block that `rip` leads to in a context of the processor's (`Cpu::context`), if that is
    /// remembered from under these translations.
    #[inline(always)]
    pub fn jump(&self, rip: u64, context: u64, translations: u64) -> *const Block {
        let jump = &self.jumps[Self::jump_index(rip)];
        let same = (jump.rip ^ rip) | (jump.context ^ context) == 0;
        if same && jump.translations == translations { jump.block } else { null() }
    }

    /// The block that `rip` led to under whatever translations, if it is the one for `key`: what
    /// [`find`](Self::find) finds, sooner.
    pub fn recall(&self, rip: u64, context: u64, key: Key) -> Option<&Block> {
        let jump = &self.jumps[Self::jump_index(rip)];
        if jump.block.is_null() || jump.rip != rip || jump.context != context {
            return None;
        }
        // SAFETY: a block of the arena, which was not emptied since: that forgets all jumps.
        let block = unsafe { &*jump.block };
        (block.key == key).then_some(block)
    }

    /// Remembers that `rip` leads to `block`.
    pub fn set_jump(&mut self, rip: u64, context: u64, translations: u64, block: *const Block) {
        self.jumps[Self::jump_index(rip)] = Jump { rip, context, translations, block };
    }

    #[inline(always)]
    fn jump_index(rip: u64) -> usize {
        (rip ^ rip >> 11) as usize & (JUMPS - 1)
    }

    /// Keeps what a cold operation runs; the pointer goes into [`Op::disp`].
    pub fn keep_cold(&mut self, cold: Cold) -> i64 {
        self.cold.push(&[cold]) as i64
    }

    /// Keeps a decoded block and returns it.
    pub fn insert(
        &mut self,
        key: Key,
        ops: &[Op],
        instructions: u32,
        bytes: u32,
        branch: Branch,
        second_page: Option<u64>,
    ) -> *const Block {
        let first = self.ops.push(ops);
        self.decoded += u64::from(instructions);
        let bucket = Self::bucket(key);
        let page = self
            .pages
            .entry(key.pa >> 12)
            .or_insert_with(|| Page { head: null_mut(), crossing: Vec::new() });
        let block = self.blocks.push(&[Block {
            first,
            len: ops.len() as u32,
            instructions,
            key,
            bytes,
            branch,
            second_page: second_page.unwrap_or(NO_PAGE),
            links: [NO_LINK; 2],
            next_in_bucket: self.buckets[bucket],
            next_in_page: page.head,
        }]);
        page.head = block;
        self.buckets[bucket] = block;
        if let Some(second) = second_page {
            self.pages
                .entry(second >> 12)
                .or_insert_with(|| Page { head: null_mut(), crossing: Vec::new() })
                .crossing
                .push(block);
        }
        block
    }

    /// True if the arena is full and must be emptied before more is decoded.
    pub fn is_full(&self) -> bool {
        self.ops.chunk >= MAX_CHUNKS || self.cold.chunk >= MAX_CHUNKS
    }

    /// Forgets everything. No block may be running.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.blocks.clear();
        self.cold.clear();
        self.buckets.fill(null_mut());
        self.pages.clear();
        self.jumps.fill(NO_JUMP);
    }

    /// Drops the blocks decoded from `lines` of the page at guest-physical `page` (a multiple of
    /// 4096); true if there was one. `running` is the block that is being executed, if any; the flag
    /// says whether it was among them.
    pub fn invalidate(&mut self, page: u64, lines: u64, running: *const Block) -> (bool, bool) {
        let Some(entry) = self.pages.get_mut(&(page >> 12)) else { return (false, false) };
        let mut dropped = Vec::new();
        let mut link: *mut *mut Block = &mut entry.head;
        // SAFETY: `link` is the page's head or the `next_in_page` of a block of the arena, and what it
        // holds is null or a block of the arena; nothing else refers to them mutably here.
        unsafe {
            while !(*link).is_null() {
                let block = *link;
                if (*block).lines() & lines != 0 {
                    *link = (*block).next_in_page;
                    dropped.push(block);
                } else {
                    link = &raw mut (*block).next_in_page;
                }
            }
        }
        if lines & 1 != 0 {
            dropped.append(&mut entry.crossing);
        }
        if entry.head.is_null() && entry.crossing.is_empty() {
            self.pages.remove(&(page >> 12));
        }
        let hit_running = dropped.iter().any(|&b| std::ptr::eq(b, running));
        for &block in &dropped {
            self.unlink(block);
        }
        (!dropped.is_empty(), hit_running)
    }

    fn unlink(&mut self, block: *mut Block) {
        // SAFETY: `block` is a block of the arena; the chain it is in holds blocks of the arena.
        unsafe {
            let mut link: *mut *mut Block = &mut self.buckets[Self::bucket((*block).key)];
            while !(*link).is_null() {
                if *link == block {
                    *link = (*block).next_in_bucket;
                    break;
                }
                link = &raw mut (**link).next_in_bucket;
            }
            (*block).key.mode |= Mode::GONE;
        }
    }

    /// Sets where `from` leads by its link `which`, or that nothing can say so ([`ELSEWHERE`]).
    pub fn link(&mut self, from: *const Block, which: usize, link: Link) {
        // SAFETY: `from` is the block that just ran, so it lies in the arena, and nobody holds a
        // reference to it: blocks are read through pointers, one field at a time.
        unsafe { (*from.cast_mut()).links[which & 1] = link };
    }

    /// Makes every operation of `block` run `stop` instead, so that whichever comes next ends the
    /// block: the code they were decoded from is gone, or the processor must not go on.
    pub fn cut(&mut self, block: *const Block, stop: super::Handler) {
        // SAFETY: `block` lies in the arena and so do its `len` operations; they are read through
        // `OpRef` one field at a time, so replacing a handler in place is seen by the next dispatch.
        unsafe {
            let (first, len) = ((*block).first, (*block).len as usize);
            for i in 0..len {
                (*first.add(i)).run = stop;
            }
        }
    }

    /// Makes every block impossible to find, without emptying the arena: one may be running.
    pub fn forget(&mut self) {
        self.buckets.fill(null_mut());
        self.pages.clear();
        self.jumps.fill(NO_JUMP);
    }
}
