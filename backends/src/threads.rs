//! [`Threads`]: how many threads the CPU computes with.

use rayon::prelude::*;

use crate::DeviceError;

/// A pool of threads for the CPU backend.
///
/// Without one, the CPU computes on rayon's global pool: one thread a core, or `RAYON_NUM_THREADS`.
pub struct Threads {
    pool: rayon::ThreadPool,
}

/// A pool that is much wider than the machine only takes memory and time to start.
const MAX_PER_CORE: usize = 16;

impl Threads {
    /// Starts `threads` threads; 0 means one a core.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Threads`] if there are more than 16 a core, or the system refuses.
    pub fn new(threads: usize) -> Result<Self, DeviceError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let max = cores.saturating_mul(MAX_PER_CORE);
        if threads > max {
            let reason = format!("this machine has {cores} cores, and {max} threads are the most that make sense");
            return Err(DeviceError::Threads { threads, reason });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| DeviceError::Threads { threads, reason: error.to_string() })?;
        Ok(Self { pool })
    }

    /// How many threads the CPU computes with here: those of the pool that this is [run on](Self::install), or else of
    /// rayon's global one.
    pub fn current() -> usize {
        rayon::current_num_threads()
    }

    /// Runs `work` on a thread of the pool that computes here. Every kernel goes there anyway, and from another thread that
    /// means to wake one and to wait for it; so it is cheaper to go there once for all of them.
    pub fn enter<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        rayon::scope(|_| work())
    }

    /// Runs `work` on each of `items`, on the threads that compute here: for what moves memory, which burn's own operations do
    /// on one.
    pub fn for_each<T: Send>(items: Vec<T>, work: impl Fn(T) + Send + Sync) {
        items.into_par_iter().for_each(work);
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
        assert_eq!(threads.install(Threads::current), 3);
        let (mut numbers, positions) = (vec![0; 50], (1..=50).collect::<Vec<_>>());
        Threads::for_each(numbers.iter_mut().zip(positions).collect(), |(number, position)| *number = position);
        assert_eq!(numbers.iter().sum::<i32>(), 51 * 25);
        assert!(matches!(Threads::new(1_000_000), Err(DeviceError::Threads { threads: 1_000_000, .. })));
    }
}
