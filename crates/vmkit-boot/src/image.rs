//! An image, in a file or in memory, and reads from it that cannot go out of bounds.
//!
//! A file stays a file: what is loaded of it goes to the guest piece by piece, and is never in this
//! process's memory as a whole.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

use vmkit_memory::GuestBuffers;

use crate::BootError;

/// Longest file taken as a kernel or module: enough for a kernel with debug information.
const LIMIT: u64 = 2 << 30;

/// An image's name and contents.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) name: String,
    contents: Contents,
}

#[derive(Clone)]
enum Contents {
    Bytes(Vec<u8>),
    /// A regular file and its length when it was opened. Should it shrink, reads fail.
    File(Arc<File>, u64),
}

impl Image {
    /// Opens `path`. What is no regular file, a pipe say, is read to its end.
    pub(crate) fn open(path: &Path) -> Result<Self, BootError> {
        let name = path.display().to_string();
        let read_error = |source| BootError::Read { image: name.clone(), source };
        let file = File::open(path).map_err(read_error)?;
        let meta = file.metadata().map_err(read_error)?;
        if meta.is_dir() {
            return Err(read_error(ErrorKind::IsADirectory.into()));
        }
        if !meta.is_file() && !meta.file_type().is_fifo() {
            let source = io::Error::new(ErrorKind::InvalidInput, "neither a file nor a pipe");
            return Err(read_error(source));
        }
        if meta.len() > LIMIT {
            return Err(BootError::TooLarge { image: name, limit: LIMIT });
        }
        // Files of /proc and the like have contents, but no length.
        if meta.is_file() && meta.len() != 0 {
            let contents = Contents::File(Arc::new(file), meta.len());
            return Ok(Self { name, contents });
        }
        let mut bytes = Vec::new();
        file.take(LIMIT + 1).read_to_end(&mut bytes).map_err(read_error)?;
        if bytes.len() as u64 > LIMIT {
            return Err(BootError::TooLarge { image: name, limit: LIMIT });
        }
        Ok(Self { name, contents: Contents::Bytes(bytes) })
    }

    pub(crate) fn new(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), contents: Contents::Bytes(bytes) }
    }

    pub(crate) fn view(&self) -> View<'_> {
        let source = match &self.contents {
            Contents::Bytes(bytes) => Source::Bytes(bytes),
            Contents::File(file, len) => Source::File(file, *len),
        };
        View { name: &self.name, source }
    }
}

