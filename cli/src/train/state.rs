//! What a run is made of, on disk and back.

use std::fs;
use std::path::Path;

use gpt2_burn::Gpt2;
use gpt2_burn::burn::module::Module;
use gpt2_burn::burn::store::ModuleRecord;

use super::optimize::Trainer;
use crate::args::Failure;

const CURRENT: &str = "checkpoint";
const PREVIOUS: &str = "checkpoint.old";

/// A run between two steps.
pub struct State {
    pub model: Gpt2,
    pub trainer: Trainer,
    /// Steps done.
    pub step: usize,
}

impl State {
    /// The run that was interrupted in `folder`, or a new one.
    pub fn resume(folder: &Path, model: Gpt2, trainer: impl Fn(&Gpt2) -> Trainer) -> Result<Self, Failure> {
        // Between two renames there is only the one before.
        let folders = [CURRENT, PREVIOUS].map(|name| folder.join(name));
        let Some(folder) = folders.into_iter().find(|folder| folder.exists()) else {
            let trainer = trainer(&model);
            return Ok(Self { model, trainer, step: 0 });
        };
        let model = model.load_record(ModuleRecord::load(folder.join("model.bpk"))?);
        // The record brings its own parameter ids, by which the trainer knows what to decay.
        let mut trainer = trainer(&model);
        trainer.optimizer = trainer.optimizer.load(folder.join("optimizer.bpk"))?;
        let step = fs::read_to_string(folder.join("step"))?.trim().parse()?;
        Ok(Self { model, trainer, step })
    }

    /// Writes the run so that there is a whole one at any moment.
    pub fn save(&self, folder: &Path) -> Result<(), Failure> {
        let [new, current, previous] = ["checkpoint.new", CURRENT, PREVIOUS].map(|name| folder.join(name));
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        fs::create_dir_all(&new)?;
        self.model.clone().into_record().save(new.join("model.bpk"))?;
        self.trainer.optimizer.save(new.join("optimizer.bpk"))?;
        fs::write(new.join("step"), self.step.to_string())?;
        if current.exists() {
            if previous.exists() {
                fs::remove_dir_all(&previous)?;
            }
            fs::rename(&current, &previous)?;
        }
        fs::rename(new, current)?;
        if previous.exists() {
            fs::remove_dir_all(previous)?;
        }
        Ok(())
    }
}
