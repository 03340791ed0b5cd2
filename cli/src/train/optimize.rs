//! The loss, its gradient, and what is done with it.

use gpt2_burn::burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use gpt2_burn::burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use gpt2_burn::burn::tensor::{Int, Tensor, activation};
use gpt2_burn::{Gpt2, Logits, Result, TokenBatch};

use super::data::Batch;

/// A learning rate that rises in a line and falls as a cosine (Loshchilov and Hutter, 2017).
pub struct Schedule {
    pub warmup: usize,
    pub steps: usize,
    pub largest: f64,
    pub smallest: f64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.largest * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
        self.smallest + 0.5 * (self.largest - self.smallest) * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

/// AdamW with decay on matrices only, and a bound on the gradient's norm.
pub struct Trainer {
    pub optimizer: ModuleOptimizer,
    grad_clip: f64,
}

impl Trainer {
    /// For the parameters of `model`.
    pub fn new(model: &Gpt2, weight_decay: f32, grad_clip: f64) -> Self {
        let adam = AdamWConfig::new().with_beta_2(0.99).with_epsilon(1e-8);
        let mut matrices = Matrices::default();
        model.visit(&mut matrices);
        let decayed = adam.clone().with_weight_decay(weight_decay).build();
        let optimizer = adam.with_weight_decay(0.0).init();
        Self { optimizer: optimizer.with_group(ParamGroup::from_ids(matrices.ids), decayed, None), grad_clip }
    }

    /// One step down the gradient; returns the model and the loss before the step.
    pub fn step(
        &mut self,
        model: Gpt2,
        batch: &Batch,
        teacher: Option<(&Gpt2, f64)>,
        learning_rate: f64,
    ) -> Result<(Gpt2, f64)> {
        let loss = loss(&model, batch, teacher)?;
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        clip(&mut grads, &model, self.grad_clip);
        Ok((self.optimizer.step(learning_rate, model, grads), value))
    }
}

/// Mean cross-entropy with the text; with a teacher, mixed with that with the teacher's distribution (Hinton et al.,
/// 2015, at temperature 1, since it is the target's own distribution that a draft is accepted by).
fn loss(model: &Gpt2, batch: &Batch, teacher: Option<(&Gpt2, f64)>) -> Result<Tensor<1>> {
    let log_probs = activation::log_softmax(logits(model, &batch.inputs)?, 1); // [N, V]
    let targets = TokenBatch::new(&batch.targets, model)?;
    let count = targets.tokens();
    let targets: Tensor<2, Int> = targets.ids().clone().reshape([count, 1]);
    let of_text = log_probs.clone().gather(1, targets).mean().neg();
    let Some((teacher, weight)) = teacher else { return Ok(of_text) };
    let wanted = activation::softmax(self::logits(teacher, &batch.inputs)?, 1);
    let wanted = Tensor::from_data(wanted.into_data(), &model.device());
    let of_teacher = (wanted * log_probs).sum().neg() / count as f64;
    Ok(of_teacher * weight + of_text * (1.0 - weight))
}

/// Of every token: `[N, V]`.
fn logits(model: &Gpt2, inputs: &[Vec<u32>]) -> Result<Tensor<2>> {
    model.forward(&TokenBatch::new(inputs, model)?, None, Logits::All)
}

/// Shortens the gradient of all parameters together to a norm (Pascanu et al., 2013).
fn clip(grads: &mut GradientsParams, model: &Gpt2, max: f64) {
    let mut norm = SquaredNorm { grads, total: 0.0 };
    model.visit(&mut norm);
    let norm = norm.total.sqrt();
    if norm > max {
        model.visit(&mut Scale { grads, factor: max / norm });
    }
}

struct SquaredNorm<'a> {
    grads: &'a GradientsParams,
    total: f64,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.total += f64::from(grad.square().sum().into_scalar::<f32>());
        }
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad * self.factor);
        }
    }
}

#[derive(Default)]
struct Matrices {
    ids: Vec<ParamId>,
}

impl ModuleVisitor for Matrices {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D == 2 {
            self.ids.push(param.id);
        }
    }
}
