//! Dividing a convolution among threads: runs of pixels per task, scratch per thread, one output for all.

use std::{
    mem::MaybeUninit,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;

use super::product::{COLS, ROWS};
use crate::cpu::{Level, stored::Stored};

/// Tasks per thread that are enough to keep all threads busy to the end.
const TASKS_PER_THREAD: usize = 4;
/// Blocks of output channels that make it worth to prepare a panel a second time.
const MIN_BLOCKS: usize = 8;

/// A part of a convolution: up to [`COLS`] positions in reading order, and a range of blocks of output channels.
pub(super) struct Task {
    pub(super) runs: Vec<Run>,
    pub(super) blocks: Range<usize>,
}

/// Neighbours in one row.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) picture: usize,
    pub(super) row: usize,
    pub(super) col: usize,
    pub(super) len: usize,
    /// Column of the panel for the first of them.
    pub(super) at: usize,
}

/// Runs `work` for all positions and all output channels, in parallel, each thread with a scratch of its own.
///
/// # Shapes
/// - `grid`: pictures, rows and columns of positions
/// - `outputs`: output channels
pub(super) fn for_each_task<S>(
    grid: [usize; 3],
    outputs: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &Task) + Sync,
) {
    let [pictures, rows, cols] = grid;
    let positions = pictures * rows * cols;
    let panels = positions.div_ceil(COLS);
    let blocks = outputs.div_ceil(ROWS);
    let threads = rayon::current_num_threads();
    let wanted = (threads * TASKS_PER_THREAD).div_ceil(panels.max(1));
    let parts = wanted.min(blocks.div_ceil(MIN_BLOCKS)).max(1);
    let per_part = blocks.div_ceil(parts);

    let next = AtomicUsize::new(0);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        let mut scratch = scratch();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            let (panel, part) = (task / parts, task % parts);
            if panel >= panels {
                break;
            }
            let positions = panel * COLS..positions.min((panel + 1) * COLS);
            let blocks = (part * per_part).min(blocks)..((part + 1) * per_part).min(blocks);
            work(&mut scratch, &Task { runs: runs(positions, rows, cols), blocks });
        }
    });
}

fn runs(positions: Range<usize>, rows: usize, cols: usize) -> Vec<Run> {
    let mut runs = vec![];
    let mut position = positions.start;
    while position < positions.end {
        let (row, col) = (position / cols, position % cols);
        let len = (cols - col).min(positions.end - position);
        runs.push(Run { picture: row / rows, row: row % rows, col, len, at: position - positions.start });
        position += len;
    }
    runs
}

/// New pictures that threads fill together, stored as `E`.
pub(super) struct Output<E> {
    values: *mut MaybeUninit<E>,
    shape: [usize; 4],
}

// SAFETY: values are reached only through `write`, whose callers do not overlap.
#[allow(unsafe_code)]
unsafe impl<E: Send> Sync for Output<E> {}

impl<E: Stored> Output<E> {
    /// The values of pictures `[batch, channels, height, width]` that `fill` writes.
    ///
    /// # Safety
    /// `fill` writes every value.
    #[allow(unsafe_code)]
    pub(super) unsafe fn collect(shape: [usize; 4], fill: impl FnOnce(&Self)) -> Vec<E> {
        let len = shape.iter().product();
        let mut values = Vec::with_capacity(len);
        fill(&Self { values: values.spare_capacity_mut().as_mut_ptr(), shape });
        // SAFETY: the capacity is `len` and all values are written, says the caller.
        unsafe { values.set_len(len) };
        values
    }

    /// Shape of the pictures.
    pub(super) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Rounds and writes neighbours in one row of one channel.
    ///
    /// # Safety
    /// No other thread writes the same values.
    ///
    /// # Panics
    /// If they reach over the end of the row, or are more than fit into two panels.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write(&self, level: Level, [picture, channel, row, col]: [usize; 4], neighbours: &[f32]) {
        let [batch, channels, height, width] = self.shape;
        assert!(picture < batch && channel < channels && row < height && col + neighbours.len() <= width);
        let start = ((picture * channels + channel) * height + row) * width + col;
        let mut stored = [E::default(); 2 * COLS];
        let stored = &mut stored[..neighbours.len()];
        E::narrow_slice(level, neighbours, stored);
        // SAFETY: the position was checked; the caller keeps other threads away.
        unsafe {
            let to = self.values.add(start).cast::<E>();
            to.copy_from_nonoverlapping(stored.as_ptr(), stored.len());
        }
    }
}
