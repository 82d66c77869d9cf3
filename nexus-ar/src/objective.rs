//! What the model is trained for: a batch of samples -> cross entropy of text and distance of image embeddings.

use std::ops::Range;

use burn::tensor::{DType, FloatDType, Tensor, activation::log_softmax};
use nexus_core::nn::{Activation, DecoderLayer, Recomputation};
use nexus_kernels::{RotaryTable, Visibility, index_tensor, without_scores};
use serde::{Deserialize, Serialize};

use crate::{
    ArError, ArModel, NUM_IMAGE_TOKENS, TrainingBatch,
    training_batch::{Group, RowSource},
};

/// Epsilon of the norms in the cosine.
const COSINE_EPS: f32 = 1e-8;

/// Weights of the two losses; the defaults are those of the original's training script.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArObjective {
    /// Factor of the cross entropy of text.
    pub token_weight: f64,
    /// Factor of the image loss.
    pub image_weight: f64,
    /// Whether the prefill embeddings stand at the positions of an answer, as when the model draws with
    /// [`ImagePass::Parallel`](crate::ImagePass::Parallel).
    ///
    /// Otherwise the true embeddings do, each predicting the next (teacher forcing): the model then draws with
    /// [`ImagePass::Autoregressive`](crate::ImagePass::Autoregressive), where its errors add up.
    pub prefill: bool,
}

impl Default for ArObjective {
    fn default() -> Self {
        Self { token_weight: 3.0, image_weight: 3.0, prefill: true }
    }
}

/// Losses of a batch, all in f32.
#[derive(Debug, Clone)]
pub struct ArLoss {
    /// `token_weight * cross_entropy + image_weight * image`.
    pub total: Tensor<1>,
    /// Mean over the learned text tokens of all samples; 0 if there are none.
    pub cross_entropy: Tensor<1>,
    /// Mean squared error of the predicted embeddings; 0 if the batch has no answer image.
    pub mse: Tensor<1>,
    /// Mean of one minus the cosine between predicted and true embeddings; 0 if the batch has no answer image.
    pub cosine: Tensor<1>,
    /// `(mse + cosine) / 2`.
    pub image: Tensor<1>,
}

/// Embeddings of all answers of a batch: f32 `[81 * answers, hidden]` each.
#[derive(Debug, Clone)]
pub struct AnswerEmbeds {
    /// What the model predicts.
    pub predicted: Tensor<2>,
    /// What it should predict, as constants.
    pub truth: Tensor<2>,
}

/// Losses of a batch and what other losses can be made of.
#[derive(Debug, Clone)]
pub struct ArOutput {
    /// The losses.
    pub loss: ArLoss,
    /// Embeddings of the answers; `None` if there is none.
    pub answers: Option<AnswerEmbeds>,
    /// Hidden states after as many layers as were asked for, `[rows, hidden]` in the compute dtype each.
    pub states: Vec<Tensor<2>>,
}

impl ArObjective {
    /// The losses of a batch, computed by the model in `dtype`; gradients reach the model and the input images, but
    /// not the true embeddings.
    ///
    /// # Errors
    /// [`ArError::TokenOutOfVocabulary`], [`ArError::EmbedWidth`] if the batch was made for another model.
    ///
    /// Source: Nexus-Gen (modeling_qwen2_5_vl.py, `forward` with labels).
    /// Differs: the losses are computed in f32 from predictions in `dtype`; scores are computed for learned positions
    /// alone.
    pub fn loss(&self, model: &ArModel, batch: &TrainingBatch, dtype: FloatDType) -> Result<ArLoss, ArError> {
        Ok(self.output(model, batch, dtype, 0..0, &mut Recomputation::none())?.loss)
    }

