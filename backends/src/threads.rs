//! [`Threads`]: how many threads the CPU computes with.

use crate::DeviceError;

/// A pool of threads for the CPU backend.
///
/// Without one, the CPU computes on rayon's global pool: one thread a core, or `RAYON_NUM_THREADS`.
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// Starts `threads` threads; 0 means one a core.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Threads`] if the system refuses.
    pub fn new(threads: usize) -> Result<Self, DeviceError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| DeviceError::Threads { threads, reason: error.to_string() })?;
        Ok(Self { pool })
    }

    /// How many threads there are.
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` so that everything in it computes on these threads.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_on_the_pool() {
        let threads = Threads::new(3).unwrap();
        assert_eq!(threads.count(), 3);
        assert_eq!(threads.install(rayon::current_num_threads), 3);
    }
}
