//! Writes an initial RAM file system: a cpio archive in the "newc" format
//! (kernel documentation, `driver-api/early-userspace/buffer-format.rst`), uncompressed.

/// An initial RAM file system under construction. Entries appear in the order they are added, and
/// a directory must come before what it holds.
///
/// ```
/// use vmkit_boot::Initramfs;
/// let init = b"#!/bin/sh\nexec /bin/sh\n";
/// let archive = Initramfs::new()
///     .dir("/bin")
///     .dir("/dev")
///     .file("/init", 0o755, init)
///     .symlink("/bin/sh", "busybox")
///     .device("/dev/console", 5, 1)
///     .finish();
/// assert!(archive.starts_with(b"070701"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

impl Initramfs {
    /// An empty file system.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, mode 0755.
    pub fn dir(self, path: &str) -> Self {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file with permission bits `mode`. A file of 4 GiB or more is cut off: the format has
    /// 32-bit sizes.
    pub fn file(self, path: &str, mode: u32, contents: &[u8]) -> Self {
        self.entry(path, REGULAR | mode & 0o7777, (0, 0), contents)
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device, mode 0600. `/dev/console` is `(5, 1)`.
    pub fn device(self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// The archive.
    pub fn finish(self) -> Vec<u8> {
        let mut archive = self.entry("TRAILER!!!", 0, (0, 0), &[]).archive;
        // Readers take whole blocks of 512 bytes.
        archive.resize(archive.len().next_multiple_of(512), 0);
        archive
    }

    fn entry(mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> Self {
        let contents = &contents[..contents.len().min(u32::MAX as usize)];
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2),
        // name's length with its NUL, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            contents.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(contents);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: name, mode, contents.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name_len) = (field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[110..110 + name_len - 1].to_vec()).unwrap();
            if name == "TRAILER!!!" {
                return found;
            }
            let data = (110 + name_len).next_multiple_of(4);
            found.push((name, field(1), archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn every_kind_of_entry_reads_back() {
        let archive = Initramfs::new()
            .dir("/bin")
            .file("/bin/a", 0o755, b"12345")
            .symlink("/bin/sh", "a")
            .device("/dev/console", 5, 1)
            .finish();
        assert_eq!(archive.len() % 512, 0);
        assert_eq!(
            entries(&archive),
            [
                ("bin".to_string(), 0o040_755, vec![]),
                ("bin/a".to_string(), 0o100_755, b"12345".to_vec()),
                ("bin/sh".to_string(), 0o120_777, b"a".to_vec()),
                ("dev/console".to_string(), 0o020_600, vec![]),
            ]
        );
    }
}
