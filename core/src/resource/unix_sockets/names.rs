//! Names of Unix sockets: whether they can be had, and where they are bound.

use std::io::Read;

use super::*;
use crate::ourselves::{Capability, ourselves};

/// Whether a socket can be bound to a path: nothing is there, or what is there is the file of a socket that is no more.
pub(super) fn is_free(path: &Path) -> Result<(), (String, String)> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        let why = format!("its directory {} is not there", directory.display());
        return Err((why, "make the directory".into()));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err((format!("its path cannot be looked at: {error}"), "run ckpt with the privilege".into())),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(("another file is at its path".into(), format!("move {} away", path.display())))
        }
        Ok(_) if is_dead(path) => Ok(()),
        Ok(_) => Err(("another socket is bound to its path".into(), "end the program that has it open".into())),
    }
}

/// Whether no socket is bound to the file any more: a connection is refused, rather than made or of the wrong type.
pub(super) fn is_dead(path: &Path) -> bool {
    let refused = |error: std::io::Error| error.raw_os_error() == Some(libc::ECONNREFUSED);
    UnixDatagram::unbound().and_then(|probe| probe.connect(path)).is_err_and(refused)
}

pub(super) fn is_abstract_free(saved: &UnixSocket) -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
    let kind = match saved.kind {
        libc::SOCK_STREAM => SockType::Stream,
        libc::SOCK_DGRAM => SockType::Datagram,
        _ => SockType::SeqPacket,
    };
    let Ok(probe) = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None) else { return true };
    let Ok(address) = UnixAddr::new_abstract(&saved.name[1..]) else { return false };
    bind(std::os::fd::AsRawFd::as_raw_fd(&probe), &address) != Err(Errno::EADDRINUSE)
}

/// The directory that the name of a bound file is relative to; `/` for an absolute one.
pub(super) fn directory_of(saved: &UnixSocket, path: &Path) -> Option<PathBuf> {
    let name = OsStr::from_bytes(&saved.name);
    if name.as_bytes().first() == Some(&b'/') {
        return (path == Path::new(name)).then(|| PathBuf::from("/"));
    }
    let whole = path.as_os_str().as_bytes();
    let base = whole.strip_suffix(name.as_bytes())?.strip_suffix(b"/")?;
    Some(PathBuf::from(OsStr::from_bytes(if base.is_empty() { b"/" } else { base })))
}

/// Whether a path has `..` in it.
pub(super) fn leads_upwards(name: &[u8]) -> bool {
    Path::new(OsStr::from_bytes(name)).components().any(|component| component == Component::ParentDir)
}

/// A directory that stands for the root, or for the current directory, while a name is bound that nobody must find.
pub(super) struct Hideout {
    directory: PathBuf,
    absolute: bool,
}

impl Hideout {
    pub(super) fn new(context: &RebuildFile<'_>, name: &[u8]) -> Result<Hideout, RestoreError> {
        let name = Path::new(OsStr::from_bytes(name));
        if leads_upwards(name.as_os_str().as_bytes()) {
            return Err(context.mismatch(format!("its name {} leads upwards, and its file is gone", name.display())));
        }
        // A name that nobody has, nor can have guessed: another pid namespace may have a ckpt with our pid.
        let directory = std::env::temp_dir().join(".ckpt-sockets-XXXXXX");
        let directory = nix::unistd::mkdtemp(&directory).map_err(|errno| RestoreError::Io {
            what: format!("a directory like {}", directory.display()),
            source: errno.into(),
        })?;
        let hideout = Hideout { directory, absolute: name.is_absolute() };
        let below = name.strip_prefix("/").unwrap_or(name).parent().unwrap_or(Path::new(""));
        let whole = hideout.directory.join(below);
        let levels = below.components().count();
        // Other users go through them.
        let made = std::fs::create_dir_all(&whole).and_then(|()| {
            whole
                .ancestors()
                .take(levels + 1)
                .try_for_each(|directory| std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)))
        });
        made.map_err(|source| RestoreError::Io { what: hideout.directory.display().to_string(), source })?;
        Ok(hideout)
    }

    /// Adds calls that go in. What they give is for [`leave`](Hideout::leave).
    fn enter(&self, batch: &mut Batch) -> [CallId; 2] {
        let open = |batch: &mut Batch, path: &[u8]| {
            let path = batch.string(path);
            let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
            batch.call(Sysno::openat, args![libc::AT_FDCWD, path, flags])
        };
        let back = [open(batch, b"/"), open(batch, b".")];
        let directory = batch.string(self.directory.as_os_str().as_bytes());
        batch.call(Sysno::chdir, args![directory]);
        if self.absolute {
            batch.call(Sysno::chroot, args![directory]);
        }
        back
    }

    fn leave(&self, batch: &mut Batch, [root, current]: [CallId; 2]) {
        if self.absolute {
            let here = batch.string(b".");
            batch.call(Sysno::fchdir, args![root]);
            batch.call(Sysno::chroot, args![here]);
        }
        batch.call(Sysno::fchdir, args![current]);
        batch.call(Sysno::close, args![root]);
        batch.call(Sysno::close, args![current]);
    }
}

