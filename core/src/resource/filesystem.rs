//! Root, current directory and umask.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::resource::files::{self, Expect, Identity, Located};
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource};

/// Where a process is in the file system (`struct fs_struct` of the kernel).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filesystem {
    /// Seen from ckpt's root, as every path of an image.
    pub cwd: Directory,
    /// `None`: the root that ckpt has.
    pub root: Option<Directory>,
    pub umask: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    pub path: PathBuf,
    pub identity: Identity,
}

/// Root, current directory and umask.
pub struct ProcessFilesystem;

impl Resource for ProcessFilesystem {
    const NAME: &'static str = "filesystem";
    type Scope = OfProcess;
    type Saved = Filesystem;

    fn collect(context: &mut Collect<'_>) -> Result<Filesystem, DumpError> {
        let cwd = collect_directory(context, "cwd", "current directory")?;
        let root = collect_directory(context, "root", "root directory")?;
        let ours = nix::sys::stat::stat("/")
            .map_err(|errno| DumpError::Io { what: "the root directory of ckpt".into(), source: errno.into() })?;
        let chrooted = (root.identity.device, root.identity.inode) != (ours.st_dev, ours.st_ino);
        let umask = context.answers[0].status.field("Umask").and_then(|umask| u32::from_str_radix(umask, 8).ok());
        let umask = umask.ok_or_else(|| {
            context
                .io_error("status shows no Umask: the kernel is older than 4.7", std::io::ErrorKind::Unsupported.into())
        })?;
        Ok(Filesystem { cwd, root: chrooted.then_some(root), umask })
    }

    fn check(saved: &Filesystem, context: &mut Check<'_>) {
        check_directory(&saved.cwd, "current directory", context);
        if let Some(root) = &saved.root {
            check_directory(root, "root directory", context);
        }
        if saved.umask & !0o777 != 0 {
            context.refuse("umask", format!("{:o} is no umask", saved.umask), "use another copy of the image");
        }
    }

    fn rebuild(saved: &Filesystem, context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        // The current directory may be outside of the root: it is found before the root changes.
        let cwd = batch.string(saved.cwd.path.as_os_str().as_bytes());
        let chdir = batch.try_call(Sysno::chdir, args![cwd]);
        let mut chroot = None;
        if let Some(root) = &saved.root {
            let path = batch.string(root.path.as_os_str().as_bytes());
            chroot = Some((root, batch.try_call(Sysno::chroot, args![path])));
        }
        batch.call(Sysno::umask, args![saved.umask]);
        let replies = context.run(&batch)?;
        let error = |what: &str, directory: &Directory| {
            let what = format!("process {}: the {what} {}", context.pid(), directory.path.display());
            move |errno: nix::errno::Errno| RestoreError::Io { what, source: errno.into() }
        };
        replies.result(chdir).map_err(error("current directory", &saved.cwd))?;
        if let Some((root, chroot)) = chroot {
            replies.result(chroot).map_err(error("root directory", root))?;
        }
        Ok(())
    }
}

fn collect_directory(context: &mut Collect<'_>, link: &str, what: &str) -> Result<Directory, DumpError> {
    let proc = context.target.proc();
    let looked = proc.link(link).and_then(|name| Ok((name, proc.stat(link)?)));
    let (name, stat) = looked.map_err(|source| context.io_error(link, source))?;
    let identity = Identity::of(&stat);
    let path = match files::locate(&name, &stat) {
        Located::Path(path) => path,
        Located::Deleted => {
            context.refuse(
                format!("{what} ({})", name.display()),
                "the directory was deleted",
                "have the program change to another directory before the dump",
            );
            PathBuf::from("/")
        }
        Located::Elsewhere(why) => {
            context.refuse(format!("{what} ({})", name.display()), why, "");
            PathBuf::from("/")
        }
    };
    Ok(Directory { path, identity })
}

fn check_directory(saved: &Directory, what: &str, context: &mut Check<'_>) {
    let subject = format!("{what} {}", saved.path.display());
    if !saved.path.is_absolute() {
        return context.refuse(subject, "it is not a full path", "use another copy of the image");
    }
    let host = &context.image.host;
    if let Some(difference) = saved.identity.difference(&saved.path, libc::S_IFDIR, Expect::Present, host) {
        context.refuse(subject, difference, "make the directory again");
    }
}
