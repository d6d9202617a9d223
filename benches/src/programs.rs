//! Guest programs for the speed of a processor: 64-bit code at [`BASE`] that repeats its work RDI
//! times and leaves through the debug-exit port.
//!
//! They follow the shapes that emulators are measured with: register arithmetic, a sort, a hash, deep
//! calls, a bytecode interpreter, memory copies, floating point and vectors.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where programs are loaded.
pub const BASE: u64 = 0x10_0000;
/// Scratch memory of the programs, 1 MiB.
pub const DATA: u64 = 0x40_0000;
/// The port that ends a program.
pub const EXIT_PORT: u16 = 0xF4;

/// A program: its name, its code, and guest instructions of one repetition, about.
pub struct Program {
    /// What it does.
    pub name: &'static str,
    /// Its body, which may use every register but RDI and R15.
    body: fn(&mut CodeAssembler) -> Result<(), IcedError>,
}

/// All programs.
pub const PROGRAMS: &[Program] = &[
    Program { name: "registers", body: registers },
    Program { name: "sort", body: sort },
    Program { name: "hash", body: hash },
    Program { name: "calls", body: calls },
    Program { name: "bytecode", body: bytecode },
    Program { name: "copy", body: copy },
    Program { name: "doubles", body: doubles },
    Program { name: "vectors", body: vectors },
    Program { name: "x87", body: x87 },
];

impl Program {
    /// The program's code for `repetitions` of its work.
    ///
    /// # Errors
    /// What the assembler refuses; none of these programs.
    pub fn assemble(&self, repetitions: u64) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut again = a.create_label();
        // SSE on: CR0.EM clear, CR4.OSFXSR and OSXMMEXCPT set.
        a.mov(rax, cr0)?;
        a.and(eax, !4)?;
        a.mov(cr0, rax)?;
        a.mov(rax, cr4)?;
        a.or(eax, 0x600)?;
        a.mov(cr4, rax)?;
        a.mov(rsp, DATA + (2 << 20))?;
        a.mov(rdi, repetitions)?;
        a.set_label(&mut again)?;
        (self.body)(&mut a)?;
        a.dec(rdi)?;
        a.jnz(again)?;
        a.xor(eax, eax)?;
        a.out(0xF4, al)?;
        a.assemble(BASE)
    }
}

/// 5,000 instructions of dependent register arithmetic.
fn registers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, 1000)?;
    a.set_label(&mut top)?;
    a.add(rax, rcx)?;
    a.xor(rdx, rax)?;
    a.lea(rbx, rdx + rax * 4)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// Fills 64 words with a linear congruence and sorts them by insertion.
fn sort(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut fill = a.create_label();
    let mut outer = a.create_label();
    let mut inner = a.create_label();
    let mut placed = a.create_label();
    a.mov(rsi, DATA)?;
    a.mov(eax, 12345)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut fill)?;
    a.imul_3(eax, eax, 1_103_515_245)?;
    a.add(eax, 12345)?;
    a.mov(dword_ptr(rsi + rcx * 4), eax)?;
    a.inc(rcx)?;
    a.cmp(rcx, 64)?;
    a.jb(fill)?;
    a.mov(ecx, 1)?;
    a.set_label(&mut outer)?;
    a.mov(eax, dword_ptr(rsi + rcx * 4))?;
    a.mov(rdx, rcx)?;
    a.set_label(&mut inner)?;
    a.mov(ebx, dword_ptr(rsi + rdx * 4 - 4))?;
    a.cmp(ebx, eax)?;
    a.jbe(placed)?;
    a.mov(dword_ptr(rsi + rdx * 4), ebx)?;
    a.dec(rdx)?;
    a.jnz(inner)?;
    a.set_label(&mut placed)?;
    a.mov(dword_ptr(rsi + rdx * 4), eax)?;
    a.inc(rcx)?;
    a.cmp(rcx, 64)?;
    a.jb(outer)
}

/// FNV-1a over 1 KiB.
fn hash(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rsi, DATA)?;
    a.mov(rbx, 0x100_0000_01B3_u64)?;
    a.mov(rax, 0xCBF2_9CE4_8422_2325_u64)?;
    a.mov(ecx, 1024)?;
    a.set_label(&mut top)?;
    a.movzx(edx, byte_ptr(rsi))?;
    a.xor(rax, rdx)?;
    a.imul_2(rax, rbx)?;
    a.inc(rsi)?;
    a.dec(ecx)?;
    a.jnz(top)
}

/// Fibonacci of 12, recursively.
fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut fib = a.create_label();
    let mut small = a.create_label();
    let mut over = a.create_label();
    a.mov(ebx, 12)?;
    a.call(fib)?;
    a.jmp(over)?;
    a.set_label(&mut fib)?;
    a.cmp(ebx, 2)?;
    a.jb(small)?;
    a.push(rbx)?;
    a.dec(ebx)?;
    a.call(fib)?;
    a.pop(rbx)?;
    a.push(rax)?;
    a.sub(ebx, 2)?;
    a.call(fib)?;
    a.pop(rdx)?;
    a.add(rax, rdx)?;
    a.ret()?;
    a.set_label(&mut small)?;
    a.mov(eax, ebx)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.nop()
}

