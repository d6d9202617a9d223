//! The header of a packet (virtio 1.2 §5.10.6).

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// A stream socket.
pub(super) const STREAM: u16 = 1;

/// What a packet does (§5.10.6).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: the sender will receive no more, will send no more.
pub(super) mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
}

/// A header, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
            u32::from_le_bytes(word)
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// Writes a header.
    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let kind = u32::from(self.kind) | u32::from(self.op) << 16;
        let longs = [self.src_cid, self.dst_cid];
        let words = [
            self.src_port,
            self.dst_port,
            self.len,
            kind,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        ];
        let all = longs
            .iter()
            .flat_map(|long| long.to_le_bytes())
            .chain(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_at_the_specified_places() {
        let bytes: [u8; HEADER] = std::array::from_fn(|n| n as u8);
        let header = Header::parse(&bytes);
        assert_eq!((header.src_cid, header.dst_port), (0x0706_0504_0302_0100, 0x1716_1514));
        assert_eq!((header.kind, header.op, header.fwd_cnt), (0x1D1C, 0x1F1E, 0x2B2A_2928));
        assert_eq!(header.to_bytes(), bytes);
    }
}
