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
