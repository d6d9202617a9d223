//! The oracle's loop: make cases, run them on both sides, compare, minimise and report what differs.

use std::collections::BTreeMap;
use std::fmt;

use iced_x86::{Formatter, Instruction, NasmFormatter};
use thiserror::Error;
use vmkit_hypervisor::{FeatureSet, Hypervisor};

use super::case::{Case, Ending, Outcome, Selectors};
use super::compare::{Comparer, Difference, GPR_NAMES, flags};
use super::forms::Form;
use super::generate::Generator;
use super::guest::{Guest, GuestError};
use super::host;
use super::layout::{DATA, LINE, USER_CS, USER_SS};
use super::minimise;
use super::native::{BATCH, Native, NativeError};

/// How often a case that the watchdog ended is run again.
const RETRIES: u32 = 3;

/// What ended a run of the oracle early.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OracleError {
    /// The host's half.
    #[error("the host: {0}")]
    Native(#[from] NativeError),
    /// The backend's half.
    #[error("the backend: {0}")]
    Guest(#[from] GuestError),
    /// A thread that ran cases panicked.
    #[error("a thread that ran cases panicked")]
    Panicked,
}

/// What is compared with the host.
#[derive(Clone, Copy)]
pub enum Subject<'a> {
    /// A backend.
    Backend(&'a dyn Hypervisor),
    /// The host itself, a second time: finds what is not reproducible.
    Host,
}

/// A choice among forms.
pub type Choice<'a> = &'a (dyn Fn(&Form) -> bool + Sync);

/// What to run.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Seed of all cases.
    pub seed: u64,
    /// Number of the first case.
    pub first: u64,
    /// How many cases.
    pub cases: u64,
    /// Features whose forms are run, as far as host and subject have them.
    pub features: FeatureSet,
    /// Only these forms, if given; then no random bytes either.
    pub only: Option<Choice<'a>>,
    /// Threads, each with a host process and a vCPU.
    pub jobs: usize,
    /// Mismatches kept per mnemonic; the rest are counted.
    pub keep: usize,
    /// Run what `features` do not list instead: each must raise #UD. The host is not asked.
    pub unlisted: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            seed: 1,
            first: 0,
            cases: 10_000,
            features: host::features(),
            only: None,
            jobs: 1,
            keep: 2,
            unlisted: false,
        }
    }
}

/// One case whose outcomes differ, minimised.
#[derive(Clone)]
pub struct Mismatch {
    /// The case's number, which with the seed makes it again.
    pub number: u64,
    /// The instruction.
    pub instruction: Instruction,
    /// What differs.
    pub differences: Vec<Difference>,
    /// The case with everything at rest that does not matter.
    pub case: Box<Case>,
    /// Why the backend refused it, if it did.
    pub refusal: Option<String>,
}

/// What a run found.
#[derive(Clone, Default)]
pub struct Report {
    /// Seed.
    pub seed: u64,
    /// Cases compared.
    pub compared: u64,
    /// Numbers that made no case.
    pub skipped: u64,
    /// Cases that loop for ever on both sides: jumps to themselves.
    pub endless: u64,
    /// Cases in which the host's process died; they are not compared. Number and instruction.
    pub lost: Vec<(u64, String)>,
    /// Forms there were.
    pub forms: usize,
    /// Exceptions by vector on the host.
    pub vectors: BTreeMap<u32, u64>,
    /// Mismatches by mnemonic: how many, and the first few.
    pub mismatches: BTreeMap<String, (u64, Vec<Mismatch>)>,
}

impl Report {
    /// True if nothing differed.
    pub fn is_clean(&self) -> bool {
        self.mismatches.is_empty()
    }

    /// Number of mismatches.
    pub fn mismatched(&self) -> u64 {
        self.mismatches.values().map(|(count, _)| count).sum()
    }

    fn merge(&mut self, other: Self, keep: usize) {
        self.compared += other.compared;
        self.skipped += other.skipped;
        self.endless += other.endless;
        self.lost.extend(other.lost);
        for (vector, count) in other.vectors {
            *self.vectors.entry(vector).or_default() += count;
        }
        for (mnemonic, (count, list)) in other.mismatches {
            let entry = self.mismatches.entry(mnemonic).or_default();
            entry.0 += count;
            entry.1.extend(list);
            entry.1.truncate(keep);
        }
    }
}

/// Either side of a comparison with the host.
pub(super) enum Executor {
    Guest(Box<Guest>),
    Host(Native),
}

impl Executor {
    pub(super) fn run(&mut self, case: &Case, outcome: &mut Outcome) -> Result<(), OracleError> {
        match self {
            Self::Guest(guest) => Ok(guest.run(case, outcome)?),
            Self::Host(native) => Ok(native.run(case, outcome)?),
        }
    }

    pub(super) fn refusal(&self) -> Option<String> {
        match self {
            Self::Guest(guest) => guest.refusal().map(Into::into),
            Self::Host(_) => None,
        }
    }
}

