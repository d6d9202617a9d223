//! Work on frames that a sender leaves to whoever is further down: checksums to be finished, and
//! segments to be cut (virtio 1.2 §5.1.6.2). It is handed on as far as there is somebody who takes
//! it, and done here otherwise.

use super::checksum;

/// Header flag: the checksum is to be finished.
const NEEDS_CSUM: u8 = 1;
/// Bytes of an Ethernet header, and of a VLAN tag in it.
const ETHERNET: usize = 14;
const TAG: usize = 4;
/// What tells of a tag (IEEE 802.1Q, and 802.1ad for the outer one of two).
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xA8]];
/// Least bytes of payload of a segment, Linux's least MSS: a frame of 64 KiB must not become as many.
const LEAST_SEGMENT: u16 = 48;
/// Bytes of the shortest IPv4, of an IPv6 and of the shortest TCP header.
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
/// Protocol number of TCP.
const PROTOCOL_TCP: u8 = 6;
/// TCP flags of the last segment only, and of the first only.
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// How a frame is to be cut (`gso_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Segmentation {
    /// Not at all.
    #[default]
    None,
    /// Into TCP segments over IPv4.
    Tcp4,
    /// Into TCP segments over IPv6.
    Tcp6,
}

/// What is left to do on a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where a checksum begins that is to be finished, and how far behind that its place is.
    pub checksum: Option<(u16, u16)>,
    /// How the frame is to be cut.
    pub segmentation: Segmentation,
    /// Bytes of payload of each segment.
    pub segment: u16,
}

/// Bytes of a header, without the number of buffers.
pub(super) const WIRE: usize = 10;

impl Offload {
    /// Reads a `virtio_net_hdr`; none for what is not known here.
    pub(super) fn parse(header: &[u8; WIRE]) -> Option<Self> {
        let [flags, kind, _, _, g0, g1, s0, s1, o0, o1] = *header;
        let segmentation = match kind {
            0 => Segmentation::None,
            1 => Segmentation::Tcp4,
            4 => Segmentation::Tcp6,
            _ => return None,
        };
        let place = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([o0, o1]));
        Some(Self {
            checksum: (flags & NEEDS_CSUM != 0).then_some(place),
            segmentation,
            segment: u16::from_le_bytes([g0, g1]),
        })
    }

    /// Writes a `virtio_net_hdr`. `headers` is how long a frame's headers are, which some drivers
    /// want to know.
    pub(super) fn to_bytes(self, headers: u16) -> [u8; WIRE] {
        let kind = match self.segmentation {
            Segmentation::None => 0,
            Segmentation::Tcp4 => 1,
            Segmentation::Tcp6 => 4,
        };
        let (start, offset) = self.checksum.unwrap_or_default();
        let [h0, h1] = if kind == 0 { [0; 2] } else { headers.to_le_bytes() };
        let [g0, g1] = if kind == 0 { [0; 2] } else { self.segment.to_le_bytes() };
        let ([s0, s1], [o0, o1]) = (start.to_le_bytes(), offset.to_le_bytes());
        let flags = if self.checksum.is_some() { NEEDS_CSUM } else { 0 };
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// True if the checksum's place, if there is one to finish, is in a frame of `len` bytes.
    pub(super) fn fits(&self, len: usize) -> bool {
        self.checksum.is_none_or(|(start, at)| usize::from(start) + usize::from(at) + 2 <= len)
    }

    /// True if there is nothing to do.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Bytes of the Ethernet header of `frame`, with its tags; none if it ends before.
pub(super) fn ethernet(frame: &[u8]) -> Option<usize> {
    let mut end = ETHERNET;
    while TAGS.iter().any(|tag| frame.get(end - 2..end) == Some(tag)) {
        end += TAG;
    }
    (end <= frame.len()).then_some(end)
}

/// A frame that is to be cut, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cutter {
    /// Where the IP header, the TCP header and the payload begin.
    ip: usize,
    tcp: usize,
    payload: usize,
    len: usize,
    segment: usize,
    v6: bool,
    next: usize,
    number: u16,
}

impl Cutter {
    /// Takes `frame` apart; none if it is not what `offload` says.
    pub(super) fn new(frame: &[u8], offload: &Offload) -> Option<Self> {
        // TCP's checksum is at 16 of its header, nowhere else.
        let (tcp, 16) = offload.checksum? else { return None };
        let tcp = usize::from(tcp);
        let ip = ethernet(frame)?;
        let v6 = offload.segmentation == Segmentation::Tcp6;
        let kind: &[u8] = if v6 { &[0x86, 0xDD] } else { &[0x08, 0x00] };
        let (header, protocol) = if v6 {
            (IPV6, *frame.get(ip + 6)?)
        } else {
            (usize::from(frame.get(ip)? & 0xF) * 4, *frame.get(ip + 9)?)
        };
        let payload = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
        let consistent = frame.get(ip - 2..ip)? == kind
            && header >= IPV4
            && tcp == ip + header
            && protocol == PROTOCOL_TCP
            && payload >= tcp + TCP
            && payload < frame.len()
            && offload.segment >= LEAST_SEGMENT
            && offload.segmentation != Segmentation::None;
        let segment = usize::from(offload.segment);
        let len = frame.len();
        consistent.then_some(Self { ip, tcp, payload, len, segment, v6, next: payload, number: 0 })
    }

