//! Guest programs: assembled when a case runs, so that a case can put its own numbers in.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use super::Failure;

/// Writes instructions to the assembler `$a`, each followed by `;`. Beside the assembler's own
/// methods: `label a, b;` declares labels, `a:` places one, `[lock]` and kin before an instruction
/// are prefixes, and `stop;` ends the run with the value of EAX.
macro_rules! asm {
    ($a:ident;) => {};
    ($a:ident; label $($l:ident),+ ; $($rest:tt)*) => {
        $(let mut $l = $a.create_label();)+
        asm!($a; $($rest)*);
    };
    ($a:ident; stop ; $($rest:tt)*) => {
        $a.out($crate::conformance::guest::STOP_PORT, ::iced_x86::code_asm::eax)?;
        asm!($a; $($rest)*);
    };
    ($a:ident; $l:ident : $($rest:tt)*) => {
        $a.set_label(&mut $l)?;
        asm!($a; $($rest)*);
    };
    ($a:ident; [$prefix:ident] $op:ident $($arg:expr),* ; $($rest:tt)*) => {
        $a.$prefix().$op($($arg),*)?;
        asm!($a; $($rest)*);
    };
    ($a:ident; $op:ident $($arg:expr),* ; $($rest:tt)*) => {
        $a.$op($($arg),*)?;
        asm!($a; $($rest)*);
    };
}
pub(super) use asm;

/// The machine code of what `write` writes, for `bits`-bit mode, to be loaded where the instruction
/// pointer is `at`.
pub(super) fn assemble(
    bits: u32,
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Vec<u8>, Failure> {
    let mut assembler = CodeAssembler::new(bits)?;
    write(&mut assembler)?;
    Ok(assembler.assemble(at)?)
}
