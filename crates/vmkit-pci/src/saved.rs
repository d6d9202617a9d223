//! Sections of a bus: its own, then those of each function under the function's name.

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Section, SnapshotError};

use crate::slot::SlotState;

const KIND: &str = "pci-host";
const VERSION: u32 = 1;

/// The bus and its slots, format version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostState {
    pub address: u32,
    pub slots: Vec<SlotState>,
}

impl HostState {
    pub(crate) fn section(&self) -> Result<Section, SnapshotError> {
        Section::encode(KIND, KIND, VERSION, self)
    }

    /// The bus's state in `sections`, of which there must be one.
    pub(crate) fn find(device: &str, sections: &[Section]) -> Result<Self, DeviceError> {
        let mut own = sections.iter().filter(|section| section.name == KIND);
        match (own.next(), own.next()) {
            (Some(section), None) => section
                .decode(KIND, VERSION)
                .map_err(|source| DeviceError::State { device: device.into(), source }),
            _ => Err(malformed(device, "want one section of the bus")),
        }
    }
}

pub(crate) fn is_own(section: &Section) -> bool {
    section.name == KIND
}

/// `section` of function `name`, named within the bus.
pub(crate) fn outer(name: &str, mut section: Section) -> Section {
    section.name = format!("{name}/{}", section.name);
    section
}

/// `section` as function `name` knows it, if it is the function's.
pub(crate) fn inner(name: &str, section: &Section) -> Option<Section> {
    let own = section.name.strip_prefix(name)?.strip_prefix('/')?;
    Some(Section { name: own.into(), ..section.clone() })
}

pub(crate) fn malformed(device: &str, reason: impl Into<String>) -> DeviceError {
    let source = SnapshotError::Malformed {
        name: KIND.into(),
        kind: KIND.into(),
        version: VERSION,
        reason: reason.into(),
    };
    DeviceError::State { device: device.into(), source }
}
