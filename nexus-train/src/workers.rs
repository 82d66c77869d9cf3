//! Work side by side: items -> one thread pool for each share of them -> results in order.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::TrainError;

/// Thread pools that share the threads of the process.
pub(crate) struct Workers {
    pools: Vec<ThreadPool>,
}

impl Workers {
    /// `count` workers; with one, work stays on the calling thread.
    pub(crate) fn new(count: usize) -> Result<Self, TrainError> {
        let threads = (rayon::current_num_threads() / count.max(1)).max(1);
        let pool = || ThreadPoolBuilder::new().num_threads(threads).build();
        let pools = (1..=count).filter(|_| count > 1).map(|_| pool()).collect::<Result<_, _>>();
        pools.map(|pools| Self { pools }).map_err(|error| TrainError::Workers { count, reason: error.to_string() })
    }

    /// Number of workers.
    pub(crate) fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// Results of all items in order; each worker does a contiguous share of them.
    pub(crate) fn map<I: Send, O: Send>(&self, items: Vec<I>, run: impl Fn(I) -> O + Sync) -> Vec<O> {
        if self.pools.is_empty() || items.len() < 2 {
            return items.into_iter().map(run).collect();
        }
        let share = items.len().div_ceil(self.count());
        let mut items = items.into_iter();
        let run = &run;
        std::thread::scope(|scope| {
            let begin = |pool| {
                let share: Vec<I> = items.by_ref().take(share).collect();
                scope.spawn(move || ThreadPool::install(pool, || share.into_iter().map(run).collect::<Vec<O>>()))
            };
            let begun: Vec<_> = self.pools.iter().map(begin).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<O>>| match thread.join() {
                Ok(results) => results,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            begun.into_iter().flat_map(join).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread::current,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        for count in [1, 2, 3, 8] {
            let workers = Workers::new(count).unwrap();
            assert_eq!(workers.count(), count);
            for length in [0, 1, 2, 5, 9] {
                let expected: Vec<usize> = (0..length).map(|item| item * item).collect();
                assert_eq!(workers.map((0..length).collect(), |item| item * item), expected, "{count} of {length}");
            }
        }
    }

    #[test]
    fn two_workers_work_at_the_same_time() {
        let begun = AtomicUsize::new(0);
        let met = Workers::new(2).unwrap().map(vec![(), ()], |()| {
            begun.fetch_add(1, Ordering::SeqCst);
            let patience = Instant::now();
            while begun.load(Ordering::SeqCst) < 2 && patience.elapsed() < Duration::from_secs(20) {
                std::thread::yield_now();
            }
            begun.load(Ordering::SeqCst) == 2
        });
        assert_eq!(met, [true, true]);
        assert!(Workers::new(1).unwrap().map(vec![(), ()], |()| current().id()).iter().all(|&id| id == current().id()));
    }
}