/// A stack machine that counts from 200 down, by computed jumps.
fn bytecode(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = a.create_label();
    let mut table = a.create_label();
    let mut ops: Vec<_> = (0..4).map(|_| a.create_label()).collect();
    let mut over = a.create_label();
    // The bytecode at DATA: 0 decrement, 1 accumulate, 2 jump back while not zero, 3 stop.
    a.mov(rsi, DATA)?;
    a.mov(dword_ptr(rsi), 0x0302_0100)?;
    a.lea(rbp, ptr(table))?;
    a.mov(ebx, 200)?;
    a.xor(eax, eax)?;
    a.set_label(&mut next)?;
    a.movzx(edx, byte_ptr(rsi))?;
    a.inc(rsi)?;
    a.movsxd(rdx, dword_ptr(rbp + rdx * 4))?;
    a.add(rdx, rbp)?;
    a.jmp(rdx)?;
    for (i, op) in ops.iter_mut().enumerate() {
        a.set_label(op)?;
        match i {
            0 => a.dec(ebx)?,
            1 => a.add(rax, rbx)?,
            2 => {
                let mut done = a.create_label();
                a.test(ebx, ebx)?;
                a.jz(done)?;
                a.sub(rsi, 3)?;
                a.set_label(&mut done)?;
                a.nop()?;
            }
            _ => {
                a.jmp(over)?;
                continue;
            }
        }
        a.jmp(next)?;
    }
    // Offsets of the operations from the table; their sizes are those of the code above.
    a.set_label(&mut table)?;
    let offsets = bytecode_offsets()?;
    a.dd(&offsets.map(|offset| offset as u32))?;
    a.set_label(&mut over)?;
    a.nop()
}

/// Where the operations of [`bytecode`] lie, relative to its table: measured on a dry run of the same
/// code, because the assembler has no label differences.
fn bytecode_offsets() -> Result<[i32; 4], IcedError> {
    // dec ebx (2) + jmp (2); add rax, rbx (3) + jmp (2); test (2) + jz (2) + sub (4) + nop (1) +
    // jmp (2); jmp over (2).
    let sizes = [4, 5, 11, 2];
    let total: i32 = sizes.iter().sum();
    let mut offsets = [0; 4];
    let mut at = -total;
    for (offset, size) in offsets.iter_mut().zip(sizes) {
        *offset = at;
        at += size;
    }
    Ok(offsets)
}

/// Copies 64 KiB with REP MOVSB and 4 KiB word by word.
fn copy(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(r8, rdi)?;
    a.mov(rsi, DATA)?;
    a.mov(rdi, DATA + 0x8_0000)?;
    a.mov(ecx, 64 << 10)?;
    a.rep().movsb()?;
    a.mov(rsi, DATA)?;
    a.mov(ecx, 512)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rsi + rcx * 8 - 8))?;
    a.mov(qword_ptr(rsi + rcx * 8 + 0x10_000), rax)?;
    a.dec(rcx)?;
    a.jnz(top)?;
    a.mov(rdi, r8)
}

/// A polynomial in doubles.
fn doubles(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, 500)?;
    a.mov(eax, 3)?;
    a.cvtsi2sd(xmm1, eax)?;
    a.cvtsi2sd(xmm2, ecx)?;
    a.divsd(xmm1, xmm2)?;
    a.xorpd(xmm0, xmm0)?;
    a.set_label(&mut top)?;
    a.mulsd(xmm0, xmm1)?;
    a.addsd(xmm0, xmm2)?;
    a.movapd(xmm3, xmm0)?;
    a.subsd(xmm3, xmm1)?;
    a.dec(ecx)?;
    a.jnz(top)
}

/// Packed integers and floats, one operand of them in memory that is not aligned.
fn vectors(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, 500)?;
    a.mov(rdx, DATA + 4)?;
    a.xorps(xmm1, xmm1)?;
    a.set_label(&mut top)?;
    a.movups(xmm0, xmmword_ptr(rdx))?;
    a.addps(xmm1, xmm0)?;
    a.pshufd(xmm2, xmm1, 0x1B)?;
    a.paddd(xmm2, xmm0)?;
    a.dec(ecx)?;
    a.jnz(top)
}

/// Sums on the x87 stack.
fn x87(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, 100)?;
    a.fninit()?;
    a.fld1()?;
    a.fld1()?;
    a.set_label(&mut top)?;
    a.fadd_2(st0, st1)?;
    a.fmul_2(st0, st1)?;
    a.dec(ecx)?;
    a.jnz(top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_assembles() {
        for program in PROGRAMS {
            assert!(program.assemble(3).is_ok(), "{}", program.name);
        }
    }
}
