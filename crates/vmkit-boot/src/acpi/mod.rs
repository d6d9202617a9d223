//! ACPI tables (ACPI 6.5 §5): the root pointer and all it leads to, laid out from one address.
//!
//! Describes what devices announced and the PC's fixed parts. Never guesses a device.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vmkit_device::Announcement;

use crate::BootContext;
use crate::firmware::checksum;

/// Guest-physical base of the local APICs.
pub(crate) const LAPIC_ADDRESS: u32 = 0xFEE0_0000;
/// Guest-physical base of the IOAPIC.
pub(crate) const IOAPIC_ADDRESS: u32 = 0xFEC0_0000;
/// Id of the IOAPIC after reset.
pub(crate) const IOAPIC_ID: u8 = 0;
/// Inputs of the IOAPIC: GSIs 0 to 23.
pub(crate) const IOAPIC_PINS: u8 = 24;
/// The SCI of a machine that announces none.
const DEFAULT_SCI: u32 = 9;

const OEM_ID: [u8; 6] = *b"VMKIT ";
const OEM_TABLE: [u8; 8] = *b"VMKIT PC";
const OEM_REVISION: u32 = 1;

/// All tables, for guest-physical `base`, which the root pointer is at. `base` is below 4 GiB and
/// aligned to a page.
pub(crate) fn build(ctx: &BootContext<'_>, base: u64) -> Vec<u8> {
    let mut blob = Blob { base, bytes: vec![0; RSDP_LEN] };
    let facs = blob.add(&bytes_of(&FACS::new()));
    let dsdt = blob.add(&dsdt::build(ctx));
    let mut listed = vec![blob.add(&fadt::build(ctx, facs, dsdt)), blob.add(&madt::build(ctx))];
    if let Some(mcfg) = mcfg(ctx) {
        listed.push(blob.add(&bytes_of(&mcfg)));
    }

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    let mut rsdt = Sdt::new(*b"RSDT", 36, 1, OEM_ID, OEM_TABLE, OEM_REVISION);
    for address in listed {
        xsdt.add_entry(address.into());
        rsdt.append_slice(&address.to_le_bytes());
    }
    let xsdt = blob.add(&bytes_of(&xsdt));
    let rsdt = blob.add(rsdt.as_slice());
    blob.bytes[..RSDP_LEN].copy_from_slice(&rsdp(rsdt, xsdt));
    blob.bytes
}

/// Tables one after the other.
struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Appends a table and returns its guest-physical address. All are aligned to 64 bytes, which
    /// the FACS needs (ACPI 6.5 §5.2.10).
    fn add(&mut self, table: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address as u32
    }
}

const RSDP_LEN: usize = 36;

/// The root pointer (ACPI 6.5 §5.2.5.3). It also names the 32-bit root table, the only one that
/// small kernels read.
fn rsdp(rsdt: u32, xsdt: u32) -> [u8; RSDP_LEN] {
    let mut rsdp = [0; RSDP_LEN];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(&OEM_ID);
    rsdp[15] = 2;
    rsdp[16..20].copy_from_slice(&rsdt.to_le_bytes());
    rsdp[20..24].copy_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    rsdp[24..32].copy_from_slice(&u64::from(xsdt).to_le_bytes());
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

fn mcfg(ctx: &BootContext<'_>) -> Option<MCFG> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    let mut any = false;
    for host in pci_hosts(ctx) {
        mcfg.add_ecam(host.ecam, host.segment, 0, host.last_bus);
        any = true;
    }
    any.then_some(mcfg)
}

/// A PCI host bridge as the tables need it. A window that is empty or does not fit its width is
/// none.
struct PciHost {
    segment: u16,
    ecam: u64,
    last_bus: u8,
    mmio32: Option<(u32, u32)>,
    mmio64: Option<(u64, u64)>,
    io: Option<(u16, u16)>,
    intx: [u32; 4],
}

/// The announced host bridges that have a bus, numbered as segments.
fn pci_hosts(ctx: &BootContext<'_>) -> impl Iterator<Item = PciHost> {
    let hosts = ctx.announcements.iter().filter_map(|announcement| match *announcement {
        Announcement::PciHost { ecam, buses, mmio32, mmio64, io, intx } if buses > 0 => {
            Some(PciHost {
                segment: 0,
                ecam,
                last_bus: buses - 1,
                mmio32: last(mmio32.0, mmio32.1)
                    .and_then(|end| Some((mmio32.0.try_into().ok()?, end.try_into().ok()?))),
                mmio64: last(mmio64.0, mmio64.1).map(|end| (mmio64.0, end)),
                io: last(io.0.into(), io.1.into())
                    .and_then(|end| Some((io.0, u16::try_from(end).ok()?))),
                intx,
            })
        }
        _ => None,
    });
    (0..=u16::MAX).zip(hosts).map(|(segment, host)| PciHost { segment, ..host })
}

/// The last address of a window of `len` from `start`; none if it is empty, wraps, or is so long
/// that its length does not fit (all of the address space).
fn last(start: u64, len: u64) -> Option<u64> {
    start.checked_add(len.checked_sub(1)?)
}

/// The GSI of the system control interrupt.
fn sci(ctx: &BootContext<'_>) -> u32 {
    let announced = ctx.announcements.iter().find_map(|announcement| match announcement {
        Announcement::PmEvent { gsi, .. } => Some(*gsi),
        _ => None,
    });
    announced.unwrap_or(DEFAULT_SCI)
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    aml.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
    bytes
}

#[cfg(test)]
mod tests;
