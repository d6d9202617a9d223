//! The fixed ACPI description table (ACPI 6.5 §5.2.9).

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use vmkit_device::Announcement;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE, bytes_of, sci};
use crate::BootContext;

/// IA-PC boot architecture flags (ACPI 6.5 §5.2.9.3).
const LEGACY_DEVICES: u16 = 1;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Where the clock of a PC keeps the century, in its RAM.
const RTC_CENTURY: u8 = 0x32;

/// Latencies in microseconds that say there is no such state (ACPI 6.5 §5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The table, pointing to `facs` and `dsdt`.
///
/// SMI_CMD is zero: the machine is in ACPI mode from the start. A machine that announces neither
/// PM block is hardware-reduced.
pub(super) fn build(ctx: &BootContext<'_>, facs: u32, dsdt: u32) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton);
    fadt.firmware_ctrl = facs.into();
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    // Latencies past which C2 and C3 count as absent.
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    // Without a PM1 event block there is no SCI; the field is then ignored.
    fadt.sci_int = (sci(ctx) as u16).into();

    let mut boot = LEGACY_DEVICES | NO_VGA | NO_CMOS_RTC;
    let mut hardware_reduced = true;
    for announcement in ctx.announcements {
        match *announcement {
            Announcement::PmEvent { port, .. } => {
                hardware_reduced = false;
                fadt.pm1a_evt_blk = u32::from(port).into();
                fadt.pm1_evt_len = 4;
                fadt.x_pm1a_evt_blk = io(port, 32, AccessSize::WordAccess);
            }
            Announcement::PmControl { port, .. } => {
                hardware_reduced = false;
                fadt.pm1a_cnt_blk = u32::from(port).into();
                fadt.pm1_cnt_len = 2;
                fadt.x_pm1a_cnt_blk = io(port, 16, AccessSize::WordAccess);
            }
            Announcement::PmTimer { port, wide } => {
                fadt.pm_tmr_blk = u32::from(port).into();
                fadt.pm_tmr_len = 4;
                fadt.x_pm_tmr_blk = io(port, 32, AccessSize::DwordAccess);
                if wide {
                    fadt = fadt.flag(Flags::TmrValExt);
                }
            }
            Announcement::ResetPort { port, value } => {
                fadt.reset_reg = io(port, 8, AccessSize::ByteAccess);
                fadt.reset_value = value;
                fadt = fadt.flag(Flags::ResetRegSup);
            }
            Announcement::I8042 => boot |= HAS_8042,
            Announcement::Rtc { .. } => {
                boot &= !NO_CMOS_RTC;
                fadt.century = RTC_CENTURY;
            }
            _ => {}
        }
    }
    fadt.iapc_boot_arch = boot.into();
    if hardware_reduced {
        fadt = fadt.flag(Flags::HwReducedAcpi);
    }
    bytes_of(&fadt.finalize())
}

fn io(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
