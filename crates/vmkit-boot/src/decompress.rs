//! The compressions a kernel's payload may have. Output never grows past a limit the caller sets,
//! and decoders take no more memory than any kernel needs.

use std::io::Read;

/// Most memory a decoder's dictionary may take, in bytes: `xz` and `zstd` at their highest levels
/// use 128 MiB.
const DICTIONARY: u64 = 128 << 20;
/// Uncompressed length of every block but the last of the lz4 legacy format, in bytes.
const LZ4_BLOCK: usize = 8 << 20;

/// A compression that can be undone here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4,
    Bzip2,
}

impl Method {
    /// Tells the compression by its first bytes.
    pub(crate) fn detect(payload: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Method); 6] = [
            (b"\x1f\x8b", Method::Gzip),
            (b"\xfd7zXZ\0", Method::Xz),
            (b"\x28\xb5\x2f\xfd", Method::Zstd),
            (b"\x02\x21\x4c\x18", Method::Lz4),
            (b"BZh", Method::Bzip2),
            // The properties byte of lzma's defaults, then a dictionary of a multiple of 64 KiB.
            (b"\x5d\0\0", Method::Lzma),
        ];
        MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, method)| *method)
    }

    /// Its usual name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
        }
    }

    /// True if decompressing notices any damage. The lz4 legacy format and lzma have no checksum,
    /// and the one of zstd is optional.
    pub(crate) fn has_checksum(self) -> bool {
        matches!(self, Self::Gzip | Self::Xz | Self::Bzip2)
    }

    /// Decompresses `payload`, which may be followed by other bytes (but for lz4, whose legacy
    /// format has no end), to `len` bytes. A longer or shorter result is an error.
    pub(crate) fn decompress(self, payload: &[u8], len: u64) -> Result<Vec<u8>, String> {
        // The decoders' own tables come on top.
        let dictionary_kib = (DICTIONARY >> 9) as u32;
        match self {
            Self::Gzip => collect(flate2::bufread::GzDecoder::new(payload), len),
            Self::Xz => {
                collect(lzma_rust2::XzReader::new_mem_limit(payload, false, dictionary_kib), len)
            }
            Self::Lzma => {
                let reader = lzma_rust2::LzmaReader::new_mem_limit(payload, dictionary_kib, None);
                collect(reader.map_err(|e| e.to_string())?, len)
            }
            Self::Zstd => {
                let reader = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
                    payload, DICTIONARY,
                );
                collect(reader.map_err(|e| e.to_string())?, len)
            }
            Self::Lz4 => lz4_legacy(payload, len),
            Self::Bzip2 => collect(bzip2::bufread::BzDecoder::new(payload), len),
        }
    }
}

