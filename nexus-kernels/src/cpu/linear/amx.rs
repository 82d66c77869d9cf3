//! Products of many rows by the matrix unit of the CPU: activations and weights in bf16, in tiles -> rows.
//!
//! The product is computed with outputs as rows, so that tiles of weights are pieces of the stored rows. Activations are
//! packed once, as pairs of inputs. A task owns some outputs of some rows: it copies the weights of these outputs into
//! tiles, as many as stay in the second cache, and multiplies them with panels that come from the third.
#![allow(unsafe_code)]

mod unit;

use std::{cell::Cell, mem::MaybeUninit, ops::Range};

use bytemuck::Zeroable;
use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
pub(super) use self::unit::Amx;
#[cfg(test)]
pub(super) use self::unit::Imitated;
use self::unit::{DEPTH, SIDE, Tile, Unit};
use super::{
    super::{
        Level,
        simd::{Simd, for_simd, pair},
        stored::Stored,
    },
    Layer,
    columns::{Columns, WRITTEN_ROWS},
};

/// From so many rows on, tiles are full enough.
pub(super) const MIN_ROWS: usize = 16;
/// Outputs of a strip, and rows of a panel: two tiles.
const WIDTH: usize = 2 * SIDE;
/// Most strips of a task.
const MAX_STRIPS: usize = 8;
/// Most steps of a strip between two visits of its sums.
const MAX_PASS: usize = 96;
/// Most steps of all strips of a task: 1.25 MiB of weights, of the 2 MiB of the second cache.
const MAX_BLOCK: usize = 640;
/// Panels of a task: enough to pay for the copy of the weights, and, if it keeps sums, no more than these should take.
const PANELS: Range<usize> = 16..64;
/// So many tasks for each thread keep all threads busy to the end.
const TASKS: usize = 3;

/// How a product is divided; a step is [`DEPTH`] inputs.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Strips of a task.
    strips: usize,
    /// Panels of a task.
    panels: usize,
    /// Steps between two visits of a sum.
    pass: usize,
}

impl Plan {
    fn of(layer: &Layer<'_>, threads: usize) -> Self {
        let [steps, panels, strips] =
            [(layer.inputs, DEPTH), (layer.rows, WIDTH), (layer.outputs, WIDTH)].map(|(all, part)| all.div_ceil(part));
        let pass = steps.div_ceil(steps.div_ceil(MAX_PASS));
        let most = MAX_STRIPS.min(MAX_BLOCK / pass);
        let wanted = TASKS * threads;
        let for_threads = wanted.div_ceil(strips.div_ceil(most).max(1)).min(panels / PANELS.start);
        let for_sums = if pass < steps { panels.div_ceil(PANELS.end) } else { 1 };
        let groups = for_threads.max(for_sums);
        let strips = most.min(strips.div_ceil(wanted.div_ceil(groups))).max(1);
        Self { strips, panels: panels.div_ceil(groups), pass }
    }
}

/// `x Wᵀ + b`, stored as `Y`.
///
/// - `x`: `[rows, inputs]`
/// - `weight`: `[outputs, inputs]`
/// - returns: `[rows, outputs]`
///
/// # Safety
/// The CPU has the unit, and nobody has opened it in this thread or in those of the pool.
pub(super) unsafe fn product<U: Unit, Y: Stored>(
    layer: &Layer<'_>,
    x: &[bf16],
    weight: &[bf16],
    level: Level,
) -> Vec<Y> {
    // SAFETY: the caller's condition.
    unsafe { planned::<U, Y>(layer, x, weight, level, &Plan::of(layer, rayon::current_num_threads())) }
}

