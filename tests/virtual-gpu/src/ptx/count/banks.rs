//! Banks of shared memory: how many wavefronts an access takes.
//!
//! Shared memory has 32 banks of one word (4 bytes) per clock. A wavefront is what all banks
//! deliver in one clock: at most one word per bank, to any number of lanes. An access of 8 bytes
//! per lane is processed for half a warp at a time, and one of 16 bytes for a quarter
//! (<https://forums.developer.nvidia.com/t/how-to-understand-the-bank-conflict-of-shared-mem/260900>).

use super::LANES;

const BANKS: usize = 32;
const WORD: u64 = 4;

/// Returns the masks of the lanes whose accesses of `bytes` bytes are processed together.
fn parts(bytes: usize) -> impl Iterator<Item = u32> {
    let parts = (bytes / 4).clamp(1, 4);
    let lanes = LANES / parts;
    let mask = u32::MAX >> (LANES - lanes);
    (0..parts).map(move |part| mask << (part * lanes))
}

/// Returns the wavefronts of an access of `bytes` bytes by the lanes of `mask`, and how many it
/// would take without bank conflicts. Lanes that access the same word share it.
pub fn wavefronts(addresses: &[u64; LANES], mask: u32, bytes: usize) -> (u64, u64) {
    let (mut taken, mut least) = (0, 0);
    for part in parts(bytes) {
        let lanes = part & mask;
        if lanes != 0 {
            taken += words_per_bank(addresses, lanes, bytes);
            least += 1;
        }
    }
    (taken, least)
}

/// Returns the largest number of different words that the lanes access in one bank.
fn words_per_bank(addresses: &[u64; LANES], lanes: u32, bytes: usize) -> u64 {
    let per_lane = (bytes as u64).div_ceil(WORD);
    let mut words = [0; BANKS];
    let mut count = 0;
    for lane in (0..LANES).filter(|lane| lanes >> lane & 1 == 1) {
        for word in 0..per_lane {
            words[count] = addresses[lane] / WORD + word;
            count += 1;
        }
    }
    let words = &mut words[..count];
    words.sort_unstable();
    let mut per_bank = [0u64; BANKS];
    let mut last = None;
    for &word in words.iter() {
        if last != Some(word) {
            per_bank[word as usize % BANKS] += 1;
        }
        last = Some(word);
    }
    per_bank.into_iter().max().unwrap_or(0)
}

/// Like [`wavefronts`], for atomic operations, which change a bank's words one after the other:
/// lanes with the same word conflict, too.
pub fn atomic_wavefronts(addresses: &[u64; LANES], mask: u32) -> (u64, u64) {
    let mut per_bank = [0u64; BANKS];
    for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
        per_bank[(addresses[lane] / WORD) as usize % BANKS] += 1;
    }
    (per_bank.into_iter().max().unwrap_or(0), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(of: impl Fn(u64) -> u64) -> [u64; LANES] {
        std::array::from_fn(|lane| of(lane as u64))
    }

    #[test]
    fn a_word_per_lane_takes_as_many_wavefronts_as_words_share_a_bank() {
        for (stride, wavefronts_) in [(4, 1), (8, 2), (12, 1), (16, 4), (128, 32), (132, 1)] {
            let taken = wavefronts(&addresses(|lane| lane * stride), u32::MAX, 4);
            assert_eq!(taken, (wavefronts_, 1), "stride {stride}");
        }
    }

    #[test]
    fn lanes_with_the_same_word_share_a_wavefront() {
        assert_eq!(wavefronts(&[64; LANES], u32::MAX, 4), (1, 1));
        // Two words of one bank, each for half of the lanes.
        let two = addresses(|lane| lane % 2 * 128);
        assert_eq!(wavefronts(&two, u32::MAX, 4), (2, 1));
        // Bytes and halves of the same words.
        assert_eq!(wavefronts(&addresses(|lane| lane), u32::MAX, 1), (1, 1));
        assert_eq!(wavefronts(&addresses(|lane| lane * 2), u32::MAX, 2), (1, 1));
    }

    #[test]
    fn wide_accesses_are_processed_for_a_half_or_a_quarter_of_the_warp() {
        assert_eq!(wavefronts(&addresses(|lane| lane * 8), u32::MAX, 8), (2, 2));
        assert_eq!(
            wavefronts(&addresses(|lane| lane * 16), u32::MAX, 8),
            (4, 2)
        );
        assert_eq!(
            wavefronts(&addresses(|lane| lane * 16), u32::MAX, 16),
            (4, 4)
        );
        // Rows of 64 bytes: the first and the third lane of a quarter have the same banks.
        assert_eq!(
            wavefronts(&addresses(|lane| lane * 64), u32::MAX, 16),
            (16, 4)
        );
    }

    #[test]
    fn lanes_that_do_not_take_part_cause_no_wavefronts() {
        let spread = addresses(|lane| lane * 128);
        assert_eq!(wavefronts(&spread, 0b1111, 4), (4, 1));
        assert_eq!(wavefronts(&addresses(|lane| lane * 16), 0xff, 16), (1, 1));
        assert_eq!(
            wavefronts(&addresses(|lane| lane * 16), 0x0101_0101, 16),
            (4, 4)
        );
    }

    #[test]
    fn atomic_operations_on_one_word_happen_one_after_the_other() {
        assert_eq!(atomic_wavefronts(&[0; LANES], u32::MAX), (32, 1));
        assert_eq!(atomic_wavefronts(&[0; LANES], 0b101), (2, 1));
        assert_eq!(
            atomic_wavefronts(&addresses(|lane| lane * 4), u32::MAX),
            (1, 1)
        );
    }
}
