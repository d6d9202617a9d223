//! Small images of every format, for tests.

use crate::decompress::{Method, tests::compress};

/// A segment of a made ELF file: physical address, contents, bytes of zeros after them.
pub(crate) type Piece<'a> = (u64, &'a [u8], u64);

/// An ELF file with segments at `pieces` (virtual address: physical plus `offset`), and a PVH
/// note if there is a `pvh` entry.
pub(crate) fn elf(
    wide: bool,
    entry: u64,
    offset: u64,
    pieces: &[Piece<'_>],
    pvh: Option<u32>,
) -> Vec<u8> {
    let (header_len, entry_len) = if wide { (64, 56) } else { (52, 32) };
    let count = pieces.len() + usize::from(pvh.is_some());
    let mut data_at = header_len + entry_len * count;
    let mut file = Vec::new();
    let mut data = Vec::new();
    let put = |file: &mut Vec<u8>, value: u64, wide: bool| {
        file.extend_from_slice(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
    };

    file.extend_from_slice(b"\x7fELF");
    file.extend_from_slice(&[if wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend_from_slice(&2_u16.to_le_bytes());
    file.extend_from_slice(&if wide { 62_u16 } else { 3 }.to_le_bytes());
    file.extend_from_slice(&1_u32.to_le_bytes());
    put(&mut file, entry, wide);
    put(&mut file, header_len as u64, wide);
    put(&mut file, 0, wide);
    file.extend_from_slice(&0_u32.to_le_bytes());
    for half in [header_len, entry_len, count, 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }

    let mut header = |file: &mut Vec<u8>, kind: u32, paddr: u64, bytes: &[u8], zeros: u64| {
        let len = bytes.len() as u64;
        let vaddr = paddr.wrapping_add(offset);
        file.extend_from_slice(&kind.to_le_bytes());
        if wide {
            file.extend_from_slice(&7_u32.to_le_bytes());
        }
        for value in [data_at as u64, vaddr, paddr, len, len + zeros] {
            put(file, value, wide);
        }
        if !wide {
            file.extend_from_slice(&7_u32.to_le_bytes());
        }
        put(file, 4, wide);
        data_at += bytes.len();
        data.extend_from_slice(bytes);
    };
    for (paddr, bytes, zeros) in pieces {
        header(&mut file, 1, *paddr, bytes, *zeros);
    }
    if let Some(pvh) = pvh {
        // A note of another owner first.
        let mut note = Vec::new();
        note.extend_from_slice(&[4, 0, 0, 0, 2, 0, 0, 0, 18, 0, 0, 0]);
        note.extend_from_slice(b"GNU\0\x55\x55\0\0");
        note.extend_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&pvh.to_le_bytes());
        header(&mut file, 4, 0, &note, 0);
    }
    file.extend_from_slice(&data);
    file
}

/// Where [`bzimage`] wants its kernel.
pub(crate) const KERNEL: u64 = 0x20_0000;
/// Its `init_size`.
pub(crate) const INIT_SIZE: u32 = 0x10_0000;

/// A bzImage (boot protocol 2.15, 64-bit entry) around `payload`, which ends in its length, and
/// with the build's checksum at its end.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SECTORS: u64 = 2;
    const VERSION: u64 = 0x300;
    let code_at = 512 * (SECTORS + 1) as usize;
    let code_len = (0x300 + payload.len() + 4).next_multiple_of(16);
    let mut image = vec![0; code_at + code_len];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1F1, &[SECTORS as u8]);
    set(0x1F4, &((code_len / 16) as u32).to_le_bytes());
    set(0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    set(0x202, b"HdrS\x0f\x02");
    set(0x20E, &((VERSION - 0x200) as u16).to_le_bytes());
    set(0x211, &[1]);
    set(0x22C, &0x7FFF_FFFF_u32.to_le_bytes());
    set(0x230, &0x20_0000_u32.to_le_bytes());
    set(0x234, &[1, 21, 1, 0]);
    set(0x238, &2047_u32.to_le_bytes());
    set(0x248, &0x300_u32.to_le_bytes());
    set(0x24C, &(payload.len() as u32).to_le_bytes());
    set(0x258, &KERNEL.to_le_bytes());
    set(0x260, &INIT_SIZE.to_le_bytes());
    set(VERSION as usize, b"6.1.0-test (test) #1\0");
    set(code_at, b"the code");
    set(code_at + 0x300, payload);
    let end = image.len() - 4;
    let crc = !crc32fast::hash(&image[..end]);
    image[end..].copy_from_slice(&crc.to_le_bytes());
    image
}

/// `kernel` compressed, as a bzImage's payload.
pub(crate) fn payload(method: Method, kernel: &[u8]) -> Vec<u8> {
    let mut payload = compress(method, kernel);
    if method != Method::Gzip {
        payload.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
    }
    payload
}
