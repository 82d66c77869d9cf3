//! Errors by position: predicted and true embeddings of many pictures -> one error for each of the 81 positions.

use anyhow::{Context, Result};
use nexus::{ImageEmbeds, ar::NUM_IMAGE_TOKENS};
use serde::{Serialize, Serializer};

/// Mean squared error and cosine distance at every position, over pictures.
pub struct Errors {
    pictures: usize,
    mse: Vec<f64>,
    cosine: Vec<f64>,
}

impl Errors {
    pub fn new() -> Self {
        Self { pictures: 0, mse: vec![0.0; NUM_IMAGE_TOKENS], cosine: vec![0.0; NUM_IMAGE_TOKENS] }
    }

    pub fn add(&mut self, predicted: &ImageEmbeds, truth: &ImageEmbeds) -> Result<()> {
        let (predicted, truth) = (rows(predicted)?, rows(truth)?);
        for (position, (p, t)) in predicted.iter().zip(&truth).enumerate() {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let square: f64 = p.iter().zip(t).map(|(p, t)| (p - t).powi(2)).sum();
            self.mse[position] += square / p.len() as f64;
            self.cosine[position] += 1.0 - dot(p, t) / (dot(p, p) * dot(t, t)).sqrt().max(1e-12);
        }
        self.pictures += 1;
        Ok(())
    }

    /// Mean squared error at every position, in raster order.
    pub fn mse(&self) -> Vec<f64> {
        self.mse.iter().map(|sum| sum / self.pictures.max(1) as f64).collect()
    }

    /// Mean of one minus the cosine at every position, in raster order.
    pub fn cosine(&self) -> Vec<f64> {
        self.cosine.iter().map(|sum| sum / self.pictures.max(1) as f64).collect()
    }
}

impl Serialize for Errors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Means {
            pictures: usize,
            mse: Vec<f64>,
            cosine: Vec<f64>,
        }
        Means { pictures: self.pictures, mse: self.mse(), cosine: self.cosine() }.serialize(serializer)
    }
}

/// How much true embeddings differ from each other: the error of always predicting their mean.
pub struct Spread {
    pictures: usize,
    sums: Vec<Vec<f64>>,
    squares: Vec<Vec<f64>>,
}

impl Spread {
    pub fn new() -> Self {
        Self { pictures: 0, sums: vec![vec![]; NUM_IMAGE_TOKENS], squares: vec![vec![]; NUM_IMAGE_TOKENS] }
    }

    pub fn add(&mut self, truth: &ImageEmbeds) -> Result<()> {
        for (position, row) in rows(truth)?.into_iter().enumerate() {
            let (sums, squares) = (&mut self.sums[position], &mut self.squares[position]);
            sums.resize(row.len(), 0.0);
            squares.resize(row.len(), 0.0);
            for (index, value) in row.into_iter().enumerate() {
                sums[index] += value;
                squares[index] += value * value;
            }
        }
        self.pictures += 1;
        Ok(())
    }

    /// Variance at every position, a mean over the width.
    pub fn by_position(&self) -> Vec<f64> {
        let count = self.pictures.max(1) as f64;
        let variance = |sums: &Vec<f64>, squares: &Vec<f64>| {
            let each = sums.iter().zip(squares).map(|(sum, square)| square / count - (sum / count).powi(2));
            each.sum::<f64>() / sums.len().max(1) as f64
        };
        self.sums.iter().zip(&self.squares).map(|(sums, squares)| variance(sums, squares)).collect()
    }
}

/// The embeddings of one picture, position by position.
fn rows(embeds: &ImageEmbeds) -> Result<Vec<Vec<f64>>> {
    let [_, _, width] = embeds.values.dims();
    let values = embeds.values.clone().into_data().try_into_vec_as::<f32>().ok().context("embeddings are f32")?;
    Ok(values.chunks_exact(width).map(|row| row.iter().map(|&value| f64::from(value)).collect()).collect())
}
