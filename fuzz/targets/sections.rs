//! Saved state from a stranger: a device's own sections, edited, loaded into it. It takes them or
//! refuses them; refused, it is as it was; taken, it can be saved again and survives what its guest
//! does next.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmkit_device::Section;
use vmkit_fuzz::{Access, Machine};

#[derive(Arbitrary, Debug)]
enum Edit {
    Set { section: u8, at: u16, value: u8 },
    Insert { section: u8, at: u16, value: u8 },
    Remove { section: u8, at: u16 },
    Cut { section: u8, len: u16 },
    Replace { section: u8, bytes: Vec<u8> },
    Version { section: u8, version: u32 },
    Twice { section: u8 },
    Drop { section: u8 },
}

#[derive(Arbitrary, Debug)]
struct Input {
    kind: u8,
    before: Vec<Access>,
    edits: Vec<Edit>,
    after: Vec<Access>,
}

/// Does the edits to `sections`.
fn hostile(mut sections: Vec<Section>, edits: &[Edit]) -> Vec<Section> {
    for edit in edits {
        let count = sections.len().max(1);
        let index = |section: u8| usize::from(section) % count;
        match *edit {
            Edit::Set { section, at, value } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                let len = section.bytes.len().max(1);
                if let Some(byte) = section.bytes.get_mut(usize::from(at) % len) {
                    *byte = value;
                }
            }
            Edit::Insert { section, at, value } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                let at = usize::from(at) % (section.bytes.len() + 1);
                section.bytes.insert(at, value);
            }
            Edit::Remove { section, at } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                let at = usize::from(at);
                if at < section.bytes.len() {
                    section.bytes.remove(at);
                }
            }
            Edit::Cut { section, len } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                section.bytes.truncate(len.into());
            }
            Edit::Replace { section, ref bytes } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                section.bytes.clone_from(bytes);
            }
            Edit::Version { section, version } => {
                let Some(section) = sections.get_mut(index(section)) else { continue };
                section.version = version;
            }
            Edit::Twice { section } => {
                if let (Some(section), 1..8) = (sections.get(index(section)).cloned(), count) {
                    sections.push(section);
                }
            }
            Edit::Drop { section } => {
                if !sections.is_empty() {
                    sections.remove(index(section));
                }
            }
        }
    }
    sections
}

fuzz_target!(|input: Input| {
    let machine = Machine::any(input.kind);
    for access in &input.before {
        machine.access(access);
    }
    machine.paused(|device| {
        let saved = device.save();
        if device.load(&hostile(saved.clone(), &input.edits)) {
            let taken = device.save();
            assert!(taken.is_empty() || device.load(&taken), "refused what it took: {taken:?}");
        } else {
            assert_eq!(device.save(), saved, "refused, and changed");
        }
    });
    for access in &input.after {
        machine.access(access);
    }
});