/// The features that `options` ask for and both sides have.
pub fn common_features(options: &Options<'_>, subject: Subject<'_>) -> FeatureSet {
    let here = options.features.intersection(host::features());
    match subject {
        Subject::Backend(hypervisor) => here.intersection(hypervisor.capabilities().features),
        Subject::Host => here,
    }
}

/// Runs cases on the host and on `subject`.
///
/// # Errors
/// [`OracleError`] if either side cannot run cases at all.
pub fn run(options: &Options<'_>, subject: Subject<'_>) -> Result<Report, OracleError> {
    let features = common_features(options, subject);
    let host = host::vendor();
    let mut generator = match options.unlisted {
        true => Generator::unlisted(options.seed, &features, host),
        false => Generator::new(options.seed, &features, host),
    };
    if let Some(only) = options.only {
        generator.retain(only);
    }
    let jobs = options.jobs.clamp(1, 64) as u64;
    let share = options.cases.div_ceil(jobs);
    let mut report =
        Report { seed: options.seed, forms: generator.forms().len(), ..Report::default() };
    let parts: Vec<Result<Report, OracleError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs)
            .map(|job| {
                let generator = &generator;
                let from = options.first + (job * share).min(options.cases);
                let to = options.first + ((job + 1) * share).min(options.cases);
                scope.spawn(move || {
                    let executor = match subject {
                        Subject::Backend(h) => {
                            Executor::Guest(Box::new(Guest::new(h, &features, host)?))
                        }
                        Subject::Host => Executor::Host(Native::new()?),
                    };
                    Job {
                        generator,
                        comparer: Comparer::new(host, &features),
                        native: Native::new()?,
                        executor,
                        keep: options.keep,
                        unlisted: options.unlisted,
                        report: Report::default(),
                    }
                    .run(from, to)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or(Err(OracleError::Panicked))).collect()
    });
    for part in parts {
        report.merge(part?, options.keep);
    }
    Ok(report)
}

struct Job<'a> {
    generator: &'a Generator,
    comparer: Comparer,
    native: Native,
    executor: Executor,
    keep: usize,
    unlisted: bool,
    report: Report,
}

/// Cases of a batch with their numbers and instructions.
struct Batch {
    cases: Vec<Case>,
    made: Vec<(u64, Instruction)>,
}

impl Batch {
    fn new() -> Self {
        Self { cases: vec![Case::default(); BATCH], made: Vec::with_capacity(BATCH) }
    }

    fn fill(&mut self, generator: &Generator, numbers: &mut std::ops::Range<u64>) -> u64 {
        self.made.clear();
        let mut skipped = 0;
        while self.made.len() < BATCH {
            let Some(number) = numbers.next() else { break };
            match generator.make(number, &mut self.cases[self.made.len()]) {
                Some(instruction) => self.made.push((number, instruction)),
                None => skipped += 1,
            }
        }
        skipped
    }
}

impl Job<'_> {
    fn run(mut self, from: u64, to: u64) -> Result<Report, OracleError> {
        let mut numbers = from..to;
        let (mut now, mut next) = (Batch::new(), Batch::new());
        let mut expected = vec![Outcome::default(); BATCH];
        let mut got = Outcome::default();
        self.report.skipped += now.fill(self.generator, &mut numbers);
        while !now.made.is_empty() {
            // The host runs this batch while the next one is made.
            let cases = &now.cases[..now.made.len()];
            if self.unlisted {
                for (case, expected) in cases.iter().zip(&mut expected) {
                    undefined_opcode(case, expected);
                }
                self.report.skipped += next.fill(self.generator, &mut numbers);
            } else {
                self.native.submit(cases);
                self.report.skipped += next.fill(self.generator, &mut numbers);
                self.native.collect(|i, outcome| expected[i].copy_from(outcome))?;
            }
            let made = now.made.iter().zip(&now.cases).zip(&mut expected);
            for (((number, instruction), case), expected) in made {
                self.compare(*number, instruction, case, expected, &mut got)?;
            }
            std::mem::swap(&mut now, &mut next);
        }
        Ok(self.report)
    }

    fn compare(
        &mut self,
        number: u64,
        instruction: &Instruction,
        case: &Case,
        expected: &mut Outcome,
        got: &mut Outcome,
    ) -> Result<(), OracleError> {
        if !matches!(expected.ending, Ending::Exception | Ending::Hung) {
            self.report.lost.push((number, assembly(instruction)));
            return Ok(());
        }
        self.report.compared += 1;
        self.executor.run(case, got)?;
        if (expected.ending, got.ending) == (Ending::Hung, Ending::Hung) {
            self.report.endless += 1;
            return Ok(());
        }
        // Both sides' patience is the host's time, so that load can end a case. One that hangs, hangs again.
        for _ in 0..RETRIES {
            match (expected.ending, got.ending) {
                (Ending::Hung, _) => self.native.run(case, expected)?,
                (_, Ending::Hung) => self.executor.run(case, got)?,
                _ => break,
            }
        }
        *self.report.vectors.entry(expected.vector).or_default() += 1;
        let differences = self.comparer.differences(case, instruction, expected, got);
        if differences.is_empty() {
            return Ok(());
        }
        let refusal = self.executor.refusal();
        let name = format!("{:?}", instruction.mnemonic()).to_lowercase();
        let entry = self.report.mismatches.entry(name).or_default();
        entry.0 += 1;
        if entry.1.len() < self.keep {
            let mut mismatch = Mismatch {
                number,
                instruction: *instruction,
                differences,
                case: Box::new(case.clone()),
                refusal,
            };
            if !self.unlisted {
                let sides = (&mut self.native, &mut self.executor);
                minimise::minimise(&mut mismatch, &self.comparer, sides)?;
            }
            entry.1.push(mismatch);
        }
        Ok(())
    }
}