/// See [`product`].
///
/// # Safety
/// As there.
unsafe fn planned<U: Unit, Y: Stored>(
    layer: &Layer<'_>,
    x: &[bf16],
    weight: &[bf16],
    level: Level,
    plan: &Plan,
) -> Vec<Y> {
    let &Layer { rows, inputs, outputs, bias } = layer;
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs && bias.len() == outputs);
    let mut memory = vec![];
    let packed = pack_all(level, x, inputs, &mut memory);
    let mut y = Vec::<Y>::with_capacity(rows * outputs);
    let out = Columns::of(&mut y, [rows, outputs]);
    let groups = rows.div_ceil(plan.panels * WIDTH);
    (0..outputs.div_ceil(plan.strips * WIDTH) * groups).into_par_iter().for_each(|index| {
        let first = index / groups * plan.strips * WIDTH;
        let outputs = first..outputs.min(first + plan.strips * WIDTH);
        let first_panel = index % groups * plan.panels;
        let steps = inputs.div_ceil(DEPTH);
        let task = Task {
            pass: plan.pass,
            steps,
            panels: &packed[first_panel * steps..packed.len().min((first_panel + plan.panels) * steps)],
            weight: &weight[outputs.start * inputs..outputs.end * inputs],
            bias: &bias[outputs],
            inputs,
        };
        // SAFETY: the caller's condition for the unit; no other task has these outputs of these rows.
        unsafe { task.run::<U, Y>(level, &out, first_panel * WIDTH, first) };
    });
    // SAFETY: the tasks cover all outputs of all rows, and each wrote its own.
    unsafe { y.set_len(rows * outputs) };
    y
}

/// Some outputs of some rows.
struct Task<'a> {
    /// `[panels, steps]`.
    panels: &'a [[Tile; 2]],
    /// `[outputs, inputs]`.
    weight: &'a [bf16],
    /// `[outputs]`.
    bias: &'a [f32],
    inputs: usize,
    steps: usize,
    pass: usize,
}

impl Task<'_> {
    /// Writes the product from a row and an output on.
    ///
    /// # Safety
    /// That of [`product`] for the unit, and that of [`Columns::put`].
    unsafe fn run<U: Unit, Y: Stored>(&self, level: Level, out: &Columns<Y>, first_row: usize, first: usize) {
        let &Self { steps, inputs, .. } = self;
        let strips = self.bias.len().div_ceil(WIDTH);
        // Sums that one pass completes are written before the next panel comes.
        let kept = if self.pass < steps { self.panels.len() / steps } else { 1 };
        // Taken, not borrowed: whatever this thread does meanwhile, nobody else has this memory.
        let [mut weight_memory, mut sum_memory] = SCRATCH.take();
        let weights = tiles_of::<2>(&mut weight_memory, strips * self.pass);
        let sums = tiles_of::<4>(&mut sum_memory, strips * kept);
        // SAFETY: the caller's condition; the unit is closed before this thread takes other work.
        let mut unit = unsafe { U::open() };
        for start in (0..steps).step_by(self.pass) {
            let pass = start..steps.min(start + self.pass);
            copy_weights(self.weight, inputs, pass.clone(), weights);
            for (index, panel) in self.panels.chunks(steps).enumerate() {
                let sums = &mut sums[index % kept * strips..][..strips];
                for (weights, sums) in weights.chunks(pass.len()).zip(&mut *sums) {
                    unit.multiply(weights, &panel[pass.clone()], sums, start > 0);
                }
                if pass.end == steps {
                    // SAFETY: the caller's condition.
                    unsafe { write(out, level, first_row + index * WIDTH, first, self.bias, sums) };
                }
            }
        }
        drop(unit);
        SCRATCH.set([weight_memory, sum_memory]);
    }
}

thread_local! {
    /// Memory of a task for weights and for sums: to ask the system for it each time takes longer than to fill it.
    static SCRATCH: Cell<[Vec<u32>; 2]> = const { Cell::new([vec![], vec![]]) };
}

/// Words that are enough for tiles, wherever the memory begins.
const fn words(tiles: usize) -> usize {
    (tiles * size_of::<Tile>() + align_of::<Tile>() - align_of::<u32>()) / size_of::<u32>()
}

