//! The table of `--timing`.

use std::fmt::Write;
use std::time::{Duration, Instant};

/// Moments, and figures beneath.
#[derive(Debug)]
pub struct Table {
    start: Instant,
    marks: Vec<(&'static str, Option<Instant>)>,
    figures: Vec<(&'static str, String)>,
}

impl Table {
    /// A table that counts from `start`.
    pub fn from(start: Instant) -> Self {
        Self { start, marks: Vec::new(), figures: Vec::new() }
    }

    /// Adds a moment, which may not have come.
    pub fn mark(&mut self, name: &'static str, at: Option<Instant>) {
        self.marks.push((name, at));
    }

    /// Adds a figure.
    pub fn figure(&mut self, name: &'static str, value: impl Into<String>) {
        self.figures.push((name, value.into()));
    }

    /// Adds the guest's instructions and their rate over `span`.
    pub fn instructions(&mut self, count: Option<u64>, span: Option<Duration>) {
        let Some(count) = count else {
            self.figure("guest instructions", "not counted by this backend");
            return;
        };
        self.figure("guest instructions", format!("{:.1} million", count as f64 / 1e6));
        if let Some(span) = span {
            let mips = count as f64 / 1e6 / span.as_secs_f64().max(1e-9);
            self.figure("guest MIPS", format!("{mips:.0}"));
        }
    }

    /// Adds what this process takes of the host's memory, and took at most.
    pub fn memory(&mut self) {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib / 1024)
        };
        if let (Some(now), Some(peak)) = (mib("VmRSS:"), mib("VmHWM:")) {
            self.figure("host memory", format!("{now} MiB, at most {peak} MiB"));
        }
    }

    /// The table as text: when each moment came, and how long after the one before.
    pub fn render(&self) -> String {
        let mut text = format!("{:<28}{:>10}{:>10}\n", "", "at ms", "took ms");
        let mut before = self.start;
        let mut marks = self.marks.clone();
        // A quiet kernel's first byte comes after /init's.
        marks.sort_by_key(|&(_, at)| (at.is_none(), at));
        for (name, at) in marks {
            let Some(at) = at else {
                let _ = writeln!(text, "{name:<28}{:>10}", "-");
                continue;
            };
            let ms = |since: Instant| at.saturating_duration_since(since).as_secs_f64() * 1e3;
            let _ = writeln!(text, "{name:<28}{:>10.1}{:>10.1}", ms(self.start), ms(before));
            before = at;
        }
        for (name, value) in &self.figures {
            let _ = writeln!(text, "{name:<28}{value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_counts_from_the_start_and_from_the_row_before() {
        let start = Instant::now();
        let mut table = Table::from(start);
        table.mark("ended", Some(start + Duration::from_millis(5)));
        table.mark("never", None);
        table.mark("built", Some(start + Duration::from_millis(2)));
        table.instructions(Some(3_000_000), Some(Duration::from_millis(10)));
        let text = table.render();
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["built", "2.0", "2.0"]);
        assert_eq!(rows[2], ["ended", "5.0", "3.0"]);
        assert_eq!(rows[3], ["never", "-"]);
        assert_eq!(rows[5], ["guest", "MIPS", "300"]);
    }
}