/// The outcome of an instruction that there is not: #UD and nothing else.
fn undefined_opcode(case: &Case, outcome: &mut Outcome) {
    const RF: u64 = 1 << 16;
    let selectors = Selectors { cs: USER_CS, ss: USER_SS, ..Selectors::default() };
    outcome.fpu.0 = case.fpu.0;
    outcome.gpr = case.gpr;
    (outcome.rip, outcome.rflags) = (case.at, case.rflags | RF);
    (outcome.fs_base, outcome.gs_base) = (case.fs_base, case.gs_base);
    outcome.selectors = selectors;
    outcome.ending = Ending::Exception;
    (outcome.vector, outcome.error, outcome.cr2) = (6, 0, 0);
    outcome.memory.copy_from(&case.memory);
}

fn assembly(instruction: &Instruction) -> String {
    let mut text = String::new();
    NasmFormatter::new().format(instruction, &mut text);
    text
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = assembly(&self.instruction);
        let bytes: Vec<_> = self.case.bytes().iter().map(|b| format!("{b:02x}")).collect();
        writeln!(f, "  case {}: {text}", self.number)?;
        writeln!(f, "    bytes    {} at {:#x}", bytes.join(" "), self.case.at)?;
        if let Some(refusal) = &self.refusal {
            writeln!(f, "    refused  {refusal}")?;
        }
        for difference in &self.differences {
            writeln!(f, "    {difference}")?;
        }
        state(f, &self.case)
    }
}

/// The parts of a case's state that are not at rest.
fn state(f: &mut fmt::Formatter<'_>, case: &Case) -> fmt::Result {
    write!(f, "    from     rflags={:#x} ({})", case.rflags, flags(case.rflags))?;
    for (name, value) in GPR_NAMES.iter().zip(case.gpr).filter(|(_, v)| *v != 0) {
        write!(f, " {name}={value:#x}")?;
    }
    for (name, base) in [("fs", case.fs_base), ("gs", case.gs_base)] {
        if base != 0 {
            write!(f, " {name}_base={base:#x}")?;
        }
    }
    writeln!(f)?;
    let hex = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    let fpu = &case.fpu;
    let (fcw, fsw, ftw, mxcsr) = (fpu.fcw(), fpu.fsw(), fpu.ftw(), fpu.mxcsr());
    if (fcw, fsw, ftw) != (0x37F, 0, 0) || (0..8).any(|i| fpu.st(i) != [0; 10]) {
        write!(f, "    x87      fcw={fcw:#x} fsw={fsw:#x} ftw={ftw:#x}")?;
        for i in (0..8).filter(|&i| fpu.st(i) != [0; 10]) {
            write!(f, " st{i}={}", hex(fpu.st(i)))?;
        }
        writeln!(f)?;
    }
    if mxcsr != 0x1F80 || (0..16).any(|i| fpu.xmm(i) != [0; 16]) {
        write!(f, "    sse      mxcsr={mxcsr:#x}")?;
        for i in (0..16).filter(|&i| fpu.xmm(i) != [0; 16]) {
            write!(f, " xmm{i}={}", hex(fpu.xmm(i)))?;
        }
        writeln!(f)?;
    }
    for (i, line) in case.memory.iter() {
        writeln!(f, "    memory   {:#x}: {}", DATA + (i * LINE) as u64, {
            line.iter().map(|b| format!("{b:02x}")).collect::<String>()
        })?;
    }
    Ok(())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (mnemonic, (count, list)) in &self.mismatches {
            writeln!(f, "{mnemonic}: {count} mismatches")?;
            for mismatch in list {
                write!(f, "{mismatch}")?;
            }
        }
        writeln!(
            f,
            "{} cases of {} forms compared (seed {}), {} mismatches in {} mnemonics; {} loop for ever; \
             {} numbers made no case; {} ended the host's process {:?}",
            self.compared,
            self.forms,
            self.seed,
            self.mismatched(),
            self.mismatches.len(),
            self.endless,
            self.skipped,
            self.lost.len(),
            self.lost
        )?;
        let vectors: Vec<_> = self.vectors.iter().map(|(v, n)| format!("{v}: {n}")).collect();
        write!(f, "exceptions on the host by vector: {}", vectors.join(", "))
    }
}
