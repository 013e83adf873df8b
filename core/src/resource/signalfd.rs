//! Signal descriptors (`signalfd`): the mask, from `/proc/PID/fdinfo`. What is pending belongs to the processes.

use crate::args;
use crate::batch::{Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FdInfo, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signalfd {
    /// The signals it accepts, bit `n-1` for signal `n`.
    pub mask: u64,
}

/// Signal descriptors.
pub struct Signalfds;

impl Resource for Signalfds {
    const NAME: &'static str = "signalfd";
    type Scope = OfFile;
    type Saved = Signalfd;

    fn collect(context: &mut CollectFile<'_>) -> Result<Signalfd, DumpError> {
        let mask = mask(&context.seen.info);
        if mask.is_none() {
            context.refuse(format!("its fdinfo has an unknown form: {:?}", context.seen.info.rest), "");
        }
        Ok(Signalfd { mask: mask.unwrap_or_default() })
    }

    fn check(_saved: &Signalfd, _context: &mut Check<'_>) {
        // It depends on nothing that a host may lack.
    }

    fn rebuild(saved: &Signalfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        context.create(process, 1, 16, |batch| {
            let mask = batch.words(&[saved.mask]);
            (batch.call(Sysno::signalfd4, args![-1, mask, 8, 0]), |_: &Replies| Ok(()))
        })
    }
}

impl FileResource for Signalfds {
    fn claims(seen: &Seen) -> bool {
        seen.is_anon_inode("[signalfd]")
    }

    fn finish(_saved: &Signalfd, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// `sigmask`, hexadecimal.
fn mask(info: &FdInfo) -> Option<u64> {
    u64::from_str_radix(info.field("sigmask")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_hexadecimal() {
        let info =
            FdInfo::parse("pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t4\nsigmask:\t8000000000004a00\n").unwrap();
        assert_eq!(mask(&info), Some(0x8000_0000_0000_4a00));
    }
}
