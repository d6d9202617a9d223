use vmkit_memory::{Backing, RamLayout};

use super::*;

const BASE: u64 = 0xE_0000;

fn tables(vcpus: u32, announcements: &[Announcement]) -> Vec<u8> {
    let layout = RamLayout::pc(1 << 20).unwrap();
    let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
    build(&BootContext::new(&ram, &layout).vcpus(vcpus).announcements(announcements), BASE)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at `address`, its checksum verified.
fn table(blob: &[u8], address: u64) -> &[u8] {
    let at = (address - BASE) as usize;
    let table = &blob[at..at + u32_at(blob, at + 4) as usize];
    assert!(&table[..4] == b"FACS" || sum(table) == 0, "{:?}", &table[..4]);
    table
}

/// The tables the root lists, by signature, found through both roots.
fn listed<'a>(blob: &'a [u8], signature: &[u8; 4]) -> Option<&'a [u8]> {
    assert_eq!(&blob[..8], b"RSD PTR ");
    assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
    let rsdt = table(blob, u32_at(blob, 16).into());
    let xsdt = table(blob, u64_at(blob, 24));
    let narrow: Vec<u64> = (36..rsdt.len()).step_by(4).map(|at| u32_at(rsdt, at).into()).collect();
    let wide: Vec<u64> = (36..xsdt.len()).step_by(8).map(|at| u64_at(xsdt, at)).collect();
    assert_eq!(narrow, wide);
    wide.into_iter().map(|address| table(blob, address)).find(|table| table.starts_with(signature))
}

fn pc() -> Vec<Announcement> {
    vec![
        Announcement::Serial { port: 0x3F8, gsi: 4 },
        Announcement::Rtc { port: 0x70, gsi: 8 },
        Announcement::I8042,
        Announcement::PmTimer { port: 0x608, wide: true },
        Announcement::PmEvent { port: 0x600, gsi: 11 },
        Announcement::PmControl { port: 0x604, s5: 5 },
        Announcement::ResetPort { port: 0xCF9, value: 6 },
        Announcement::PvPanic { port: 0x505 },
        Announcement::VirtioMmio { base: 0xD000_0000, len: 0x1000, gsi: 16 },
    ]
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_fixed_table_has_the_pm_blocks_and_points_to_facs_and_dsdt() {
    let blob = tables(1, &pc());
    let fadt = listed(&blob, b"FACP").unwrap();
    assert_eq!(&table(&blob, u32_at(fadt, 36).into())[..4], b"FACS");
    assert_eq!(u32_at(fadt, 36) % 64, 0);
    assert_eq!(&table(&blob, u32_at(fadt, 40).into())[..4], b"DSDT");
    assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
    assert_eq!(fadt[46], 11, "SCI");
    assert_eq!([56, 64, 76].map(|at| u32_at(fadt, at)), [0x600, 0x604, 0x608]);
    assert_eq!(u64_at(fadt, 116 + 4), 0xCF9);
    assert_eq!(fadt[128], 6);
    let flags = u32_at(fadt, 112);
    assert_eq!(flags >> 20 & 1, 0, "not hardware-reduced");
    assert_eq!((flags >> 8 & 1, flags >> 10 & 1), (1, 1), "wide timer, reset register");
    assert_eq!(fadt[109] & 0b10_0010, 0b10, "8042, and an RTC");
    assert_eq!(fadt[108], 0x32, "the century in the RTC's RAM");
}

#[test]
fn without_pm_blocks_the_machine_is_hardware_reduced() {
    let blob = tables(1, &[]);
    let fadt = listed(&blob, b"FACP").unwrap();
    assert_eq!(u32_at(fadt, 112) >> 20 & 1, 1);
    assert_eq!(fadt[109] & 0b10_0010, 0b10_0000, "no 8042, no RTC");
    assert_eq!(fadt[108], 0, "no century");
    assert!(!holds(&blob, b"_S5_"));
    assert!(listed(&blob, b"MCFG").is_none());
}

#[test]
fn every_processor_has_a_local_apic_and_past_254_an_x2apic() {
    for vcpus in [1, 2, 255, 257] {
        let blob = tables(vcpus, &[]);
        let madt = listed(&blob, b"APIC").unwrap();
        assert_eq!(u32_at(madt, 36), LAPIC_ADDRESS);
        let mut ids = Vec::new();
        let mut overrides = Vec::new();
        let mut at = 44;
        while at < madt.len() {
            match madt[at] {
                0 => ids.push(madt[at + 3].into()),
                9 => ids.push(u32_at(madt, at + 4)),
                1 => assert_eq!(madt[at + 2], vmkit_hypervisor::IoapicState::default().id),
                2 => overrides.push((madt[at + 3], u32_at(madt, at + 4), madt[at + 8])),
                _ => {}
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        assert_eq!(overrides, [(0, 2, 0), (9, 9, 0xD)]);
    }
}

#[test]
fn every_announcement_has_its_object() {
    let blob = tables(2, &pc());
    let fadt = listed(&blob, b"FACP").unwrap();
    let dsdt = table(&blob, u32_at(fadt, 40).into());
    for name in [&b"C001"[..], b"QEMU0001\0", b"LNRO0005\0", b"_S5_\x12\x08\x04\x0A\x05\x0A\x05"] {
        assert!(holds(dsdt, name), "{name:?}");
    }
    for pnp in ["PNP0501", "PNP0B00", "PNP0303"] {
        assert!(holds(dsdt, &bytes_of(&acpi_tables::aml::EISAName::new(pnp))), "{pnp}");
    }
    assert!(!holds(dsdt, &bytes_of(&acpi_tables::aml::EISAName::new("PNP0A08"))));
}

#[test]
fn a_pci_host_has_windows_routing_and_a_configuration_window() {
    let host = Announcement::PciHost {
        ecam: 0xE000_0000,
        buses: 16,
        mmio32: (0xD000_0000, 0x1000_0000),
        mmio64: (1 << 40, 1 << 40),
        io: (0x1000, 0x8000),
        intx: [20, 21, 22, 23],
    };
    let blob = tables(1, &[host]);
    let mcfg = listed(&blob, b"MCFG").unwrap();
    assert_eq!((u64_at(mcfg, 44), mcfg[54], mcfg[55]), (0xE000_0000, 0, 15));
    // Device 31, pin 3: (31 + 3) % 4 = 2.
    assert!(holds(&blob, b"\x0C\xFF\xFF\x1F\x00\x0A\x03\x00\x0A\x16"));
}

#[test]
fn nonsense_windows_are_left_out() {
    for (mmio, io) in [((0, 0), (0, 0)), ((u64::MAX, 2), (0xFFFF, 2)), ((0, u64::MAX), (0, 0xFFFF))]
    {
        let host = Announcement::PciHost {
            ecam: u64::MAX,
            buses: 255,
            mmio32: mmio,
            mmio64: mmio,
            io,
            intx: [u32::MAX; 4],
        };
        let virtio = Announcement::VirtioMmio { base: mmio.0, len: mmio.1, gsi: u32::MAX };
        let blob = tables(1, &[host.clone(), host, virtio]);
        listed(&blob, b"FACP").unwrap();
    }
}
