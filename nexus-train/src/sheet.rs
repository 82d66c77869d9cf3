//! Sheets of pictures: rows of decoded pictures -> one image to look at.

use burn::tensor::Tensor;
use nexus::read;
use nexus_data::Image;

use crate::TrainError;

/// Pixels between pictures.
const GAP_PX: usize = 4;

/// Rows of pictures, all of one size, on white.
///
/// # Shapes
/// - each row: `[pictures, 3, height, width]`, -1 is black and 1 is white
pub(super) fn rows(rows: &[Tensor<4>]) -> Result<Image, TrainError> {
    let [height, width] = rows.first().map_or([0, 0], |row| [row.dims()[2], row.dims()[3]]);
    let columns = rows.iter().map(|row| row.dims()[0]).max().unwrap_or(0);
    let (sheet_width, sheet_height) = (columns * (width + GAP_PX) + GAP_PX, rows.len() * (height + GAP_PX) + GAP_PX);
    let mut rgb = vec![255; 3 * sheet_width * sheet_height];
    for (row, pictures) in rows.iter().enumerate() {
        for column in 0..pictures.dims()[0] {
            let values = read(pictures.clone().narrow(0, column, 1))?;
            let picture = Image::from_decoded(&values, height, width)?;
            let (left, top) = (GAP_PX + column * (width + GAP_PX), GAP_PX + row * (height + GAP_PX));
            for (y, line) in picture.rgb().chunks_exact(3 * width).enumerate() {
                rgb[3 * ((top + y) * sheet_width + left)..][..3 * width].copy_from_slice(line);
            }
        }
    }
    Ok(Image::from_rgb8(sheet_width, sheet_height, rgb)?)
}