impl Drop for Hideout {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A path that is bound where it leads to, without the privilege to have another root directory. What is there is out of
/// the way as long as this lives, and so is what was bound, from right after the call on: the name stays with the socket, and
/// whoever else uses it finds nothing.
pub(super) struct Aside {
    path: PathBuf,
    directory: PathBuf,
    /// Of the socket, in that directory.
    bound: String,
    /// Of what was there before, in that directory.
    kept: String,
}

impl Aside {
    fn new(path: &Path) -> Result<Aside, RestoreError> {
        let error = |source| RestoreError::Io { what: path.display().to_string(), source };
        let directory = path.parent().unwrap_or(Path::new("/"));
        // Nobody can have guessed it.
        let mut random = [0; 8];
        std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).map_err(error)?;
        let name = |what: &str| format!(".ckpt-{what}-{:016x}", u64::from_ne_bytes(random));
        let aside = Aside {
            path: path.to_path_buf(),
            directory: directory.to_path_buf(),
            bound: name("bound"),
            kept: name("kept"),
        };
        match std::fs::rename(path, directory.join(&aside.kept)) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(error(source)),
            _ => Ok(aside),
        }
    }

    /// Adds the call that takes away what was just bound.
    fn add_move(&self, batch: &mut Batch) {
        let (from, to) = (batch.string(self.path.as_os_str().as_bytes()), batch.string(self.bound.as_bytes()));
        batch.call(Sysno::renameat, args![libc::AT_FDCWD, from, libc::AT_FDCWD, to]);
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.directory.join(&self.bound));
        let _ = std::fs::rename(self.directory.join(&self.kept), &self.path);
    }
}

/// Adds calls with `inner` in a directory.
fn in_directory<T>(batch: &mut Batch, directory: &Path, inner: impl FnOnce(&mut Batch) -> T) -> T {
    let here = batch.string(b".");
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let back = batch.call(Sysno::openat, args![libc::AT_FDCWD, here, flags]);
    let directory = batch.string(directory.as_os_str().as_bytes());
    batch.call(Sysno::chdir, args![directory]);
    let result = inner(batch);
    batch.call(Sysno::fchdir, args![back]);
    batch.call(Sysno::close, args![back]);
    result
}

/// Where a name is to be used.
pub(super) enum Place {
    /// Where it is found by everybody: an abstract name, or a path that others use.
    Open,
    Hidden(Hideout),
    Aside(Aside),
    /// A relative path, from its directory.
    In(PathBuf),
}

impl Place {
    /// Adds calls with `inner` at this place.
    pub(super) fn at<T>(&self, batch: &mut Batch, inner: impl FnOnce(&mut Batch) -> T) -> T {
        match self {
            Place::Open => inner(batch),
            Place::Hidden(hideout) => {
                let back = hideout.enter(batch);
                let result = inner(batch);
                hideout.leave(batch, back);
                result
            }
            Place::Aside(aside) => in_directory(batch, &aside.directory, inner),
            Place::In(directory) => in_directory(batch, directory, inner),
        }
    }

