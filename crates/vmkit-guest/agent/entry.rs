//! How the kernel enters the program, and what the compiler expects of a C library.
#![allow(unsafe_code, reason = "the program's entry and the compiler's memory functions")]

use core::arch::{asm, naked_asm};
use core::ffi::c_char;
use core::panic::PanicInfo;

use crate::connection;
use crate::options::{Options, Peer};
use crate::sys::{self, Environment};

/// Where the kernel enters (System V ABI, AMD64 supplement, §3.4.1): the stack holds the number of
/// arguments, the arguments, a null pointer, the environment, a null pointer.
// SAFETY: the kernel is its only caller; it keeps the stack aligned for `main`, which does not return.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "mov rdi, rsp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: `_start` passes the stack as the kernel left it.
    let count = unsafe { *stack };
    let arguments = stack.wrapping_add(1).cast::<*const c_char>();
    // SAFETY: the kernel puts two tables there, each with a null pointer at its end.
    let (arguments, environment) = unsafe {
        (Environment::new(arguments), Environment::new(arguments.wrapping_add(count + 1)))
    };
    let Some(options) = Options::parse(arguments.strings().skip(1)) else {
        sys::complain("usage: vmkit-agent [--cid N] [--port N] | --fd N\n");
        sys::exit(2);
    };
    let served = match options.peer {
        // Taken to another number before its own is filled up.
        Peer::Inherited(number) => sys::adopt(number).and_then(|fd| {
            sys::occupy_standard_descriptors();
            connection::serve_one(environment, &fd)
        }),
        Peer::Dialled { cid, port } => {
            sys::occupy_standard_descriptors();
            connection::serve_for_ever(environment, cid, port)
        }
    };
    if served.is_err() {
        sys::complain("vmkit-agent: this kernel lacks what the agent needs\n");
    }
    sys::exit(served.is_err().into());
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    sys::complain("vmkit-agent: a bug\n");
    sys::exit(101);
}

/// # Safety
/// As in C: `n` bytes at each, which do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C: `n` bytes at each.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= n {
        // SAFETY: the target is not inside the source, so copying upwards reads before it writes.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the caller's promise; downwards from the last byte, and the flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
            inout("rdi") to.wrapping_add(n).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(n).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As in C: `n` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C: `n` bytes at each.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, n: usize) -> i32 {
    for index in 0..n {
        // SAFETY: the caller's promise. Volatile, lest the compiler see a memcmp in this.
        let (a, b) = unsafe {
            (one.wrapping_add(index).read_volatile(), other.wrapping_add(index).read_volatile())
        };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As in C: `n` bytes at each.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(one, other, n) }
}

/// # Safety
/// As in C: a string with a zero byte at its end.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(string: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller's promise, up to the zero byte. Volatile for the reason above.
    while unsafe { string.wrapping_add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
