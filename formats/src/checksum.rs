//! CRC-32C of sparse files.

/// The checksum of what had `checksum`, followed by a run of zeros of any length.
pub fn append_zeros(checksum: u32, zeros: u64) -> u32 {
    // CRC-32C begins and ends with an inversion; between, a run of zeros is one matrix, which `crc32c_combine` applies.
    !crc32c::crc32c_combine(!checksum, 0, zeros as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_as_if_written_out() {
        let zeros = vec![0; 70_000];
        for length in [0, 1, 2, 3, 7, 8, 255, 4096, 65_536, 69_999, 70_000] {
            assert_eq!(append_zeros(0, length as u64), crc32c::crc32c(&zeros[..length]), "{length} zeros");
            let start = crc32c::crc32c(b"something");
            let written_out = crc32c::crc32c_append(start, &zeros[..length]);
            assert_eq!(append_zeros(start, length as u64), written_out, "{length} zeros after something");
        }
        let half = u64::MAX / 2;
        assert_eq!(append_zeros(append_zeros(1, half), half + 1), append_zeros(1, u64::MAX));
    }
}