/// So many times `N` tiles of a memory, which grows if it is too small; they hold anything.
fn tiles_of<const N: usize>(memory: &mut Vec<u32>, count: usize) -> &mut [[Tile; N]] {
    memory.resize(memory.len().max(words(count * N)), 0);
    &mut bytemuck::pod_align_to_mut::<u32, Tile>(memory).1.as_chunks_mut().0[..count]
}

/// All rows in panels, `[panels, steps]`, in a memory that is empty.
fn pack_all<'a>(level: Level, x: &[bf16], inputs: usize, memory: &'a mut Vec<u32>) -> &'a [[Tile; 2]] {
    let steps = inputs.div_ceil(DEPTH);
    let count = x.len().div_ceil(WIDTH * inputs) * steps;
    memory.reserve_exact(words(2 * count));
    // SAFETY: any memory may be seen as elements that are not initialised.
    let (_, panels, _) = unsafe { memory.spare_capacity_mut().align_to_mut::<MaybeUninit<[Tile; 2]>>() };
    let panels = &mut panels[..count];
    let rows = x.par_chunks(WIDTH * inputs);
    panels.par_chunks_mut(steps).zip(rows).for_each(|(panel, rows)| pack(level, rows, inputs, panel));
    // SAFETY: there are as many panels as chunks of rows, and `pack` has written all of each.
    unsafe { &*(&raw const *panels as *const [[Tile; 2]]) }
}

/// Writes tiles of a panel of rows, with zeros where rows or inputs are missing.
fn pack(level: Level, x: &[bf16], inputs: usize, panel: &mut [MaybeUninit<[Tile; 2]>]) {
    assert!(x.len().is_multiple_of(inputs) && x.len() / inputs <= WIDTH && panel.len() == inputs.div_ceil(DEPTH));
    for_simd!(level, pack_with::<>(x: &[bf16], inputs: usize, panel: &mut [MaybeUninit<[Tile; 2]>]) where)
}

/// # Safety
/// The CPU has the instructions of `S`, and `x` is no more than [`WIDTH`] rows.
#[inline(always)]
unsafe fn pack_with<S: Simd>(x: &[bf16], inputs: usize, panel: &mut [MaybeUninit<[Tile; 2]>]) {
    let rows = x.len() / inputs;
    for (step, tiles) in panel.iter_mut().enumerate() {
        if rows < WIDTH || (step + 1) * DEPTH > inputs {
            tiles.write([Tile::zeroed(); 2]);
        }
        // Eight rows, and the inputs of eight pairs.
        for (row, first_pair) in (0..rows).step_by(8).flat_map(|row| [(row, 0), (row, 8)]) {
            let input = step * DEPTH + 2 * first_pair;
            let first = row / SIDE * SIDE * SIDE + first_pair * SIDE + row % SIDE;
            // SAFETY: `first` is below 512, the words of two tiles: the row is below 32, and the first pair is at most 8.
            let to = unsafe { tiles.as_mut_ptr().cast::<u32>().add(first) };
            if row + 8 <= rows && input + 16 <= inputs {
                // SAFETY: the caller's condition; there are as many rows and inputs, and from `to` on the tile has eight
                // pairs for eight rows.
                unsafe {
                    let from = std::array::from_fn(|i| x.as_ptr().add((row + i) * inputs + input).cast::<f32>());
                    S::transpose_8x8(from, to.cast::<f32>(), SIDE);
                }
                continue;
            }
            for (lane, row) in x.chunks(inputs).skip(row).take(8).enumerate() {
                for (index, inputs) in row[input.min(inputs)..].chunks(2).take(8).enumerate() {
                    let second = inputs.get(1).copied().unwrap_or(bf16::ZERO);
                    // SAFETY: one of eight pairs for eight rows.
                    unsafe { *to.add(index * SIDE + lane) = pair(inputs[0], second) };
                }
            }
        }
    }
}

