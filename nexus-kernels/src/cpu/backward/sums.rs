//! Rows of gradients and sums over rows, in one threaded pass whose order of additions is fixed.

use rayon::prelude::*;

use super::super::{Level, level::with_level};

/// A chunk has at least so many rows, so that partial sums are small beside the rows.
const MIN_ROWS: usize = 64;
/// Values that a thread takes at a time.
const CHUNK: usize = 16 * 1024;

/// Writes `rows` rows of `width` values, and sums `sums` rows of `width` values over each `group` rows.
///
/// `function` gets the number of a row, that row to write, and `[sums, width]` values to add to. The sums come back as
/// `[rows / group, sums, width]`; they are added in an order that does not depend on the number of threads.
pub(super) fn rows_and_sums(
    [rows, width, group, sums]: [usize; 4],
    function: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let mut written = vec![0.0; rows * width];
    if rows * width == 0 {
        return (written, vec![0.0; rows.checked_div(group).unwrap_or(0) * sums * width]);
    }
    let chunk_rows = (CHUNK / width).max(MIN_ROWS).min(group);
    let chunks = group.div_ceil(chunk_rows);
    let mut partial = vec![0.0; rows / group * chunks * sums * width];
    // A group's last chunk may be short, so chunks of rows are cut per group.
    let parts: Vec<&mut [f32]> =
        written.chunks_mut(group * width).flat_map(|group| group.chunks_mut(chunk_rows * width)).collect();
    let run = |(index, (rows, sums)): (usize, (&mut [f32], &mut [f32]))| {
        let first = index / chunks * group + index % chunks * chunk_rows;
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            function(first + i, row, sums);
        }
    };
    if sums == 0 {
        parts.into_par_iter().enumerate().for_each(|(index, rows)| run((index, (rows, &mut []))));
        return (written, vec![]);
    }
    parts.into_par_iter().zip(partial.par_chunks_mut(sums * width)).enumerate().for_each(run);
    let totals = partial
        .par_chunks(chunks * sums * width)
        .flat_map_iter(|partial| {
            let (total, rest) = partial.split_at(sums * width);
            let mut total = total.to_vec();
            for partial in rest.chunks_exact(sums * width) {
                add(&mut total, partial);
            }
            total
        })
        .collect();
    (written, totals)
}

/// Sums over all rows of `width` values.
pub(super) fn column_sums(values: &[f32], width: usize) -> Vec<f32> {
    let level = Level::detect();
    let chunk = (CHUNK / width.max(1)).max(MIN_ROWS) * width.max(1);
    let partial: Vec<Vec<f32>> = values
        .par_chunks(chunk)
        .map(|rows| {
            let mut total = vec![0.0; width];
            let sums = &mut total[..];
            with_level!(
                level,
                fn run(rows: &[f32], sums: &mut [f32], width: usize) {
                    for row in rows.chunks_exact(width) {
                        for (sum, value) in sums.iter_mut().zip(row) {
                            *sum += value;
                        }
                    }
                }
            );
            total
        })
        .collect();
    let mut total = vec![0.0; width];
    partial.iter().for_each(|partial| add(&mut total, partial));
    total
}

fn add(total: &mut [f32], partial: &[f32]) {
    for (total, partial) in total.iter_mut().zip(partial) {
        *total += partial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_summed_and_rows_are_numbered() {
        for [rows, width, group] in [[1, 1, 1], [6, 3, 2], [700, 5, 350], [67, 400, 67], [130, 1, 65]] {
            let (written, sums) = rows_and_sums([rows, width, group, 2], |index, row, sums| {
                row.fill(index as f32);
                sums[..width].iter_mut().for_each(|sum| *sum += 1.0);
                sums[width..].iter_mut().for_each(|sum| *sum += index as f32);
            });
            let expected: Vec<f32> = (0..rows * width).map(|i| (i / width) as f32).collect();
            assert_eq!(written, expected);
            for (group_index, sums) in sums.chunks_exact(2 * width).enumerate() {
                let total: usize = (group_index * group..(group_index + 1) * group).sum();
                assert!(sums[..width].iter().all(|&sum| sum == group as f32));
                assert!(sums[width..].iter().all(|&sum| sum == total as f32));
            }
            assert_eq!(sums.len(), rows / group * 2 * width);
            let columns = column_sums(&written, width);
            assert!(columns.iter().all(|&sum| sum == (rows * (rows - 1) / 2) as f32));
        }
    }
}
