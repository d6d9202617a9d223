//! The differentiated system description table: AML objects for processors and for what devices
//! announced (ACPI 6.5 §5.2.11.1, §6.1).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use vmkit_device::Announcement;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE, PciHost, bytes_of, pci_hosts};
use crate::BootContext;

/// Two: integers have 64 bits.
const REVISION: u8 = 2;
/// Present, enabled, shown, working (ACPI 6.5 §6.3.7).
const PRESENT: u8 = 0xF;

/// The table.
pub(super) fn build(ctx: &BootContext<'_>) -> Vec<u8> {
    let mut bus = Vec::new();
    for cpu in 0..ctx.vcpus {
        let path = format!("C{:03X}", cpu & 0xFFF);
        let uid = Name::new("_UID".into(), &cpu);
        bus.extend(device(&path, &"ACPI0007", vec![&uid]));
    }
    for (number, announcement) in (0_u16..0xFFF).zip(ctx.announcements) {
        bus.extend(announced(number, announcement));
    }
    for host in pci_hosts(ctx) {
        bus.extend(pci_host(&host));
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE, OEM_REVISION);
    let mut body = Scope::raw("_SB_".into(), bus);
    body.extend(soft_off(ctx));
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

/// The package by which S5 is entered, if there is a register for it (ACPI 6.5 §7.4.2).
fn soft_off(ctx: &BootContext<'_>) -> Vec<u8> {
    let s5 = ctx.announcements.iter().find_map(|announcement| match announcement {
        Announcement::PmControl { s5, .. } => Some(*s5),
        _ => None,
    });
    s5.map_or_else(Vec::new, |s5| {
        bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &0_u8, &0_u8])))
    })
}

/// Device `path` with hardware id `hid`, present, with more objects.
fn device(path: &str, hid: &dyn Aml, objects: Vec<&dyn Aml>) -> Vec<u8> {
    let hid = Name::new("_HID".into(), hid);
    let sta = Name::new("_STA".into(), &PRESENT);
    let mut children: Vec<&dyn Aml> = vec![&hid, &sta];
    children.extend(objects);
    bytes_of(&Device::new(Path::new(path), children))
}

/// The object of one announcement. `number` is its place among all, and makes names unique.
fn announced(number: u16, announcement: &Announcement) -> Vec<u8> {
    let path = |letter: char| format!("{letter}{number:03X}");
    let uid = Name::new("_UID".into(), &number);
    let resources = |list: Vec<&dyn Aml>| Name::new("_CRS".into(), &ResourceTemplate::new(list));
    match *announcement {
        Announcement::Serial { port, gsi } => {
            let crs = resources(vec![&IO::new(port, port, 1, 8), &edge(gsi)]);
            device(&path('S'), &EISAName::new("PNP0501"), vec![&uid, &crs])
        }
        Announcement::Rtc { port, gsi } => {
            let crs = resources(vec![&IO::new(port, port, 1, 2), &edge(gsi)]);
            device(&path('R'), &EISAName::new("PNP0B00"), vec![&uid, &crs])
        }
        Announcement::I8042 => {
            let crs =
                resources(vec![&IO::new(0x60, 0x60, 1, 1), &IO::new(0x64, 0x64, 1, 1), &edge(1)]);
            device(&path('K'), &EISAName::new("PNP0303"), vec![&uid, &crs])
        }
        Announcement::PvPanic { port } => {
            let crs = resources(vec![&IO::new(port, port, 1, 1)]);
            device(&path('Q'), &"QEMU0001", vec![&uid, &crs])
        }
        Announcement::VirtioMmio { base, len, gsi } => {
            let Some(memory) = memory(base, len) else { return Vec::new() };
            let crs = resources(vec![&memory, &level(gsi)]);
            let coherent = Name::new("_CCA".into(), &1_u8);
            device(&path('V'), &"LNRO0005", vec![&uid, &coherent, &crs])
        }
        // The PM blocks and the reset port are in the FADT, host bridges have their own numbers.
        _ => Vec::new(),
    }
}

/// An ISA-style interrupt.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A level-triggered, active-high interrupt.
fn level(gsi: u32) -> Interrupt {
    Interrupt::new(true, false, false, true, gsi)
}

/// Already encoded objects.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device's own memory; none if it is empty or wraps.
fn memory(base: u64, len: u64) -> Option<Encoded> {
    let last = super::last(base, len)?;
    Some(Encoded(match (u32::try_from(base), u32::try_from(len)) {
        (Ok(base), Ok(len)) if last <= u64::from(u32::MAX) => {
            bytes_of(&Memory32Fixed::new(true, base, len))
        }
        _ => bytes_of(&AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            base,
            last,
            None,
        )),
    }))
}

/// A PCI Express host bridge with its windows and interrupt wiring (PCI Firmware Specification
/// 3.3 §4), and a motherboard device that claims its configuration window.
fn pci_host(host: &PciHost) -> Vec<u8> {
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &host.segment);
    let segment = Name::new("_SEG".into(), &host.segment);
    let first_bus = Name::new("_BBN".into(), &0_u8);
    let crs = Name::new("_CRS".into(), &windows(host));
    let prt = Name::new("_PRT".into(), &interrupt_routing(host));
    let mut bytes = device(
        &format!("PC{:02X}", host.segment & 0xFF),
        &EISAName::new("PNP0A08"),
        vec![&cid, &uid, &segment, &first_bus, &crs, &prt],
    );
    if let Some(ecam) = memory(host.ecam, (u64::from(host.last_bus) + 1) << 20) {
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
        let path = format!("MB{:02X}", host.segment & 0xFF);
        bytes.extend(device(&path, &EISAName::new("PNP0C02"), vec![&uid, &crs]));
    }
    bytes
}

fn windows(host: &PciHost) -> Encoded {
    let mut list =
        vec![Encoded(bytes_of(&AddressSpace::new_bus_number(0_u16, u16::from(host.last_bus))))];
    if host.segment == 0 {
        list.push(Encoded(bytes_of(&IO::new(0xCF8, 0xCF8, 1, 8))));
    }
    if let Some((first, last)) = host.io.filter(|w| *w != (0, u16::MAX)) {
        list.push(Encoded(bytes_of(&AddressSpace::new_io(first, last, None))));
    }
    let mode = AddressSpaceCacheable::NotCacheable;
    if let Some((first, last)) = host.mmio32.filter(|w| *w != (0, u32::MAX)) {
        list.push(Encoded(bytes_of(&AddressSpace::new_memory(mode, true, first, last, None))));
    }
    if let Some((first, last)) = host.mmio64.filter(|w| *w != (0, u64::MAX)) {
        list.push(Encoded(bytes_of(&AddressSpace::new_memory(mode, true, first, last, None))));
    }
    let list: Vec<&dyn Aml> = list.iter().map(|window| window as &dyn Aml).collect();
    Encoded(bytes_of(&ResourceTemplate::new(list)))
}

/// Pin p of device n is wired to `intx[(n + p) % 4]` (ACPI 6.5 §6.2.13).
fn interrupt_routing(host: &PciHost) -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..32_u32 {
        for pin in 0..4_u32 {
            let any_function = device << 16 | 0xFFFF;
            let gsi = host.intx[((device + pin) % 4) as usize];
            table.add_element(&Package::new(vec![&any_function, &pin, &0_u8, &gsi]));
        }
    }
    table
}
