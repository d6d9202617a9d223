//! The software TLB: linear page to host address, per kind of access.
//!
//! A tag is the linear page with the access mode in its low bits ([`super::MODE_USER`] and kin), so
//! that a hit is one comparison. Entries displaced from their place go to a small victim array:
//! buffers whose distance is a multiple of the table's reach are common.

/// Entries of the read and the write table.
const ENTRIES: usize = 1024;
/// Entries of the fetch table.
const FETCH_ENTRIES: usize = 256;
const VICTIMS: usize = 16;

const PAGE_MASK: u64 = !0xFFF;
/// A tag that matches no address.
const INVALID: u64 = 1 << 11;
/// Set in the tag of a write entry whose page holds decoded code: the fast path misses it.
const SLOW: u64 = 1 << 10;

/// The entry's translation is global (survives CR3 loads).
pub(crate) const META_GLOBAL: u64 = 1;
/// The entry is part of a page larger than 4 KiB.
pub(crate) const META_LARGE: u64 = 2;

/// One cached translation.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub tag: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Guest-physical page, and `META_` bits.
    pub meta: u64,
}

const EMPTY: Entry = Entry { tag: INVALID, addend: 0, meta: 0 };

/// What a translation is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Read,
    Write,
}

/// What [`Tlb::find_slow`] found.
pub(crate) enum Found {
    Miss,
    /// The host address.
    Fast(u64),
    /// The host address and guest-physical address, in a page that holds code.
    Code(u64, u64),
}

struct Half {
    entries: [Entry; ENTRIES],
    victims: [Entry; VICTIMS],
    turn: usize,
}

impl Half {
    const fn new() -> Self {
        Self { entries: [EMPTY; ENTRIES], victims: [EMPTY; VICTIMS], turn: 0 }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut().chain(&mut self.victims)
    }
}

/// A cached code translation: linear page with mode, guest-physical page.
#[derive(Clone, Copy)]
struct FetchEntry {
    tag: u64,
    page: u64,
    meta: u64,
}

const EMPTY_FETCH: FetchEntry = FetchEntry { tag: INVALID, page: 0, meta: 0 };

/// A processor's cached translations.
pub(crate) struct Tlb {
    read: Half,
    write: Half,
    fetch: [FetchEntry; FETCH_ENTRIES],
    /// Linear addresses that entries of large pages lie between.
    large: (u64, u64),
}

fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (ENTRIES - 1)
}

fn tag_of(linear: u64, bytes: usize, mode: u64) -> u64 {
    (linear.wrapping_add(bytes as u64 - 1) & PAGE_MASK) | mode
}

impl Tlb {
    pub const fn new() -> Self {
        Self {
            read: Half::new(),
            write: Half::new(),
            fetch: [EMPTY_FETCH; FETCH_ENTRIES],
            large: (u64::MAX, 0),
        }
    }

    /// The host address of a `bytes`-long read at `linear`, if it is cached and inside one page.
    #[inline(always)]
    pub fn read(&self, linear: u64, bytes: usize, mode: u64) -> Option<u64> {
        let entry = &self.read.entries[index(linear)];
        // The tag of the last byte's page: an access that crosses into the next page cannot match,
        // because that page's entries have another index.
        (entry.tag == tag_of(linear, bytes, mode)).then(|| linear.wrapping_add(entry.addend))
    }

    /// The host address of a `bytes`-long write at `linear`, if it is cached, inside one page, and
    /// the page holds no code.
    #[inline(always)]
    pub fn write(&self, linear: u64, bytes: usize, mode: u64) -> Option<u64> {
        let entry = &self.write.entries[index(linear)];
        (entry.tag == tag_of(linear, bytes, mode)).then(|| linear.wrapping_add(entry.addend))
    }

