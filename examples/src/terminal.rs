//! The terminal in raw mode, and back again on every way out.

use std::io::{IsTerminal, Stdin};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};

use crate::Failure;

/// The mode to go back to, while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal in raw mode: no echo, no line editing, no signals from keys. Dropping it restores
/// the terminal, as do a panic and [`restore`].
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input's terminal raw; none if it is not a terminal.
    ///
    /// # Errors
    /// If the terminal refuses.
    pub fn enter(stdin: &Stdin) -> Result<Option<Self>, Failure> {
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let failed = |e: rustix::io::Errno| Failure::host("terminal")(e.into());
        let mode = tcgetattr(stdin).map_err(failed)?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(mode.clone());
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        let mut raw = mode;
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back into the mode it had before [`RawTerminal::enter`]. May be called from
/// any thread, any number of times.
pub fn restore() {
    if let Some(mode) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // It cannot be told to anybody if the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &mode);
    }
}

/// Rows and columns of standard input's terminal.
pub fn size() -> Option<(u16, u16)> {
    let Winsize { ws_row, ws_col, .. } = tcgetwinsize(std::io::stdin()).ok()?;
    (ws_row > 0 && ws_col > 0).then_some((ws_row, ws_col))
}
