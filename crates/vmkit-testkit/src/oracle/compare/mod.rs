//! What differs between two outcomes of a case and must not.
//!
//! Everything is compared; what the manuals leave open is let go by the table in `undefined`.

mod latitude;
mod undefined;

use std::fmt;

use iced_x86::Instruction;
use vmkit_hypervisor::{Feature, FeatureSet, Vendor};

use super::case::{Case, Ending, Fpu, Outcome};
use super::layout::{DATA, LINE};
use latitude::Latitude;

/// Names of the general registers in the order of their encoding.
pub const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What: a register, a flag word, a memory line.
    pub what: String,
    /// What the host has.
    pub expected: String,
    /// What the other has.
    pub got: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} expected {} got {}", self.what, self.expected, self.got)
    }
}

/// Compares outcomes of one kind of host with one kind of guest.
#[derive(Clone, Copy, Debug)]
pub struct Comparer {
    /// Whose processor the host is.
    pub host: Vendor,
    /// True if the high halves of YMM registers count.
    pub avx: bool,
}

impl Comparer {
    /// A comparer for a host of that make and a guest with `features`.
    pub fn new(host: Vendor, features: &FeatureSet) -> Self {
        Self { host, avx: features.contains(Feature::Avx) }
    }

    /// What differs between the host's outcome `expected` and `got`, apart from what is undefined.
    pub fn differences(
        &self,
        case: &Case,
        instruction: &Instruction,
        expected: &Outcome,
        got: &Outcome,
    ) -> Vec<Difference> {
        let mut found = Found(Vec::new());
        if expected.ending != got.ending {
            let name = |o: &Outcome| match o.ending {
                Ending::Exception => exception(o),
                other => format!("{other:?}"),
            };
            found.text("ending", name(expected), name(got));
            return found.0;
        }
        if expected.ending != Ending::Exception {
            return found.0;
        }
        let latitude = undefined::latitude(case, instruction, expected, self.host);
        exceptions(&mut found, &latitude, expected, got);
        registers(&mut found, &latitude, expected, got);
        extended(&mut found, &latitude, &expected.fpu, &got.fpu, self.avx);
        memory(&mut found, &latitude, expected, got);
        found.0
    }
}

struct Found(Vec<Difference>);

impl Found {
    fn text(&mut self, what: &str, expected: String, got: String) {
        self.0.push(Difference { what: what.into(), expected, got });
    }

    fn word(&mut self, what: &str, expected: u64, got: u64, ignore: u64) {
        if (expected ^ got) & !ignore != 0 {
            self.text(what, format!("{expected:#x}"), format!("{got:#x}"));
        }
    }

    fn bytes(&mut self, what: impl FnOnce() -> String, expected: &[u8], got: &[u8]) {
        if expected != got {
            self.text(&what(), number(expected), number(got));
        }
    }
}

