//! What the programs of a job ask of the ckpt that waits for it: to be saved now (`ckpt_now`).

use std::io;
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::rc::Rc;

use ckpt_core::dump::After;
use ckpt_core::{Backend, DumpError, Pid, StoreError, TargetError};
use ckpt_preload::interface::{Manager, Requested};

use crate::failure::Refused;
use crate::periodic::{self, Keeper};
use crate::supervise::Chore;

/// Listens before there is a job, so that none asks in vain.
pub struct Listener(Option<Manager>);

impl Listener {
    pub fn new() -> Listener {
        let manager = Manager::new();
        if let Err(error) = &manager {
            tracing::warn!("programs cannot ask to be saved: {error}");
        }
        Listener(manager.ok())
    }

    /// For a job, and the directory of its own where it has one.
    pub fn serve(self, root: Pid, keeper: Option<Rc<Keeper>>) -> Requests {
        Requests { manager: self.0, root, keeper }
    }
}

pub struct Requests {
    manager: Option<Manager>,
    root: Pid,
    keeper: Option<Rc<Keeper>>,
}

impl Requests {
    fn grant(&self, requested: &Requested) -> Result<(), (i32, Option<anyhow::Error>)> {
        if !requested.is_below(self.root) {
            return Err((libc::EPERM, None));
        }
        let saved = match (&requested.image, &self.keeper) {
            // What this user may write is for him to say.
            (Some(_), _) if requested.uid != nix::unistd::geteuid().as_raw() => return Err((libc::EPERM, None)),
            (Some(image), _) => {
                // Requests come from the shim alone.
                let backend: anyhow::Result<&Backend> = crate::backends::find(Some("preload"));
                backend.and_then(|backend| periodic::save_into(backend, self.root, image, After::LeaveRunning))
            }
            (None, Some(keeper)) => keeper.save(After::LeaveRunning).map(drop),
            (None, None) => return Err((libc::EDESTADDRREQ, None)),
        };
        saved.map_err(|error| (errno(&error), Some(error)))
    }
}

impl Chore for Requests {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.manager.as_ref().map(Manager::fd)
    }

    fn work(&mut self) -> anyhow::Result<()> {
        while let Some(requested) = self.manager.as_ref().and_then(Manager::next) {
            match self.grant(&requested) {
                Ok(()) => requested.tell(0),
                Err((errno, error)) => {
                    if let Some(error) = error {
                        periodic::not_saved(self.root, error);
                    }
                    requested.tell(errno);
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, _signal: i32) -> Option<Option<ExitCode>> {
        None
    }
}

/// The number that says best what was in the way, as `ckpt.h` lists them.
fn errno(error: &anyhow::Error) -> i32 {
    let of = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    for cause in error.chain() {
        if cause.is::<Refused>() {
            return libc::ENOTSUP;
        }
        let store = match cause.downcast_ref() {
            Some(DumpError::NotNow { .. }) => return libc::EBUSY,
            Some(DumpError::Unsupported(_) | DumpError::NotDumpable { .. }) => return libc::ENOTSUP,
            Some(DumpError::NotPermitted { .. }) => return libc::EPERM,
            Some(DumpError::FreezeTimedOut { .. }) => return libc::ETIMEDOUT,
            Some(DumpError::Interrupted) => return libc::ECANCELED,
            Some(
                DumpError::Io { source, .. } | DumpError::Target { source: TargetError::Driver { source, .. }, .. },
            ) => {
                return of(source);
            }
            Some(DumpError::Store(store)) => Some(store),
            _ => cause.downcast_ref(),
        };
        match store {
            Some(StoreError::Io { source, .. }) => return of(source),
            Some(StoreError::Directory { .. }) => return libc::EINVAL,
            _ => {}
        }
        if let Some(source) = cause.downcast_ref::<io::Error>() {
            return of(source);
        }
    }
    libc::EIO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_learns_what_was_in_the_way() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let not_now = DumpError::NotNow { pid: Pid(1), why: String::new(), help: String::new() };
        for (error, number) in [
            (anyhow::Error::from(not_now), libc::EBUSY),
            (DumpError::Unsupported(Vec::new()).into(), libc::ENOTSUP),
            (DumpError::Io { what: String::new(), source: full() }.into(), libc::ENOSPC),
            (DumpError::Store(StoreError::Io { path: "i".into(), what: "", source: full() }).into(), libc::ENOSPC),
            (anyhow::Error::from(full()).context("a link"), libc::ENOSPC),
            (anyhow::anyhow!("else"), libc::EIO),
        ] {
            assert_eq!(errno(&error), number, "{error:?}");
        }
    }
}
