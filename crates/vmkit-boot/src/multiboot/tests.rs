use proptest::prelude::*;
use vmkit_hypervisor::x86::Cr0;
use vmkit_memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout};

use super::*;
use crate::testimage::elf;

const MIB: u64 = 1 << 20;

fn machine(bytes: u64) -> (RamLayout, GuestRam) {
    let layout = RamLayout::pc(bytes).unwrap();
    let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
    (layout, ram)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32) -> Vec<u8> {
    words(&[HEADER_MAGIC, flags, HEADER_MAGIC.wrapping_add(flags).wrapping_neg()])
}

/// What the kernel finds through EBX.
struct Info {
    ram: GuestRam,
    at: u64,
}

impl Info {
    fn word(&self, offset: u64) -> u64 {
        self.ram.read_obj::<u32>(GuestAddress(self.at + offset)).unwrap().into()
    }

    fn string(&self, at: u64) -> String {
        let mut bytes = [0; 64];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        String::from_utf8(bytes[..bytes.iter().position(|b| *b == 0).unwrap()].to_vec()).unwrap()
    }
}

fn load(ram: &GuestRam, layout: &RamLayout, guest: &Multiboot) -> (Entry, Info) {
    let entry = guest.load(&BootContext::new(ram, layout)).unwrap();
    assert_eq!(entry.state.general.rax(), 0x2BAD_B002);
    assert_eq!(entry.state.control.cr0, (Cr0::PE | Cr0::ET).bits());
    let at = entry.state.general.rbx();
    (entry, Info { ram: ram.clone(), at })
}

#[test]
fn elf_images_of_both_classes_start_at_their_physical_entry() {
    let (layout, ram) = machine(8 * MIB);
    for wide in [false, true] {
        // The second is linked 3 GiB up, its entry is a virtual address.
        for offset in [0, 0xC000_0000] {
            let code = [header(3), vec![0x90; 20]].concat();
            let image = elf(wide, MIB + 12 + offset, offset, &[(MIB, &code, 100)], None);
            let guest = Multiboot::from_bytes(image).unwrap();
            let (entry, _) = load(&ram, &layout, &guest);
            assert_eq!(entry.state.general.rip, MIB + 12);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(MIB + 12)).unwrap(), 0x90);
        }
    }
}

#[test]
fn the_information_tells_memory_command_line_modules_and_loader() {
    let (layout, ram) = machine(8 * MIB);
    let code = header(3);
    let guest = Multiboot::from_bytes(elf(false, MIB, 0, &[(MIB, &code, 0x1000)], None))
        .unwrap()
        .cmdline("a=b c")
        .module_bytes(vec![5; 5000], "first")
        .module_bytes(vec![6; 10], "second one");
    let (_, info) = load(&ram, &layout, &guest);
    assert_eq!(info.word(0), 0b10_0100_1101);
    assert_eq!((info.word(4), info.word(8)), (639, 7 * 1024));
    assert_eq!(info.string(info.word(16)), "kernel a=b c");
    assert_eq!(info.string(info.word(64)), "vmkit");

    assert_eq!(info.word(20), 2);
    let modules = Info { ram: ram.clone(), at: info.word(24) };
    assert_eq!((modules.word(0), modules.word(4)), (MIB + 0x2000, MIB + 0x2000 + 5000));
    assert_eq!(modules.word(16) % 4096, 0);
    assert!(modules.word(16) >= modules.word(4));
    assert_eq!(ram.read_obj::<[u8; 10]>(GuestAddress(modules.word(16))).unwrap(), [6; 10]);
    assert_eq!(info.string(modules.word(8)), "first");
    assert_eq!(info.string(modules.word(24)), "second one");

    let map = Info { ram: ram.clone(), at: info.word(48) };
    let entries: Vec<_> = (0..info.word(44) / 24)
        .map(|n| {
            (map.word(24 * n), map.word(24 * n + 4), map.word(24 * n + 12), map.word(24 * n + 20))
        })
        .collect();
    assert_eq!(entries[0], (20, 0, 0x9_FC00, 1));
    assert_eq!(entries.last(), Some(&(20, MIB, 7 * MIB, 1)));
}

#[test]
fn the_first_word_is_the_name_and_the_rest_is_as_given() {
    let (layout, ram) = machine(8 * MIB);
    for (given, line) in [("", "kernel"), ("a=b ", "kernel a=b "), (" ", "kernel  ")] {
        let image = elf(false, MIB, 0, &[(MIB, &header(3), 0x1000)], None);
        let guest = Multiboot::from_bytes(image).unwrap().cmdline(given);
        let (_, info) = load(&ram, &layout, &guest);
        assert_eq!(info.string(info.word(16)), line);
    }
}

#[test]
fn address_fields_replace_an_elf_header() {
    let (layout, ram) = machine(8 * MIB);
    // Eight bytes of something, then the header: loaded from the file's fourth byte.
    let mut image = vec![0xAA; 8];
    image.extend(header(1 << 16));
    let base = MIB as u32;
    image.extend(words(&[base + 4, base, base + 40, base + 8192, base + 36]));
    image.extend([0xF4; 32]);
    let guest = Multiboot::from_bytes(image.clone()).unwrap();
    let (entry, _) = load(&ram, &layout, &guest);
    assert_eq!(entry.state.general.rip, MIB + 36);
    let mut loaded = [0; 41];
    ram.read_slice(&mut loaded, GuestAddress(MIB)).unwrap();
    assert_eq!(loaded[..40], image[4..44]);
    assert_eq!(loaded[40], 0);
}

#[test]
fn contradictory_address_fields_are_refused() {
    let (layout, ram) = machine(8 * MIB);
    let base = MIB as u32;
    let good = [base, base, base + 40, base + 8192, base + 36];
    for (field, value) in
        [(0, base - 1), (1, base + 1), (2, base - 1), (2, base + 99), (3, base + 39)]
    {
        let mut fields = good;
        fields[field] = value;
        let image = [header(1 << 16), words(&fields), vec![0xF4; 20]].concat();
        let error = Multiboot::from_bytes(image)
            .unwrap()
            .load(&BootContext::new(&ram, &layout))
            .unwrap_err();
        assert!(
            matches!(error, BootError::Malformed { .. } | BootError::Truncated { .. }),
            "{field}: {error}"
        );
    }
}

#[test]
fn no_header_and_unknown_requirements_are_told() {
    let far = [vec![0; 8192], header(0)].concat();
    assert!(matches!(Multiboot::from_bytes(far), Err(BootError::Format { .. })));
    let unaligned = [vec![0; 2], header(0)].concat();
    assert!(matches!(Multiboot::from_bytes(unaligned), Err(BootError::Format { .. })));
    let demanding = header(1 << 3);
    assert!(matches!(Multiboot::from_bytes(demanding), Err(BootError::Unsupported { .. })));
}

proptest! {
    #[test]
    fn hostile_headers_never_panic(
        fields in prop::array::uniform5(prop_oneof![
            any::<u32>(),
            (0..0x40_0000_u32),
            Just(0x10_0000_u32),
        ]),
        flags: u16,
        pad in 0_usize..64,
    ) {
        let (layout, ram) = machine(2 * MIB);
        let flags = u32::from(flags & 7) | HAS_ADDRESSES;
        let image = [vec![0; pad * 4], header(flags), words(&fields), vec![1; 64]].concat();
        let guest = Multiboot::from_bytes(image).unwrap().module_bytes(vec![1; 5000], "m");
        let _ = guest.load(&BootContext::new(&ram, &layout));
    }
}
