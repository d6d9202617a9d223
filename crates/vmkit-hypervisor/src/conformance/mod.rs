//! The conformance suite: what every backend must do, as guest programs and API checks.
//!
//! A case makes a small machine on the backend it is given, runs a program of a few instructions in
//! real, protected or 64-bit mode, and compares what the program, the callbacks and the vCPU's state
//! show with what the manuals and this crate's contract say. It knows no backend: what a backend may
//! lack is in its [`Capabilities`](crate::Capabilities), and a case says what it [`Need`]s.
//!
//! [`runner`] runs the cases and tells which ran, which did not, and why.

mod apic;
mod asm;
mod calls;
mod case;
mod code;
mod controllers;
mod cpu;
mod debug;
mod exceptions;
mod exits;
mod guest;
mod interrupts;
mod io;
mod kicks;
mod memory;
mod modes;
mod msrs;
mod paging;
mod recorder;
pub mod runner;
mod segments;
mod sharing;
mod smp;
mod state;
mod strings;
mod tables;
mod timers;

pub use case::{Case, Failure, Need};

/// All cases, by theme.
pub fn cases() -> Vec<Case> {
    let themes = [
        io::CASES,
        strings::CASES,
        exits::CASES,
        kicks::CASES,
        state::CASES,
        memory::CASES,
        exceptions::CASES,
        debug::CASES,
        paging::CASES,
        modes::CASES,
        segments::CASES,
        calls::CASES,
        code::CASES,
        msrs::CASES,
        interrupts::CASES,
        controllers::CASES,
        apic::CASES,
        timers::CASES,
        smp::CASES,
        sharing::CASES,
    ];
    themes.concat()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let mut seen = HashSet::new();
        for case in cases() {
            assert!(seen.insert(case.name), "{} is there twice", case.name);
        }
    }
}
