//! Internet checksums that a driver left for the device to finish (virtio 1.2 §5.1.6.2).

/// Finishes the checksum over `frame` from `start` on, whose place is `offset` bytes after `start`
/// and holds the pseudo header's sum. False if that place is not in the frame.
pub(super) fn finish(frame: &mut [u8], start: u16, offset: u16) -> bool {
    let (start, offset) = (usize::from(start), usize::from(offset));
    let Some(covered) = frame.get_mut(start..) else { return false };
    let Some(end) = offset.checked_add(2).filter(|end| *end <= covered.len()) else { return false };
    let sum = fold(covered);
    // All ones and all zeros mean the same, but UDP takes zeros for no checksum at all (RFC 768).
    let sum = if sum == 0xFFFF { sum } else { !sum };
    if let Some(place) = covered.get_mut(offset..end) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
    true
}

/// The ones' complement sum of `bytes` as 16-bit words, most significant byte first (RFC 1071).
pub(super) fn fold(bytes: &[u8]) -> u16 {
    let mut chunks = bytes.chunks_exact(2);
    let mut sum: u64 = 0;
    for pair in &mut chunks {
        if let &[high, low] = pair {
            sum += u64::from(u16::from_be_bytes([high, low]));
        }
    }
    if let &[last] = chunks.remainder() {
        sum += u64::from(last) << 8;
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_checksum_makes_the_sum_all_ones() {
        // The header of RFC 1071's style examples, with the sum's place at 10.
        let mut header =
            *b"\x45\x00\x00\x73\x00\x00\x40\x00\x40\x11\x00\x00\xc0\xa8\x00\x01\xc0\xa8\x00\xc7";
        assert!(finish(&mut header, 0, 10));
        assert_eq!(header[10..12], [0xB8, 0x61]);
        assert_eq!(fold(&header), 0xFFFF);
        let mut odd = *b"xx\x00\x00abc";
        assert!(finish(&mut odd, 2, 0));
        assert_eq!(fold(&odd[2..]), 0xFFFF);
    }

    #[test]
    fn places_outside_of_the_frame_are_refused() {
        for (start, offset) in [(20, 0), (21, 0), (0, 19), (0xFFFF, 0xFFFF), (10, 9)] {
            assert!(!finish(&mut [0; 20], start, offset), "{start} {offset}");
        }
        assert!(finish(&mut [0; 20], 10, 8));
    }
}
