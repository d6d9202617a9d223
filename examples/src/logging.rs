//! Shows the library's log on standard error: warnings, or what `VMKIT_LOG` asks for.

use log::{LevelFilter, Log, Metadata, Record};

struct ToStderr;

impl Log for ToStderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // A terminal in raw mode needs the carriage return; elsewhere it does no harm.
        eprint!("vmkit: {}\r\n", record.args());
    }

    fn flush(&self) {}
}

/// Starts logging. `VMKIT_LOG` is `error`, `warn`, `info`, `debug`, `trace` or `off`.
pub fn start() {
    let level = std::env::var("VMKIT_LOG").ok().and_then(|text| text.parse().ok());
    if log::set_logger(&ToStderr).is_ok() {
        log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    }
}
