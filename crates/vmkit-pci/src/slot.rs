//! One function on the bus: its configuration space at work.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::config::{self, BARS, Config, register};
use crate::msix::Entry;
use crate::{Intx, Msix, PciFunction};

/// A function in its place.
pub(crate) struct Slot {
    pub number: u8,
    pub function: Arc<dyn PciFunction>,
    pub msix: Option<Arc<Msix>>,
    pub intx: Arc<Intx>,
    bars: [Option<u32>; BARS],
    /// As it is after power-on, with the BARs where they were placed.
    power_on: Config,
    config: Mutex<Config>,
    /// Where the function was last told its BARs are.
    told: Mutex<[Option<u64>; BARS]>,
}

/// Saved state of a slot, format version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SlotState {
    number: u8,
    config: Vec<u8>,
    msix: Vec<Entry>,
    asserted: bool,
}

/// An access through a window capability.
struct WindowAccess {
    bar: usize,
    offset: u64,
    len: usize,
}

impl Slot {
    pub(crate) fn new(
        number: u8,
        function: Arc<dyn PciFunction>,
        config: Config,
        bars: [Option<u32>; BARS],
        msix: Option<Arc<Msix>>,
        intx: Arc<Intx>,
    ) -> Self {
        let power_on = config.clone();
        let told = Mutex::default();
        Self { number, function, msix, intx, bars, power_on, config: Mutex::new(config), told }
    }

    fn lock(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the BARs are that the function answers.
    pub(crate) fn decoded(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        let config = self.lock();
        let found: [Option<Range<u64>>; BARS] = std::array::from_fn(|index| {
            let size = self.bars.get(index).copied().flatten()?;
            config.bar(index, size)
        });
        drop(config);
        found.into_iter().enumerate().filter_map(|(index, range)| Some((index, range?)))
    }

    /// Tells the function where its BARs are, of those in `placed`.
    pub(crate) fn tell(&self, placed: &[(usize, u64)]) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, known) in told.iter_mut().enumerate() {
            let now = placed.iter().find(|(bar, _)| *bar == index).map(|(_, start)| *start);
            if *known != now {
                *known = now;
                self.function.bar_moved(index, now);
            }
        }
    }

    pub(crate) fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some(msix) if msix.owns(bar, offset) => msix.read(offset, data),
            _ => self.function.read_bar(bar, offset, data),
        }
    }

    pub(crate) fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        match &self.msix {
            Some(msix) if msix.owns(bar, offset) => msix.write(offset, data),
            _ => self.function.write_bar(bar, offset, data),
        }
    }

    pub(crate) fn read_config(&self, at: usize, data: &mut [u8]) {
        let config = self.lock();
        config.read(at, data);
        let window = self.window(&config, at, data.len());
        drop(config);
        if let Some(status) = register::STATUS.checked_sub(at)
            && let Some(byte) = data.get_mut(status)
            && self.intx.asserted()
        {
            *byte |= config::INTX_STATUS;
        }
        if let Some(access) = window
            && let Some(data) = data.get_mut(..access.len)
        {
            self.read_bar(access.bar, access.offset, data);
        }
    }

    /// Writes the configuration space; true if BARs may have moved.
    pub(crate) fn write_config(&self, at: usize, data: &[u8]) -> bool {
        let mut config = self.lock();
        config.write(at, data);
        let window = self.window(&config, at, data.len());
        let command = config.word(register::COMMAND);
        let end = at.saturating_add(data.len());
        let touches = |range: Range<usize>| at < range.end && range.start < end;
        if touches(register::COMMAND..register::COMMAND + 2) {
            self.intx.disable(command & config::INTX_DISABLE != 0);
        }
        // Under the lock, so that the vectors follow the register in the order of its writes.
        if let (Some(capability), Some(msix)) = (config.msix, &self.msix)
            && touches(capability + 2..capability + 4)
        {
            msix.set_control(config.word(capability + 2));
        }
        drop(config);
        if let Some(access) = window
            && let Some(data) = data.get(..access.len)
        {
            self.write_bar(access.bar, access.offset, data);
        }
        touches(register::COMMAND..register::COMMAND + 2)
            || touches(register::BAR0..register::BAR0 + 4 * BARS)
    }

    /// The access that reading or writing the window's data makes, if `at` is there and what the
    /// driver set up is possible.
    fn window(&self, config: &Config, at: usize, len: usize) -> Option<WindowAccess> {
        let capability = config.window?;
        if at != capability + 16 {
            return None;
        }
        let bar = usize::from(config.word(capability + 4) as u8);
        let offset = u64::from(config.long(capability + 8));
        let wanted = config.long(capability + 12) as usize;
        let size = u64::from(self.bars.get(bar).copied().flatten()?);
        let possible = matches!(wanted, 1 | 2 | 4)
            && wanted <= len
            && offset.is_multiple_of(wanted as u64)
            && offset + wanted as u64 <= size;
        possible.then_some(WindowAccess { bar, offset, len: wanted })
    }

    pub(crate) fn reset(&self) {
        *self.lock() = self.power_on.clone();
        self.function.reset();
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.intx.disable(false);
        self.intx.set(false);
    }

    pub(crate) fn save(&self) -> SlotState {
        SlotState {
            number: self.number,
            config: self.lock().save(),
            msix: self.msix.as_ref().map(|msix| msix.save()).unwrap_or_default(),
            asserted: self.intx.asserted(),
        }
    }

    /// True if the slot can take on `state`.
    pub(crate) fn fits(&self, state: &SlotState) -> bool {
        let vectors = self.msix.as_ref().map_or(0, |msix| usize::from(msix.vectors()));
        state.number == self.number
            && state.msix.len() == vectors
            && self.power_on.clone().load(&state.config)
    }

    /// Takes on a state that fits.
    pub(crate) fn load(&self, state: &SlotState) {
        let mut config = self.lock();
        config.load(&state.config);
        if let (Some(capability), Some(msix)) = (config.msix, &self.msix) {
            msix.load(&state.msix, config.word(capability + 2));
        }
        let disabled = config.word(register::COMMAND) & config::INTX_DISABLE != 0;
        self.intx.restore(state.asserted, disabled);
    }
}
