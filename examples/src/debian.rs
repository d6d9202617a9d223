//! Finds a stock Debian kernel with its modules and a static busybox, or fetches them with
//! `apt-get download`, as root or not. What was fetched stays in the build's target directory.

use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;
use crate::modules::{BUILT_IN, Modules};

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// `linux-image-cloud-amd64`: what cloud images run; smaller.
    Cloud,
    /// `linux-image-amd64`: what desktops and servers run.
    Full,
}

impl Flavour {
    fn package(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Full => "linux-image-amd64",
        }
    }
}

/// Where fetched files live: `vmkit-guests` in the target directory this program was built in.
pub fn cache() -> PathBuf {
    let target = std::env::current_exe().ok().and_then(|exe| {
        // target/PROFILE/examples/PROGRAM or target/PROFILE/deps/TEST
        let target = exe.ancestors().nth(3)?;
        target.join("CACHEDIR.TAG").exists().then(|| target.to_owned())
    });
    target
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"))
        .join("vmkit-guests")
}

/// A stock kernel's bzImage: fetched before, installed on this host, or fetched now.
///
/// # Errors
/// [`Failure`] that says what to pass instead, if it cannot be fetched.
pub fn kernel(flavour: Flavour) -> Result<PathBuf, Failure> {
    let home = cache().join(flavour.package());
    if let Some(found) = find(&home, |name| name.starts_with("vmlinuz-")) {
        return Ok(found);
    }
    let cloud = |name: &str| name.ends_with("-cloud-amd64");
    let installed = find(Path::new("/boot"), |name| {
        name.starts_with("vmlinuz-")
            && name.ends_with("-amd64")
            && cloud(name) == (flavour == Flavour::Cloud)
    });
    if let Some(found) = installed {
        return Ok(found);
    }
    let newest = || Apt::new()?.dependency(flavour.package()).map_err(|e| explain(&e));
    let package = newest()?;
    fetch_kernel(&package, &home).or_else(|failure| match newest() {
        // apt's lists were old when they named that one, and are fresh now.
        Ok(newer) if newer != package => fetch_kernel(&newer, &home),
        _ => Err(failure),
    })
}

/// Modules that a fetched kernel keeps, with what they depend on: virtio's transports and drivers,
/// and the file system of most images.
const KEPT: [&str; 11] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_pmem",
    "nd_pmem",
    "vmw_vsock_virtio_transport",
    "ext4",
];

/// The modules of the kernel in `image`, or none for a kernel whose modules are not beside it in
/// the cache nor installed.
///
/// # Errors
/// [`Failure`] if they cannot be read, or not be fetched for a kernel that was fetched without them.
pub fn modules(image: &Path) -> Result<Option<Modules>, Failure> {
    let name = image.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(version) = name.strip_prefix("vmlinuz-") else { return Ok(None) };
    let home = image.parent().unwrap_or(Path::new("."));
    let fetched = home.join(version);
    // What was fetched by an older program may lack some.
    let complete = || Modules::open(&fetched).is_ok_and(|m| KEPT.iter().all(|name| m.has(name)));
    if home.starts_with(cache()) && !complete() {
        fetch_kernel(&format!("linux-image-{version}"), home)?;
    }
    let places = [fetched, Path::new("/lib/modules").join(version)];
    let found = places.iter().find(|place| place.join(BUILT_IN).exists());
    found.map(|place| Modules::open(place)).transpose()
}

/// Fetches the kernel of `package` and its modules into `home`.
fn fetch_kernel(package: &str, home: &Path) -> Result<PathBuf, Failure> {
    let fetch = || -> Result<PathBuf, Failure> {
        let unpacked = Apt::new()?.unpack(package)?;
        let lacks = |what: &str| Failure::Other(format!("{package} holds no {what}"));
        let kernel = find(&unpacked.0.join("boot"), |name| name.starts_with("vmlinuz-"))
            .ok_or_else(|| lacks("kernel"))?;
        let name = kernel.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let version = name.trim_start_matches("vmlinuz-");
        let trees = ["lib/modules", "usr/lib/modules"];
        let trees = trees.map(|tree| unpacked.0.join(tree).join(version));
        let tree = trees.iter().find(|tree| tree.is_dir()).ok_or_else(|| lacks("modules"))?;
        keep_modules(tree, &home.join(version))?;
        // The kernel comes last: where it is, all is.
        keep(&kernel, &home.join(name))?;
        Ok(home.join(name))
    };
    fetch().map_err(|e| explain(&e))
}