/// A borrowed image. All offsets are from its first byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub(crate) name: &'a str,
    source: Source<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Bytes(&'a [u8]),
    File(&'a File, u64),
}

impl<'a> View<'a> {
    /// Of `bytes`, under a name for errors.
    pub(crate) fn of(name: &'a str, bytes: &'a [u8]) -> Self {
        Self { name, source: Source::Bytes(bytes) }
    }

    pub(crate) fn len(&self) -> u64 {
        match self.source {
            Source::Bytes(bytes) => bytes.len() as u64,
            Source::File(_, len) => len,
        }
    }

    /// Errors unless there are `len` bytes at `offset`.
    pub(crate) fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), BootError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(BootError::Truncated {
                image: self.name.into(),
                what,
                offset,
                len,
                has: self.len(),
            }),
        }
    }

    /// The file the image is in, if it is not in memory.
    pub(crate) fn file(&self) -> Option<&'a File> {
        match self.source {
            Source::Bytes(_) => None,
            Source::File(file, _) => Some(file),
        }
    }

    /// Reads some bytes of the image's `file`, from `offset` on, into guest memory: how many.
    pub(crate) fn read_into(
        &self,
        file: &File,
        offset: u64,
        into: &GuestBuffers<'_>,
    ) -> Result<u64, BootError> {
        let error = |source| BootError::Read { image: self.name.into(), source };
        match into.read_from(file.as_fd(), Some(offset)).map_err(error)? {
            0 => Err(error(std::io::ErrorKind::UnexpectedEof.into())),
            read => Ok(read as u64),
        }
    }

    /// Fills `into` with the bytes from `offset` on.
    pub(crate) fn read(
        &self,
        what: &'static str,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), BootError> {
        self.check(what, offset, into.len() as u64)?;
        match self.source {
            Source::Bytes(bytes) => {
                let start = offset as usize;
                into.copy_from_slice(&bytes[start..start + into.len()]);
                Ok(())
            }
            Source::File(file, _) => file
                .read_exact_at(into, offset)
                .map_err(|source| BootError::Read { image: self.name.into(), source }),
        }
    }

    /// `len` bytes at `offset`.
    pub(crate) fn get(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<Cow<'a, [u8]>, BootError> {
        self.check(what, offset, len)?;
        if let Source::Bytes(bytes) = self.source {
            return Ok(Cow::Borrowed(&bytes[offset as usize..(offset + len) as usize]));
        }
        let mut bytes = vec![0; len as usize];
        self.read(what, offset, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    fn array<const N: usize>(&self, what: &'static str, offset: u64) -> Result<[u8; N], BootError> {
        let mut array = [0; N];
        self.read(what, offset, &mut array)?;
        Ok(array)
    }

    pub(crate) fn u8(&self, what: &'static str, offset: u64) -> Result<u8, BootError> {
        self.array::<1>(what, offset).map(|[byte]| byte)
    }

    pub(crate) fn u16(&self, what: &'static str, offset: u64) -> Result<u16, BootError> {
        self.array(what, offset).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, what: &'static str, offset: u64) -> Result<u32, BootError> {
        self.array(what, offset).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&self, what: &'static str, offset: u64) -> Result<u64, BootError> {
        self.array(what, offset).map(u64::from_le_bytes)
    }

    pub(crate) fn malformed(&self, offset: u64, reason: &'static str) -> BootError {
        BootError::Malformed { image: self.name.into(), offset, reason }
    }

    pub(crate) fn format(
        &self,
        format: &'static str,
        offset: u64,
        reason: &'static str,
    ) -> BootError {
        BootError::Format { image: self.name.into(), format, offset, reason }
    }

    pub(crate) fn unsupported(&self, what: impl Into<String>) -> BootError {
        BootError::Unsupported { image: self.name.into(), what: what.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_end_name_the_file_and_the_offset() {
        let image = Image::new("k", vec![1, 2, 3, 4]);
        let view = image.view();
        assert_eq!(view.u32("a word", 0).unwrap(), 0x0403_0201);
        for offset in [1, 4, u64::MAX, u64::MAX - 3] {
            let error = view.u32("a word", offset).unwrap_err();
            assert!(matches!(error, BootError::Truncated { offset: o, has: 4, .. } if o == offset));
        }
    }

    #[test]
    fn a_file_reads_as_its_bytes_do() {
        let path = std::env::temp_dir().join(format!("vmkit-boot-image-{}", std::process::id()));
        let bytes: Vec<u8> = (0..=255).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (file, memory) = (Image::open(&path).unwrap(), Image::new("bytes", bytes.clone()));
        std::fs::remove_file(&path).unwrap();
        let (file, memory) = (file.view(), memory.view());
        assert!(file.file().is_some() && memory.file().is_none());
        for (offset, len) in [(0, 256), (0, 0), (256, 0), (17, 100), (255, 1)] {
            let [ours, theirs] = [file, memory].map(|view| view.get("it", offset, len).unwrap());
            assert_eq!(ours, theirs);
        }
        assert_eq!(file.u32("a word", 4).unwrap(), 0x0706_0504);
        for (offset, len) in [(0, 257), (256, 1), (u64::MAX, 2)] {
            let error = file.get("it", offset, len).unwrap_err();
            assert!(matches!(error, BootError::Truncated { has: 256, .. }), "{error}");
        }
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let path = std::env::temp_dir().join(format!("vmkit-boot-shrink-{}", std::process::id()));
        std::fs::write(&path, [1; 64]).unwrap();
        let image = Image::open(&path).unwrap();
        std::fs::write(&path, [1; 8]).unwrap();
        let error = image.view().get("it", 0, 64).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(error, BootError::Read { .. }), "{error}");
    }

    #[test]
    fn only_files_and_pipes_are_read() {
        assert!(matches!(Image::open(Path::new("/dev/zero")), Err(BootError::Read { .. })));
        assert!(matches!(Image::open(Path::new("/")), Err(BootError::Read { .. })));
        assert!(matches!(Image::open(Path::new("/nonexistent")), Err(BootError::Read { .. })));
    }
}