    /// The losses of a batch as [`ArObjective::loss`] computes them, the predicted embeddings, and the hidden states
    /// after each number of layers in `state_layers`; gradients reach the model through all three. The layers are the
    /// blocks of the recomputation, whose `backward` gives the gradients.
    ///
    /// # Errors
    /// As [`ArObjective::loss`].
    ///
    /// # Panics
    /// If the model has fewer layers.
    pub fn output<'a>(
        &self,
        model: &'a ArModel,
        batch: &TrainingBatch,
        dtype: FloatDType,
        state_layers: Range<usize>,
        layers: &mut Recomputation<'a>,
    ) -> Result<ArOutput, ArError> {
        let embeds = model.embed_batch(batch, self.prefill, dtype)?;
        let BatchStates { after: states, last: hidden } = model.batch_states(embeds, batch, state_layers, layers);
        let zero = || Tensor::zeros([1], (&hidden.device(), DType::F32));

        let (mut cross_entropy, mut mse, mut cosine) = (zero(), zero(), zero());
        if !batch.text_labels.is_empty() {
            let (rows, ids): (Vec<usize>, Vec<usize>) =
                batch.text_labels.iter().map(|&(row, id)| (row, id as usize)).unzip();
            let predicting = select(&hidden, &rows);
            let logits = model.logits(predicting.unsqueeze()).squeeze_dim(0);
            cross_entropy = mean_cross_entropy(logits, ids, &batch.excluded);
        }
        let answers = (!batch.image_labels.is_empty()).then(|| {
            let predicting = select(&hidden, &batch.image_labels);
            let predicted = model.predict_embeds(predicting.unsqueeze()).squeeze_dim::<2>(0).cast(DType::F32);
            AnswerEmbeds { predicted, truth: batch.target_rows(FloatDType::F32) }
        });
        if let Some(AnswerEmbeds { predicted, truth }) = &answers {
            mse = (predicted.clone() - truth.clone()).square().mean();
            cosine = cosine_distance(predicted.clone(), truth.clone());
        }
        let image = (mse.clone() + cosine.clone()) * 0.5;
        let total = cross_entropy.clone() * self.token_weight + image.clone() * self.image_weight;
        Ok(ArOutput { loss: ArLoss { total, cross_entropy, mse, cosine, image }, answers, states })
    }

    /// What the model predicts for the answer images of a batch, as constants: each embedding from what stands before
    /// it, which are prefill embeddings or, without `prefill`, the true ones.
    ///
    /// # Shapes
    /// - returns: one `[1, 81, hidden]` for each answer image, in the order of the samples
    ///
    /// # Errors
    /// As [`ArObjective::loss`].
    pub fn predict_answers(
        &self,
        model: &ArModel,
        batch: &TrainingBatch,
        dtype: FloatDType,
    ) -> Result<Vec<Tensor<3>>, ArError> {
        let hidden = model.forward_batch(model.embed_batch(batch, self.prefill, dtype)?, batch);
        let predict = |rows: &[usize]| model.predict_embeds(select(&hidden, rows).unsqueeze()).detach();
        Ok(batch.image_labels.chunks(NUM_IMAGE_TOKENS).map(predict).collect())
    }
}

impl ArModel {
    /// Embeddings of a batch: those of tokens and input images, and at answers the prefill embeddings or, without
    /// `prefill`, the true embeddings as constants.
    ///
    /// # Shapes
    /// - returns: `[rows, hidden]` in `dtype`
    ///
    /// # Errors
    /// [`ArError::TokenOutOfVocabulary`], [`ArError::EmbedWidth`] if the batch was made for another model.
    pub fn embed_batch(&self, batch: &TrainingBatch, prefill: bool, dtype: FloatDType) -> Result<Tensor<2>, ArError> {
        batch.check_fits(self.config())?;
        let device = self.device();
        let ids = index_tensor(batch.vocabulary.iter().map(|&id| id as usize), [1, batch.vocabulary.len()], &device);
        let mut table = vec![self.model.embed_tokens.forward(ids, dtype).squeeze_dim::<2>(0)];
        table.extend(batch.inputs.iter().map(|image| image.values.clone().squeeze_dim::<2>(0).cast(dtype)));
        let first_input = batch.vocabulary.len();
        let first_answer = first_input + batch.inputs.iter().map(|image| image.grid.num_merged_tokens()).sum::<usize>();
        if !batch.targets.is_empty() {
            table.push(match prefill {
                true => self.prefill_embeds(dtype).squeeze_dim(0),
                false => batch.target_rows(dtype),
            });
        }
        let row = |source: &RowSource| match *source {
            RowSource::Token(index) => index,
            RowSource::Input(index) => first_input + index,
            RowSource::Answer(index) if prefill => first_answer + index % NUM_IMAGE_TOKENS,
            RowSource::Answer(index) => first_answer + index,
        };
        let rows = index_tensor(batch.row_sources.iter().map(row), [batch.row_sources.len()], &device);
        Ok(Tensor::cat(table, 0).select(0, rows))
    }

