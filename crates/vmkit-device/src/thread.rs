//! Threads of devices and machines.

use std::thread::Builder;

/// Bytes of a thread's stack.
const STACK: usize = 31 << 16;

/// A builder of a thread called `name`. Its stack is a little less than the 2 MiB that Rust gives, for
/// which Linux takes a huge page where it lies well, as it does below guest memory that does.
pub fn thread_builder(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
