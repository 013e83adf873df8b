//! An image is data: whatever is in one that was decoded, checking it against this host neither panics nor hangs.

mod common;

use ckpt_core::backend::{RestoreOptions, Restorer, Skeleton};
use ckpt_core::error::{Refusal, RestoreError};
use ckpt_core::plan::Plan;
use ckpt_core::resource::memory::Filler;
use ckpt_core::{Image, Pid};

/// A restorer that has nothing against any image, and is asked for nothing else.
struct Agreeing;

impl Restorer for Agreeing {
    fn check(&self, _image: &Image) -> Vec<Refusal> {
        Vec::new()
    }
    fn skeleton(&self, _image: &Image) -> Result<Box<dyn Skeleton>, RestoreError> {
        unreachable!("a plan makes nothing")
    }
    fn renames(&self) -> bool {
        false
    }
    fn filler(&self) -> Box<dyn Filler> {
        unreachable!("a plan fills nothing")
    }
}

#[test]
fn any_image_can_be_checked() {
    let mut said = std::collections::BTreeSet::new();
    for seed in 0..2000 {
        let mut image = common::image_of(seed);
        // High ids, which are free: else that they are taken is all that is found.
        image.processes.iter_mut().for_each(|process| process.task.ppid = Pid(1));
        match Plan::new(&Agreeing, &image, &RestoreOptions::default()) {
            Ok(_) => {}
            Err(RestoreError::Refused(refusals)) => {
                said.extend(refusals.iter().map(|refusal| refusal.resource));
                for refusal in refusals {
                    assert!(!refusal.to_string().is_empty());
                }
            }
            Err(other) => panic!("seed {seed}: {other:?}"),
        }
    }
    // Nonsense is refused by more than one kind, or else nothing was asked.
    assert!(said.len() > 3, "only {said:?} had something to say");
}
