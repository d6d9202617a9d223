//! Disks in qcow2 images, through the imago crate.
//!
//! An image names its own backing file, so that whoever made it could name any file of the host, and
//! a guest can write a whole new image into a raw disk. Therefore nothing is opened that the embedder
//! did not allow, and no format is guessed: one that the image does not name is an error.
//!
//! Guest memory is reached through a buffer of ours, because imago wants slices that nobody else
//! changes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2 as Image;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};
use vmkit_device::DeviceError;
use vmkit_memory::GuestBuffers;

use super::{Block, Disk};
use crate::lock::FileLock;

/// Most images that are stacked on each other.
const MOST_LAYERS: usize = 32;
/// Most bytes that are copied at once.
const CHUNK: usize = 1 << 20;

type Layer = FormatAccess<ImageFile>;

/// How to open a qcow2 image.
///
/// ```no_run
/// use vmkit_virtio::Qcow2;
///
/// let disk = Qcow2::at("/vms/one.qcow2").backing_from("/images").open()?.serial("root");
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Qcow2 {
    path: PathBuf,
    allowed: Vec<PathBuf>,
    read_only: bool,
}

impl Qcow2 {
    /// The image at `path`, for reading and writing, without a backing file.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), allowed: Vec::new(), read_only: false }
    }

    /// Allows the image, and each one under it, a backing file that is `place` or lies in the
    /// directory `place`, after all symbolic links are followed. The image must name its backing
    /// file's format, which is qcow2 or raw.
    #[must_use]
    pub fn backing_from(mut self, place: impl Into<PathBuf>) -> Self {
        self.allowed.push(place.into());
        self
    }

    /// Refuses all writes of the guest, and opens the image for reading.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// A block device on the image. The image, and the files under it, are locked as
    /// [`Block::file`] locks.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if a file cannot be opened, is in use or is no such image, and if it
    /// has a backing file that is not allowed or whose format it does not name, or is to be written to
    /// and counts no references to its header;
    /// [`DeviceError::Config`] if the disk is smaller than a sector.
    pub fn open(self) -> Result<Block, DeviceError> {
        let path = self.path.display().to_string();
        let disk = self.layers().map_err(|source| DeviceError::Host {
            device: "block0".into(),
            what: format!("open the qcow2 image {path}"),
            source,
        })?;
        let block = Block::disk(disk)?;
        Ok(if self.read_only { block.read_only() } else { block })
    }

    /// Opens the image and what is under it, top to bottom, then stacks them.
    fn layers(&self) -> io::Result<Qcow2Disk> {
        let mut locks = Vec::new();
        let (mut path, mut qcow2) = (self.path.clone(), true);
        let mut images = Vec::new();
        let mut base = None;
        while qcow2 {
            if images.len() >= MOST_LAYERS {
                return Err(refused(format!("more than {MOST_LAYERS} images under each other")));
            }
            let write = images.is_empty() && !self.read_only;
            let bytes = open(&path, write, &mut locks)?;
            if write {
                check_refcounts(&bytes)?;
            }
            let image = Image::<ImageFile>::open_image(storage(bytes, &path, write)?, write)?;
            if image.requires_external_data_file() {
                return Err(refused("its data is in another file, which is not supported"));
            }
            let backing = match image.implicit_backing_file() {
                None => None,
                Some(name) => Some((
                    self.allow(&path, name)?,
                    is_qcow2(image.implicit_backing_format().map(String::as_str))?,
                )),
            };
            images.push(image);
            let Some((under, format)) = backing else { break };
            (path, qcow2) = (under, format);
            if !qcow2 {
                base = Some(Layer::new(Raw::open_image(
                    storage(open(&path, false, &mut locks)?, &path, false)?,
                    false,
                )?));
            }
        }
        for mut image in images.into_iter().rev() {
            image.set_data_file(None);
            image.set_backing(base);
            base = Some(Layer::new(image));
        }
        let image = base.ok_or_else(|| refused("no image"))?;
        Ok(Qcow2Disk { bytes: image.size(), image: RwLock::new(image), _locks: locks })
    }

    /// Where the backing file `name` of the image at `image` is, if it may be used.
    fn allow(&self, image: &Path, name: &str) -> io::Result<PathBuf> {
        let beside = image.parent().unwrap_or(Path::new(""));
        let refuse = || refused(format!("its backing file {name:?} is not allowed"));
        // Nothing is told of files outside of the allowed places, not even whether they exist.
        let path = beside.join(name).canonicalize().map_err(|_| refuse())?;
        for place in &self.allowed {
            if path.starts_with(place.canonicalize()?) {
                return Ok(path);
            }
        }
        Err(refuse())
    }
}

