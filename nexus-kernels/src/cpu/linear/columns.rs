//! Results of a linear layer: the sums of some outputs -> columns of rows.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    super::{
        Level,
        simd::{Simd, for_simd},
        stored::Stored,
    },
    tiles::TASK_OUTPUTS,
};

/// Rows that are written together.
pub(super) const WRITTEN_ROWS: usize = 8;
/// Bytes of a result that some of the caches may still hold when it is read.
const MOST_CACHED: usize = 8 << 20;

/// The output, `[rows, outputs]`, written by tasks that own different columns.
pub(super) struct Columns<Y> {
    to: *mut Y,
    rows: usize,
    outputs: usize,
    /// Whether the output is so large that the caches lose it before it is read.
    is_large: bool,
}

// SAFETY: the pointer is only used by `put`, whose callers own different elements.
unsafe impl<Y: Send> Sync for Columns<Y> {}

impl<Y: Stored> Columns<Y> {
    /// The spare capacity of `y`.
    ///
    /// # Panics
    /// If that is too small.
    pub(super) fn of(y: &mut Vec<Y>, [rows, outputs]: [usize; 2]) -> Self {
        let spare = y.spare_capacity_mut();
        assert!(spare.len() >= rows * outputs);
        let is_large = rows * outputs * size_of::<Y>() > MOST_CACHED;
        Self { to: spare.as_mut_ptr().cast(), rows, outputs, is_large }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Writes columns of some rows, those from `first` on, one for each bias: `sums` is `[TASK_OUTPUTS, padded_rows]`.
    pub(super) fn write(
        &self,
        level: Level,
        rows: Range<usize>,
        first: usize,
        bias: &[f32],
        sums: &[f32],
        padded_rows: usize,
    ) {
        assert!(first + bias.len() <= self.outputs && rows.end <= self.rows && rows.len() <= padded_rows);
        let mut lines = [[0.0; TASK_OUTPUTS]; WRITTEN_ROWS];
        for start in rows.clone().step_by(WRITTEN_ROWS) {
            turn(level, &sums[start - rows.start..], padded_rows, &mut lines);
            for (row, line) in (start..rows.end).zip(&mut lines) {
                let line = &mut line[..bias.len()];
                for (value, bias) in line.iter_mut().zip(bias) {
                    *value += bias;
                }
                // SAFETY: no other task writes these columns.
                unsafe { self.put(level, row, first, line) };
            }
        }
        self.finish();
    }

    /// Ends the writes of a task: what went past the caches must be there before others are told that it is.
    pub(super) fn finish(&self) {
        #[cfg(target_arch = "x86_64")]
        if self.is_large {
            // SAFETY: every CPU of the target has the instruction.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }

    /// Rounds and writes a row of the columns from `first` on; [`Columns::finish`] follows.
    ///
    /// # Safety
    /// `to` points to `rows * outputs` elements, and nobody else uses these meanwhile.
    pub(super) unsafe fn put(&self, level: Level, row: usize, first: usize, line: &[f32]) {
        assert!(row < self.rows && first + line.len() <= self.outputs);
        let mut narrow = [Y::default(); TASK_OUTPUTS];
        for (values, column) in line.chunks(TASK_OUTPUTS).zip((first..).step_by(TASK_OUTPUTS)) {
            let narrow = &mut narrow[..values.len()];
            Y::narrow_slice(level, values, narrow);
            // SAFETY: the row and the columns are inside of what `to` points to, and the caller owns them.
            unsafe {
                let to = self.to.add(row * self.outputs + column);
                if self.is_large {
                    write_past_caches(narrow, to);
                } else {
                    narrow.as_ptr().copy_to_nonoverlapping(to, narrow.len());
                }
            }
        }
    }
}

/// Writes values without reading the memory first, and without keeping them near, if they are whole cache lines.
///
/// # Safety
/// `to` points to as many values, which nobody else uses meanwhile. Others may read them after [`Columns::finish`].
unsafe fn write_past_caches<Y: Stored>(values: &[Y], to: *mut Y) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        const LINE: usize = 64;
        let bytes = size_of_val(values);
        if to.addr().is_multiple_of(LINE) && bytes.is_multiple_of(LINE) {
            for at in (0..bytes).step_by(size_of::<__m128i>()) {
                // SAFETY: `at` is inside of the values, and of what the caller owns; every CPU of the target has SSE2.
                unsafe {
                    let lanes = _mm_loadu_si128(values.as_ptr().byte_add(at).cast());
                    _mm_stream_si128(to.byte_add(at).cast(), lanes);
                }
            }
            return;
        }
    }
    // SAFETY: the caller's condition.
    unsafe { values.as_ptr().copy_to_nonoverlapping(to, values.len()) };
}

/// Makes lines of the first [`WRITTEN_ROWS`] sums of every output.
fn turn(level: Level, sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]) {
    assert!(sums.len() >= (TASK_OUTPUTS - 1) * stride + WRITTEN_ROWS);
    for_simd!(level, turn_with::<>(
        sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]
    ) where)
}

/// # Safety
/// The CPU has the instructions of `S`, and there are [`WRITTEN_ROWS`] sums of every output.
#[inline(always)]
unsafe fn turn_with<S: Simd>(sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]) {
    let to = lines.as_flattened_mut().as_mut_ptr();
    for output in (0..TASK_OUTPUTS).step_by(8) {
        // SAFETY: the caller's condition; eight outputs are written from `output` on in each of eight lines.
        unsafe {
            let rows = std::array::from_fn(|i| sums.as_ptr().add((output + i) * stride));
            S::transpose_8x8(rows, to.add(output), TASK_OUTPUTS);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Writes all rows; a value is its index.
    fn write_all<Y: Stored>(memory: &mut [Y], [rows, outputs]: [usize; 2], is_large: bool) {
        let out = Columns { to: memory.as_mut_ptr(), rows, outputs, is_large };
        for row in 0..rows {
            for first in (0..outputs).step_by(TASK_OUTPUTS) {
                let columns = first..outputs.min(first + TASK_OUTPUTS);
                let line: Vec<f32> = columns.map(|column| (row * outputs + column) as f32).collect();
                // SAFETY: the memory has all rows, and is only read afterwards.
                unsafe { out.put(Level::detect(), row, first, &line) };
            }
        }
        out.finish();
    }

    #[test]
    fn what_goes_past_the_caches_is_what_was_written() {
        fn check<Y: Stored>() {
            for [rows, outputs] in [[3, 128], [2, 64], [3, 96], [5, 67], [2, 1]] {
                let mut memory = vec![Y::default(); rows * outputs + 64];
                let aligned = memory.as_ptr().align_offset(64).min(32);
                for start in [aligned, aligned + 1] {
                    memory.fill(Y::default());
                    write_all(&mut memory[start..][..rows * outputs], [rows, outputs], true);
                    let mut near = vec![Y::default(); rows * outputs];
                    write_all(&mut near, [rows, outputs], false);
                    assert!(near.iter().enumerate().all(|(i, value)| value.widen() == i as f32));
                    assert!(memory[start..].iter().zip(&near).all(|(x, y)| x.widen() == y.widen()));
                    let outside = memory[..start].iter().chain(&memory[start + rows * outputs..]);
                    assert!(outside.into_iter().all(|value| value.widen() == 0.0), "{start} {rows} {outputs}");
                }
            }
        }
        check::<f32>();
        check::<f16>();
    }
}