    /// Bytes of all headers.
    pub(super) fn headers(&self) -> u16 {
        self.payload as u16
    }

    /// Writes the next segment of `frame` into `into`; its length, or none after the last.
    pub(super) fn next(&mut self, frame: &[u8], into: &mut [u8]) -> Option<usize> {
        let end = (self.next + self.segment).min(self.len);
        let data = frame.get(self.next..end).filter(|data| !data.is_empty())?;
        let total = self.payload + data.len();
        let out = into.get_mut(..total)?;
        let (headers, body) = out.split_at_mut_checked(self.payload)?;
        headers.copy_from_slice(frame.get(..self.payload)?);
        body.copy_from_slice(data);
        let done = (self.next - self.payload) as u32;
        let flags = headers.get_mut(self.tcp + 13)?;
        *flags &= if end < self.len { !FIN_PSH } else { 0xFF };
        *flags &= if done > 0 { !CWR } else { 0xFF };
        let sequence = headers.get_mut(self.tcp + 4..self.tcp + 8)?;
        let first = u32::from_be_bytes(sequence.try_into().ok()?);
        sequence.copy_from_slice(&first.wrapping_add(done).to_be_bytes());
        self.address(headers, total)?;
        let pseudo = self.pseudo_sum(headers, total - self.tcp)?;
        let place = headers.get_mut(self.tcp + 16..self.tcp + 18)?;
        place.copy_from_slice(&pseudo.to_be_bytes());
        if !checksum::finish(out, self.tcp as u16, 16) {
            return None;
        }
        self.next = end;
        self.number = self.number.wrapping_add(1);
        Some(total)
    }

