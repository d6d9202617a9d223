//! The saved-state container of vmkit: named, versioned sections.
//!
//! A [`Section`] is one part's state: who it belongs to (`name`), what it is (`kind`), the version
//! of its encoding, and its bytes. Bytes are what [`Section::encode`] makes of a saved type (serde
//! through postcard); they are untrusted on the way back in, and [`Section::decode`] answers a bad
//! one with an error that names the section.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// One part's saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose state it is: unique within a machine (`"serial0"`, `"vcpu1"`).
    pub name: String,
    /// What kind of part it is (`"16550"`): a section is loaded only by a part of its kind.
    pub kind: String,
    /// Version of the encoding of `bytes`, counted from 1 per kind.
    pub version: u32,
    /// The encoded state.
    pub bytes: Vec<u8>,
}

/// Why saved state could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The state could not be encoded.
    #[error("section {name} ({kind}) cannot be encoded: {reason}")]
    Encode {
        /// The section's name.
        name: String,
        /// The section's kind.
        kind: String,
        /// What the encoder said.
        reason: String,
    },
    /// The bytes are not an encoding of this kind and version.
    #[error("section {name} ({kind}, version {version}) is malformed: {reason}")]
    Malformed {
        /// The section's name.
        name: String,
        /// The section's kind.
        kind: String,
        /// The section's version.
        version: u32,
        /// What the decoder said.
        reason: String,
    },
    /// The section is of another kind than the part that loads it.
    #[error("section {name} is of kind {found}, want {want}")]
    Kind {
        /// The section's name.
        name: String,
        /// The kind it has.
        found: String,
        /// The kind it should have.
        want: String,
    },
    /// The section's version is not one this build reads.
    #[error("section {name} ({kind}) has version {found}, this build reads {reads}")]
    Version {
        /// The section's name.
        name: String,
        /// The section's kind.
        kind: String,
        /// The version it has.
        found: u32,
        /// The newest version this build reads.
        reads: u32,
    },
}

impl Section {
    /// Encodes `state` as a section.
    ///
    /// # Errors
    /// [`SnapshotError::Encode`] if `state` has no encoding (a sequence of unknown length).
    pub fn encode<T: Serialize>(
        name: &str,
        kind: &str,
        version: u32,
        state: &T,
    ) -> Result<Self, SnapshotError> {
        let bytes = postcard::to_stdvec(state).map_err(|e| SnapshotError::Encode {
            name: name.into(),
            kind: kind.into(),
            reason: e.to_string(),
        })?;
        Ok(Self { name: name.into(), kind: kind.into(), version, bytes })
    }

    /// Decodes a section of `kind` and `version`. Bytes left over are an error.
    ///
    /// # Errors
    /// [`SnapshotError::Kind`], [`SnapshotError::Version`] or [`SnapshotError::Malformed`].
    pub fn decode<T: DeserializeOwned>(
        &self,
        kind: &str,
        version: u32,
    ) -> Result<T, SnapshotError> {
        if self.kind != kind {
            return Err(SnapshotError::Kind {
                name: self.name.clone(),
                found: self.kind.clone(),
                want: kind.into(),
            });
        }
        if self.version != version {
            return Err(SnapshotError::Version {
                name: self.name.clone(),
                kind: self.kind.clone(),
                found: self.version,
                reads: version,
            });
        }
        let malformed = |reason: String| SnapshotError::Malformed {
            name: self.name.clone(),
            kind: self.kind.clone(),
            version: self.version,
            reason,
        };
        match postcard::take_from_bytes(&self.bytes) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(malformed(format!("{} bytes left over", rest.len()))),
            Err(e) => Err(malformed(e.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_round_trips_and_refuses_what_it_is_not() {
        let section = Section::encode("serial0", "16550", 1, &(1_u32, vec![2_u8, 3])).unwrap();
        assert_eq!(section.decode::<(u32, Vec<u8>)>("16550", 1).unwrap(), (1, vec![2, 3]));
        assert!(matches!(section.decode::<u32>("rtc", 1), Err(SnapshotError::Kind { .. })));
        assert!(matches!(section.decode::<u32>("16550", 2), Err(SnapshotError::Version { .. })));
        assert!(matches!(section.decode::<u32>("16550", 1), Err(SnapshotError::Malformed { .. })));
        let mut cut = section;
        cut.bytes.pop();
        assert!(cut.decode::<(u32, Vec<u8>)>("16550", 1).is_err());
    }
}
