//! The multiple APIC description table (ACPI 6.5 §5.2.12).

use acpi_tables::sdt::Sdt;

use super::{IOAPIC_ADDRESS, IOAPIC_ID, LAPIC_ADDRESS, OEM_ID, OEM_REVISION, OEM_TABLE, sci};
use crate::BootContext;

const REVISION: u8 = 5;
/// The machine also has a pair of 8259s.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
/// First APIC id that only an x2APIC structure can name; 255 is broadcast.
const FIRST_X2APIC: u32 = 255;
/// Flags of an interrupt source override: as the bus has it; level-triggered, active-high.
const CONFORMS: u16 = 0;
const LEVEL_HIGH: u16 = 0b11_01;

/// The table. acpi_tables has no PC-style one: neither the flag above nor overrides.
pub(super) fn build(ctx: &BootContext<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..ctx.vcpus {
        if id < FIRST_X2APIC {
            body.extend_from_slice(&[0, 8, id as u8, id as u8]);
            body.extend_from_slice(&ENABLED.to_le_bytes());
        } else {
            body.extend_from_slice(&[9, 16, 0, 0]);
            for word in [id, ENABLED, id] {
                body.extend_from_slice(&word.to_le_bytes());
            }
        }
    }
    body.extend_from_slice(&[1, 12, IOAPIC_ID, 0]);
    body.extend_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    source_override(&mut body, 0, 2, CONFORMS);
    let sci = sci(ctx);
    if sci < 16 {
        source_override(&mut body, sci as u8, sci, LEVEL_HIGH);
    }
    // NMI on LINT1 of every processor; the x2APIC structure covers the ids past 254.
    body.extend_from_slice(&[4, 6, 0xFF, 0, 0, 1]);
    if ctx.vcpus > FIRST_X2APIC {
        body.extend_from_slice(&[10, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
    }
    let mut madt = Sdt::new(*b"APIC", 36, REVISION, OEM_ID, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&body);
    madt.as_slice().to_vec()
}

/// ISA interrupt `irq` is on `gsi` (ACPI 6.5 §5.2.12.5).
fn source_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend_from_slice(&[2, 10, 0, irq]);
    body.extend_from_slice(&gsi.to_le_bytes());
    body.extend_from_slice(&flags.to_le_bytes());
}
