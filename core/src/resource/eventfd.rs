//! Event counters (`eventfd`): the count and whether it is a semaphore, from `/proc/PID/fdinfo`.

use crate::args;
use crate::batch::{Replies, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FdInfo, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eventfd {
    pub count: u64,
    /// `EFD_SEMAPHORE`: a read takes one.
    pub semaphore: bool,
}

/// Event counters.
pub struct Eventfds;

impl Resource for Eventfds {
    const NAME: &'static str = "eventfd";
    type Scope = OfFile;
    type Saved = Eventfd;

    fn collect(context: &mut CollectFile<'_>) -> Result<Eventfd, DumpError> {
        let count = count(&context.seen.info);
        let semaphore = context.seen.info.field("eventfd-semaphore");
        if semaphore.is_none() {
            context.refuse(
                "this kernel does not say whether it is a semaphore",
                "use a kernel that shows eventfd-semaphore in fdinfo (6.5 and later)",
            );
        }
        match count {
            Some(u64::MAX) => context.refuse("the counter has overflowed", "have the program read it before the dump"),
            None => context.refuse(format!("its fdinfo has an unknown form: {:?}", context.seen.info.rest), ""),
            Some(_) => {}
        }
        Ok(Eventfd { count: count.unwrap_or_default(), semaphore: semaphore == Some("1") })
    }

    fn check(_saved: &Eventfd, _context: &mut Check<'_>) {
        // It depends on nothing that a host may lack.
    }

    fn rebuild(saved: &Eventfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        context.create(process, 2, 16, |batch| {
            let flags = libc::EFD_NONBLOCK | if saved.semaphore { libc::EFD_SEMAPHORE } else { 0 };
            let fd = batch.call(Sysno::eventfd2, args![0, flags]);
            if saved.count != 0 {
                // The argument of eventfd2 has only 32 bits.
                let count = batch.words(&[saved.count]);
                batch.call(Sysno::write, args![fd, count, 8]);
            }
            (fd, |_: &Replies| Ok(()))
        })
    }
}

impl FileResource for Eventfds {
    fn claims(seen: &Seen) -> bool {
        seen.is_anon_inode("[eventfd]")
    }

    fn finish(_saved: &Eventfd, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// `eventfd-count`, hexadecimal.
fn count(info: &FdInfo) -> Option<u64> {
    u64::from_str_radix(info.field("eventfd-count")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_hexadecimal() {
        let info = FdInfo::parse(
            "pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t4\neventfd-count:               1f\neventfd-id: 9\neventfd-semaphore: 1\n",
        )
        .unwrap();
        assert_eq!(count(&info), Some(31));
        assert_eq!(info.field("eventfd-semaphore"), Some("1"));
    }
}
