//! Advisory locks on image files.

use std::fs::File;
use std::io;
use std::path::Path;

/// A lock on an image, given back when this is dropped.
///
/// The lock is flock(2)'s, which a child that this process is starting holds too, from its fork to its
/// exec. To close the file would therefore not give the lock back at once; to unlock it does.
pub(crate) struct FileLock(File);

/// An image that could not be opened: what was attempted, and what the host said.
pub(crate) type NotOpened = (&'static str, io::Error);

impl FileLock {
    /// Opens the image at `path`: to be written too, and by no one else, or to be read, as others may.
    pub(crate) fn open(path: &Path, write: bool) -> Result<(File, Self), NotOpened> {
        let file = File::options().read(true).write(write).open(path);
        let file = file.map_err(|source| ("open", source))?;
        let lock = if write { Self::alone(&file) } else { Self::shared(&file) };
        Ok((file, lock.map_err(|source| ("lock", source))?))
    }

    /// No one else may use `file`.
    fn alone(file: &File) -> io::Result<Self> {
        let same = file.try_clone()?;
        same.try_lock()?;
        Ok(Self(same))
    }

    /// No one may write to `file`.
    fn shared(file: &File) -> io::Result<Self> {
        let same = file.try_clone()?;
        same.try_lock_shared()?;
        Ok(Self(same))
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            log::warn!("an image stays locked until it is closed everywhere: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_lock_is_free_although_a_starting_child_has_the_file_open() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let image = File::open(place.path()).unwrap();
        let childs = image.try_clone().unwrap();
        let lock = FileLock::alone(&image).unwrap();
        let other = File::open(place.path()).unwrap();
        assert_eq!(FileLock::alone(&other).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(FileLock::shared(&other).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        drop((lock, image));
        let both = (FileLock::shared(&other).unwrap(), FileLock::shared(&place.reopen().unwrap()));
        assert!(both.1.is_ok());
        drop((both, childs));
    }
}
