//! Guest programs that send and receive a stream of words, and sum it up on the way: what they need
//! per byte is little, so that a software processor's time goes into the network.

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, byte_ptr, dl, eax, ecx, edi, edx, qword_ptr, r8, r8d, r12, r13,
    r14, rax, rcx, rdi, rdx, rsi, rsp,
};

use crate::program::{Written, assemble, call, system_call};

/// Bytes written or asked for at once.
const PIECE: u32 = 64 << 10;
/// Of the words sent: Knuth's linear congruential generator (MMIX).
const FACTOR: u64 = 6_364_136_223_846_793_005;
const STEP: u64 = 1_442_695_040_888_963_407;
/// Of the sum, which is FNV-1a over words instead of bytes.
const SUM_START: u64 = 0xCBF2_9CE4_8422_2325;
const SUM_FACTOR: u64 = 0x100_0000_01B3;

/// What a sender of `bytes` bytes, a multiple of eight, sends.
pub fn stream(bytes: usize) -> Vec<u8> {
    let mut stream = vec![0; bytes];
    let mut next = STEP;
    // Plain loops here and below: tests are not optimised, and streams are long.
    for word in stream.as_chunks_mut().0 {
        *word = next.to_le_bytes();
        next = next.wrapping_mul(FACTOR).wrapping_add(STEP);
    }
    stream
}

/// The sum of `stream`, as the programs print it.
pub fn sum(stream: &[u8]) -> String {
    let mut sum = SUM_START;
    for word in stream.as_chunks().0 {
        sum = (sum ^ u64::from_le_bytes(*word)).wrapping_mul(SUM_FACTOR);
    }
    format!("{sum:016x}")
}

/// A program that writes `pieces` times 64 KiB to its standard output, reads its standard input to the
/// end, and prints the sum of what it wrote on standard error.
pub fn sender(pieces: u32) -> Vec<u8> {
    assemble(|code| write_sender(code, pieces))
}

/// A program that reads `pieces` times 64 KiB from its standard input, or what comes before that
/// ends, and prints the sum on standard error.
pub fn receiver(pieces: u32) -> Vec<u8> {
    assemble(|code| write_receiver(code, pieces))
}

fn write_sender(code: &mut CodeAssembler, pieces: u32) -> Written {
    let (mut piece, mut word, mut rest) =
        (code.create_label(), code.create_label(), code.create_label());
    let (mut linger, done) = (code.create_label(), code.create_label());
    code.sub(rsp, PIECE as i32)?;
    // r12 is the next word, r13 the sum, r14 what is left to send.
    code.mov(r12, STEP)?;
    code.mov(r13, SUM_START)?;
    code.mov(r14, u64::from(pieces) * u64::from(PIECE))?;

    code.set_label(&mut piece)?;
    code.mov(rdi, FACTOR)?;
    code.mov(rsi, STEP)?;
    code.mov(rdx, SUM_FACTOR)?;
    code.xor(ecx, ecx)?;
    code.set_label(&mut word)?;
    code.mov(qword_ptr(rsp + rcx), r12)?;
    code.xor(r13, r12)?;
    code.imul_2(r13, rdx)?;
    code.imul_2(r12, rdi)?;
    code.add(r12, rsi)?;
    code.add(ecx, 8)?;
    code.cmp(ecx, PIECE as i32)?;
    code.jne(word)?;

    code.mov(rsi, rsp)?;
    code.mov(edx, PIECE)?;
    code.set_label(&mut rest)?;
    code.mov(edi, 1)?;
    system_call(code, call::WRITE)?;
    code.test(rax, rax)?;
    code.jle(done)?;
    code.sub(r14, rax)?;
    code.add(rsi, rax)?;
    code.sub(rdx, rax)?;
    code.jne(rest)?;
    code.test(r14, r14)?;
    code.jne(piece)?;

    code.set_label(&mut linger)?;
    read(code)?;
    code.test(rax, rax)?;
    code.jg(linger)?;
    finish(code, done)
}

fn write_receiver(code: &mut CodeAssembler, pieces: u32) -> Written {
    let (mut again, mut word, mut whole) =
        (code.create_label(), code.create_label(), code.create_label());
    let done = code.create_label();
    code.sub(rsp, PIECE as i32 + 8)?;
    // r12 is how many bytes of a word were left, r13 the sum, r14 what is left to receive.
    code.xor(r12, r12)?;
    code.mov(r13, SUM_START)?;
    code.mov(r14, u64::from(pieces) * u64::from(PIECE))?;

    code.set_label(&mut again)?;
    code.lea(rsi, qword_ptr(rsp + r12))?;
    code.mov(edi, 0)?;
    code.mov(edx, PIECE)?;
    system_call(code, call::READ)?;
    code.test(rax, rax)?;
    code.jle(done)?;
    code.sub(r14, rax)?;
    code.add(rax, r12)?;
    code.mov(rdx, SUM_FACTOR)?;
    code.mov(rsi, rsp)?;
    code.lea(rdi, qword_ptr(rsp + rax))?;
    code.and(rax, 7)?;
    code.mov(r12, rax)?;
    code.sub(rdi, rax)?;
    code.jmp(whole)?;
    code.set_label(&mut word)?;
    code.xor(r13, qword_ptr(rsi))?;
    code.imul_2(r13, rdx)?;
    code.add(rsi, 8)?;
    code.set_label(&mut whole)?;
    code.cmp(rsi, rdi)?;
    code.jb(word)?;
    // What is left goes to the front.
    code.mov(rax, qword_ptr(rsi))?;
    code.mov(qword_ptr(rsp), rax)?;
    code.test(r14, r14)?;
    code.jg(again)?;
    finish(code, done)
}

/// A piece of standard input to the bottom of the stack.
fn read(code: &mut CodeAssembler) -> Written {
    code.xor(edi, edi)?;
    code.mov(rsi, rsp)?;
    code.mov(edx, PIECE)?;
    system_call(code, call::READ)
}

/// Prints r13 and ends the program.
fn finish(code: &mut CodeAssembler, mut here: CodeLabel) -> Written {
    let (mut digit, mut letter) = (code.create_label(), code.create_label());
    code.set_label(&mut here)?;
    code.xor(r8d, r8d)?;
    code.set_label(&mut digit)?;
    code.rol(r13, 4)?;
    code.mov(rax, r13)?;
    code.and(eax, 15)?;
    code.add(al, i32::from(b'0'))?;
    code.cmp(al, i32::from(b'9'))?;
    code.jbe(letter)?;
    code.add(al, i32::from(b'a' - b'9' - 1))?;
    code.set_label(&mut letter)?;
    code.mov(byte_ptr(rsp + r8), al)?;
    code.inc(r8d)?;
    code.cmp(r8d, 16)?;
    code.jne(digit)?;
    code.mov(dl, i32::from(b'\n'))?;
    code.mov(byte_ptr(rsp + 16), dl)?;
    code.mov(edi, 2)?;
    code.mov(rsi, rsp)?;
    code.mov(edx, 17)?;
    system_call(code, call::WRITE)?;
    code.xor(edi, edi)?;
    system_call(code, call::EXIT)
}
