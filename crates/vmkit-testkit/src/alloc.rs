//! A global allocator that counts, for tests that pin "this path allocates nothing".
//!
//! Counters are per thread, so that tests which run side by side do not disturb each other. Install it
//! in the test binary:
//!
//! ```
//! use vmkit_testkit::alloc::{Counting, counted};
//!
//! #[global_allocator]
//! static ALLOCATOR: Counting = Counting;
//!
//! let (text, made) = counted(|| String::from("heap"));
//! assert_eq!((text.as_str(), made.allocations), ("heap", 1));
//! ```

#![allow(unsafe_code, reason = "GlobalAlloc is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What a thread asked of the allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls that returned new memory, reallocations among them.
    pub allocations: u64,
    /// Bytes those calls asked for.
    pub bytes: u64,
    /// Calls that gave memory back.
    pub frees: u64,
}

thread_local! {
    static COUNT: Cell<Count> = const { Cell::new(Count { allocations: 0, bytes: 0, frees: 0 }) };
}

/// This thread's count since it started. Zero where [`Counting`] is not the global allocator.
pub fn count() -> Count {
    COUNT.get()
}

/// Runs `f` and tells what it allocated on this thread.
pub fn counted<T>(f: impl FnOnce() -> T) -> (T, Count) {
    let before = count();
    let value = f();
    let after = count();
    let made = Count {
        allocations: after.allocations - before.allocations,
        bytes: after.bytes - before.bytes,
        frees: after.frees - before.frees,
    };
    (value, made)
}

fn update(change: impl FnOnce(&mut Count)) {
    // A thread that is going away has no counters left; its last frees are nobody's measurement.
    let _ = COUNT.try_with(|cell| {
        let mut count = cell.get();
        change(&mut count);
        cell.set(count);
    });
}

/// The system allocator, counting.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting;

// SAFETY: every method hands its arguments to `System` unchanged; the counters are plain
// thread-local cells without destructors and allocate nothing themselves.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        update(|c| {
            c.allocations += 1;
            c.bytes += layout.size() as u64;
        });
        // SAFETY: the caller upholds `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        update(|c| c.frees += 1);
        // SAFETY: as in `alloc`; `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        update(|c| {
            c.allocations += 1;
            c.bytes += layout.size() as u64;
        });
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        update(|c| {
            c.allocations += 1;
            c.bytes += new_size as u64;
        });
        // SAFETY: as in `dealloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
