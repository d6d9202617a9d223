//! Segments of protected mode: limits, types, null selectors, and what the descriptor shows.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Failure;
use super::asm::asm;
use super::case::{cases, ensure_eq};
use super::cpu::End;
use super::guest::{DATA, Guest, Mode};
use super::modes::{in_mode, raises};
use super::recorder::Recorder;
use super::tables::{FREE, GDT};
use crate::x86::SegmentAttributes;
use crate::{Hypervisor, StateSet};

cases! { "segments":
    a_limit_is_checked "Intel SDM vol. 3A §5.3";
    an_expand_down_segment "Intel SDM vol. 3A §5.3";
    segment_types_are_checked "Intel SDM vol. 3A §5.4";
    a_null_selector_may_be_loaded_but_not_used "Intel SDM vol. 3A §3.4.2";
    loading_a_segment_sets_its_accessed_bit "Intel SDM vol. 3A §3.4.5.1";
    lar_lsl_verr_verw "Intel SDM vol. 2A, LAR, LSL; vol. 2B, VERR";
}

/// A data segment with this type, a byte limit of 0xFF, at [`DATA`].
fn small_segment(kind: u64) -> u64 {
    0x0040_0000_0000_00FF | (0x90 | kind) << 40 | (DATA & 0xFF_FFFF) << 16
}
/// Loads ES with [`FREE`] and executes `access`.
fn through_es(
    hypervisor: &dyn Hypervisor,
    descriptor: u64,
    access: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    guest.write_u64(GDT + u64::from(FREE), descriptor)?;
    guest.load(|a| {
        asm! { a; mov eax, u32::from(FREE); mov es, eax; };
        access(a)?;
        asm! { a; mov eax, 0x600D; stop; };
        Ok(())
    })?;
    Ok(guest)
}
/// `mov ebx, es:[offset]`
fn es_read(offset: u32) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        a.db(&[0x26, 0x8B, 0x1D])?;
        a.db(&offset.to_le_bytes())
    }
}
/// `mov es:[offset], ebx`
fn es_write(offset: u32) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        a.db(&[0x26, 0x89, 0x1D])?;
        a.db(&offset.to_le_bytes())
    }
}
fn goes_well(guest: &mut Guest, what: &str) -> Result<(), Failure> {
    let end = guest.cpu.go(&mut Recorder::new())?;
    ensure_eq!(end, End::Stop(0x600D), "{what}");
    Ok(())
}
fn a_limit_is_checked(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let writable = small_segment(3);
    goes_well(&mut through_es(hypervisor, writable, es_read(0xFC))?, "the last four bytes")?;
    for offset in [0xFD, 0xFF, 0x100, 0xFFFF_FFFF] {
        let what = format!("read at {offset:#x}");
        raises(&mut through_es(hypervisor, writable, es_read(offset))?, &what, 13, 0)?;
    }
    raises(&mut through_es(hypervisor, writable, es_write(0xFE))?, "write at 0xFE", 13, 0)
}
fn an_expand_down_segment(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let down = small_segment(7);
    goes_well(&mut through_es(hypervisor, down, es_write(0x100))?, "the first byte above")?;
    raises(&mut through_es(hypervisor, down, es_read(0xFF))?, "the last byte below", 13, 0)?;
    raises(&mut through_es(hypervisor, down, es_read(0))?, "the first byte below", 13, 0)
}
fn segment_types_are_checked(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    goes_well(&mut through_es(hypervisor, small_segment(1), es_read(0))?, "read of read-only")?;
    let mut read_only = through_es(hypervisor, small_segment(1), es_write(0))?;
    raises(&mut read_only, "write to read-only", 13, 0)?;
    goes_well(&mut through_es(hypervisor, small_segment(0xB), es_read(0))?, "read of code")?;
    let mut code = through_es(hypervisor, small_segment(0xB), es_write(0))?;
    raises(&mut code, "write to code", 13, 0)?;
    let mut execute_only = through_es(hypervisor, small_segment(9), es_read(0))?;
    raises(&mut execute_only, "loading execute-only code", 13, FREE.into())
}
fn a_null_selector_may_be_loaded_but_not_used(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    guest.load(|a| {
        asm! { a; xor eax, eax; mov es, eax; mov ebx, es; };
        es_read(DATA as u32)(a)
    })?;
    raises(&mut guest, "use", 13, 0)?;
    guest.load(|a| {
        asm! { a; xor eax, eax; mov ss, eax; };
        Ok(())
    })?;
    raises(&mut guest, "SS", 13, 0)
}
fn loading_a_segment_sets_its_accessed_bit(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = through_es(hypervisor, small_segment(2), es_read(0))?;
    goes_well(&mut guest, "read")?;
    ensure_eq!(guest.read_u64(GDT + u64::from(FREE))?, small_segment(3), "descriptor");
    let attributes = guest.cpu.get(StateSet::SEGMENTS)?.segments.es.attributes;
    ensure_eq!(attributes, SegmentAttributes(0x4093), "attributes of ES");
    Ok(())
}
fn lar_lsl_verr_verw(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = in_mode(hypervisor, Mode::Protected)?;
    guest.write_u64(GDT + u64::from(FREE), small_segment(1))?;
    guest.load(|a| {
        asm! { a;
            mov ecx, u32::from(FREE);
            lar ebx, ecx;
            setz al;
            lsl esi, ecx;
            setz ah;
            verr cx;
            setz dl;
            verw cx;
            setz dh;
            mov ecx, 0x1000;
            lar edi, ecx;
            setz cl;
            movzx ecx, cl;
            shl ecx, 16;
            or edx, ecx;
            movzx edx, dx;
            stop;
        };
        Ok(())
    })?;
    let zero_flags = guest.cpu.finish(&mut Recorder::new())? & 0xFFFF;
    ensure_eq!(zero_flags, 0x0101, "ZF after LAR and LSL");
    ensure_eq!(guest.cpu.register(3)?, 0x0040_9100, "LAR");
    ensure_eq!(guest.cpu.register(6)?, 0xFF, "LSL");
    ensure_eq!(guest.cpu.register(2)? & 0xFFFF, 0x0001, "ZF after VERR and VERW");
    Ok(())
}