    /// As [`read`](Self::read) and [`write`](Self::write), with the victims and pages that hold code.
    pub fn find_slow(&mut self, table: Table, linear: u64, bytes: usize, mode: u64) -> Found {
        let want = tag_of(linear, bytes, mode);
        if want & PAGE_MASK != linear & PAGE_MASK {
            return Found::Miss;
        }
        let half = match table {
            Table::Read => &mut self.read,
            Table::Write => &mut self.write,
        };
        let place = index(linear);
        if half.entries[place].tag & !SLOW != want {
            let Some(victim) = half.victims.iter().position(|v| v.tag & !SLOW == want) else {
                return Found::Miss;
            };
            let displaced = std::mem::replace(&mut half.entries[place], half.victims[victim]);
            half.victims[victim] = displaced;
        }
        let entry = half.entries[place];
        let host = linear.wrapping_add(entry.addend);
        if entry.tag & SLOW == 0 {
            Found::Fast(host)
        } else {
            Found::Code(host, entry.meta & PAGE_MASK | linear & !PAGE_MASK)
        }
    }

    /// Caches a translation. `host` is the host address of `linear`, `meta` the guest-physical page
    /// with `META_` bits; `code` says that the page holds code (write table only).
    pub fn fill(&mut self, table: Table, linear: u64, mode: u64, host: u64, meta: u64, code: bool) {
        self.note_large(linear, meta);
        let half = match table {
            Table::Read => &mut self.read,
            Table::Write => &mut self.write,
        };
        let tag = linear & PAGE_MASK | mode;
        for victim in &mut half.victims {
            if victim.tag & !SLOW == tag {
                *victim = EMPTY;
            }
        }
        let place = &mut half.entries[index(linear)];
        if place.tag & INVALID == 0 && place.tag & !SLOW != tag {
            half.victims[half.turn] = *place;
            half.turn = (half.turn + 1) % VICTIMS;
        }
        *place = Entry {
            tag: tag | if code { SLOW } else { 0 },
            addend: host.wrapping_sub(linear),
            meta,
        };
    }

    fn note_large(&mut self, linear: u64, meta: u64) {
        if meta & META_LARGE != 0 {
            self.large = (self.large.0.min(linear), self.large.1.max(linear));
        }
    }

    /// The guest-physical page that `linear` is fetched from, if cached.
    #[inline(always)]
    pub fn fetch(&self, linear: u64, mode: u64) -> Option<u64> {
        let entry = &self.fetch[(linear >> 12) as usize & (FETCH_ENTRIES - 1)];
        (entry.tag == linear & PAGE_MASK | mode).then_some(entry.page)
    }

    /// Caches a code translation.
    pub fn fill_fetch(&mut self, linear: u64, mode: u64, meta: u64) {
        self.note_large(linear, meta);
        self.fetch[(linear >> 12) as usize & (FETCH_ENTRIES - 1)] =
            FetchEntry { tag: linear & PAGE_MASK | mode, page: meta & PAGE_MASK, meta };
    }

    /// Makes writes to guest-physical `page` take the slow path.
    pub fn page_holds_code(&mut self, page: u64) {
        for entry in self.write.all() {
            if entry.tag & INVALID == 0 && entry.meta & PAGE_MASK == page {
                entry.tag |= SLOW;
            }
        }
    }

    /// Lets writes to the page of `linear` take the fast path again.
    pub fn page_holds_no_code(&mut self, linear: u64, mode: u64) {
        let entry = &mut self.write.entries[index(linear)];
        if entry.tag & !SLOW == linear & PAGE_MASK | mode {
            entry.tag &= !SLOW;
        }
    }

    /// True if some write entry for guest-physical `page` takes the fast path.
    pub fn writes_fast(&mut self, page: u64) -> bool {
        self.write.all().any(|e| e.tag & (INVALID | SLOW) == 0 && e.meta & PAGE_MASK == page)
    }

    /// Forgets everything; global translations too if `global`.
    pub fn flush(&mut self, global: bool) {
        let keep = if global { 0 } else { META_GLOBAL };
        for entry in self.read.all().chain(self.write.all()) {
            if entry.meta & keep == 0 {
                entry.tag = INVALID;
            }
        }
        for entry in &mut self.fetch {
            if entry.meta & keep == 0 {
                entry.tag = INVALID;
            }
        }
        if global {
            self.large = (u64::MAX, 0);
        }
    }