    /// The name by which the socket that is bound here is reached from here.
    pub(super) fn leads_to<'a>(&'a self, name: &'a [u8]) -> &'a [u8] {
        match self {
            Place::Aside(aside) => aside.bound.as_bytes(),
            Place::Open | Place::Hidden(_) | Place::In(_) => name,
        }
    }
}

/// Where a name that nobody else shall use is bound: an abstract one has no other place.
pub(super) fn hidden(context: &RebuildFile<'_>, name: &[u8]) -> Result<Place, RestoreError> {
    Ok(match name {
        [0, ..] => Place::Open,
        [b'/', ..] if !ourselves().may(Capability::SYS_CHROOT) => {
            Place::Aside(Aside::new(Path::new(OsStr::from_bytes(name)))?)
        }
        _ => Place::Hidden(Hideout::new(context, name)?),
    })
}

/// Whether [`hidden`] can have a path, as far as that can be told beforehand.
pub(super) fn can_be_hidden(name: &[u8]) -> Result<(), (String, String)> {
    if name.first() != Some(&b'/') || ourselves().may(Capability::SYS_CHROOT) {
        return Ok(());
    }
    let path = Path::new(OsStr::from_bytes(name));
    let directory = path.parent().unwrap_or(Path::new("/"));
    let elsewhere = |(why, help)| (why, format!("{help}, or give ckpt CAP_SYS_CHROOT"));
    is_free(path).map_err(elsewhere)?;
    nix::unistd::access(directory, nix::unistd::AccessFlags::W_OK).map_err(|errno| {
        let why = format!("its directory {} cannot be written to: {}", directory.display(), errno.desc());
        elsewhere((why, "run ckpt as the user whose directory it is".into()))
    })
}

/// Where a socket of the image is bound. A dead file that is in the way is removed.
pub(super) fn place_of(context: &RebuildFile<'_>, saved: &UnixSocket) -> Result<Place, RestoreError> {
    let Some(file) = &saved.file else { return hidden(context, &saved.name) };
    let path = &file.path;
    if let Err((why, _)) = is_free(path) {
        return Err(context.mismatch(format!("{}: {why}", show(&saved.name))));
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(RestoreError::Io { what: format!("removing the old {}", path.display()), source });
        }
        _ => {}
    }
    let directory = directory_of(saved, path);
    let directory = directory.ok_or_else(|| context.mismatch("its path does not end in its name"))?;
    Ok(if saved.name[0] == b'/' { Place::Open } else { Place::In(directory) })
}

/// Adds the call that binds, so that the file gets just these permissions.
pub(super) fn add_bind(batch: &mut Batch, fd: impl Into<Arg>, name: &[u8], place: &Place, mode: u32) {
    let address = address(name);
    place.at(batch, |batch| {
        let slot = batch.bytes(&address);
        let old = batch.call(Sysno::umask, args![!mode & 0o777]);
        batch.call(Sysno::bind, &[fd.into(), slot.into(), address.len().into()]);
        batch.call(Sysno::umask, args![old]);
        if let Place::Aside(aside) = place {
            aside.add_move(batch);
        }
    });
}

/// Gives the file of a bound socket its owner, and the permissions that a umask cannot give.
pub(super) fn own_file(file: &BoundFile) -> Result<(), RestoreError> {
    let error = |source| RestoreError::Io { what: format!("owner of {}", file.path.display()), source };
    let found = std::fs::symlink_metadata(&file.path).map_err(error)?;
    if (found.uid(), found.gid()) != (file.uid, file.gid) {
        std::os::unix::fs::lchown(&file.path, Some(file.uid), Some(file.gid)).map_err(error)?;
    }
    if found.permissions().mode() & 0o7777 != file.mode {
        std::fs::set_permissions(&file.path, PermissionsExt::from_mode(file.mode)).map_err(error)?;
    }
    Ok(())
}