/// Copies some steps of rows of weights into strips, `[strips, steps]`; inputs that are missing become zero.
fn copy_weights(weight: &[bf16], inputs: usize, steps: Range<usize>, strips: &mut [[Tile; 2]]) {
    for (strip, rows) in strips.chunks_mut(steps.len()).zip(weight.chunks(WIDTH * inputs)) {
        for (output, row) in rows.chunks(inputs).enumerate() {
            let row = &row[steps.start * DEPTH..inputs.min(steps.end * DEPTH)];
            for (tiles, from) in strip.iter_mut().zip(row.chunks(DEPTH)) {
                let to = &mut tiles[output / SIDE].0[output % SIDE * SIDE..][..SIDE];
                let to = bytemuck::cast_slice_mut::<u32, bf16>(to);
                if let Ok(from) = <&[bf16; DEPTH]>::try_from(from) {
                    to.copy_from_slice(from);
                } else {
                    to[..from.len()].copy_from_slice(from);
                    to[from.len()..].fill(bf16::ZERO);
                }
            }
        }
    }
}

/// Sums of [`WRITTEN_ROWS`] rows, with the bias.
type Lines = [[f32; MAX_STRIPS * WIDTH]; WRITTEN_ROWS];

/// Writes the sums of a panel, `[strips]`, one column for each bias.
///
/// # Safety
/// As [`Columns::put`], for all rows of the panel.
unsafe fn write<Y: Stored>(
    out: &Columns<Y>,
    level: Level,
    first_row: usize,
    first: usize,
    bias: &[f32],
    sums: &[[Tile; 4]],
) {
    let mut lines: Lines = [[0.0; MAX_STRIPS * WIDTH]; WRITTEN_ROWS];
    for row in (0..WIDTH.min(out.rows() - first_row)).step_by(WRITTEN_ROWS) {
        turn(level, sums, row, &mut lines);
        for (row, line) in (first_row + row..out.rows()).zip(&mut lines) {
            let line = &mut line[..bias.len()];
            for (value, bias) in line.iter_mut().zip(bias) {
                *value += bias;
            }
            // SAFETY: the caller's condition.
            unsafe { out.put(level, row, first, line) };
        }
    }
    out.finish();
}

/// Makes lines of the sums of [`WRITTEN_ROWS`] rows from `row` on.
fn turn(level: Level, sums: &[[Tile; 4]], row: usize, lines: &mut Lines) {
    assert!(sums.len() <= MAX_STRIPS && row + WRITTEN_ROWS <= WIDTH && row.is_multiple_of(WRITTEN_ROWS));
    for_simd!(level, turn_with::<>(sums: &[[Tile; 4]], row: usize, lines: &mut Lines) where)
}

