use linux_loader::bootparam::boot_params;
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use vmkit_device::Announcement;
use vmkit_hypervisor::x86::{Cr0, Efer};
use vmkit_memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout};

use super::*;
use crate::decompress::{Method, tests::ALL};
use crate::testimage::{INIT_SIZE, KERNEL, bzimage, elf, payload};

const MIB: u64 = 1 << 20;
const UPPER_HALF: u64 = 0xFFFF_FFFF_8000_0000;

struct Machine {
    layout: RamLayout,
    ram: GuestRam,
}

impl Machine {
    fn new(bytes: u64) -> Self {
        let layout = RamLayout::pc(bytes).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        Self { layout, ram }
    }

    fn ctx(&self) -> BootContext<'_> {
        BootContext::new(&self.ram, &self.layout)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn string(&self, at: u64) -> String {
        let bytes = self.bytes(at, 64);
        let len = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }
}

/// A kernel of two segments, linked in the upper half, entered by its physical address.
fn kernel(pvh: Option<u32>) -> Vec<u8> {
    let code = [0x90; 5000];
    elf(true, KERNEL, UPPER_HALF, &[(KERNEL, &code, 0), (KERNEL + 0x4000, b"data", 0x8000)], pvh)
}

fn zero_page(machine: &Machine, entry: &Entry) -> boot_params {
    machine.ram.read_obj(GuestAddress(entry.state.general.rsi())).unwrap()
}

#[test]
fn every_compression_ends_in_the_kernel_proper_in_long_mode() {
    for method in ALL {
        let machine = Machine::new(16 * MIB);
        let image = bzimage(&payload(method, &kernel(Some(0x1234))));
        let entry = Linux::from_bytes(image).unwrap().load(&machine.ctx()).unwrap();
        assert_eq!(entry.state.general.rip, KERNEL, "{method:?}");
        assert_eq!(machine.bytes(KERNEL, 5000), [0x90; 5000]);
        assert_eq!(machine.bytes(KERNEL + 0x4000, 5), b"data\0");
        assert_eq!(entry.state.control.efer, (Efer::LME | Efer::LMA).bits());
        assert_eq!(entry.state.segments.cs.selector, 0x10);
        assert_eq!(entry.state.segments.ds.selector, 0x18);
        assert_eq!(entry.state.general.rflags, 2);
    }
}

#[test]
fn the_zero_page_tells_header_memory_command_line_initrd_and_tables() {
    let machine = Machine::new(16 * MIB);
    let linux = Linux::from_bytes(bzimage(&payload(Method::Gzip, &kernel(None))))
        .unwrap()
        .cmdline("console=ttyS0")
        .initrd_bytes(vec![7; 5000]);
    let entry = linux.load(&machine.ctx()).unwrap();
    let page = zero_page(&machine, &entry);
    let (header, version) = (page.hdr.header, page.hdr.version);
    assert_eq!((header.to_le_bytes(), version), (*b"HdrS", 0x020F));
    assert_eq!(page.hdr.type_of_loader, 0xFF);
    let cmdline = page.hdr.cmd_line_ptr;
    assert_eq!(machine.string(cmdline.into()), "console=ttyS0");
    let (initrd, len) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size);
    assert_eq!(u64::from(initrd), 16 * MIB - 8192, "as high as it goes");
    assert_eq!(machine.bytes(initrd.into(), 5001), [vec![7; 5000], vec![0]].concat());
    assert_eq!(len, 5000);
    let rsdp = page.acpi_rsdp_addr;
    assert_eq!(machine.bytes(rsdp, 8), b"RSD PTR ");
    let table = page.e820_table;
    let usable: u64 = table[..page.e820_entries.into()]
        .iter()
        .filter(|e| { e.r#type } == 1)
        .map(|e| e.size)
        .sum();
    assert_eq!(usable, 16 * MIB - 0x6_0000 - 0x400);
}

#[test]
fn an_unknown_compression_runs_the_kernels_own_decompressor() {
    let machine = Machine::new(16 * MIB);
    let image = bzimage(b"\x89LZO no decoder here \x10\0\0\0");
    let entry = Linux::from_bytes(image).unwrap().load(&machine.ctx()).unwrap();
    assert_eq!(entry.state.general.rip, KERNEL + 0x200);
    assert_eq!(machine.bytes(KERNEL, 8), b"the code");
    let code32_start = zero_page(&machine, &entry).hdr.code32_start;
    assert_eq!(u64::from(code32_start), KERNEL);

    let small = Machine::new(KERNEL + u64::from(INIT_SIZE) - 4096);
    let image = bzimage(b"\x89LZO no decoder here \x10\0\0\0");
    let error = Linux::from_bytes(image).unwrap().load(&small.ctx()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Linux kernel: the kernel needs 3 MiB of RAM, the machine has 2 MiB"
    );
}

#[test]
fn an_elf_kernel_with_a_note_starts_by_pvh() {
    let machine = Machine::new(16 * MIB);
    let entry = Linux::from_bytes(kernel(Some(KERNEL as u32 + 0x10)))
        .unwrap()
        .cmdline("quiet")
        .initrd_bytes(vec![9; 100])
        .load(&machine.ctx())
        .unwrap();
    assert_eq!(entry.state.general.rip, KERNEL + 0x10);
    assert_eq!(entry.state.control.cr0, (Cr0::PE | Cr0::ET).bits());
    let info: hvm_start_info =
        machine.ram.read_obj(GuestAddress(entry.state.general.rbx())).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336E_C578, 1, 1));
    assert_eq!(machine.string(info.cmdline_paddr), "quiet");
    assert_eq!(machine.bytes(info.rsdp_paddr, 8), b"RSD PTR ");
    let module: hvm_modlist_entry = machine.ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(machine.bytes(module.paddr, 100), [9; 100]);
    assert_eq!(module.size, 100);
    let last = info.memmap_paddr + 24 * (u64::from(info.memmap_entries) - 1);
    let range: hvm_memmap_table_entry = machine.ram.read_obj(GuestAddress(last)).unwrap();
    assert_eq!((range.addr, range.size, range.type_), (MIB, 15 * MIB, 1));
}

