//! x87, SSE and AVX state: KVM's area to the standard format and back.
//!
//! KVM already uses the standard format. What differs between hosts is taken out: bytes that the
//! kernel puts into the area for itself, components outside the model, and whether a component in
//! its initial state counts as in use.

#![allow(unsafe_code, reason = "the size of KVM's area is only known at run time")]

use kvm_bindings::{Xsave, kvm_xsave};
use vmkit_hypervisor::x86::XsaveArea;
use vmkit_hypervisor::{HypervisorError, Result};

use super::KvmVcpu;
use super::state::refused;
use crate::error::host;

/// Legacy region and header (Intel SDM vol. 1 §13.4).
const LEGACY_AND_HEADER: usize = 576;
/// Bytes 464 to 511 are free for software; Linux writes there.
const SOFTWARE: std::ops::Range<usize> = 464..512;
/// XSTATE_BV.
const XSTATE_BV: std::ops::Range<usize> = 512..520;
/// XCOMP_BV and the reserved rest of the header: zero in the standard format.
const HEADER_ZERO: std::ops::Range<usize> = 520..576;
/// Offset of MXCSR.
const MXCSR: usize = 24;
/// What MXCSR may hold on any processor since SSE2 with DAZ.
const MXCSR_MASK: u32 = 0xFFFF;

impl KvmVcpu {
    fn wanted(&self) -> usize {
        (self.model.xsave_bytes() as usize).max(LEGACY_AND_HEADER)
    }

    /// The components that the area may hold: also a model without XSAVE has x87 and SSE.
    fn components(&self) -> u64 {
        self.model.xcr0_mask() | 3
    }

    /// An area as large as the kernel may fill.
    fn area(&self) -> Result<Xsave> {
        let extra = self.partition.host.xsave_bytes.saturating_sub(size_of::<kvm_xsave>());
        Xsave::new(extra.div_ceil(4))
            .map_err(|_| HypervisorError::Unsupported("an XSAVE area of this size"))
    }

    pub(super) fn xsave(&self, out: &mut XsaveArea) -> Result<()> {
        let mut area = self.area()?;
        if self.partition.host.has_xsave2 {
            // SAFETY: the area holds as many bytes as KVM_CAP_XSAVE2 says.
            unsafe { self.fd.get_xsave2(&mut area) }.map_err(host("read the XSAVE area"))?;
        } else {
            let plain = self.fd.get_xsave().map_err(host("read the XSAVE area"))?;
            // SAFETY: the flexible part is not touched.
            unsafe { area.as_mut_fam_struct() }.xsave.region = plain.region;
        }
        let region = &area.as_fam_struct_ref().xsave.region;
        out.0.clear();
        out.0.extend(region.iter().flat_map(|word| word.to_le_bytes()).take(self.wanted()));
        out.0[SOFTWARE].fill(0);
        let in_use = xstate_bv(&out.0) & self.components();
        out.0[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
        Ok(())
    }

    pub(super) fn set_xsave(&self, from: &XsaveArea) -> Result<()> {
        let mut area = self.area()?;
        // SAFETY: the flexible part and its length are not touched.
        let region = &mut unsafe { area.as_mut_fam_struct() }.xsave.region;
        for (word, bytes) in region.iter_mut().zip(from.0.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        // SAFETY: the area holds as many bytes as KVM_CAP_XSAVE2 says, or 4096 where that is absent.
        unsafe { self.fd.set_xsave2(&area) }.map_err(|error| refused("XSAVE area", &error))
    }

    /// Refuses what KVM would refuse, and what is outside the model.
    pub(super) fn check_xsave(&self, area: &XsaveArea) -> Result<()> {
        let wrong = |text: String| Err(HypervisorError::state(text));
        let bytes = &area.0;
        let mask = self.components();
        if bytes.len() < LEGACY_AND_HEADER || bytes.len() > size_of::<kvm_xsave>() {
            return wrong(format!("an XSAVE area of {} bytes", bytes.len()));
        }
        let in_use = xstate_bv(bytes);
        if in_use & !mask != 0 {
            return wrong(format!("XSAVE components {in_use:#x}, the model has {mask:#x}"));
        }
        if in_use & 4 != 0 && bytes.len() < self.wanted() {
            return wrong("an XSAVE area too short for its AVX component".into());
        }
        if bytes[HEADER_ZERO].iter().any(|byte| *byte != 0) {
            return wrong("an XSAVE area in the compacted format".into());
        }
        let mxcsr = u32::from_le_bytes([
            bytes[MXCSR],
            bytes[MXCSR + 1],
            bytes[MXCSR + 2],
            bytes[MXCSR + 3],
        ]);
        if mxcsr & !MXCSR_MASK != 0 {
            return wrong(format!("MXCSR {mxcsr:#x}"));
        }
        Ok(())
    }
}

fn xstate_bv(area: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(area.iter().skip(XSTATE_BV.start)) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}
