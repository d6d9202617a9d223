//! Whole programs: how long they run, and how soon one says that its guest's `/init` runs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::{median, ms};

fn command<'a>(words: &[&'a str]) -> (&'a str, Command) {
    let (program, args) = words.split_first().unwrap();
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    (program, command)
}

/// The median time of `times` runs, from before it is started to after it has ended.
pub fn starts(times: usize, words: &[&str]) {
    let (program, mut command) = command(words);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let runs = (0..times).map(|_| {
        let start = Instant::now();
        command.status().unwrap();
        start.elapsed()
    });
    println!("{program}: {:.2} ms, median of {times} runs", ms(median(runs.collect())));
}

/// Starts a program that boots a guest of `mib` MiB, `times` times: how long until it prints `line`, and
/// its memory beyond the guest's then. It is killed after that.
pub fn boot(times: usize, mib: u64, line: &str, words: &[&str]) {
    let (_, mut command) = command(words);
    command.stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut to_line = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        let mut child = command.spawn().unwrap();
        wait_for(line, &mut child);
        to_line.push(start.elapsed());
        if to_line.len() == times {
            // An idle guest: its own start is over.
            std::thread::sleep(std::time::Duration::from_millis(200));
            let (beyond, all) = resident(child.id(), mib << 20);
            println!("memory beyond the guest's: {beyond} KiB of {all} KiB in all");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let each: Vec<_> = to_line.iter().map(|time| format!("{:.1}", ms(*time))).collect();
    println!("process start to {line:?}: {:.1} ms ({})", ms(median(to_line)), each.join(", "));
}

fn wait_for(line: &str, child: &mut Child) {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut text = Vec::new();
    loop {
        text.clear();
        assert_ne!(output.read_until(b'\n', &mut text).unwrap(), 0, "it ended without {line:?}");
        if String::from_utf8_lossy(&text).trim_end().ends_with(line) {
            // The pipe stays open, so that the program can go on.
            child.stdout = Some(output.into_inner());
            return;
        }
    }
}

/// Resident memory of process `id` in KiB: in mappings smaller than `guest` bytes, and in all.
fn resident(id: u32, guest: u64) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{id}/smaps")).unwrap();
    let (mut size, mut beyond, mut all) = (0, 0, 0);
    for line in maps.lines() {
        let value = |key: &str| -> Option<u64> {
            line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse().ok()
        };
        if let Some(kib) = value("Size:") {
            size = kib << 10;
        } else if let Some(kib) = value("Rss:") {
            all += kib;
            if size < guest {
                beyond += kib;
            }
        }
    }
    (beyond, all)
}