#[test]
fn an_elf_kernel_without_a_note_gets_a_zero_page() {
    let machine = Machine::new(16 * MIB);
    let entry = Linux::from_bytes(kernel(None)).unwrap().load(&machine.ctx()).unwrap();
    assert_eq!(entry.state.general.rip, KERNEL);
    let header = zero_page(&machine, &entry).hdr.header;
    assert_eq!(header.to_le_bytes(), *b"HdrS");
}

#[test]
fn a_32_bit_kernel_starts_in_protected_mode() {
    let machine = Machine::new(16 * MIB);
    let inner = elf(false, KERNEL, 0, &[(KERNEL, &[0x90; 64], 0)], None);
    let image = bzimage(&payload(Method::Gzip, &inner));
    let entry = Linux::from_bytes(image).unwrap().load(&machine.ctx()).unwrap();
    assert_eq!(entry.state.control.cr0 & Cr0::PG.bits(), 0);
    assert_eq!(zero_page(&machine, &entry).hdr.type_of_loader, 0xFF);
}

#[test]
fn too_little_ram_says_how_much_is_needed() {
    let machine = Machine::new(2 * MIB);
    let image = bzimage(&payload(Method::Gzip, &kernel(None)));
    let linux = Linux::from_bytes(image).unwrap();
    let error = linux.load(&machine.ctx()).unwrap_err();
    assert!(matches!(error, BootError::NotEnoughRam { needs, .. } if needs == KERNEL + 0xC004));

    let machine = Machine::new(4 * MIB);
    let error = linux.initrd_bytes(vec![1; 3 << 20]).load(&machine.ctx()).unwrap_err();
    assert!(error.to_string().starts_with("Linux kernel: the initrd needs "), "{error}");
}

#[test]
fn an_initrd_that_no_ram_would_help_is_not_a_matter_of_ram() {
    let machine = Machine::new(64 * MIB);
    let mut image = bzimage(&payload(Method::Gzip, &kernel(None)));
    image[0x22C..0x230].copy_from_slice(&(MIB as u32).to_le_bytes());
    let linux = Linux::from_bytes(image).unwrap().initrd_bytes(vec![1; 4096]);
    let error = linux.load(&machine.ctx()).unwrap_err();
    assert!(matches!(error, BootError::Placement { what: "the initrd", .. }), "{error}");
}

#[test]
fn command_lines_have_a_limit_and_no_nul() {
    let machine = Machine::new(16 * MIB);
    for (line, reason) in [("x".repeat(2048), "too long"), ("a\0b".into(), "holds a NUL byte")] {
        let error = Linux::from_bytes(kernel(None))
            .unwrap()
            .cmdline(line)
            .load(&machine.ctx())
            .unwrap_err();
        assert!(matches!(error, BootError::CommandLine { reason: r, .. } if r == reason));
    }
    let longest = "x".repeat(2047);
    Linux::from_bytes(kernel(None)).unwrap().cmdline(longest).load(&machine.ctx()).unwrap();
}

#[test]
fn virtio_mmio_words_name_each_device_when_asked_for() {
    let machine = Machine::new(16 * MIB);
    let devices = [
        Announcement::VirtioMmio { base: 0xD000_0000, len: 0x1000, gsi: 16 },
        Announcement::VirtioMmio { base: 0xD000_1000, len: 0x1000, gsi: 17 },
    ];
    let ctx = machine.ctx().announcements(&devices);
    let linux = Linux::from_bytes(kernel(None)).unwrap().cmdline("quiet");
    let line = |linux: &Linux| {
        let entry = linux.load(&ctx).unwrap();
        let at = zero_page(&machine, &entry).hdr.cmd_line_ptr;
        String::from_utf8(machine.bytes(at.into(), 82)).unwrap()
    };
    assert!(line(&linux).starts_with("quiet\0"));
    assert_eq!(
        line(&linux.virtio_mmio_words()),
        "quiet virtio_mmio.device=4096@0xd0000000:16 virtio_mmio.device=4096@0xd0001000:17\0"
    );
}