    /// Hidden states of a batch after the final norm, causal, without a cache.
    ///
    /// # Shapes
    /// - `embeds`: `[rows, hidden]`; its dtype is the compute dtype
    /// - returns: the same
    ///
    /// # Panics
    /// If the embeddings are not those of the batch.
    pub fn forward_batch(&self, embeds: Tensor<2>, batch: &TrainingBatch) -> Tensor<2> {
        self.batch_states(embeds, batch, 0..0, &mut Recomputation::none()).last
    }

    /// As [`ArModel::forward_batch`], with the hidden states after each of these numbers of layers.
    fn batch_states<'a>(
        &'a self,
        embeds: Tensor<2>,
        batch: &TrainingBatch,
        wanted: Range<usize>,
        layers: &mut Recomputation<'a>,
    ) -> BatchStates {
        let [rows, hidden] = embeds.dims();
        assert_eq!(rows, batch.num_rows(), "rows of the batch");
        assert!(wanted.end <= self.model.layers.len() + 1, "layers of the model");
        let [embeds] = layers.enter([embeds.unsqueeze()]);
        let mut start = 0;
        let (mut after, mut last) = (vec![Vec::new(); wanted.len()], Vec::new());
        for &Group { samples, tokens } in &batch.groups {
            let rows = samples * tokens;
            let x = embeds.value().narrow(1, start, rows).reshape([samples, tokens, hidden]);
            let RotaryTable { cos, sin } = self.rotary_table(&batch.positions[start..start + rows], &x);
            let shape = [samples, tokens, cos.dims()[2]];
            let rotary = RotaryTable { cos: cos.reshape(shape), sin: sin.reshape(shape) };
            start += rows;
            let flat = |x: &Activation| x.value().reshape([rows, hidden]);
            let mut keep = |done: usize, x: &Activation| {
                if wanted.contains(&done) {
                    after[done - wanted.start].push(flat(x));
                }
            };
            let [mut x] = layers.enter([x]);
            keep(0, &x);
            for (index, layer) in self.model.layers.iter().enumerate() {
                let rotary = rotary.clone();
                let run = move |layer: &DecoderLayer, [x]: [Tensor<3>; 1]| {
                    [layer.forward(x, &rotary, Visibility::Causal, None)]
                };
                [x] = layers.run(layer, [&x], run);
                keep(index + 1, &x);
            }
            last.push(self.model.norm.forward(x.value()).reshape([rows, hidden]));
        }
        let after = after.into_iter().map(|groups| Tensor::cat(groups, 0)).collect();
        BatchStates { after, last: Tensor::cat(last, 0) }
    }
}

/// Hidden states of a batch, `[rows, hidden]` each.
struct BatchStates {
    /// After the numbers of layers that were asked for.
    after: Vec<Tensor<2>>,
    /// After the final norm.
    last: Tensor<2>,
}

impl TrainingBatch {
    /// True embeddings of all answers, as constants.
    ///
    /// # Shapes
    /// `[81 * answers, hidden]`
    fn target_rows(&self, dtype: FloatDType) -> Tensor<2> {
        let rows = |image: &nexus_core::ImageEmbeds| image.values.clone().inner().squeeze_dim::<2>(0).cast(dtype);
        Tensor::cat(self.targets.iter().map(rows).collect(), 0)
    }