/// Little-endian bytes as one hexadecimal number.
fn number(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// An exception as manuals write it.
pub fn exception(outcome: &Outcome) -> String {
    const NAMES: [&str; 20] = [
        "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF",
        "15", "MF", "AC", "MC", "XM",
    ];
    let name = NAMES.get(outcome.vector as usize).copied().unwrap_or("unknown");
    match outcome.vector {
        14 => format!("#PF({:#x}) at {:#x}, rip {:#x}", outcome.error, outcome.cr2, outcome.rip),
        8 | 10..=13 | 17 => format!("#{name}({:#x}), rip {:#x}", outcome.error, outcome.rip),
        _ => format!("#{name}, rip {:#x}", outcome.rip),
    }
}

fn exceptions(found: &mut Found, latitude: &Latitude, expected: &Outcome, got: &Outcome) {
    let fault = |o: &Outcome| matches!(o.vector, 11..=14 | 17);
    if latitude.any_fault && fault(expected) && fault(got) && expected.rip == got.rip {
        return;
    }
    let same = expected.vector == got.vector
        && (expected.error ^ got.error) & !latitude.error == 0
        && (expected.cr2 ^ got.cr2) & !latitude.cr2 == 0
        && expected.rip == got.rip;
    if !same {
        found.text("raised", exception(expected), exception(got));
    }
}

fn registers(found: &mut Found, latitude: &Latitude, expected: &Outcome, got: &Outcome) {
    for (i, name) in GPR_NAMES.iter().enumerate() {
        found.word(name, expected.gpr[i], got.gpr[i], latitude.gpr[i]);
    }
    if (expected.rflags ^ got.rflags) & !latitude.flags != 0 {
        let text = |o: &Outcome| format!("{:#x} ({})", o.rflags, flags(o.rflags));
        found.text("rflags", text(expected), text(got));
    }
    let (e, g) = (&expected.selectors, &got.selectors);
    for (name, e, g) in [
        ("cs", e.cs, g.cs),
        ("ss", e.ss, g.ss),
        ("ds", null(e.ds), null(g.ds)),
        ("es", null(e.es), null(g.es)),
        ("fs", null(e.fs), null(g.fs)),
        ("gs", null(e.gs), null(g.gs)),
    ] {
        found.word(name, e.into(), g.into(), 0);
    }
    found.word("fs_base", expected.fs_base, got.fs_base, latitude.bases);
    found.word("gs_base", expected.gs_base, got.gs_base, latitude.bases);
}

/// A null selector without its RPL, which the kernel's return to ring 3 clears on the host (SDM
/// vol. 2A, IRET, "return to outer privilege level").
fn null(selector: u16) -> u16 {
    if selector < 4 { 0 } else { selector }
}

/// The names of the flags that are set.
pub fn flags(rflags: u64) -> String {
    const NAMES: [(u32, &str); 11] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (16, "RF"),
        (18, "AC"),
    ];
    let set: Vec<_> =
        NAMES.iter().filter(|(bit, _)| rflags >> bit & 1 != 0).map(|(_, name)| *name).collect();
    set.join(" ")
}

fn extended(found: &mut Found, latitude: &Latitude, expected: &Fpu, got: &Fpu, avx: bool) {
    found.word("fcw", expected.fcw().into(), got.fcw().into(), 0);
    found.word("fsw", expected.fsw().into(), got.fsw().into(), latitude.fsw.into());
    found.word("ftw", expected.ftw().into(), got.ftw().into(), 0);
    found.word("mxcsr", expected.mxcsr().into(), got.mxcsr().into(), latitude.mxcsr.into());
    for i in 0..8 {
        if !latitude.st_agrees(i, expected.st(i), got.st(i)) {
            found.bytes(|| format!("st{i}"), expected.st(i), got.st(i));
        }
    }
    for i in 0..16 {
        if !latitude.xmm_agrees(i, expected.xmm(i), got.xmm(i)) {
            found.bytes(|| format!("xmm{i}"), expected.xmm(i), got.xmm(i));
        }
        if avx && !latitude.xmm_agrees(i, expected.ymm_high(i), got.ymm_high(i)) {
            found.bytes(|| format!("ymm{i}hi"), expected.ymm_high(i), got.ymm_high(i));
        }
    }
}

fn memory(found: &mut Found, latitude: &Latitude, expected: &Outcome, got: &Outcome) {
    if latitude.memory || expected.memory == got.memory {
        return;
    }
    let mut lines: Vec<usize> =
        expected.memory.iter().chain(got.memory.iter()).map(|(i, _)| i).collect();
    lines.sort_unstable();
    lines.dedup();
    for i in lines {
        let (e, g) = (expected.memory.line(i), got.memory.line(i));
        let address = |at: usize| DATA + (i * LINE + at) as u64;
        let differs = |at: &usize| e[*at] != g[*at] && !latitude.ignores_byte(address(*at));
        let Some(first) = (0..LINE).find(differs) else { continue };
        let last = (first..LINE).rev().find(differs).unwrap_or(first);
        found.bytes(|| format!("[{:#x}]", address(first)), &e[first..=last], &g[first..=last]);
    }
}
