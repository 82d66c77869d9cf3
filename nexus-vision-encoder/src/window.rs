//! Attention windows, integers only: grids -> order of the merged tokens and bounds of the segments.

use nexus_core::{GridThw, MERGE_SIZE};

const PATCHES_PER_CELL: usize = MERGE_SIZE * MERGE_SIZE;

/// How the patches of several images are ordered and segmented for attention.
///
/// A cell is a merged token, [`MERGE_SIZE`]² patches. Windows follow each other in raster order, and so do the cells
/// inside a window; windows at the right and bottom border may be smaller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowLayout {
    /// `cell_order[i]` is the raster index of the cell at place `i` of window order.
    pub cell_order: Vec<usize>,
    /// Place in window order of each raster cell: the inverse of `cell_order`.
    pub cell_places: Vec<usize>,
    /// Bounds of the windows, in patches, starting with 0.
    pub window_bounds: Vec<usize>,
    /// Bounds of the image frames, in patches, starting with 0.
    pub frame_bounds: Vec<usize>,
}

impl WindowLayout {
    /// Lays out images one after the other; `window_cells` is the side of a window in cells.
    ///
    /// # Panics
    /// If `window_cells` is zero.
    ///
    /// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `get_window_index`).
    /// Differs: the empty windows that the original makes and drops again are not made.
    pub fn new(grids: &[GridThw], window_cells: usize) -> Self {
        assert!(window_cells > 0, "a window has at least one cell");
        let mut layout =
            Self { cell_order: vec![], cell_places: vec![], window_bounds: vec![0], frame_bounds: vec![0] };
        for grid in grids {
            let (rows, cols) = (grid.merged_h(), grid.merged_w());
            for _ in 0..grid.t {
                let first_cell = layout.cell_order.len();
                for row in (0..rows).step_by(window_cells) {
                    for col in (0..cols).step_by(window_cells) {
                        for r in row..rows.min(row + window_cells) {
                            let cells = col..cols.min(col + window_cells);
                            layout.cell_order.extend(cells.map(|c| first_cell + r * cols + c));
                        }
                        layout.window_bounds.push(layout.cell_order.len() * PATCHES_PER_CELL);
                    }
                }
                layout.frame_bounds.push(layout.cell_order.len() * PATCHES_PER_CELL);
            }
        }
        layout.cell_places = vec![0; layout.cell_order.len()];
        for (place, &cell) in layout.cell_order.iter().enumerate() {
            layout.cell_places[cell] = place;
        }
        layout
    }
}

/// Row and column of every patch, in the order in which patches arrive: cells in raster order, the patches of a cell
/// in raster order.
pub(crate) fn patch_coordinates(grids: &[GridThw]) -> impl Iterator<Item = [usize; 2]> + '_ {
    grids.iter().flat_map(|grid| {
        let (rows, cols) = (grid.merged_h(), grid.merged_w());
        (0..grid.t * rows * cols * PATCHES_PER_CELL).map(move |patch| {
            let cell = patch / PATCHES_PER_CELL % (rows * cols);
            let within = patch % PATCHES_PER_CELL;
            let row = cell / cols * MERGE_SIZE + within / MERGE_SIZE;
            [row, cell % cols * MERGE_SIZE + within % MERGE_SIZE]
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(h: usize, w: usize) -> GridThw {
        GridThw::new(1, h, w).unwrap()
    }

    #[test]
    fn ragged_windows_keep_only_their_cells() {
        // 3 x 5 cells, windows of 2: 2x2 2x2 2x1 | 1x2 1x2 1x1
        let layout = WindowLayout::new(&[grid(6, 10)], 2);
        assert_eq!(layout.cell_order, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]);
        assert_eq!(layout.window_bounds, [0, 16, 32, 40, 48, 56, 60]);
        assert_eq!(layout.frame_bounds, [0, 60]);
    }

    #[test]
    fn images_follow_each_other_and_places_invert_the_order() {
        let layout = WindowLayout::new(&[grid(2, 16), grid(4, 4), grid(18, 18)], 4);
        assert_eq!(layout.frame_bounds, [0, 32, 48, 372]);
        assert_eq!(layout.window_bounds[..4], [0, 16, 32, 48]);
        for (cell, &place) in layout.cell_places.iter().enumerate() {
            assert_eq!(layout.cell_order[place], cell);
        }
    }

    #[test]
    fn patches_of_a_cell_stay_together() {
        let coordinates: Vec<_> = patch_coordinates(&[grid(2, 4)]).collect();
        assert_eq!(coordinates, [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]);
    }
}