/// Puts those modules of `tree` that are [`KEPT`] into the directory `home`.
fn keep_modules(tree: &Path, home: &Path) -> Result<(), Failure> {
    let chosen = tree.join("kept");
    std::fs::create_dir_all(&chosen).map_err(Failure::file(&chosen))?;
    for module in Modules::open(tree)?.with_dependencies(&KEPT)? {
        let file = chosen.join(format!("{}.ko", module.name));
        std::fs::write(&file, module.bytes).map_err(Failure::file(&file))?;
    }
    keep(&tree.join(BUILT_IN), &chosen.join(BUILT_IN))?;
    if home.is_dir() {
        std::fs::remove_dir_all(home).map_err(Failure::file(home))?;
    }
    keep(&chosen, home)
}

/// Moves a file or directory to its place in the cache, whole or not at all. Another process may
/// have put the same there meanwhile.
fn keep(from: &Path, to: &Path) -> Result<(), Failure> {
    let home = to.parent().unwrap_or(to);
    std::fs::create_dir_all(home).map_err(Failure::file(home))?;
    match std::fs::rename(from, to) {
        Err(_) if to.is_dir() => Ok(()),
        other => other.map_err(Failure::file(to)),
    }
}

/// A statically linked busybox: fetched before, installed on this host, or fetched now.
///
/// # Errors
/// [`Failure`] that says what to pass instead, if it cannot be fetched.
pub fn busybox() -> Result<PathBuf, Failure> {
    let home = cache().join("busybox-static");
    let fetched = home.join("busybox");
    if fetched.exists() {
        return Ok(fetched);
    }
    let installed = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    if let Some(found) = installed.into_iter().find(|path| is_static(path)) {
        return Ok(found);
    }
    let fetch = || -> Result<(), Failure> {
        let unpacked = Apt::new()?.unpack("busybox-static")?;
        let places = ["bin/busybox", "usr/bin/busybox"].map(|place| unpacked.0.join(place));
        let found = places.iter().find(|place| place.exists());
        let found = found.ok_or(Failure::Other("busybox-static holds no busybox".into()))?;
        keep(found, &fetched)
    };
    fetch().map_err(|e| explain(&e))?;
    Ok(fetched)
}

/// What to do where nothing can be fetched.
const ADVICE: &str = "\
to boot offline, pass --kernel FILE (a Linux bzImage or vmlinux with a serial console), and --busybox \
FILE (statically linked) or --initrd FILE";

fn explain(failure: &Failure) -> Failure {
    Failure::Other(format!("{failure}; {ADVICE}"))
}

/// The last file of `directory` by name that `wanted` wants and that can be read.
fn find(directory: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(&wanted))
        .filter(|path| std::fs::File::open(path).is_ok())
        .collect();
    found.sort();
    found.pop()
}

/// True for an executable without a dynamic loader, whose name would stand near its beginning.
fn is_static(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| {
        let head = &bytes[..bytes.len().min(8192)];
        head.starts_with(b"\x7fELF") && !head.windows(4).any(|w| w == b"/ld-")
    })
}

/// apt, with package lists of our own where the system has none.
struct Apt {
    home: PathBuf,
    private_lists: std::cell::Cell<bool>,
}

impl Apt {
    fn new() -> Result<Self, Failure> {
        let home = cache().join("apt");
        std::fs::create_dir_all(&home).map_err(Failure::file(&home))?;
        let private_lists = home.join("state/lists").exists().into();
        Ok(Self { home, private_lists })
    }

