//! A function's configuration space: bytes, and which bits of them software may write (PCI 3.0 §6).
//! It knows what registers look like, not what they do.

use std::ops::Range;

/// Bytes of a conventional configuration space.
pub(crate) const LEN: usize = 256;
/// BARs of a function.
pub(crate) const BARS: usize = 6;

/// Registers (§6.1, figure 6-1).
pub(crate) mod register {
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const BAR0: usize = 0x10;
    pub const INTERRUPT_LINE: usize = 0x3C;
}

/// Command register (§6.2.2): the function answers its memory BARs.
pub(crate) const MEMORY: u16 = 1 << 1;
/// Command register: the function may read and write memory.
const BUS_MASTER: u16 = 1 << 2;
/// Command register: the function leaves its interrupt pin alone.
pub(crate) const INTX_DISABLE: u16 = 1 << 10;
/// Status register (§6.2.3): the interrupt pin is asserted, whether or not it is disabled.
pub(crate) const INTX_STATUS: u8 = 1 << 3;
/// Status register: there is a list of capabilities.
const CAPABILITIES: u8 = 1 << 4;
/// Interrupt line register (§6.2.4): unknown, or no connection.
const UNKNOWN_LINE: u8 = 0xFF;
/// First byte for capabilities.
const FIRST_CAPABILITY: usize = 0x40;
/// Capability id of MSI-X (§6.8.2).
pub(crate) const MSIX: u8 = 0x11;

/// Who a function is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, sub-class and programming interface, as `0xBBSSPP`.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// One entry of the list of capabilities (§6.7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its id.
    pub id: u8,
    /// Its bytes, from the third on: id and next pointer come before.
    pub bytes: Vec<u8>,
    /// Which bits of `bytes` software may write; shorter is padded with zeros.
    pub writable: Vec<u8>,
    /// The capability is a window to the BARs, laid out as virtio's (virtio 1.2 §4.1.4.9): bar at
    /// byte 4, offset at 8, length at 12, data at 16.
    pub window: bool,
}

impl Capability {
    /// A capability that software can only read.
    pub fn fixed(id: u8, bytes: Vec<u8>) -> Self {
        Self { id, bytes, writable: Vec::new(), window: false }
    }
}

/// What a function is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Who it is.
    pub identity: Identity,
    /// Bytes of each BAR, all of them of 32-bit memory: powers of two from 4 KiB to 64 MiB. None
    /// for a BAR that is not there.
    pub bars: [Option<u32>; BARS],
    /// Its capabilities, apart from MSI-X.
    pub capabilities: Vec<Capability>,
    /// Its MSI-X vectors and their place, if it has any.
    pub msix: Option<crate::MsixPlace>,
    /// True if it has an interrupt pin.
    pub pin: bool,
}

/// The space itself.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the MSI-X capability is.
    pub msix: Option<usize>,
    /// Where the window is.
    pub window: Option<usize>,
}

impl Config {
    /// The space of a function as it is after power-on; an error says what does not fit.
    pub(crate) fn new(of: &Description) -> Result<Self, String> {
        let mut config = Self { bytes: [0; LEN], writable: [0; LEN], msix: None, window: None };
        let id = of.identity;
        config.put(0x00, &id.vendor.to_le_bytes());
        config.put(0x02, &id.device.to_le_bytes());
        config.put(0x08, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        config.put(0x2C, &id.subsystem_vendor.to_le_bytes());
        config.put(0x2E, &id.subsystem.to_le_bytes());
        // Which input of a pair of 8259s the pin is on, nobody knows.
        config.put(register::INTERRUPT_LINE, &[if of.pin { UNKNOWN_LINE } else { 0 }]);
        config.put(0x3D, &[u8::from(of.pin)]);
        config.allow(register::COMMAND, &(MEMORY | BUS_MASTER | INTX_DISABLE).to_le_bytes());
        config.allow(0x0C, &[0xFF]);
        config.allow(register::INTERRUPT_LINE, &[0xFF]);
        for (index, size) in of.bars.iter().enumerate() {
            let Some(size) = *size else { continue };
            if !size.is_power_of_two() || !(4096..=64 << 20).contains(&size) {
                return Err(format!("BAR {index} of {size} bytes"));
            }
            // Software finds the size by writing ones and reading back (§6.2.5.1).
            config.allow(register::BAR0 + 4 * index, &(!(size - 1)).to_le_bytes());
        }
        let mut capabilities = of.capabilities.clone();
        if let Some(place) = &of.msix {
            capabilities.push(place.capability(&of.bars)?);
        }
        config.link(&capabilities)?;
        Ok(config)
    }

    fn link(&mut self, capabilities: &[Capability]) -> Result<(), String> {
        let (mut pointer, mut at) = (0x34, FIRST_CAPABILITY);
        for capability in capabilities {
            let end = at + 2 + capability.bytes.len();
            if end > LEN || capability.window && capability.bytes.len() < 18 {
                return Err(format!("capability {:#x} does not fit", capability.id));
            }
            self.put(pointer, &[at as u8]);
            self.put(at, &[capability.id, 0]);
            self.put(at + 2, &capability.bytes);
            let writable = capability.writable.len().min(capability.bytes.len());
            self.allow(at + 2, capability.writable.get(..writable).unwrap_or_default());
            if capability.id == MSIX {
                self.msix = Some(at);
            }
            if capability.window {
                self.window = Some(at);
            }
            self.put(register::STATUS, &[CAPABILITIES]);
            pointer = at + 1;
            at = end.next_multiple_of(4);
        }
        Ok(())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable.iter_mut().skip(at).zip(bits).for_each(|(to, from)| *to = *from);
    }

    /// Reads; beyond the end there are ones, as from a function without extended space.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        for (n, to) in data.iter_mut().enumerate() {
            *to = self.bytes.get(at.saturating_add(n)).copied().unwrap_or(0xFF);
        }
    }

    /// Writes the bits that may be written.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        let writable = self.writable.iter().skip(at);
        for ((to, mask), from) in self.bytes.iter_mut().skip(at).zip(writable).zip(data) {
            *to = *to & !mask | from & mask;
        }
    }

    pub(crate) fn word(&self, at: usize) -> u16 {
        let mut word = [0; 2];
        self.read(at, &mut word);
        u16::from_le_bytes(word)
    }

    pub(crate) fn long(&self, at: usize) -> u32 {
        let mut long = [0; 4];
        self.read(at, &mut long);
        u32::from_le_bytes(long)
    }

    pub(crate) fn set_bar(&mut self, index: usize, address: u32) {
        self.write(register::BAR0 + 4 * index, &address.to_le_bytes());
    }

    /// Where BAR `index` of `size` bytes is, if the function answers it.
    pub(crate) fn bar(&self, index: usize, size: u32) -> Option<Range<u64>> {
        let start = u64::from(self.long(register::BAR0 + 4 * index));
        let decodes = self.word(register::COMMAND) & MEMORY != 0;
        (decodes && start != 0).then_some(start..start + u64::from(size))
    }

    /// Everything that software can have written.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & mask).collect()
    }

    /// Takes on what [`save`](Self::save) gave; false if it is not of this size.
    pub(crate) fn load(&mut self, saved: &[u8]) -> bool {
        let fits = saved.len() == LEN
            && saved.iter().zip(&self.writable).all(|(byte, mask)| byte & !mask == 0);
        if fits {
            self.write(0, saved);
        }
        fits
    }
}
