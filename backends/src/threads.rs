//! [`Threads`]: how many threads the CPU computes with.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::DeviceError;

/// A pool of threads for the CPU backend.
///
/// Without one, the CPU computes on rayon's global pool: one thread a core, or `RAYON_NUM_THREADS`.
pub struct Threads {
    pool: rayon::ThreadPool,
}

thread_local! {
    /// Whether this is a thread of a pool for what runs [apart](Threads::apart).
    static IS_APART: Cell<bool> = const { Cell::new(false) };
}

/// The pool for what runs [apart](Threads::apart) on so many threads; none if the system refuses.
fn own_pool(threads: usize) -> Option<Arc<rayon::ThreadPool>> {
    static POOLS: Mutex<BTreeMap<usize, Arc<rayon::ThreadPool>>> = Mutex::new(BTreeMap::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get(&threads) {
        return Some(pool.clone());
    }
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(|_| IS_APART.set(true));
    let pool = Arc::new(builder.build().ok()?);
    pools.insert(threads, pool.clone());
    Some(pool)
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

    /// Runs `work` on threads of its own, of which there are as many as compute here, while this one waits and does nothing else: for
    /// what holds a lock for which others of these threads may wait. On a thread of a pool, waiting for other work of the pool means to
    /// do some of it meanwhile, and that may be what waits for the lock.
    pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        // Where there can be no other threads, nobody waits on one.
        let Some(pool) = (!IS_APART.get()).then(|| own_pool(Self::current())).flatten() else { return work() };
        if rayon::current_thread_index().is_none() {
            return pool.install(work);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| pool.install(work)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
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

    /// With a lock held on threads of the pool, two of these would wait for each other forever.
    #[test]
    fn what_holds_a_lock_runs_apart_from_what_waits_for_it() {
        let (lock, threads) = (Mutex::new(0), Threads::new(2).unwrap());
        let add = |_| {
            let mut sum = lock.lock().unwrap();
            let counted = || (0..1000).into_par_iter().map(|_| rayon::current_num_threads() / 2).sum::<usize>();
            *sum += Threads::apart(|| Threads::apart(counted));
        };
        threads.install(|| (0..50).into_par_iter().for_each(add));
        Threads::apart(|| (0..2).for_each(add));
        assert_eq!(*lock.lock().unwrap(), 52_000);
        let panics = || threads.install(|| Threads::apart(|| panic!("it is told")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
    }

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
