//! Shuffling without a table: a key and a place -> the number at this place of a permutation.

/// Rounds of the network; four would do against a chosen-input attack, the rest evens out small permutations.
const NUM_ROUNDS: u64 = 8;

/// A permutation of `0..len` that takes no memory and gives any of its numbers directly.
///
/// It is a Feistel network over the smallest power of four that has room for `len` numbers; a result that is not below
/// `len` is sent through it again until it is, fewer than four times on average.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    key: u64,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..len` with this key; another key gives another order.
    pub fn new(key: u64, len: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { key, len, half_bits: bits.div_ceil(2).max(1) }
    }

    /// How many numbers are permuted.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no number to permute.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number at a place.
    ///
    /// # Panics
    /// If the place is not below the length.
    pub fn at(&self, place: u64) -> u64 {
        assert!(place < self.len, "place {place} is outside of a permutation of {} numbers", self.len);
        let mut number = self.through_network(place);
        // The network permutes a larger range, so this path is a cycle that comes back below `len`.
        while number >= self.len {
            number = self.through_network(number);
        }
        number
    }

    fn through_network(&self, number: u64) -> u64 {
        let low_half = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (number >> self.half_bits, number & low_half);
        for round in 0..NUM_ROUNDS {
            (left, right) = (right, left ^ (mixed(&[self.key, round, right]) & low_half));
        }
        left << self.half_bits | right
    }
}

/// A hash of numbers in which every bit of the result depends on every bit of them.
///
/// Source: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
pub(super) fn mixed(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |state, &number| {
        let mut z = (state ^ number).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once() {
        for len in [1, 2, 3, 4, 5, 16, 17, 100, 255, 256, 257, 4097] {
            for key in [0, 1, u64::MAX] {
                let permutation = Permutation::new(key, len);
                let mut numbers: Vec<u64> = (0..len).map(|place| permutation.at(place)).collect();
                numbers.sort_unstable();
                assert_eq!(numbers, (0..len).collect::<Vec<_>>(), "length {len}, key {key}");
            }
        }
    }

    #[test]
    fn huge_ranges_are_permuted_without_collisions() {
        for len in [(1 << 40) + 7, (1 << 63) + 1, u64::MAX] {
            let permutation = Permutation::new(3, len);
            let places = (0..1000).chain(len - 1000..len);
            let numbers: std::collections::BTreeSet<u64> = places.map(|place| permutation.at(place)).collect();
            assert_eq!(numbers.len(), 2000);
            assert!(numbers.iter().all(|&number| number < len));
            assert!(numbers.first().unwrap() < &(len / 100) && numbers.last().unwrap() > &(len / 100 * 99));
        }
    }

    #[test]
    fn another_key_gives_another_order() {
        let order = |key| (0..1000).map(|place| Permutation::new(key, 1000).at(place)).collect::<Vec<_>>();
        assert_eq!(order(1), order(1));
        let in_place = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(a, b)| a == b).count();
        // One is expected by chance.
        assert!(in_place(&order(1), &order(2)) < 10);
        assert!(in_place(&order(1), &(0..1000).collect::<Vec<_>>()) < 10);
    }

    #[test]
    fn every_number_is_as_likely_at_every_place() {
        for len in [3, 6, 10] {
            let num_keys = 6000;
            let mut counts = vec![vec![0_u64; len as usize]; len as usize];
            for key in 0..num_keys {
                let permutation = Permutation::new(mixed(&[5, key]), len);
                (0..len).for_each(|place| counts[place as usize][permutation.at(place) as usize] += 1);
            }
            let expected = num_keys as f64 / len as f64;
            for count in counts.into_iter().flatten() {
                // Five standard deviations.
                assert!((count as f64 - expected).abs() < 5.0 * expected.sqrt(), "{count} of {expected}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "place 5 is outside of a permutation of 5 numbers")]
    fn places_outside_are_a_bug() {
        Permutation::new(0, 5).at(5);
    }
}