    /// `tool` of apt's with the options that let anybody run it in a directory of ours.
    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        // Root's downloads would otherwise be handed to a user that cannot write here.
        command.args(["-q", "-o", "APT::Sandbox::User=root"]).env("LC_ALL", "C");
        if self.private_lists.get() {
            for (option, place) in [("Dir::State", "state"), ("Dir::Cache", "cache")] {
                command.arg("-o").arg(format!("{option}={}", self.home.join(place).display()));
            }
        }
        command.current_dir(&self.home).stdin(Stdio::null());
        command
    }

    fn output(&self, tool: &str, args: &[&str]) -> Result<String, Failure> {
        let output = self.command(tool).args(args).output().map_err(Failure::host(tool))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Failure::Other(format!("{tool} {}: {}", args.join(" "), last_error(&output.stderr))))
    }

    /// The package that the empty package `name` stands for.
    fn dependency(&self, name: &str) -> Result<String, Failure> {
        let ask = || -> Result<Option<String>, Failure> {
            let text = self.output("apt-cache", &["depends", name])?;
            let mut lines = text.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
            Ok(lines.next().map(str::to_owned))
        };
        if let Ok(Some(found)) = ask() {
            return Ok(found);
        }
        self.update()?;
        ask()?.ok_or_else(|| Failure::Other(format!("apt knows no package {name}")))
    }

    /// Fetches package lists into a place of our own; the system's stay as they are.
    fn update(&self) -> Result<(), Failure> {
        self.private_lists.set(true);
        for place in ["state/lists/partial", "cache/archives/partial"] {
            let place = self.home.join(place);
            std::fs::create_dir_all(&place).map_err(Failure::file(&place))?;
        }
        eprintln!("fetching Debian's package lists");
        self.output("apt-get", &["update", "-o", "APT::Update::Error-Mode=any"]).map(drop)
    }

    /// Downloads `package` and unpacks it.
    fn unpack(&self, package: &str) -> Result<Unpacked, Failure> {
        // Another process may fetch the same at this moment.
        let place = Unpacked(self.home.join(format!("{package}.{}", std::process::id())));
        std::fs::create_dir_all(&place.0).map_err(Failure::file(&place.0))?;
        if self.download(package, &place.0).is_err() {
            // The lists are missing, or so old that what they name is gone.
            self.update()?;
            self.download(package, &place.0)?;
        }
        let archive = find(&place.0, |name| name.ends_with(".deb"))
            .ok_or_else(|| Failure::Other(format!("apt-get left no archive of {package}")))?;
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(&archive).arg(&place.0);
        if unpack.status().map_err(Failure::host("dpkg-deb"))?.success() {
            return Ok(place);
        }
        Err(Failure::Other(format!("{}: cannot be unpacked", archive.display())))
    }

    fn download(&self, package: &str, place: &Path) -> Result<(), Failure> {
        let mut command = self.command("apt-get");
        command
            .args(["download", "-o", "APT::Status-Fd=1", package])
            .current_dir(place)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(Failure::host("apt-get"))?;
        let progress = Progress::of(package);
        if let Some(lines) = child.stdout.take() {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                if let Some(percent) = percent(&line) {
                    progress.show(percent);
                }
            }
        }
        let output = child.wait_with_output().map_err(Failure::host("apt-get"))?;
        drop(progress);
        if output.status.success() {
            return Ok(());
        }
        let said = last_error(&output.stderr);
        Err(Failure::Other(format!("apt-get download {package}: {said}")))
    }
}

/// How far a download is: on a terminal a bar that is gone at the end, elsewhere a line that stays.
struct Progress<'a> {
    package: &'a str,
    terminal: bool,
}

impl<'a> Progress<'a> {
    fn of(package: &'a str) -> Self {
        let progress = Self { package, terminal: std::io::stderr().is_terminal() };
        if progress.terminal {
            progress.show(0);
        } else {
            eprintln!("fetching {package}");
        }
        progress
    }

    fn show(&self, percent: u64) {
        if self.terminal {
            let filled = "=".repeat((percent.min(100) / 4) as usize);
            eprint!("\rfetching {} [{filled:<25}] {percent:>3} %", self.package);
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if self.terminal {
            // Erase in line (ECMA-48 §8.3.41).
            eprint!("\r\x1b[K");
        }
    }
}

/// The percentage in a line of apt's progress reports: `dlstatus:1:48.5:Retrieving …`.
fn percent(line: &str) -> Option<u64> {
    let number = line.strip_prefix("dlstatus:")?.split(':').nth(1)?;
    number.parse::<f64>().ok().map(|percent| percent as u64)
}

/// The line of apt's complaints that says most.
fn last_error(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let mut errors = text.lines().filter_map(|line| line.strip_prefix("E: "));
    errors.next().or(text.lines().next_back()).unwrap_or("it failed without a word").to_owned()
}

/// An unpacked package, gone when this is.
struct Unpacked(PathBuf);

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reports_are_read() {
        assert_eq!(percent("dlstatus:1:48.5127:Retrieving file 1 of 1"), Some(48));
        assert_eq!(percent("Get:1 http://deb.debian.org …"), None);
    }

    #[test]
    fn apts_first_error_is_told() {
        let stderr = b"W: something\nE: Failed to fetch http://x\nE: Some files failed\n";
        assert_eq!(last_error(stderr), "Failed to fetch http://x");
        assert_eq!(last_error(b""), "it failed without a word");
    }
}