/// # Safety
/// The CPU has the instructions of `S`, and the arguments are as [`turn`] wants them.
#[inline(always)]
unsafe fn turn_with<S: Simd>(sums: &[[Tile; 4]], row: usize, lines: &mut Lines) {
    let to = lines.as_flattened_mut().as_mut_ptr();
    for (strip, sums) in sums.iter().enumerate() {
        for output in (0..WIDTH).step_by(8) {
            let tile = &sums[output / SIDE * 2 + row / SIDE];
            let from = &tile.0[output % SIDE * SIDE + row % SIDE..];
            // SAFETY: the caller's condition; eight outputs have eight rows each from `from` on, and as many elements are
            // written in each of eight lines.
            unsafe {
                let rows = std::array::from_fn(|i| from.as_ptr().add(i * SIDE).cast::<f32>());
                S::transpose_8x8(rows, to.add(strip * WIDTH + output), MAX_STRIPS * WIDTH);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::tests::{Example, NEAR},
        *,
    };
    use crate::testing::relative_drift;

    /// The product at every level, by the imitated unit and by that of the CPU, if it has one; each with what did it.
    pub(in super::super) fn products(layer: &Layer<'_>, x: &[bf16], weight: &[bf16]) -> Vec<(String, Vec<f32>)> {
        let all = planned_products(layer, x, weight, &Plan::of(layer, rayon::current_num_threads()));
        assert!(all.len() >= Level::available().count());
        all
    }

    fn planned_products(layer: &Layer<'_>, x: &[bf16], weight: &[bf16], plan: &Plan) -> Vec<(String, Vec<f32>)> {
        let mut all = vec![];
        for level in Level::available() {
            // SAFETY: every CPU has what the imitation needs.
            let y = unsafe { planned::<Imitated, f32>(layer, x, weight, level, plan) };
            all.push((format!("imitated, {level:?}, {plan:?}"), y));
            #[cfg(target_arch = "x86_64")]
            if level.multiplies_bf16_tiles() {
                // SAFETY: the CPU has just been asked.
                let y = unsafe { planned::<Amx, f32>(layer, x, weight, level, plan) };
                all.push((format!("AMX, {level:?}, {plan:?}"), y));
            }
        }
        all
    }

    #[test]
    fn however_the_work_is_divided_the_sums_are_the_same() {
        for (rows, inputs, outputs) in [(97, 200, 130), (70, 65, 1), (33, 96, 64)] {
            let example = Example::of(rows, inputs, outputs);
            let mut exact: Option<Vec<f32>> = None;
            for (strips, panels, pass) in [(1, 1, 1), (2, 1, 3), (1, 3, 2), (5, 2, 1), (8, 4, 7), (3, 9, 40)] {
                let plan = Plan { strips, panels, pass };
                for (name, y) in planned_products(&example.layer(), &example.x, &example.weight, &plan) {
                    let drift = relative_drift(&y, &example.expected);
                    assert!(drift < NEAR, "{name}, {rows} x {inputs} -> {outputs}: drift {drift:e}");
                    if name.starts_with("imitated") {
                        assert_eq!(&y, exact.get_or_insert_with(|| y.clone()), "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn long_rows_and_many_of_them_match_the_sum() {
        for (rows, inputs, outputs) in [(40, 6200, 70), (2100, 33, 40), (600, 31, 300)] {
            let example = Example::of(rows, inputs, outputs);
            for (name, y) in products(&example.layer(), &example.x, &example.weight) {
                let drift = relative_drift(&y, &example.expected);
                assert!(drift < NEAR, "{name}, {rows} x {inputs} -> {outputs}: drift {drift:e}");
            }
        }
    }

    #[test]
    fn a_plan_gives_every_thread_work_and_keeps_weights_in_the_cache() {
        let size = |index: usize| [1, 31, 33, 500, 3072, 15_360][index % 6];
        for index in 0..6 * 6 * 6 {
            let [rows, inputs, outputs] = [index, index / 6, index / 36].map(size);
            for threads in [1, 2, 16, 100] {
                let plan = Plan::of(&Layer { bias: &[], rows, inputs, outputs }, threads);
                let &Plan { strips, panels, pass } = &plan;
                assert!(strips >= 1 && panels >= 1 && pass >= 1, "{plan:?}");
                assert!(strips <= MAX_STRIPS && strips * pass <= MAX_BLOCK, "{plan:?}");
                let tasks = outputs.div_ceil(strips * WIDTH) * rows.div_ceil(panels * WIDTH);
                let possible = outputs.div_ceil(WIDTH) * (rows / WIDTH / PANELS.start).max(1);
                assert!(2 * tasks >= possible.min(TASKS * threads), "{plan:?}: {tasks} tasks");
            }
        }
        let layer = Layer { bias: &[], rows: 4608, inputs: 3072, outputs: 12_288 };
        assert_eq!(Plan::of(&layer, 2), Plan { strips: 6, panels: 144, pass: 96 });
    }
}
