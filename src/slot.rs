//! One part of the model in memory: loaded when it is needed, shared by all who use it, freed when told.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use nexus_checkpoint::weight_bytes;

use crate::Error;

/// A part of the model that may be in memory.
///
/// Who uses it holds an `Arc`, so that freeing a slot takes nothing from a request that runs.
pub(crate) struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Slot<T> {
    /// An empty slot.
    pub(crate) fn empty() -> Self {
        Self(Mutex::new(None))
    }

    /// What is loaded.
    pub(crate) fn get(&self) -> Option<Arc<T>> {
        lock(&self.0).clone()
    }

    /// What is loaded, after loading it if nothing is; who comes meanwhile waits, and nothing is loaded twice.
    ///
    /// # Errors
    /// Those of `load`; the slot then stays empty.
    pub(crate) fn get_or_load(&self, load: impl FnOnce() -> Result<T, Error>) -> Result<Arc<T>, Error> {
        let mut slot = lock(&self.0);
        if let Some(loaded) = &*slot {
            return Ok(loaded.clone());
        }
        Ok(slot.insert(Arc::new(load()?)).clone())
    }

    /// Lets go of what is loaded; it stays in memory until the last one who uses it is done.
    pub(crate) fn free(&self) {
        drop(lock(&self.0).take());
    }
}

impl<T: Module> Slot<T> {
    /// Bytes of the weights that are loaded; 0 if there are none.
    pub(crate) fn num_bytes(&self) -> usize {
        self.get().map_or(0, |loaded| weight_bytes(&*loaded))
    }
}

/// Locks what no panic can leave half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn a_slot_is_loaded_once_however_many_come() {
        let (slot, loads) = (Slot::empty(), AtomicUsize::new(0));
        let load = || {
            thread::sleep(std::time::Duration::from_millis(20));
            Ok(loads.fetch_add(1, Ordering::SeqCst))
        };
        thread::scope(|scope| {
            let users = [(); 4].map(|()| scope.spawn(|| slot.get_or_load(load).unwrap()));
            users.into_iter().for_each(|user| assert_eq!(*user.join().unwrap(), 0));
        });
        assert_eq!(loads.into_inner(), 1);
    }

    #[test]
    fn a_failed_load_leaves_it_empty_and_a_panic_does_too() {
        let slot = Slot::<usize>::empty();
        assert!(matches!(slot.get_or_load(|| Err(Error::Cancelled)), Err(Error::Cancelled)));
        let load = || slot.get_or_load(|| std::panic::resume_unwind(Box::new("no memory")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).is_err());
        assert!(slot.get().is_none());
        assert_eq!(*slot.get_or_load(|| Ok(7)).unwrap(), 7);
    }

    #[test]
    fn what_is_freed_lives_as_long_as_it_is_used() {
        let slot = Slot::empty();
        let used = slot.get_or_load(|| Ok(7)).unwrap();
        slot.free();
        assert!(slot.get().is_none());
        assert_eq!((*used, Arc::strong_count(&used)), (7, 1));
        assert_eq!(*slot.get_or_load(|| Ok(8)).unwrap(), 8);
    }
}
