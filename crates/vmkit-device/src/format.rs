//! Saved state that is one section, and errors for sections that do not fit. Most devices need no more.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmkit_snapshot::{Section, SnapshotError};

use crate::{DeviceError, Saved};

/// What the one section of a device, or of a part of one, is called, and which version of it this
/// build writes and reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionFormat {
    /// Name and kind of the section.
    pub kind: &'static str,
    /// Version of what is in it.
    pub version: u32,
}

impl SectionFormat {
    /// `state` as the only section.
    pub fn save<T: Serialize>(&self, state: &T) -> Saved {
        match Section::encode(self.kind, self.kind, self.version, state) {
            Ok(section) => Saved::Sections(vec![section]),
            Err(_) => Saved::Cannot("its state has no encoding"),
        }
    }

    /// The state in the one section there must be.
    ///
    /// # Errors
    /// [`DeviceError::State`] for any other number of sections, and for one of another kind, version or shape.
    pub fn load<T: DeserializeOwned>(
        &self,
        device: &str,
        sections: &[Section],
    ) -> Result<T, DeviceError> {
        let [section] = sections else {
            return Err(self.malformed(device, format!("{} sections, want one", sections.len())));
        };
        section
            .decode(self.kind, self.version)
            .map_err(|source| DeviceError::State { device: device.into(), source })
    }

    /// An error that says why decoded state is none that `device` can be in.
    pub fn malformed(&self, device: &str, reason: impl Into<String>) -> DeviceError {
        let source = SnapshotError::Malformed {
            name: self.kind.into(),
            kind: self.kind.into(),
            version: self.version,
            reason: reason.into(),
        };
        DeviceError::State { device: device.into(), source }
    }

    /// Refuses sections for a part that has none.
    ///
    /// # Errors
    /// [`DeviceError::State`] that names the first section.
    pub fn none(device: &str, sections: &[Section]) -> Result<(), DeviceError> {
        let Some(section) = sections.first() else { return Ok(()) };
        let source = SnapshotError::Kind {
            name: section.name.clone(),
            found: section.kind.clone(),
            want: "none".into(),
        };
        Err(DeviceError::State { device: device.into(), source })
    }
}
