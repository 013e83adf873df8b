//! Programs that want to know: they are asked before a dump whether they may be saved, and told what became of it.
//!
//! It does not depend on the backend that dumps. Whoever can ask them registers a [`Consent`]; a tree that nobody wants to
//! be asked in is not touched.

use std::time::Instant;

use crate::backend::{DumpOptions, Dumper, Frozen, FrozenProcess};
use crate::error::DumpError;
use crate::target::Pid;

/// A way to ask programs, as `inventory` holds it.
pub struct Consent {
    pub begin: fn() -> Box<dyn Asking>,
}

inventory::collect!(Consent);

/// The programs that were asked for one dump. Dropped, they learn that nothing came of it.
pub trait Asking {
    /// Asks those under `root` that were not asked yet, and waits until all agree.
    ///
    /// # Errors
    /// When one does not agree, or not before the deadline.
    fn ask(&mut self, root: Pid, deadline: Instant) -> Result<(), DumpError>;
    /// Whether nobody in a frozen tree wants to be asked that was not.
    fn covers(&self, tree: &[FrozenProcess]) -> bool;
    /// They are in an image.
    fn saved(self: Box<Self>);
}

/// All that were asked for one dump.
pub struct Consents(Vec<Box<dyn Asking>>);

impl Consents {
    pub fn saved(self) {
        self.0.into_iter().for_each(Asking::saved);
    }
}

/// Freezes a tree in which everybody agrees.
pub fn freeze(dumper: &dyn Dumper, root: Pid, options: &DumpOptions) -> Result<(Consents, Box<dyn Frozen>), DumpError> {
    let deadline = Instant::now() + options.timeout;
    let mut consents = Consents(inventory::iter::<Consent>.into_iter().map(|way| (way.begin)()).collect());
    loop {
        consents.0.iter_mut().try_for_each(|asking| asking.ask(root, deadline))?;
        let frozen = dumper.freeze(root, options)?;
        if consents.0.iter().all(|asking| asking.covers(frozen.processes())) {
            return Ok((consents, frozen));
        }
        // Somebody has come, or has just begun to want it.
        frozen.thaw()?;
        if Instant::now() >= deadline {
            return Err(DumpError::Changed {
                pid: root,
                what: "went on starting programs that want to be asked".into(),
            });
        }
    }
}
