//! General, control and debug registers.

use serde::{Deserialize, Serialize};

/// The sixteen general registers, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneralRegisters {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15: in the order of their encoding.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags. Bit 1 is always one.
    pub rflags: u64,
}

impl Default for GeneralRegisters {
    /// The state after reset, RDX aside (Intel SDM vol. 3A §10.1.1).
    fn default() -> Self {
        Self { gpr: [0; 16], rip: 0xFFF0, rflags: 2 }
    }
}

macro_rules! named {
    ($($index:literal $name:ident $set:ident;)*) => {
        impl GeneralRegisters {
            $(
                #[doc = concat!("The register of that name (encoding ", $index, ").")]
                pub fn $name(&self) -> u64 { self.gpr[$index] }
                #[doc = concat!("Sets the register of encoding ", $index, ".")]
                pub fn $set(&mut self, value: u64) { self.gpr[$index] = value; }
            )*
        }
    };
}
named! {
    0 rax set_rax; 1 rcx set_rcx; 2 rdx set_rdx; 3 rbx set_rbx;
    4 rsp set_rsp; 5 rbp set_rbp; 6 rsi set_rsi; 7 rdi set_rdi;
}

/// Control registers, EFER and XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlRegisters {
    /// CR0: see [`Cr0`](super::Cr0).
    pub cr0: u64,
    /// CR2: the last page fault's linear address.
    pub cr2: u64,
    /// CR3: the page-table base.
    pub cr3: u64,
    /// CR4: see [`Cr4`](super::Cr4).
    pub cr4: u64,
    /// CR8: the task-priority class, 0 to 15.
    pub cr8: u64,
    /// EFER: see [`Efer`](super::Efer).
    pub efer: u64,
    /// XCR0: the state components XSAVE manages. Bit 0 is always one.
    pub xcr0: u64,
}

impl Default for ControlRegisters {
    /// The state after reset (Intel SDM vol. 3A §10.1.1).
    fn default() -> Self {
        Self { cr0: 0x6000_0010, cr2: 0, cr3: 0, cr4: 0, cr8: 0, efer: 0, xcr0: 1 }
    }
}

/// Debug registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegisters {
    /// DR0 to DR3: breakpoint addresses.
    pub dr: [u64; 4],
    /// DR6: status.
    pub dr6: u64,
    /// DR7: control.
    pub dr7: u64,
}

impl Default for DebugRegisters {
    /// The state after reset (Intel SDM vol. 3A §10.1.1).
    fn default() -> Self {
        Self { dr: [0; 4], dr6: 0xFFFF_0FF0, dr7: 0x400 }
    }
}
