//! The instruction oracle from the command line:
//! `cargo run --release -p vmkit-testkit --bin oracle -- --cases 2000000 --jobs 2`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]

use std::process::ExitCode;
use std::time::Instant;

use vmkit_hypervisor::{CpuModel, Feature, FeatureSet, Hypervisor};
use vmkit_testkit::oracle::forms::Form;
use vmkit_testkit::oracle::run::common_features;
use vmkit_testkit::oracle::{Options, Subject, host, run};

const USAGE: &str = "\
Runs random instructions on this machine's processor and on a vmkit backend and reports what differs.

  --cases N         how many (default 100000)
  --seed S          of all cases (default 1); with the same seed, the same cases
  --first N         number of the first case (default 0), to look at one again with --cases 1
  --features LIST   v1, v2, v3, host, or names: avx2,bmi1 (default host); what both sides have counts
  --only LIST       only forms of these CPUID features (iced's names: sse2, fpu, intel386)
  --mnemonic LIST   only these mnemonics: add,movsb
  --backend B       soft, kvm, or host: this processor a second time (default soft)
  --jobs N          threads (default 1)
  --keep N          mismatches shown per mnemonic (default 2)
  --unlisted yes    run what the features do NOT list: every case must raise #UD";

struct Arguments {
    cases: u64,
    seed: u64,
    first: u64,
    features: FeatureSet,
    only: Vec<String>,
    mnemonics: Vec<String>,
    backend: String,
    jobs: usize,
    keep: usize,
    unlisted: bool,
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(|s| s.trim().to_ascii_lowercase()).filter(|s| !s.is_empty()).collect()
}

fn features(text: &str) -> Result<FeatureSet, String> {
    list(text).iter().try_fold(FeatureSet::empty(), |set, name| {
        Ok(set.union(match name.as_str() {
            "host" => host::features(),
            "v1" => CpuModel::x86_64_v1().features,
            "v2" => CpuModel::x86_64_v2().features,
            "v3" => CpuModel::x86_64_v3().features,
            name => Feature::ALL
                .iter()
                .find(|f| f.to_string() == name)
                .map(|&f| FeatureSet::empty().with(f))
                .ok_or_else(|| format!("no feature is called {name}"))?,
        }))
    })
}

fn parse() -> Result<Option<Arguments>, String> {
    let mut parsed = Arguments {
        cases: 100_000,
        seed: 1,
        first: 0,
        features: host::features(),
        only: Vec::new(),
        mnemonics: Vec::new(),
        backend: "soft".into(),
        jobs: 1,
        keep: 2,
        unlisted: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--help" || word == "-h" {
            return Ok(None);
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{word} {value}: {e}"));
        match word.as_str() {
            "--cases" => parsed.cases = number()?,
            "--seed" => parsed.seed = number()?,
            "--first" => parsed.first = number()?,
            "--features" => parsed.features = features(&value)?,
            "--only" => parsed.only = list(&value),
            "--mnemonic" => parsed.mnemonics = list(&value),
            "--backend" => parsed.backend = value,
            "--jobs" => parsed.jobs = number()? as usize,
            "--unlisted" => parsed.unlisted = value == "yes",
            "--keep" => parsed.keep = number()? as usize,
            _ => return Err(format!("no option is called {word}")),
        }
    }
    Ok(Some(parsed))
}

fn backend(name: &str) -> Result<Option<Box<dyn Hypervisor>>, String> {
    match name {
        "host" => Ok(None),
        "soft" => Ok(Some(Box::new(vmkit_soft::SoftHypervisor::new()))),
        "kvm" => match vmkit_kvm::KvmHypervisor::open() {
            Ok(kvm) => Ok(Some(Box::new(kvm))),
            Err(error) => Err(error.to_string()),
        },
        _ => Err(format!("no backend is called {name}")),
    }
}

fn main() -> ExitCode {
    match go() {
        Ok(code) => code,
        Err(message) => {
            eprintln!("oracle: {message}");
            ExitCode::from(2)
        }
    }
}

fn go() -> Result<ExitCode, String> {
    let Some(arguments) = parse()? else {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    let hypervisor = backend(&arguments.backend)?;
    let subject = hypervisor.as_deref().map_or(Subject::Host, Subject::Backend);
    let chosen = |form: &Form| {
        let mnemonic = format!("{:?}", form.code.mnemonic()).to_ascii_lowercase();
        let features = form.code.cpuid_features().iter();
        let mut features = features.map(|f| format!("{f:?}").to_ascii_lowercase());
        (arguments.mnemonics.is_empty() || arguments.mnemonics.contains(&mnemonic))
            && (arguments.only.is_empty() || features.any(|f| arguments.only.contains(&f)))
    };
    let everything = arguments.mnemonics.is_empty() && arguments.only.is_empty();
    let options = Options {
        seed: arguments.seed,
        first: arguments.first,
        cases: arguments.cases,
        features: arguments.features,
        only: (!everything).then_some(&chosen),
        jobs: arguments.jobs,
        keep: arguments.keep,
        unlisted: arguments.unlisted,
    };
    println!("features: {:?}", common_features(&options, subject));
    let started = Instant::now();
    let report = run(&options, subject).map_err(|e| e.to_string())?;
    println!("{report}");
    let seconds = started.elapsed().as_secs_f64();
    println!("{seconds:.1} s, {:.0} cases/s", report.compared as f64 / seconds);
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