#[test]
fn damage_that_the_compression_does_not_notice_is_found_by_the_checksum() {
    let mut kernel = kernel(None);
    kernel.extend((0..4000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B9).to_le_bytes()));
    let good = bzimage(&payload(Method::Lz4, &kernel));
    let machine = Machine::new(16 * MIB);
    Linux::from_bytes(good.clone()).unwrap().load(&machine.ctx()).unwrap();
    // Literals near the end of the block: lz4 takes any.
    let mut bad = good.clone();
    let at = bad.len() - 1000;
    bad[at] ^= 1;
    let error = Linux::from_bytes(bad.clone()).unwrap().load(&machine.ctx()).unwrap_err();
    assert!(matches!(error, BootError::Decompress { method: "lz4", .. }), "{error}");
    // A kernel too new to have a checksum is taken as it is.
    bad[0x300..0x303].copy_from_slice(b"7.1");
    Linux::from_bytes(bad).unwrap().load(&machine.ctx()).unwrap();
}

#[test]
fn a_payload_that_lies_about_its_length_is_refused_before_it_is_unpacked() {
    let machine = Machine::new(16 * MIB);
    for (lie, wanted_ram) in [(u32::MAX, false), (32 << 20, true), (10, false)] {
        let mut packed = payload(Method::Xz, &kernel(None));
        let end = packed.len() - 4;
        packed[end..].copy_from_slice(&lie.to_le_bytes());
        let error = Linux::from_bytes(bzimage(&packed)).unwrap().load(&machine.ctx()).unwrap_err();
        assert_eq!(matches!(error, BootError::NotEnoughRam { .. }), wanted_ram, "{error}");
        assert_eq!(matches!(error, BootError::Decompress { .. }), !wanted_ram, "{error}");
    }
}

#[test]
fn vmlinux_comes_out_of_a_bzimage_unchanged() {
    let kernel = kernel(None);
    assert_eq!(extract_vmlinux(&bzimage(&payload(Method::Xz, &kernel))).unwrap(), kernel);
    assert!(matches!(extract_vmlinux(&kernel), Err(BootError::Format { .. })));
    let opaque = bzimage(b"?????????");
    assert!(matches!(extract_vmlinux(&opaque), Err(BootError::Unsupported { .. })));
}

#[test]
fn a_truncated_image_says_what_is_missing() {
    let image = bzimage(&payload(Method::Gzip, &kernel(None)));
    for len in [0, 0x1F0, 0x201, 0x230, 0x600, image.len() - 16] {
        let error = SetupHeader::parse(View::of("k", &image[..len])).unwrap_err();
        assert!(matches!(error, BootError::Truncated { has, .. } if has == len as u64), "{error}");
    }
}

fn mutated(mut image: Vec<u8>, changes: &[(prop::sample::Index, u8)], within: usize) -> Vec<u8> {
    let within = image.len().min(within);
    for (at, value) in changes {
        image[at.index(within)] = *value;
    }
    image
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is in a header, loading ends, in an entry or an error, within the machine's RAM.
    #[test]
    fn hostile_bzimage_headers_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        method in prop::sample::select(&ALL[..]),
        known: bool,
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let machine = Machine::new(8 * MIB);
        let payload = if known { payload(method, &kernel(None)) } else { vec![0; 64] };
        // The setup header, so that most changes count.
        let mut image = mutated(bzimage(&payload).split_off(0x1F1), &changes, 0x80);
        image.splice(0..0, vec![0; 0x1F1]);
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        if let Ok(linux) = Linux::from_bytes(image) {
            let _ = linux.initrd_bytes(vec![1; 4096]).load(&machine.ctx());
        }
    }

    #[test]
    fn hostile_elf_headers_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        wide: bool,
        pvh in prop::option::of(any::<u32>()),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let machine = Machine::new(8 * MIB);
        let image = elf(wide, KERNEL, 0, &[(KERNEL, &[1; 600], 50), (3 * MIB, &[2; 50], 0)], pvh);
        let mut image = mutated(image, &changes, 0x120);
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        let _ = crate::detect(&image);
        if let Ok(linux) = Linux::from_bytes(image.clone()) {
            let _ = linux.load(&machine.ctx());
        }
        if let Ok(elf) = crate::Elf::from_bytes(image) {
            let _ = elf.load(&machine.ctx());
        }
    }
}