/// Reads to the end, at most `len` bytes and one.
fn collect(reader: impl Read, len: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    reader.take(len.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    exactly(bytes, len)
}

fn exactly(bytes: Vec<u8>, len: u64) -> Result<Vec<u8>, String> {
    match (bytes.len() as u64).cmp(&len) {
        std::cmp::Ordering::Equal => Ok(bytes),
        std::cmp::Ordering::Less => {
            Err(format!("it ends after {} of the {len} bytes it announces", bytes.len()))
        }
        std::cmp::Ordering::Greater => {
            Err(format!("it is longer than the {len} bytes it announces"))
        }
    }
}

/// The legacy frame format of lz4 (lz4 documentation, `lz4_Frame_format.md`, "Legacy frame"): a
/// magic number, then blocks, each after its compressed length.
fn lz4_legacy(payload: &[u8], len: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = payload.get(4..).unwrap_or_default();
    while let Some((size, tail)) = rest.split_first_chunk() {
        let size = u32::from_le_bytes(*size) as usize;
        let block = tail.get(..size).ok_or("a block is cut off")?;
        let done = bytes.len();
        let room = (len.saturating_sub(done as u64) as usize).min(LZ4_BLOCK);
        bytes.resize(done + room, 0);
        let written = lz4_flex::block::decompress_into(block, &mut bytes[done..])
            .map_err(|e| e.to_string())?;
        bytes.truncate(done + written);
        // Every block costs the clearing of its room: they are no more than the room is worth.
        if written != LZ4_BLOCK && bytes.len() as u64 != len {
            return Err("a block before the last is not of 8 MiB".into());
        }
        rest = &tail[size..];
    }
    if !rest.is_empty() {
        return Err("a block's length is cut off".into());
    }
    exactly(bytes, len)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// All methods whose compressor is at hand, with their compressors.
    pub(crate) fn compress(method: Method, bytes: &[u8]) -> Vec<u8> {
        match method {
            Method::Gzip => {
                let mut out =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(bytes).unwrap();
                out.finish().unwrap()
            }
            Method::Xz => {
                let mut options = lzma_rust2::XzOptions::with_preset(1);
                options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
                let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                out.write_all(bytes).unwrap();
                out.finish().unwrap()
            }
            Method::Lzma => {
                let options = lzma_rust2::LzmaOptions::with_preset(1);
                let mut out =
                    lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
                out.write_all(bytes).unwrap();
                out.finish().unwrap()
            }
            Method::Zstd => ruzstd::encoding::compress_to_vec(
                bytes,
                ruzstd::encoding::CompressionLevel::Fastest,
            ),
            Method::Lz4 => {
                let mut out = b"\x02\x21\x4c\x18".to_vec();
                for block in bytes.chunks(LZ4_BLOCK) {
                    let block = lz4_flex::block::compress(block);
                    out.extend_from_slice(&(block.len() as u32).to_le_bytes());
                    out.extend_from_slice(&block);
                }
                out
            }
            Method::Bzip2 => {
                let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                out.write_all(bytes).unwrap();
                out.finish().unwrap()
            }
        }
    }

    pub(crate) const ALL: [Method; 6] =
        [Method::Gzip, Method::Xz, Method::Lzma, Method::Zstd, Method::Lz4, Method::Bzip2];

    /// Something like code: relative calls, which the x86 filter rewrites, and text.
    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| if i % 16 == 0 { 0xE8 } else { (i / 64) as u8 }).collect()
    }

    #[test]
    fn every_method_is_told_by_its_magic_and_undone() {
        for method in ALL {
            let bytes = sample(100_000);
            let mut packed = compress(method, &bytes);
            assert_eq!(Method::detect(&packed), Some(method));
            if method != Method::Lz4 {
                packed.extend_from_slice(&[0xAA; 4]);
            }
            assert_eq!(method.decompress(&packed, 100_000).as_ref(), Ok(&bytes), "{method:?}");
        }
    }

    #[test]
    fn a_result_longer_or_shorter_than_announced_is_an_error() {
        for method in ALL {
            let packed = compress(method, &vec![0; 1 << 20]);
            for len in [0, 1000, (1 << 20) - 1, (1 << 20) + 1] {
                assert!(method.decompress(&packed, len).is_err(), "{method:?} {len}");
            }
        }
    }

    #[test]
    fn lz4_blocks_follow_one_another() {
        let bytes = sample(LZ4_BLOCK + 12345);
        let packed = compress(Method::Lz4, &bytes);
        assert!(Method::Lz4.decompress(&packed, bytes.len() as u64).unwrap() == bytes);
    }

    #[test]
    fn lz4_blocks_before_the_last_are_full() {
        let len = LZ4_BLOCK + 5;
        let block = |bytes: &[u8]| {
            let block = lz4_flex::block::compress(bytes);
            [&(block.len() as u32).to_le_bytes()[..], &block].concat()
        };
        let magic = b"\x02\x21\x4c\x18";
        let (full, tail) = (block(&vec![7; LZ4_BLOCK]), block(&[7; 5]));
        let good = [&magic[..], &full, &tail].concat();
        assert!(Method::Lz4.decompress(&good, len as u64).is_ok());
        // A block without a byte, and the same bytes in the other order.
        let empty = [&magic[..], &[1, 0, 0, 0, 0], &full, &tail].concat();
        let short = [&magic[..], &tail, &full].concat();
        for bad in [empty, short] {
            let error = Method::Lz4.decompress(&bad, len as u64).unwrap_err();
            assert!(error.contains("not of 8 MiB"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_a_result_of_the_announced_length(
            method in prop::sample::select(&ALL[..]),
            at in any::<prop::sample::Index>(),
            value: u8,
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut packed = compress(method, &sample(20_000));
            let at = at.index(packed.len());
            packed[at] = value;
            if let Some(cut) = cut {
                packed.truncate(cut.index(packed.len()));
            }
            if let Ok(bytes) = method.decompress(&packed, 20_000) {
                prop_assert_eq!(bytes.len(), 20_000);
            }
        }
    }
}