    /// Forgets what is cached for writing.
    pub fn flush_writes(&mut self) {
        for entry in self.write.all() {
            entry.tag = INVALID;
        }
    }

    /// Forgets the page of `linear` (INVLPG), whatever its size.
    pub fn flush_page(&mut self, linear: u64) {
        // A large page is cached in 4 KiB pieces; up to 1 GiB of them may be there.
        const GIB: u64 = 1 << 30;
        let near_large = linear.saturating_add(GIB) >= self.large.0
            && linear.saturating_sub(GIB) <= self.large.1;
        let page = linear & PAGE_MASK;
        let gone = |tag: u64, meta: u64| {
            tag & PAGE_MASK == page
                || near_large && meta & META_LARGE != 0 && (tag ^ linear) & !(GIB - 1) == 0
        };
        if near_large {
            for entry in self.read.all().chain(self.write.all()) {
                if gone(entry.tag, entry.meta) {
                    entry.tag = INVALID;
                }
            }
            for entry in &mut self.fetch {
                if gone(entry.tag, entry.meta) {
                    entry.tag = INVALID;
                }
            }
            return;
        }
        for half in [&mut self.read, &mut self.write] {
            let place = &mut half.entries[index(linear)];
            if place.tag & PAGE_MASK == page {
                place.tag = INVALID;
            }
            for victim in &mut half.victims {
                if victim.tag & PAGE_MASK == page {
                    victim.tag = INVALID;
                }
            }
        }
        let place = &mut self.fetch[(linear >> 12) as usize & (FETCH_ENTRIES - 1)];
        if place.tag & PAGE_MASK == page {
            place.tag = INVALID;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_across_the_page_end_misses() {
        let mut tlb = Box::new(Tlb::new());
        tlb.fill(Table::Read, 0x5000, 0, 0x7000_5000, 0x5000, false);
        assert_eq!(tlb.read(0x5FF8, 8, 0), Some(0x7000_5FF8));
        assert_eq!(tlb.read(0x5FF9, 8, 0), None);
        assert_eq!(tlb.read(0x5000, 8, 2), None);
    }

    #[test]
    fn a_displaced_entry_is_found_among_the_victims() {
        let mut tlb = Box::new(Tlb::new());
        let far = 0x5000 + (ENTRIES as u64) * 4096;
        tlb.fill(Table::Read, 0x5000, 0, 0x7000_5000, 0x5000, false);
        tlb.fill(Table::Read, far, 0, 0x8000_0000, 0x9000, false);
        assert!(matches!(tlb.find_slow(Table::Read, 0x5010, 4, 0), Found::Fast(0x7000_5010)));
        assert!(matches!(tlb.find_slow(Table::Read, far, 4, 0), Found::Fast(0x8000_0000)));
    }

    #[test]
    fn code_pages_take_the_slow_path_for_writes_only() {
        let mut tlb = Box::new(Tlb::new());
        tlb.fill(Table::Write, 0x5000, 0, 0x7000_5000, 0x9000, false);
        tlb.page_holds_code(0x9000);
        assert_eq!(tlb.write(0x5004, 4, 0), None);
        assert!(matches!(
            tlb.find_slow(Table::Write, 0x5004, 4, 0),
            Found::Code(0x7000_5004, 0x9004)
        ));
        tlb.page_holds_no_code(0x5004, 0);
        assert!(tlb.write(0x5004, 4, 0).is_some());
    }

    #[test]
    fn invlpg_forgets_all_pieces_of_a_large_page_and_flush_keeps_global_ones() {
        let mut tlb = Box::new(Tlb::new());
        tlb.fill(Table::Read, 0x20_1000, 0, 0x7000_1000, 0x1000 | META_LARGE, false);
        tlb.fill(Table::Read, 0x20_2000, 0, 0x7000_2000, 0x2000 | META_LARGE | META_GLOBAL, false);
        tlb.flush(false);
        assert_eq!(tlb.read(0x20_1000, 1, 0), None);
        assert!(tlb.read(0x20_2000, 1, 0).is_some());
        tlb.flush_page(0x20_0000);
        assert_eq!(tlb.read(0x20_2000, 1, 0), None);
    }
}
