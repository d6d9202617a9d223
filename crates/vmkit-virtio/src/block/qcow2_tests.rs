//! Images made by QEMU, good ones and bad ones.

#![cfg(feature = "qcow2")]

use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::testing::{FREE, Rig, Ring};
use crate::{Mmio, WorkModel};

const HEADER: u64 = FREE;
const STATUS: u64 = FREE + 0x100;
const DATA: u64 = FREE + 0x1000;

/// A directory of its own for each test, gone with it.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmkit-qcow2-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    /// With the images of `tests/data`: 32 KiB, clusters of 512 bytes. `base.qcow2`, compressed, is
    /// 0x11 up to 8 KiB and 0x22 from 16 to 20 KiB; `top.qcow2` on it is 0x33 from 4 to 5 KiB and zeros
    /// from 16 to 17 KiB.
    fn golden(test: &str) -> Self {
        let dir = Self::new(test);
        std::fs::write(dir.at("base.qcow2"), include_bytes!("../../tests/data/base.qcow2"))
            .unwrap();
        std::fs::write(dir.at("top.qcow2"), include_bytes!("../../tests/data/top.qcow2")).unwrap();
        dir
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs one of QEMU's tools in `dir`; false, after saying so, if there is none.
fn tool(dir: &Dir, name: &str, arguments: &[&str]) -> bool {
    match Command::new(name).args(arguments).current_dir(&dir.0).output() {
        Ok(output) => {
            assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
            true
        }
        Err(error) => {
            eprintln!("ignored: {name}: {error} (Debian package qemu-utils)");
            false
        }
    }
}

struct Machine {
    rig: Rig,
    ring: Ring,
}

impl Machine {
    fn new(block: Block) -> Self {
        let rig = Rig::new(Mmio::new(block).work(WorkModel::Inline));
        let all = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES | feature::RO;
        let ring = rig.activate(all, 16).remove(0);
        Self { rig, ring }
    }

    fn request(&mut self, kind: u32, sector: u64, out: u32, into: u32) -> u8 {
        self.rig.write(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
        self.rig.write(HEADER + 8, &sector.to_le_bytes());
        let writable = [(DATA, into), (STATUS, 1)];
        let readable = [(HEADER, 16), (DATA, out)];
        let from = if into == 0 { 1 } else { 0 };
        let to = if out == 0 { 1 } else { 2 };
        self.ring.add(&readable[..to], &writable[from..]);
        self.rig.notify(0);
        self.ring.wait_used();
        self.rig.bytes(STATUS, 1)[0]
    }

    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        assert_eq!(self.request(0, offset / 512, 0, len), 0);
        self.rig.bytes(DATA, len as usize)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> u8 {
        self.rig.write(DATA, bytes);
        self.request(1, offset / 512, bytes.len() as u32, 0)
    }

    /// Discards (11) or zeroes (13).
    fn range(&mut self, kind: u32, offset: u64, len: u32, flags: u32) -> u8 {
        let range = [(offset / 512).to_le_bytes(), [0; 8]].concat();
        self.rig.write(DATA, &range);
        self.rig.write(DATA + 8, &[(len / 512).to_le_bytes(), flags.to_le_bytes()].concat());
        self.request(kind, 0, 16, 0)
    }
}

fn message(result: Result<Block, DeviceError>) -> String {
    match result {
        Ok(_) => "opened".into(),
        Err(error) => {
            let source = std::error::Error::source(&error).map(|source| source.to_string());
            format!("{error}: {}", source.unwrap_or_default())
        }
    }
}

#[test]
fn the_image_of_a_machine_that_rests_is_whole() {
    let dir = Dir::golden("rest");
    let mut machine = Machine::new(Block::qcow2(dir.at("base.qcow2")).unwrap());
    assert_eq!(machine.write(24 << 10, &[0x44; 2048]), 0);
    machine.rig.device.pause();
    std::fs::copy(dir.at("base.qcow2"), dir.at("copy.qcow2")).unwrap();
    let copy = Qcow2::at(dir.at("copy.qcow2")).read_only().open().unwrap();
    assert_eq!(Machine::new(copy).read(24 << 10, 2048), [0x44; 2048]);
    tool(&dir, "qemu-img", &["check", "copy.qcow2"]);
}

#[test]
fn an_image_without_refcounts_is_only_read() {
    let dir = Dir::golden("refcounts");
    let good = std::fs::read(dir.at("base.qcow2")).unwrap();
    // The table's place beyond the file, its length, its first entry.
    for (at, bytes) in [(51, &[200][..]), (56, &[0; 4]), (0x200, &[0; 8])] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(dir.at("bad.qcow2"), bad).unwrap();
        assert_ne!(message(Block::qcow2(dir.at("bad.qcow2"))), "opened", "{at}");
        let read = Qcow2::at(dir.at("bad.qcow2")).read_only().open().unwrap();
        assert_eq!(Machine::new(read).read(0, 512), [0x11; 512]);
    }
}

#[test]
fn an_image_over_another_reads_as_both() {
    let dir = Dir::golden("chain");
    let disk = Qcow2::at(dir.at("top.qcow2")).backing_from(&dir.0).open().unwrap();
    let mut machine = Machine::new(disk);
    let found = machine.read(0, 32 << 10);
    let mut expected = vec![0; 32 << 10];
    expected[..8 << 10].fill(0x11);
    expected[4 << 10..5 << 10].fill(0x33);
    expected[17 << 10..20 << 10].fill(0x22);
    assert!(found == expected);
}

#[test]
fn what_is_written_stays_and_the_backing_file_is_left_alone() {
    let dir = Dir::golden("write");
    let open = || Qcow2::at(dir.at("top.qcow2")).backing_from(dir.at("base.qcow2")).open().unwrap();
    let mut machine = Machine::new(open());
    let bytes: Vec<u8> = (0..11 * 512_u32).map(|n| n as u8).collect();
    assert_eq!(machine.write(3 << 9, &bytes), 0);
    assert_eq!(machine.range(13, 17 << 10, 1024, 0), 0);
    assert_eq!(machine.range(13, 18 << 10, 1024, 1), 0);
    assert_eq!(machine.range(11, 19 << 10, 1024, 0), 0);
    assert_eq!(machine.request(4, 0, 0, 0), 0);
    let check = |machine: &mut Machine| {
        assert_eq!(machine.read(3 << 9, bytes.len() as u32), bytes);
        assert_eq!(machine.read(17 << 10, 2048), [0; 2048]);
        assert_eq!(machine.read(0, 512), [0x11; 512]);
    };
    check(&mut machine);
    drop(machine);
    check(&mut Machine::new(open()));
    let base = std::fs::read(dir.at("base.qcow2")).unwrap();
    assert!(base == include_bytes!("../../tests/data/base.qcow2"));
    tool(&dir, "qemu-img", &["check", "-q", "-f", "qcow2", "top.qcow2"]);
}

#[test]
fn a_backing_file_is_opened_only_where_the_embedder_says() {
    let dir = Dir::golden("allow");
    std::fs::create_dir(dir.at("elsewhere")).unwrap();
    let top = || Qcow2::at(dir.at("top.qcow2"));
    let closed = message(Block::qcow2(dir.at("top.qcow2")));
    assert!(closed.contains("\"base.qcow2\" is not allowed"), "{closed}");
    let wrong = message(top().backing_from(dir.at("elsewhere")).open());
    assert!(wrong.contains("is not allowed"), "{wrong}");
    // A link out of the allowed place does not lead out of it.
    std::fs::rename(dir.at("top.qcow2"), dir.at("elsewhere/top.qcow2")).unwrap();
    std::os::unix::fs::symlink(dir.at("base.qcow2"), dir.at("elsewhere/base.qcow2")).unwrap();
    let inside = Qcow2::at(dir.at("elsewhere/top.qcow2"));
    let out = message(inside.clone().backing_from(dir.at("elsewhere")).open());
    assert!(out.contains("is not allowed"), "{out}");
    assert_eq!(message(inside.backing_from(&dir.0).open()), "opened");
    assert_eq!(message(Block::qcow2(dir.at("base.qcow2"))), "opened");
}

#[test]
fn images_in_use_and_files_that_are_none_are_refused() {
    let dir = Dir::golden("locks");
    let first = Block::qcow2(dir.at("base.qcow2")).unwrap();
    assert_ne!(message(Block::qcow2(dir.at("base.qcow2"))), "opened");
    let over = Qcow2::at(dir.at("top.qcow2")).backing_from(&dir.0);
    assert_ne!(message(over.clone().open()), "opened", "its backing file is being written");
    drop(first);
    let both = (over.clone().read_only().open().unwrap(), over.read_only().open().unwrap());
    drop(both);
    for len in [0, 4, 71, 100] {
        let image = &include_bytes!("../../tests/data/base.qcow2")[..len];
        std::fs::write(dir.at("cut"), image).unwrap();
        assert_ne!(message(Block::qcow2(dir.at("cut"))), "opened", "{len}");
    }
    std::fs::write(dir.at("raw"), [7; 4096]).unwrap();
    assert_ne!(message(Block::qcow2(dir.at("raw"))), "opened");
}

#[test]
fn a_read_only_image_refuses_writes_and_stays_as_it_is() {
    let dir = Dir::golden("readonly");
    let disk = Qcow2::at(dir.at("top.qcow2")).backing_from(&dir.0).read_only().open().unwrap();
    let mut machine = Machine::new(disk);
    assert_eq!(machine.write(0, &[1; 512]), 1);
    assert_eq!(machine.read(0, 512), [0x11; 512]);
    drop(machine);
    let top = std::fs::read(dir.at("top.qcow2")).unwrap();
    assert!(top == include_bytes!("../../tests/data/top.qcow2"));
}

#[test]
fn images_of_qemus_are_written_well_and_formats_are_never_guessed() {
    let dir = Dir::new("qemu");
    // A raw backing file whose bytes are an image is still raw.
    std::fs::write(dir.at("base"), include_bytes!("../../tests/data/base.qcow2")).unwrap();
    if !tool(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top"]) {
        return;
    }
    let disk = Qcow2::at(dir.at("top")).backing_from(&dir.0).open().unwrap();
    let magic = Machine::new(disk).read(0, 512);
    assert_eq!(magic[..4], *b"QFI\xFB");
    // Old images, which have no mark for zeros.
    for cluster in ["cluster_size=512,compat=0.10", "cluster_size=64k,compat=1.1"] {
        tool(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", cluster, "disk", "1M"]);
        let mut machine = Machine::new(Block::qcow2(dir.at("disk")).unwrap());
        assert_eq!(machine.write(0x1_0000, &[0x5A; 0x2_0000]), 0);
        for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
            assert_eq!(machine.range(kind, 0x1_4000, 0x4000, flags), 0, "{cluster} {kind} {flags}");
        }
        assert_eq!(machine.read(0x1_4000, 0x4000), [0; 0x4000]);
        assert_eq!(machine.read(0x1_8000, 512), [0x5A; 512]);
        assert_eq!(machine.request(4, 0, 0, 0), 0);
        drop(machine);
        tool(&dir, "qemu-img", &["check", "-q", "-f", "qcow2", "disk"]);
        let zeros =
            ["-f", "qcow2", "-c", "read -P 0x5a 64k 16k", "-c", "read -P 0 80k 16k", "disk"];
        tool(&dir, "qemu-io", &zeros);
    }
}

#[test]
fn a_backing_file_without_a_format_is_refused() {
    let dir = Dir::golden("format");
    let mut image = std::fs::read(dir.at("top.qcow2")).unwrap();
    // The header extension that names the format becomes one that nobody knows.
    let name = 0xE279_2ACA_u32.to_be_bytes();
    let at = image.windows(4).position(|bytes| bytes == name).unwrap();
    image[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(dir.at("top.qcow2"), &image).unwrap();
    let unnamed = message(Qcow2::at(dir.at("top.qcow2")).backing_from(&dir.0).open());
    assert!(unnamed.contains("does not name"), "{unnamed}");
}

#[test]
fn an_image_that_is_its_own_backing_file_is_refused() {
    let dir = Dir::golden("loop");
    std::fs::rename(dir.at("top.qcow2"), dir.at("base.qcow2")).unwrap();
    let disk = Qcow2::at(dir.at("base.qcow2")).backing_from(&dir.0);
    assert_ne!(message(disk.clone().open()), "opened", "locked");
    let deep = message(disk.read_only().open());
    assert!(deep.contains("more than"), "{deep}");
}
