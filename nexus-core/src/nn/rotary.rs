//! Rotary position embeddings of three axes: positions -> tables of cosines and sines.
//!
//! Tables are made on the host in the precision that the model's original uses, and made once for all blocks.

use burn::tensor::Device;
use nexus_kernels::RotaryTable;

/// `theta^(-2i / dim)` for `i < dim / 2`, with f32 arithmetic as in the original models.
pub fn inverse_frequencies(dim: usize, theta: f64) -> Vec<f32> {
    (0..dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim as f32)).collect()
}

/// Multimodal rotary embedding (M-RoPE): the frequencies are shared out among three position axes.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `apply_multimodal_rotary_pos_emb`).
#[derive(Debug, Clone, PartialEq)]
pub struct MultimodalRotary {
    inverse_frequencies: Vec<f32>,
    axis_of_frequency: Vec<usize>,
}

impl MultimodalRotary {
    /// # Panics
    /// If the sections do not add up to `head_dim / 2`.
    pub fn new(head_dim: usize, theta: f64, sections: [usize; 3]) -> Self {
        assert_eq!(sections.iter().sum::<usize>(), head_dim / 2, "sections {sections:?}, head width {head_dim}");
        let axis_of_frequency = (0..3).flat_map(|axis| std::iter::repeat_n(axis, sections[axis])).collect();
        Self { inverse_frequencies: inverse_frequencies(head_dim, theta), axis_of_frequency }
    }

    /// Rounds the frequencies to bf16, as the original's decoders do with the embedding merger in bf16.
    pub fn with_bf16_frequencies(mut self) -> Self {
        for frequency in &mut self.inverse_frequencies {
            *frequency = half::bf16::from_f32(*frequency).to_f32();
        }
        self
    }

    /// Table for one sequence of positions.
    ///
    /// # Shapes
    /// - `positions`: temporal, row and column position of each token
    /// - returns: f32 tables `[1, tokens, head_dim / 2]`
    pub fn table(&self, positions: &[[f32; 3]], device: &Device) -> RotaryTable {
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|position| {
                self.inverse_frequencies
                    .iter()
                    .zip(&self.axis_of_frequency)
                    .map(|(frequency, &axis)| position[axis] * frequency)
            })
            .collect();
        RotaryTable::from_f32(&angles, positions.len(), self.inverse_frequencies.len(), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_kernels::testing::{assert_close, cpu};

    #[test]
    fn each_section_follows_its_axis() {
        let rotary = MultimodalRotary::new(8, 10_000.0, [1, 1, 2]);
        let table = rotary.table(&[[1.0, 2.0, 3.0]], &cpu());
        // inverse frequencies 1, 0.1, 0.01, 0.001
        let angles = [1.0f32, 0.2, 0.03, 0.003];
        assert_close(&table.cos, &angles.map(f32::cos), 1e-6);
        assert_close(&table.sin, &angles.map(f32::sin), 1e-6);
    }
}
