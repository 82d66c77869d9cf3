//! Ctrl-C: the first asks the work to stop at its next event, the second ends the program at once.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use signal_hook::{consts::SIGINT, flag};

/// Whether Ctrl-C was pressed.
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    /// While nothing is at work, Ctrl-C ends the program.
    idle: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes Ctrl-C over from the system.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn listen() -> io::Result<Self> {
        let (asked, idle) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        // In this order: the second Ctrl-C finds the flag of the first.
        for condition in [&asked, &idle] {
            flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(condition))?;
        }
        flag::register(SIGINT, Arc::clone(&asked))?;
        Ok(Self { asked, idle })
    }

    /// Whether the work is to stop.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Waits for something that Ctrl-C may end the program in; what was asked before is forgotten.
    pub fn while_idle<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.asked.store(false, Ordering::SeqCst);
        self.idle.store(true, Ordering::SeqCst);
        let result = wait();
        self.idle.store(false, Ordering::SeqCst);
        result
    }
}