    /// Gives the IP header its length, and an IPv4 one its number and checksum.
    fn address(&self, headers: &mut [u8], total: usize) -> Option<()> {
        if self.v6 {
            let len = (total - self.ip - IPV6) as u16;
            headers.get_mut(self.ip + 4..self.ip + 6)?.copy_from_slice(&len.to_be_bytes());
            return Some(());
        }
        let ip = headers.get_mut(self.ip..self.tcp)?;
        ip.get_mut(2..4)?.copy_from_slice(&((total - self.ip) as u16).to_be_bytes());
        let number = u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?);
        ip.get_mut(4..6)?.copy_from_slice(&number.wrapping_add(self.number).to_be_bytes());
        ip.get_mut(10..12)?.fill(0);
        checksum::finish(ip, 0, 10).then_some(())
    }

    /// The sum over what TCP's checksum covers of the IP header, for `len` bytes of TCP.
    fn pseudo_sum(&self, headers: &[u8], len: usize) -> Option<u16> {
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        let ip = headers.get(self.ip..self.tcp)?;
        let sum = u32::from(checksum::fold(ip.get(addresses)?))
            + u32::from(PROTOCOL_TCP)
            + u32::from(len as u16);
        Some((sum & 0xFFFF) as u16 + (sum >> 16) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP frame with this payload, as a driver leaves it to be cut.
    fn frame(v6: bool, tag: bool, payload: usize) -> (Vec<u8>, Offload) {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        if tag {
            frame.extend([0x81, 0, 0, 5]);
        }
        if v6 {
            frame.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, 6, 64]);
            frame.extend((0..32).map(|n| n * 3));
        } else {
            frame.extend([
                8, 0, 0x45, 0, 0, 0, 0xFF, 0xFE, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
        }
        let start = frame.len() as u16;
        // CWR, PSH, ACK and FIN; twelve bytes of options.
        frame.extend([
            0x12, 0x34, 0x56, 0x78, 0xFF, 0xFF, 0xFF, 0x00, 0, 0, 0, 1, 0x80, 0x99, 9, 9, 0, 0, 0,
            0,
        ]);
        frame.extend([1; 12]);
        frame.extend((0..payload).map(|n| (n * 7) as u8));
        let segmentation = if v6 { Segmentation::Tcp6 } else { Segmentation::Tcp4 };
        (frame, Offload { checksum: Some((start, 16)), segmentation, segment: 1000 })
    }

    #[test]
    fn segments_are_what_a_sender_would_have_sent() {
        for (v6, tag) in [(false, false), (true, false), (false, true), (true, true)] {
            let (frame, offload) = frame(v6, tag, 2500);
            let mut cutter = Cutter::new(&frame, &offload).unwrap();
            let (ip, tcp) = (cutter.ip, cutter.tcp);
            assert_eq!(usize::from(cutter.headers()), tcp + 32);
            let mut found = Vec::<u8>::new();
            let mut segments = Vec::new();
            let mut into = vec![0; 2000];
            while let Some(len) = cutter.next(&frame, &mut into) {
                let segment = into[..len].to_vec();
                found.extend(&segment[tcp + 32..]);
                segments.push(segment);
            }
            assert_eq!(found, frame[tcp + 32..]);
            assert_eq!(
                segments.iter().map(Vec::len).collect::<Vec<_>>(),
                [1000, 1000, 500].map(|n| n + tcp + 32)
            );
            for (n, segment) in segments.iter().enumerate() {
                let sequence = u32::from_be_bytes(segment[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xFFFF_FF00_u32.wrapping_add(n as u32 * 1000));
                let flags = segment[tcp + 13];
                assert_eq!((flags & FIN_PSH != 0, flags & CWR != 0), (n == 2, n == 0));
                // A right checksum makes the sum with the pseudo header all ones.
                let len = segment.len() - tcp;
                let mut covered = if v6 {
                    segment[ip + 8..ip + 40].to_vec()
                } else {
                    segment[ip + 12..ip + 20].to_vec()
                };
                covered.extend([0, 6]);
                covered.extend((len as u16).to_be_bytes());
                covered.extend(&segment[tcp..]);
                assert_eq!(checksum::fold(&covered), 0xFFFF);
                if v6 {
                    assert_eq!(segment[ip + 4..ip + 6], (len as u16).to_be_bytes());
                } else {
                    assert_eq!(checksum::fold(&segment[ip..tcp]), 0xFFFF);
                    assert_eq!(
                        segment[ip + 2..ip + 4],
                        ((segment.len() - ip) as u16).to_be_bytes()
                    );
                    assert_eq!(
                        segment[ip + 4..ip + 6],
                        0xFFFE_u16.wrapping_add(n as u16).to_be_bytes()
                    );
                }
            }
        }
    }

    #[test]
    fn frames_that_are_not_what_they_say_are_refused() {
        let (good, offload) = frame(false, false, 2000);
        assert!(Cutter::new(&good, &offload).is_some());
        assert!(Cutter::new(&good, &Offload { segment: 48, ..offload }).is_some());
        for cut in 0..good.len() - 1999 {
            assert!(Cutter::new(&good[..cut], &offload).is_none(), "{cut}");
        }
        for wrong in [
            Offload { checksum: None, ..offload },
            Offload { checksum: Some((33, 16)), ..offload },
            Offload { checksum: Some((0xFFFF, 16)), ..offload },
            Offload { checksum: Some((34, 0xFFFF)), ..offload },
            Offload { checksum: Some((34, 6)), ..offload },
            Offload { segment: 0, ..offload },
            Offload { segment: 47, ..offload },
            Offload { segmentation: Segmentation::Tcp6, ..offload },
            Offload { segmentation: Segmentation::None, ..offload },
        ] {
            assert!(Cutter::new(&good, &wrong).is_none(), "{wrong:?}");
        }
        for at in [12, 14, 23, 46] {
            let mut bad = good.clone();
            bad[at] = 0;
            assert!(Cutter::new(&bad, &offload).is_none(), "{at}");
        }
        // Tags of both kinds, and without end.
        let (mut outer, offload) = frame(true, true, 2000);
        outer.splice(12..12, [0x88, 0xA8, 0, 7]);
        let start = offload.checksum.map(|(start, at)| (start + 4, at));
        assert!(Cutter::new(&outer, &Offload { checksum: start, ..offload }).is_some());
        assert!(Cutter::new(&[0x88, 0xA8].repeat(20), &offload).is_none());
        assert!(Cutter::new(&[0x81, 0x00].repeat(20), &offload).is_none());
    }

    #[test]
    fn a_checksum_outside_of_the_frame_does_not_fit() {
        let fits = |place| Offload { checksum: place, ..Offload::default() }.fits(60);
        assert!(fits(None) && fits(Some((58, 0))) && fits(Some((34, 24))));
        assert!(!fits(Some((58, 1))) && !fits(Some((34, 0xFFFF))) && !fits(Some((0xFFFF, 0xFFFF))));
    }

    #[test]
    fn headers_round_trip() {
        for header in
            [[0; WIRE], [1, 1, 54, 0, 0xB4, 5, 34, 0, 16, 0], [1, 4, 74, 0, 1, 0, 54, 0, 16, 0]]
        {
            let offload = Offload::parse(&header).unwrap();
            assert_eq!(offload.to_bytes(u16::from(header[2])), header);
        }
        for kind in [2, 3, 5, 0x81, 0xFF] {
            assert!(Offload::parse(&[1, kind, 0, 0, 1, 0, 0, 0, 0, 0]).is_none());
        }
    }
}
