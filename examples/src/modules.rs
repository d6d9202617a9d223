//! Kernel modules: where they are, what each depends on, and in which order to load them.
//!
//! Reads a directory of a stock kernel's modules, packed or not. Loads nothing itself: the
//! [`initramfs`](crate::initramfs) does that in the guest.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::Failure;

/// A module as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file, unpacked.
    pub bytes: Vec<u8>,
}

/// The modules of one kernel, by name.
#[derive(Clone, Debug, Default)]
pub struct Modules {
    home: PathBuf,
    paths: HashMap<String, PathBuf>,
    /// Those that the kernel has without loading anything.
    built_in: HashSet<String>,
}

/// The file that lists what is built in.
pub const BUILT_IN: &str = "modules.builtin";

impl Modules {
    /// What is at `home` and below, for example `/lib/modules/6.1.0-1-amd64`.
    ///
    /// # Errors
    /// [`Failure`] if a directory cannot be read.
    pub fn open(home: &Path) -> Result<Self, Failure> {
        let mut found = Self { home: home.to_owned(), ..Self::default() };
        let mut directories = vec![home.to_owned()];
        while let Some(directory) = directories.pop() {
            let entries = std::fs::read_dir(&directory).map_err(Failure::file(&directory))?;
            for entry in entries {
                let entry = entry.map_err(Failure::file(&directory))?;
                let kind = entry.file_type().map_err(Failure::file(entry.path()))?;
                if kind.is_dir() {
                    directories.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    found.paths.insert(name, entry.path());
                }
            }
        }
        let listed = std::fs::read_to_string(home.join(BUILT_IN)).unwrap_or_default();
        found.built_in = listed.lines().filter_map(|l| module_name(Path::new(l))).collect();
        Ok(found)
    }

    /// True if module `name` is here, or built in.
    pub fn has(&self, name: &str) -> bool {
        self.built_in.contains(name) || self.paths.contains_key(name)
    }

    /// `names` and all that they depend on, each after what it needs. What is built in is left out.
    ///
    /// # Errors
    /// [`Failure`] if one is missing or cannot be unpacked.
    pub fn with_dependencies(&self, names: &[&str]) -> Result<Vec<Module>, Failure> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            self.visit(&name.replace('-', "_"), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut HashSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<(), Failure> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.paths.get(name).ok_or_else(|| {
            Failure::Other(format!("{}: there is no module {name}", self.home.display()))
        })?;
        let bytes = unpacked(path)?;
        for needed in dependencies(&bytes) {
            self.visit(&needed, seen, order)?;
        }
        order.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// The module in a file of this name.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, _) = name.split_once(".ko").filter(|(_, rest)| ["", ".xz"].contains(rest))?;
    Some(stem.replace('-', "_"))
}

fn unpacked(path: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = std::fs::read(path).map_err(Failure::file(path))?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    let mut reader = lzma_rust2::XzReader::new(bytes.as_slice(), false);
    reader.read_to_end(&mut unpacked).map_err(Failure::file(path))?;
    Ok(unpacked)
}

/// What the `depends` field of a module's information names.
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(FIELD.len()).position(|w| w == FIELD) else { return Vec::new() };
    let value = module[at + FIELD.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn tree() -> TempDir {
        let scratch = tempfile::tempdir().unwrap();
        let home = scratch.path();
        std::fs::create_dir_all(home.join("kernel/net")).unwrap();
        let put = |path: &str, text: &str| std::fs::write(home.join(path), text).unwrap();
        put("kernel/net/card-x.ko", "\x7fELF\0depends=ring,fail-over\0");
        put("kernel/ring.ko", "\x7fELF\0depends=\0");
        put("kernel/net/fail_over.ko", "\x7fELF\0depends=ring\0");
        put(BUILT_IN, "kernel/fs/ext4/ext4.ko\n");
        scratch
    }

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let scratch = tree();
        let modules = Modules::open(scratch.path()).unwrap();
        assert!(modules.has("card_x") && modules.has("ext4") && !modules.has("card_y"));
        let order = modules.with_dependencies(&["ext4", "card-x", "ring"]).unwrap();
        let names: Vec<&str> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["ring", "fail_over", "card_x"]);
        assert!(order[0].bytes.starts_with(b"\x7fELF"));
        let missing = modules.with_dependencies(&["card-y"]).unwrap_err().to_string();
        assert!(missing.contains("card_y"), "{missing}");
    }
}
