//! Segment registers with their hidden parts, and descriptor tables.

use serde::{Deserialize, Serialize};

/// The access-rights bits of a descriptor, as VMCS and KVM lay them out
/// (Intel SDM vol. 3C §25.4.1): type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15,
/// unusable 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SegmentAttributes(pub u32);

impl SegmentAttributes {
    /// Marks a segment register that holds a null selector.
    pub const UNUSABLE: Self = Self(1 << 16);

    /// The type field.
    pub fn kind(self) -> u8 {
        (self.0 & 0xF) as u8
    }
    /// S: a code or data segment, not a system one.
    pub fn code_or_data(self) -> bool {
        self.0 & 0x10 != 0
    }
    /// S and the executable bit of the type.
    pub fn is_code(self) -> bool {
        self.0 & 0x18 == 0x18
    }
    /// DPL.
    pub fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }
    /// P.
    pub fn present(self) -> bool {
        self.0 & 0x80 != 0
    }
    /// L: 64-bit code.
    pub fn long(self) -> bool {
        self.0 & 0x2000 != 0
    }
    /// D/B: 32-bit.
    pub fn big(self) -> bool {
        self.0 & 0x4000 != 0
    }
    /// G: the descriptor's limit counted pages.
    pub fn granular(self) -> bool {
        self.0 & 0x8000 != 0
    }
    /// The register holds a null selector.
    pub fn unusable(self) -> bool {
        self.0 & 0x1_0000 != 0
    }
}

/// One segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible part.
    pub selector: u16,
    /// Base linear address.
    pub base: u64,
    /// Last valid offset, in bytes (granularity applied).
    pub limit: u32,
    /// Access rights.
    pub attributes: SegmentAttributes,
}

impl Segment {
    /// A real-mode data segment at `selector << 4`.
    pub fn real(selector: u16) -> Self {
        Self {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xFFFF,
            attributes: SegmentAttributes(0x93),
        }
    }

    /// A flat 64-bit code segment of ring 0.
    pub fn code64(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, attributes: SegmentAttributes(0xA09B) }
    }

    /// A flat 32-bit code segment of ring 0.
    pub fn code32(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, attributes: SegmentAttributes(0xC09B) }
    }

    /// A flat data segment of ring 0.
    pub fn data(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, attributes: SegmentAttributes(0xC093) }
    }

    /// The same segment with privilege level `dpl` (0 to 3), its selector's RPL too.
    pub fn with_dpl(mut self, dpl: u8) -> Self {
        let dpl = dpl & 3;
        self.attributes.0 = self.attributes.0 & !0x60 | u32::from(dpl) << 5;
        self.selector = self.selector & !3 | u16::from(dpl);
        self
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset.
    pub limit: u16,
}

impl Default for DescriptorTable {
    fn default() -> Self {
        Self { base: 0, limit: 0xFFFF }
    }
}

/// All segment and table registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segments {
    /// Code.
    pub cs: Segment,
    /// Data.
    pub ds: Segment,
    /// Extra.
    pub es: Segment,
    /// Its base is the FS_BASE MSR.
    pub fs: Segment,
    /// Its base is the GS_BASE MSR.
    pub gs: Segment,
    /// Stack. Its DPL is the CPL.
    pub ss: Segment,
    /// Task state.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
}

impl Default for Segments {
    /// The state after reset (Intel SDM vol. 3A §10.1.1): CS at 0xFFFF0000.
    fn default() -> Self {
        let data = Segment::real(0);
        Self {
            cs: Segment {
                selector: 0xF000,
                base: 0xFFFF_0000,
                limit: 0xFFFF,
                attributes: SegmentAttributes(0x9B),
            },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment {
                limit: 0xFFFF,
                attributes: SegmentAttributes(0x8B),
                ..Segment::default()
            },
            ldt: Segment {
                limit: 0xFFFF,
                attributes: SegmentAttributes(0x82),
                ..Segment::default()
            },
            gdt: DescriptorTable::default(),
            idt: DescriptorTable::default(),
        }
    }
}
