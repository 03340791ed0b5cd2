//! Clocks that wait for the device, and what they find in repeated runs.

use burn::tensor::Device;
use web_time::Instant;

use super::quantile;
use crate::{Error, Result};

/// A clock that starts and stops when the device has nothing left to do. Devices compute behind the program's back: without
/// waiting for them, it is the asking that is timed.
#[derive(Debug)]
pub struct Clock<'a> {
    device: &'a Device,
    started: Instant,
}

impl<'a> Clock<'a> {
    /// Waits until the device has done what it was asked for, and starts.
    ///
    /// # Errors
    ///
    /// [`Error::Execution`] if something asked for before has failed.
    pub fn start(device: &'a Device) -> Result<Self> {
        sync(device)?;
        Ok(Self { device, started: Instant::now() })
    }

    /// Seconds from the start until the device has done what it was asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Execution`] if some of it has failed.
    pub fn seconds(&self) -> Result<f64> {
        sync(self.device)?;
        Ok(self.started.elapsed().as_secs_f64())
    }
}

fn sync(device: &Device) -> Result<()> {
    device.sync().map_err(|error| Error::Execution(error.to_string()))
}

/// How often something is run to time it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Repeats {
    /// Runs before those that are timed: they fill caches, and compile and tune kernels.
    pub warm_up: usize,
    /// Fewest timed runs; at least one is timed.
    pub min_runs: usize,
    /// Seconds for which timed runs go on.
    pub seconds: f64,
}

impl Default for Repeats {
    fn default() -> Self {
        Self { warm_up: 1, min_runs: 5, seconds: 0.5 }
    }
}

impl Repeats {
    /// One run, not warmed up: to see that something runs.
    pub fn once() -> Self {
        Self { warm_up: 0, min_runs: 1, seconds: 0.0 }
    }

    /// Times `work` on `device`.
    ///
    /// # Errors
    ///
    /// The first error of `work`; [`Error::Execution`] if the device fails.
    pub fn time(self, device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<Timing> {
        for _ in 0..self.warm_up {
            work()?;
        }
        let all = Clock::start(device)?;
        let mut timing = Timing::default();
        loop {
            let clock = Clock::start(device)?;
            work()?;
            timing.seconds.push(clock.seconds()?);
            if timing.seconds.len() >= self.min_runs && all.seconds()? >= self.seconds {
                return Ok(timing);
            }
        }
    }
}

/// Seconds of repeated runs.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Timing {
    /// Of each run, in order.
    pub seconds: Vec<f64>,
}

impl From<Vec<f64>> for Timing {
    fn from(seconds: Vec<f64>) -> Self {
        Self { seconds }
    }
}

impl Timing {
    /// The middle run; not a number if there is none.
    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// The fastest run: what the machine can do when nothing else disturbs it.
    pub fn least(&self) -> f64 {
        self.at(0.0)
    }

    /// The seconds between which the middle half of the runs lies.
    pub fn spread(&self) -> (f64, f64) {
        (self.at(0.25), self.at(0.75))
    }

    fn at(&self, q: f64) -> f64 {
        quantile(&self.seconds, q).unwrap_or(f64::NAN)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn work_runs_as_often_as_asked_and_its_error_ends_it() {
        let device = Device::flex();
        let mut runs = 0;
        let repeats = Repeats { warm_up: 2, min_runs: 4, seconds: 0.0 };
        let timing = repeats.time(&device, || {
            runs += 1;
            Ok(())
        });
        let timing = timing.unwrap();
        assert_eq!((runs, timing.seconds.len()), (6, 4));
        assert!(timing.least() >= 0.0 && timing.least() <= timing.median());

        let mut runs = 0;
        let failed = repeats.time(&device, || {
            runs += 1;
            if runs == 4 { Err(Error::EmptyBatch) } else { Ok(()) }
        });
        assert!(matches!(failed, Err(Error::EmptyBatch)) && runs == 4);
        assert_eq!(Repeats { min_runs: 0, ..Repeats::once() }.time(&device, || Ok(())).unwrap().seconds.len(), 1);
    }

    #[test]
    fn runs_go_on_for_the_time_given() {
        let repeats = Repeats { warm_up: 0, min_runs: 1, seconds: 0.02 };
        let pause = std::time::Duration::from_millis(5);
        let timing = repeats.time(&Device::flex(), || {
            std::thread::sleep(pause);
            Ok(())
        });
        let timing = timing.unwrap();
        assert!(timing.seconds.iter().sum::<f64>() > 0.015 && timing.least() >= pause.as_secs_f64());
    }

    #[test]
    fn the_spread_is_the_middle_half() {
        let timing = Timing::from(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((timing.least(), timing.median(), timing.spread()), (1.0, 3.0, (2.0, 4.0)));
        assert!(Timing::default().median().is_nan());
    }
}