    /// States at the tokens of the input images, in the order of the images; `None` if there is none.
    ///
    /// # Shapes
    /// - `states`: `[rows, hidden]`
    /// - returns: `[input tokens, hidden]`
    pub fn input_states(&self, states: &Tensor<2>) -> Option<Tensor<2>> {
        let is_input = |(row, source): (usize, &RowSource)| matches!(source, RowSource::Input(_)).then_some(row);
        let rows: Vec<usize> = self.row_sources.iter().enumerate().filter_map(is_input).collect();
        (!rows.is_empty()).then(|| select(states, &rows))
    }

    /// First row and number of rows, padding included, of every sample.
    pub(crate) fn sample_rows(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut start = 0;
        self.groups.iter().flat_map(|group| std::iter::repeat_n(group.tokens, group.samples)).map(move |tokens| {
            start += tokens;
            (start - tokens, tokens)
        })
    }
}

/// # Shapes
/// - `logits`: `[rows, vocab]`
/// - `ids`: one per row
/// - `excluded`: rows, and ids that do not compete there
fn mean_cross_entropy(logits: Tensor<2>, ids: Vec<usize>, excluded: &[(usize, u32)]) -> Tensor<1> {
    let rows = ids.len();
    let ids = index_tensor(ids, [rows, 1], &logits.device());
    let mut logits = logits.cast(DType::F32);
    if !excluded.is_empty() {
        logits = without_scores(logits, excluded.iter().map(|&(row, id)| (row, id as usize)));
    }
    log_softmax(logits, 1).gather(1, ids).mean().neg()
}

/// Mean of `1 - cos` over the rows of two `[rows, width]`.
fn cosine_distance(a: Tensor<2>, b: Tensor<2>) -> Tensor<1> {
    let norm = |x: &Tensor<2>| x.clone().square().sum_dim(1).sqrt().clamp_min(COSINE_EPS);
    let scale = norm(&a) * norm(&b);
    let cosine = (a * b).sum_dim(1) / scale;
    (cosine.neg() + 1.0).mean()
}

