//! How far a pipeline is, for whoever shows it to a person.

/// A step of the dump or the restore, in the words of the [pipelines](crate).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    // dump
    Freeze,
    Collect,
    WritePages,
    Publish,
    LetGo,
    // restore
    Plan,
    Skeleton,
    Rebuild,
    ReadPages,
}

/// Is told how far a pipeline is. Called between the steps of a freeze: an implementation must be quick.
pub trait Progress: Send {
    fn phase(&mut self, phase: Phase);

    /// Bytes of pages moved so far in this phase, and of how many, where that is known.
    fn bytes(&mut self, done: u64, total: Option<u64>);
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn phase(&mut self, _phase: Phase) {}
    fn bytes(&mut self, _done: u64, _total: Option<u64>) {}
}

/// Adds up the bytes of one phase over all processes.
pub struct Meter<'a> {
    progress: &'a mut dyn Progress,
    done: u64,
    total: Option<u64>,
}

impl<'a> Meter<'a> {
    pub fn new(progress: &'a mut dyn Progress, phase: Phase, total: Option<u64>) -> Meter<'a> {
        progress.phase(phase);
        Meter { progress, done: 0, total }
    }

    /// So many bytes more.
    pub fn add(&mut self, bytes: u64) {
        self.done += bytes;
        self.progress.bytes(self.done, self.total);
    }

    /// So many bytes are now known to come.
    pub fn expect(&mut self, bytes: u64) {
        *self.total.get_or_insert(0) += bytes;
    }
}

impl Meter<'static> {
    /// For work whose progress is shown elsewhere.
    pub fn silent() -> Meter<'static> {
        Meter { progress: Box::leak(Box::new(Silent)), done: 0, total: None }
    }
}