fn refused(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason.into())
}

/// True for qcow2, false for raw.
fn is_qcow2(format: Option<&str>) -> io::Result<bool> {
    match format {
        Some("qcow2") => Ok(true),
        Some("raw") => Ok(false),
        Some(other) => Err(refused(format!("its backing file's format {other:?} is not known"))),
        None => Err(refused("it does not name its backing file's format, and none is guessed")),
    }
}

/// Opens a file and locks it.
fn open(path: &Path, write: bool, locks: &mut Vec<FileLock>) -> io::Result<File> {
    let (file, lock) = FileLock::open(path, write).map_err(|(_, source)| source)?;
    locks.push(lock);
    Ok(file)
}

/// Refuses an image that counts no references to its first clusters, where its header is. Who allocates
/// in one puts the missing counts over the header, and imago then looks for them without end.
fn check_refcounts(image: &File) -> io::Result<()> {
    // `refcount_table_offset` and `refcount_table_clusters` of the header; the table's first entry.
    let mut place = [0; 12];
    image.read_exact_at(&mut place, 48)?;
    let [table @ .., c0, c1, c2, c3] = place;
    let mut first = [0; 8];
    if u32::from_be_bytes([c0, c1, c2, c3]) > 0 {
        image.read_exact_at(&mut first, u64::from_be_bytes(table))?;
    }
    // The low bits of an entry are reserved.
    if u64::from_be_bytes(first) >> 9 == 0 {
        return Err(refused("it does not count references to its header"));
    }
    Ok(())
}

fn storage(file: File, path: &Path, write: bool) -> io::Result<ImageFile> {
    ImageFile::from_open_file(file, StorageOpenOptions::new().write(write).filename(path))
}

/// A disk in an image.
struct Qcow2Disk {
    bytes: u64,
    /// Written to only by discards, which move what others may be about to read.
    image: RwLock<Layer>,
    /// Given back after what imago still writes when it is dropped.
    _locks: Vec<FileLock>,
}

impl Disk for Qcow2Disk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, mut offset: u64, into: &mut GuestBuffers<'_>) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let mut copy = vec![0; into.bytes().min(CHUNK)];
        while into.bytes() > 0 {
            let now = copy.get_mut(..into.bytes().min(CHUNK)).unwrap_or_default();
            image.read(&mut *now, offset)?;
            let mut rest: &[u8] = now;
            for slice in into.slices() {
                let (part, later) = rest.split_at_checked(slice.len()).unwrap_or((rest, &[]));
                slice.copy_from(part);
                rest = later;
            }
            offset += now.len() as u64;
            let count = now.len();
            into.advance(count);
        }
        Ok(())
    }

    fn write(&self, mut offset: u64, from: &mut GuestBuffers<'_>) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let mut copy = vec![0; from.bytes().min(CHUNK)];
        while from.bytes() > 0 {
            let now = copy.get_mut(..from.bytes().min(CHUNK)).unwrap_or_default();
            let count = now.len();
            let mut rest = &mut *now;
            for slice in from.slices() {
                let (part, later) = rest.split_at_mut(slice.len().min(rest.len()));
                slice.copy_to(part);
                rest = later;
            }
            image.write(&*now, offset)?;
            offset += count as u64;
            from.advance(count);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        image.flush()?;
        image.sync()
    }

    fn settle(&self) -> io::Result<()> {
        // Where clusters are is kept in memory until then.
        self.image.read().unwrap_or_else(PoisonError::into_inner).flush()
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        match image.discard_to_any(offset, len) {
            // A discard is a hint; what cannot be freed stays.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let zeroed = if may_unmap {
            let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
            image.discard_to_zero(offset, len)
        } else {
            let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
            image.write_zeroes(offset, len)
        };
        match zeroed {
            // Images of version 2 have no mark for zeros.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.zeros(offset, len),
            other => other,
        }
    }
}

impl Qcow2Disk {
    /// Writes zeros, byte for byte.
    fn zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let zeros = vec![0; len.min(CHUNK as u64) as usize];
        while len > 0 {
            let count = len.min(CHUNK as u64);
            image.write(zeros.get(..count as usize).unwrap_or_default(), offset)?;
            offset += count;
            len -= count;
        }
        Ok(())
    }
}