/// Rows of a `[rows, width]`.
fn select(x: &Tensor<2>, rows: &[usize]) -> Tensor<2> {
    x.clone().select(0, index_tensor(rows.iter().copied(), [rows.len()], &x.device()))
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use nexus_core::{
        ImageEmbeds,
        testing::{assert_close, assert_close_tensors, cpu},
    };

    use super::*;
    use crate::{
        GenerateOptions, ImagePass, Prompt, TrainingSample, generate,
        training_batch::tests::{BOI, EOI, IMG, editing, image, tiny, words},
    };

    fn model() -> ArModel {
        ArModel::new(&tiny(), &cpu().autodiff()).unwrap()
    }

    fn batch(samples: Vec<TrainingSample>) -> TrainingBatch {
        TrainingBatch::new(samples, &tiny()).unwrap()
    }

    fn value(tensor: &Tensor<1>) -> f32 {
        tensor.to_data().try_into_vec_as::<f32>().unwrap()[0]
    }

    #[test]
    fn losses_of_rows_are_those_of_the_formulas() {
        let logits = Tensor::from_data([[0.0, 2f32.ln(), 0.0], [3f32.ln(), 0.0, 0.0]], &cpu());
        // Softmax [1/4, 1/2, 1/4] and [3/5, 1/5, 1/5].
        let expected = -(0.5f32.ln() + 0.2f32.ln()) / 2.0;
        assert_close(&mean_cross_entropy(logits.clone(), vec![1, 2], &[]), &[expected], 1e-6);
        // Without the first of the second row [1/2, 1/2].
        let expected = -2.0 * 0.5f32.ln() / 2.0;
        assert_close(&mean_cross_entropy(logits, vec![1, 2], &[(1, 0)]), &[expected], 1e-6);
        let a = Tensor::from_data([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], &cpu());
        let b = Tensor::from_data([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]], &cpu());
        assert_close(&cosine_distance(a, b), &[(1.0 - 24.0 / 25.0 + 2.0 + 1.0) / 3.0], 1e-6);
    }

    #[test]
    fn parts_add_up_with_their_weights() {
        let objective = ArObjective { token_weight: 0.5, image_weight: 2.0, prefill: true };
        let loss = objective.loss(&model(), &batch(vec![editing(), words()]), FloatDType::F32).unwrap();
        let image = (value(&loss.mse) + value(&loss.cosine)) / 2.0;
        assert!((value(&loss.image) - image).abs() < 1e-6);
        assert_close(&loss.total, &[0.5 * value(&loss.cross_entropy) + 2.0 * image], 1e-6);
        let text = ArObjective::default().loss(&model(), &batch(vec![words()]), FloatDType::F32).unwrap();
        assert_eq!((value(&text.image), value(&text.total)), (0.0, 3.0 * value(&text.cross_entropy)));
    }

    #[test]
    fn embeddings_of_a_batch_are_those_of_its_prompts() {
        let (model, sample) = (model(), editing());
        let batch = batch(vec![words(), sample.clone()]);
        for prefill in [true, false] {
            let embeds = model.embed_batch(&batch, prefill, FloatDType::F32).unwrap();
            let answer = if prefill { model.prefill_embeds(FloatDType::F32) } else { sample.targets[0].values.clone() };
            let answer = ImageEmbeds::new(answer, sample.targets[0].grid).unwrap();
            let images = [sample.inputs[0].clone(), answer];
            let expected = model.embed(&sample.token_ids, &images, FloatDType::F32).unwrap();
            assert_close_tensors(&embeds.clone().narrow(0, 3, sample.token_ids.len()).unsqueeze(), &expected, 0.0);
            let expected = model.embed(&words().token_ids, &[], FloatDType::F32).unwrap();
            assert_close_tensors(&embeds.narrow(0, 0, 3).unsqueeze(), &expected, 0.0);
        }
    }

    #[test]
    fn the_gradient_of_an_input_image_is_what_the_loss_changes_by() {
        let (model, objective) = (model(), ArObjective::default());
        let loss = |values: Tensor<3>| {
            let mut sample = editing();
            sample.inputs[0].values = values;
            objective.loss(&model, &batch(vec![words(), sample]), FloatDType::F32).unwrap().total
        };
        let values = editing().inputs[0].values.clone();
        let tracked = values.clone().autodiff().require_grad();
        let gradient = tracked.grad(&loss(tracked.clone()).backward()).unwrap();
        // Along the gradient the change is largest, and so least touched by rounding.
        let norm = value(&gradient.clone().square().sum().sqrt());
        let step = gradient / norm * 0.02;
        let change = (value(&loss(values.clone() + step.clone())) - value(&loss(values - step))) / 0.04;
        assert!((change - norm).abs() < 0.02 * norm, "change {change}, gradient {norm}");
    }

    #[test]
    fn true_embeddings_get_no_gradient() {
        let mut sample = editing();
        let tracked = sample.targets[0].values.clone().autodiff().require_grad();
        sample.targets[0].values = tracked.clone() * 2.0;
        for prefill in [true, false] {
            let objective = ArObjective { prefill, ..Default::default() };
            let batch = batch(vec![sample.clone()]);
            let gradients = objective.loss(&model(), &batch, FloatDType::F32).unwrap().total.backward();
            assert!(tracked.grad(&gradients).is_none());
        }
    }

    #[test]
    fn predictions_of_answers_are_what_the_loss_compares() {
        let (model, batch) = (model(), batch(vec![words(), editing()]));
        for prefill in [true, false] {
            let objective = ArObjective { prefill, ..Default::default() };
            let predicted = objective.predict_answers(&model, &batch, FloatDType::F32).unwrap();
            assert_eq!(predicted.len(), 1);
            let target = editing().targets[0].values.clone();
            let mse = (predicted[0].clone().inner() - target).square().mean();
            let loss = objective.loss(&model, &batch, FloatDType::F32).unwrap();
            assert_close(&mse, &[value(&loss.mse)], 1e-6);
        }
    }

    #[test]
    fn states_of_layers_lead_to_the_last_and_pick_the_input_images() {
        let (model, objective) = (model(), ArObjective::default());
        let batch = batch(vec![words(), editing(), editing()]);
        let output =
            |layers| objective.output(&model, &batch, FloatDType::F32, layers, &mut Recomputation::none()).unwrap();
        let loss = value(&objective.loss(&model, &batch, FloatDType::F32).unwrap().total);
        let image = editing().inputs[0].values.clone().squeeze_dim::<2>(0);
        let inputs = Tensor::cat(vec![image.clone(), image], 0);
        let layers = model.config().num_hidden_layers;
        let ArOutput { loss: with_states, answers, states } = output(0..layers + 1);
        assert_eq!((value(&with_states.total), states.len()), (loss, layers + 1));
        let seen = |states: &Tensor<2>| batch.input_states(states).unwrap().inner();
        assert_close_tensors(&seen(&states[0]), &inputs, 0.0);
        let moved = |states: &Tensor<2>| value(&(seen(states) - inputs.clone()).square().mean());
        let moved: Vec<f32> = states[1..].iter().map(moved).collect();
        assert!(moved.iter().all(|&moved| moved > 0.0) && moved[0] != moved[1], "{moved:?}");
        let later = output(1..3).states;
        assert_eq!(later.len(), 2);
        for (one, other) in later.iter().zip(&states[1..]) {
            assert_close_tensors(&one.clone().inner(), &other.clone().inner(), 0.0);
        }
        let target = editing().targets[0].values.clone().squeeze_dim::<2>(0);
        let AnswerEmbeds { predicted, truth } = answers.unwrap();
        assert_close_tensors(&truth, &Tensor::cat(vec![target.clone(), target], 0), 0.0);
        let mse = (predicted.inner() - truth).square().mean();
        assert_close(&mse, &[value(&with_states.mse)], 1e-6);
        let text = TrainingBatch::new(vec![words()], &tiny()).unwrap();
        let output = objective.output(&model, &text, FloatDType::F32, 1..2, &mut Recomputation::none()).unwrap();
        assert!(output.answers.is_none() && text.input_states(&output.states[0]).is_none());
        assert!(
            objective
                .output(&model, &text, FloatDType::F32, 0..0, &mut Recomputation::none())
                .unwrap()
                .states
                .is_empty()
        );
    }

    /// What the model draws from its own predictions is what it predicts when they are given as the truth.
    #[test]
    fn teacher_forcing_is_the_training_of_autoregressive_drawing() {
        let model = model();
        let prompt = [1, 2, BOI];
        let options =
            GenerateOptions { image_pass: ImagePass::Autoregressive, max_new_tokens: 83, ..Default::default() };
        let prompt_input = Prompt { token_ids: &prompt, images: &[] };
        let drawn = generate(&model, prompt_input, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let parallel = GenerateOptions { image_pass: ImagePass::Parallel, ..options };
        let other = generate(&model, prompt_input, &parallel, &mut |_| ControlFlow::Continue(())).unwrap();
        let first = |generation: &crate::Generation| generation.images[0].values.clone().inner().narrow(1, 0, 1);
        assert_close_tensors(&first(&drawn), &first(&other), 1e-5);
        let token_ids = [&prompt[..], &[IMG; 81], &[EOI]].concat();
        assert_eq!(drawn.token_ids[..token_ids.len()], token_ids);
        let labels: Vec<Option<u32>> =
            token_ids.iter().enumerate().map(|(index, &id)| (index > 2).then_some(id)).collect();
        let loss = |targets: Vec<ImageEmbeds>, prefill| {
            let sample =
                TrainingSample { token_ids: token_ids.clone(), labels: labels.clone(), inputs: vec![], targets };
            let objective = ArObjective { prefill, ..Default::default() };
            objective.loss(&model, &batch(vec![sample]), FloatDType::F32).unwrap()
        };
        let scale = value(&drawn.images[0].values.clone().inner().square().mean());
        let own = loss(drawn.images.clone(), false);
        assert!(value(&own.mse) < 1e-9 * scale, "{} of {scale}", value(&own.mse));
        assert!(value(&loss(drawn.images.clone(), true).mse) > 1e-4 * scale);
        assert!(value(&loss(other.images.clone(), true).mse) < 1e-9 * scale);
        assert!(value(&loss(vec![image(18, 18, 5)], false).mse) > 1e-4);
    }
}
