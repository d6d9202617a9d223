//! The MP configuration table (Intel MultiProcessor Specification 1.4 §4), for kernels without
//! ACPI.

use vmkit_device::Announcement;

use crate::BootContext;
use crate::acpi::{IOAPIC_ADDRESS, IOAPIC_ID, IOAPIC_PINS, LAPIC_ADDRESS};
use crate::firmware::checksum;

const SPEC_REVISION: u8 = 4;
/// Version register of an integrated local APIC and of an IOAPIC as PCs have them.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

/// The PCI bus has the number that configuration space gives it: kernels look its interrupts up by
/// that. Without a PCI bus the ISA bus is the first.
const PCI_BUS: u8 = 0;

const EDGE_HIGH: u16 = 0b01_01;
const LEVEL_HIGH: u16 = 0b11_01;

/// The floating pointer, followed by the table it points to, for guest-physical `base`. None if
/// the machine has more processors than 8-bit APIC ids.
pub(crate) fn build(ctx: &BootContext<'_>, base: u64) -> Option<Vec<u8>> {
    // The id 0xFF is broadcast.
    let entries = Entries::of(ctx, u8::try_from(ctx.vcpus).ok()?);
    const POINTER: usize = 16;
    let mut pointer = [0; POINTER];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&((base as u32) + POINTER as u32).to_le_bytes());
    pointer[8] = 1;
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&pointer);

    let mut table = Vec::new();
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER + entries.bytes.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[SPEC_REVISION, 0]);
    table.extend_from_slice(b"VMKIT   ");
    table.extend_from_slice(b"VMKIT PC    ");
    table.extend_from_slice(&[0; 6]); // No OEM table.
    table.extend_from_slice(&entries.count.to_le_bytes());
    table.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // No extended entries.
    table.extend_from_slice(&entries.bytes);
    table[7] = checksum(&table);
    Some([&pointer[..], &table].concat())
}

/// Bytes of the table's header.
const HEADER: usize = 44;

struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn of(ctx: &BootContext<'_>, vcpus: u8) -> Self {
        let mut entries = Self { bytes: Vec::new(), count: 0 };
        for id in 0..vcpus {
            entries.processor(id);
        }
        let host = ctx.announcements.iter().find_map(|announcement| match announcement {
            Announcement::PciHost { intx, .. } => Some(*intx),
            _ => None,
        });
        // In ascending order of their numbers (§4.3.2).
        if host.is_some() {
            entries.bus(PCI_BUS, b"PCI   ");
        }
        let isa = if host.is_some() { PCI_BUS + 1 } else { 0 };
        entries.bus(isa, b"ISA   ");
        entries.ioapic();
        entries.isa_interrupts(ctx, isa);
        if let Some(intx) = host {
            entries.pci_interrupts(intx);
        }
        // The PIC on LINT0, NMI on LINT1, of all processors.
        entries.push(&[4, 3, 0, 0, isa, 0, 0xFF, 0]);
        entries.push(&[4, 1, 0, 0, isa, 0, 0xFF, 1]);
        entries
    }

    fn push(&mut self, entry: &[u8]) {
        self.bytes.extend_from_slice(entry);
        self.count += 1;
    }

    fn processor(&mut self, id: u8) {
        const ENABLED: u8 = 1;
        const BOOT: u8 = 2;
        let flags = if id == 0 { ENABLED | BOOT } else { ENABLED };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, id, LAPIC_VERSION, flags]);
        // Signature and features: a Pentium Pro class part with FPU and APIC. Kernels use CPUID.
        entry[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        self.push(&entry);
    }

    fn bus(&mut self, id: u8, kind: &[u8; 6]) {
        let mut entry = [1, id, 0, 0, 0, 0, 0, 0];
        entry[2..].copy_from_slice(kind);
        self.push(&entry);
    }

    fn ioapic(&mut self) {
        let mut entry = [2, IOAPIC_ID, IOAPIC_VERSION, 1, 0, 0, 0, 0];
        entry[4..].copy_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
        self.push(&entry);
    }

    fn interrupt(&mut self, flags: u16, bus: u8, source: u8, pin: u8) {
        let [low, high] = flags.to_le_bytes();
        self.push(&[3, 0, low, high, bus, source, IOAPIC_ID, pin]);
    }

    /// The sixteen ISA interrupts (the timer on pin 2), and those of virtio-mmio devices, which a
    /// kernel without ACPI learns from its command line by number.
    fn isa_interrupts(&mut self, ctx: &BootContext<'_>, bus: u8) {
        let level = |irq: u8| {
            ctx.announcements.iter().any(|a| match a {
                Announcement::VirtioMmio { gsi, .. } | Announcement::PmEvent { gsi, .. } => {
                    *gsi == u32::from(irq)
                }
                _ => false,
            })
        };
        self.interrupt(EDGE_HIGH, bus, 0, 2);
        for irq in (1..16).filter(|irq| *irq != 2) {
            let flags = if level(irq) { LEVEL_HIGH } else { EDGE_HIGH };
            self.interrupt(flags, bus, irq, irq);
        }
        for irq in (16..IOAPIC_PINS).filter(|irq| level(*irq)) {
            self.interrupt(LEVEL_HIGH, bus, irq, irq);
        }
    }

    /// Pin p of device n of bus 0, which the PCI host wires to `intx[(n + p) % 4]`.
    fn pci_interrupts(&mut self, intx: [u32; 4]) {
        const CONFORMS: u16 = 0;
        for device in 0..32_u8 {
            for pin in 0..4_u8 {
                let gsi = intx[usize::from((device + pin) % 4)];
                if let Some(gsi) = u8::try_from(gsi).ok().filter(|gsi| *gsi < IOAPIC_PINS) {
                    self.interrupt(CONFORMS, PCI_BUS, device << 2 | pin, gsi);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmkit_memory::{Backing, RamLayout};

    use super::*;

    fn table(vcpus: u32, announcements: &[Announcement]) -> Option<Vec<u8>> {
        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        build(&BootContext::new(&ram, &layout).vcpus(vcpus).announcements(announcements), 0xF_0000)
    }

    /// The entries of a table, after checking its checksums, pointer, length and count.
    fn entries(bytes: &[u8]) -> Vec<Vec<u8>> {
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |s, b| s.wrapping_add(*b));
        assert_eq!((&bytes[..4], sum(&bytes[..16])), (&b"_MP_"[..], 0));
        assert_eq!(bytes[4..8], 0xF_0010_u32.to_le_bytes());
        let table = &bytes[16..];
        assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        let mut found = Vec::new();
        let mut rest = &table[HEADER..];
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(if rest[0] == 0 { 20 } else { 8 });
            found.push(entry.to_vec());
            rest = tail;
        }
        assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), found.len());
        found
    }

    #[test]
    fn processors_and_isa_interrupts_are_listed() {
        let found = entries(&table(3, &[]).unwrap());
        let processors: Vec<_> = found.iter().filter(|e| e[0] == 0).map(|e| (e[1], e[3])).collect();
        assert_eq!(processors, [(0, 3), (1, 1), (2, 1)]);
        let timer: Vec<_> = found.iter().filter(|e| e[0] == 3 && e[5] == 0).collect();
        assert_eq!(timer, [&vec![3, 0, 5, 0, 0, 0, IOAPIC_ID, 2]]);
        assert_eq!(found.iter().filter(|e| e[0] == 3).count(), 15);
    }

    fn host(intx: [u32; 4]) -> Announcement {
        Announcement::PciHost {
            ecam: 0xE000_0000,
            buses: 1,
            mmio32: (0, 0),
            mmio64: (0, 0),
            io: (0, 0),
            intx,
        }
    }

    #[test]
    fn the_pci_bus_has_the_number_that_configuration_space_gives_it() {
        let buses = |announcements: &[Announcement]| -> Vec<(u8, String)> {
            let found = entries(&table(1, announcements).unwrap());
            let buses = found.iter().filter(|e| e[0] == 1);
            buses.map(|e| (e[1], String::from_utf8_lossy(&e[2..]).into_owned())).collect()
        };
        assert_eq!(buses(&[host([16; 4])]), [(0, "PCI   ".into()), (1, "ISA   ".into())]);
        assert_eq!(buses(&[]), [(0, "ISA   ".into())]);

        let found = entries(&table(1, &[host([16, 17, 18, 19])]).unwrap());
        let (pci, isa): (Vec<_>, Vec<_>) =
            found.iter().filter(|e| e[0] == 3).partition(|e| e[7] >= 16);
        assert_eq!(pci.len(), 128);
        assert!(pci.iter().all(|e| e[4] == 0) && isa.iter().all(|e| e[4] == 1));
        assert!(found.iter().filter(|e| e[0] == 4).all(|e| e[4] == 1));
    }

    #[test]
    fn the_ioapic_has_the_id_that_it_says_itself() {
        for vcpus in [1, 4] {
            let found = entries(&table(vcpus, &[host([16, 17, 18, 19])]).unwrap());
            let ids: Vec<_> = found.iter().filter(|e| e[0] == 2).map(|e| e[1]).collect();
            assert_eq!(ids, [vmkit_hypervisor::IoapicState::default().id]);
            assert!(found.iter().filter(|e| e[0] == 3).all(|e| e[6] == ids[0]));
        }
    }

    #[test]
    fn virtio_and_pci_interrupts_are_level() {
        let devices = [
            Announcement::VirtioMmio { base: 0xD000_0000, len: 0x1000, gsi: 5 },
            Announcement::VirtioMmio { base: 0xD000_1000, len: 0x1000, gsi: 20 },
            host([16, 17, 18, 99]),
        ];
        let found = entries(&table(1, &devices).unwrap());
        for irq in [5, 20] {
            let entry = found.iter().find(|e| e[0] == 3 && e[4] != PCI_BUS && e[5] == irq).unwrap();
            assert_eq!(entry[2], 0xD);
        }
        let pci: Vec<_> = found.iter().filter(|e| e[0] == 3 && e[4] == PCI_BUS).collect();
        assert_eq!(pci.len(), 96, "pins on the absent input 99 are left out");
        assert!(pci.iter().all(|e| e[7] == 16 + ((e[5] >> 2) + (e[5] & 3)) % 4));
    }

    #[test]
    fn more_processors_than_apic_ids_have_no_table() {
        assert!(table(255, &[]).is_some());
        assert!(table(256, &[]).is_none());
        assert!(table(u32::MAX, &[]).is_none());
    }
}
