//! A guest program of a few instructions that echoes over vsock: what comes in on a port goes back, and
//! what the host sends on a connection that the guest made does too.

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, dword_ptr, eax, edi, edx, r12d, r13d, rax, rdx, rsi, rsp,
};

use crate::program::{Written, assemble, call, system_call};

/// `AF_VSOCK` and `SOCK_STREAM`.
const VSOCK: u32 = 40;
const STREAM: u32 = 1;
/// `VMADDR_CID_ANY` and `VMADDR_CID_HOST`.
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

/// A static ELF program that connects to port `dial` of the host and echoes until the host is done,
/// then accepts one connection at port `answer` and echoes again. Its status is 0 if all went well.
pub fn program(dial: u32, answer: u32) -> Vec<u8> {
    assemble(|code| write(code, dial, answer))
}

fn write(code: &mut CodeAssembler, dial: u32, answer: u32) -> Written {
    let mut failed = code.create_label();
    // Addresses and data are at the bottom of the stack.
    code.sub(rsp, 8192)?;
    socket(code)?;
    address(code, HOST, dial)?;
    on_address(code, call::CONNECT)?;
    code.test(eax, eax)?;
    code.jne(failed)?;
    code.mov(r13d, r12d)?;
    echo(code, failed)?;

    socket(code)?;
    address(code, ANY, answer)?;
    on_address(code, call::BIND)?;
    code.test(eax, eax)?;
    code.jne(failed)?;
    code.mov(edi, r12d)?;
    code.mov(rsi, 1_u64)?;
    system_call(code, call::LISTEN)?;
    code.mov(edi, r12d)?;
    code.xor(edx, edx)?;
    code.mov(rsi, rdx)?;
    system_call(code, call::ACCEPT)?;
    code.mov(r13d, eax)?;
    echo(code, failed)?;

    code.xor(edi, edi)?;
    system_call(code, call::EXIT)?;
    code.set_label(&mut failed)?;
    code.mov(edi, 1)?;
    system_call(code, call::EXIT)
}

/// A new socket in r12d.
fn socket(code: &mut CodeAssembler) -> Written {
    code.mov(edi, VSOCK)?;
    code.mov(rsi, u64::from(STREAM))?;
    code.xor(edx, edx)?;
    system_call(code, call::SOCKET)?;
    code.mov(r12d, eax)
}

/// A `sockaddr_vm` on the stack: family, port, address, flags.
fn address(code: &mut CodeAssembler, cid: u32, port: u32) -> Written {
    for (at, word) in [(0, VSOCK), (4, port), (8, cid), (12, 0)] {
        code.mov(dword_ptr(rsp + at), word)?;
    }
    Ok(())
}

/// A call on the socket in r12d and the address on the stack.
fn on_address(code: &mut CodeAssembler, number: u32) -> Written {
    code.mov(edi, r12d)?;
    code.mov(rsi, rsp)?;
    code.mov(edx, 16)?;
    system_call(code, number)
}

/// Writes back what is read from the socket in r13d until its end, and closes it.
fn echo(code: &mut CodeAssembler, failed: CodeLabel) -> Written {
    let (mut again, mut done) = (code.create_label(), code.create_label());
    code.set_label(&mut again)?;
    code.mov(edi, r13d)?;
    code.mov(rsi, rsp)?;
    code.mov(edx, 8192)?;
    system_call(code, call::READ)?;
    code.test(eax, eax)?;
    code.js(failed)?;
    code.je(done)?;
    code.mov(edx, eax)?;
    code.mov(edi, r13d)?;
    code.mov(rsi, rsp)?;
    system_call(code, call::WRITE)?;
    code.cmp(rax, rdx)?;
    code.jne(failed)?;
    code.jmp(again)?;
    code.set_label(&mut done)?;
    code.mov(edi, r13d)?;
    system_call(code, call::CLOSE)
}
