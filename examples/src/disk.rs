//! `--disk`: an image file, and how its device reads and writes it.

use std::path::PathBuf;
use std::str::FromStr;

use vmkit::virtio::{Block, Engine, Qcow2, RateLimit};

use crate::Failure;
use crate::args::limit;

const KNOWN: &str =
    "ro, format=raw|qcow2, backing=DIR, engine=positional|io_uring, queues=N and limit=RATE";

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    file: PathBuf,
    read_only: bool,
    format: Format,
    backing: Option<PathBuf>,
    engine: Engine,
    queues: u16,
    limit: RateLimit,
}

/// What an image file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let file = words.next().filter(|file| !file.is_empty()).ok_or("which file?")?;
        let mut disk = Self {
            file: file.into(),
            read_only: false,
            format: Format::Raw,
            backing: None,
            engine: Engine::Positional,
            queues: 1,
            limit: RateLimit::new(),
        };
        for word in words {
            match word {
                "ro" => disk.read_only = true,
                "format=raw" => disk.format = Format::Raw,
                "format=qcow2" => disk.format = Format::Qcow2,
                "engine=positional" => disk.engine = Engine::Positional,
                "engine=io_uring" => disk.engine = Engine::IoUring,
                other => match other.split_once('=') {
                    Some(("backing", place)) if !place.is_empty() => {
                        disk.backing = Some(place.into());
                    }
                    Some(("queues", count)) => disk.queues = queues(count)?,
                    Some(("limit", rate)) => disk.limit = limit(disk.limit, rate)?,
                    _ => return Err(format!("`{other}` is none of {KNOWN}")),
                },
            }
        }
        if disk.engine == Engine::IoUring && disk.format != Format::Raw {
            return Err("only a raw image can be read and written through io_uring".into());
        }
        if disk.backing.is_some() && disk.format == Format::Raw {
            return Err("a raw image has no backing file".into());
        }
        Ok(disk)
    }
}

impl DiskArg {
    /// The device.
    ///
    /// # Errors
    /// [`Failure`] if the image or its engine cannot be had.
    pub fn open(&self) -> Result<Block, Failure> {
        let opened = match (self.format, self.read_only) {
            (Format::Raw, false) => Block::file(&self.file),
            (Format::Raw, true) => Block::read_only_file(&self.file),
            (Format::Qcow2, read_only) => {
                let image = Qcow2::at(&self.file);
                let image = self.backing.iter().fold(image, Qcow2::backing_from);
                if read_only { image.read_only() } else { image }.open()
            }
        };
        let block = opened?.engine(self.engine)?;
        Ok(block.queues(self.queues).limit(self.limit))
    }
}

fn queues(text: &str) -> Result<u16, String> {
    let count = text.parse().ok().filter(|count| (1..=64).contains(count));
    count.ok_or_else(|| format!("`{text}` is no number of queues: want 1 to 64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_raw_and_writable_unless_it_is_said() {
        let parsed = |text: &str| text.parse::<DiskArg>();
        let disk = |read_only, format, backing: Option<&str>| {
            let plain = DiskArg {
                file: "a.img".into(),
                read_only,
                format,
                backing: backing.map(PathBuf::from),
                engine: Engine::Positional,
                queues: 1,
                limit: RateLimit::new(),
            };
            Ok(plain)
        };
        assert_eq!(parsed("a.img"), disk(false, Format::Raw, None));
        assert_eq!(parsed("a.img,ro"), disk(true, Format::Raw, None));
        assert_eq!(parsed("a.img,format=qcow2,ro"), disk(true, Format::Qcow2, None));
        let backed = "a.img,format=qcow2,backing=/images";
        assert_eq!(parsed(backed), disk(false, Format::Qcow2, Some("/images")));
        let unbacked = ["a.img,backing=/images", "a.img,format=qcow2,backing="];
        for bad in ["", ",ro", "a.img,rw", "a.img,format=vmdk"].into_iter().chain(unbacked) {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_has_the_engine_queues_and_limits_that_are_said() {
        let text = "a.img,engine=io_uring,queues=4,limit=10M,limit=500iops";
        let disk: DiskArg = text.parse().unwrap();
        let rate = RateLimit::new().bytes(10 << 20).operations(500);
        assert_eq!((disk.engine, disk.queues, disk.limit), (Engine::IoUring, 4, rate));
        let queues = ["a.img,queues=0", "a.img,queues=65", "a.img,queues="];
        let others = ["a.img,engine=aio", "a.img,format=qcow2,engine=io_uring", "a.img,limit=0"];
        for bad in queues.into_iter().chain(others) {
            assert!(bad.parse::<DiskArg>().is_err(), "{bad}");
        }
    }
}
