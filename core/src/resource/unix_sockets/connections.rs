//! Unix sockets made again, alone or with their other end.

use super::*;

/// Who a process is before a socket is made in it, to be put back.
pub(super) struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

pub(super) fn identity(context: &mut RebuildFile<'_>, process: usize) -> Result<Identity, RestoreError> {
    let mut batch = Batch::new();
    let uid = batch.call(Sysno::geteuid, &[]);
    let gid = batch.call(Sysno::getegid, &[]);
    let groups = batch.room(4 * 1024);
    let count = batch.call(Sysno::getgroups, args![1024, groups]);
    let replies = context.run(process, &batch)?;
    let groups = replies.bytes(groups).chunks_exact(4).take(replies.value(count) as usize).filter_map(number).collect();
    Ok(Identity { uid: replies.value(uid) as u32, gid: replies.value(gid) as u32, groups })
}

/// Adds `inner` as another user: the kernel notes the effective ids of who makes a pair, connects or listens.
pub(super) fn as_user<T>(
    batch: &mut Batch,
    user: Option<&Credentials>,
    own: &Identity,
    inner: impl FnOnce(&mut Batch) -> T,
) -> T {
    let Some(user) = user.filter(|user| (user.uid, user.gid) != (own.uid, own.gid) || user.groups != own.groups) else {
        return inner(batch);
    };
    let set_groups = |batch: &mut Batch, groups: &[u32]| {
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
        let slot = batch.bytes(&bytes);
        batch.call(Sysno::setgroups, args![groups.len(), slot]);
    };
    let groups_differ = user.groups != own.groups;
    if groups_differ {
        set_groups(batch, &user.groups);
    }
    batch.call(Sysno::setresgid, args![-1, user.gid, -1]);
    batch.call(Sysno::setresuid, args![-1, user.uid, -1]);
    let result = inner(batch);
    batch.call(Sysno::setresuid, args![-1, own.uid, -1]);
    batch.call(Sysno::setresgid, args![-1, own.gid, -1]);
    if groups_differ {
        set_groups(batch, &own.groups);
    }
    result
}

/// The process with these credentials, or one that has the socket.
pub(super) fn process_of(context: &RebuildFile<'_>, user: Option<&Credentials>) -> usize {
    user.and_then(|user| context.image.process(user.pid)).unwrap_or_else(|| context.process())
}

/// Adds the owner of the socket itself, which the kernel also takes for that of its packets.
pub(super) fn add_owner(batch: &mut Batch, fd: impl Into<Arg>, saved: &UnixSocket, own: &Identity) {
    if (saved.uid, saved.gid) != (own.uid, own.gid) {
        batch.call(Sysno::fchown, &[fd.into(), saved.uid.into(), saved.gid.into()]);
    }
}

/// Makes a socket that is no end of a pair.
pub(super) fn single(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = process_of(context, saved.peer.as_ref());
    let own = identity(context, process)?;
    let mut batch = Batch::new();
    let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, saved.kind | libc::SOCK_CLOEXEC, 0]);
    let fd = context.lift(process, &mut batch, fd);
    add_owner(&mut batch, fd, saved, &own);
    let setting = set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Early);
    let place = if saved.name.is_empty() { Place::Open } else { place_of(context, saved)? };
    if !saved.name.is_empty() {
        add_bind(&mut batch, fd, &saved.name, &place, saved.file.as_ref().map_or(0o777, |file| file.mode));
    }
    let replies = context.run(process, &batch)?;
    let fd = replies.fd(fd);
    setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    if let Some(file) = &saved.file {
        own_file(file)?;
    }
    let mut batch = Batch::new();
    if let State::Listening { backlog, .. } = saved.state {
        as_user(&mut batch, saved.peer.as_ref(), &own, |batch| {
            batch.call(Sysno::listen, args![fd, backlog]);
        });
    }
    // It holds a directory that has to be there until the batch has run.
    let _lost = match &saved.state {
        State::Orphaned { name, .. } => Some(add_lost_peer(context, &mut batch, fd, name)?),
        _ => None,
    };
    // The rest comes when all names are there.
    let later = saved.kind == libc::SOCK_DGRAM || matches!(saved.state, State::Waiting { .. });
    let setting = if later {
        None
    } else {
        add_shutdown(&mut batch, fd, saved);
        Some(set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Late))
    };
    let replies = context.run(process, &batch)?;
    if let Some(setting) = setting {
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    context.stage(context.id, process, fd)
}

/// Has a datagram socket be connected to one that was bound to a name and is closed. What it gives has to live until the
/// batch has run.
pub(super) fn add_lost_peer(
    context: &RebuildFile<'_>,
    batch: &mut Batch,
    fd: RemoteFd,
    name: &[u8],
) -> Result<Place, RestoreError> {
    let place = hidden(context, name)?;
    let lost = batch.call(Sysno::socket, args![libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0]);
    add_bind(batch, lost, name, &place, 0o777);
    place.at(batch, |batch| add_connect(batch, fd, place.leads_to(name)));
    batch.call(Sysno::close, args![lost]);
    Ok(place)
}

/// Has those connect that wait to be accepted.
pub(super) fn finish_waiting(
    saved: &UnixSocket,
    waiting: &[FileId],
    context: &mut RebuildFile<'_>,
) -> Result<(), RestoreError> {
    let image = context.image;
    for &client in waiting {
        let to = reach(context, saved)?;
        let socket =
            unix_socket(image, client).ok_or_else(|| context.mismatch("a file that waits is no Unix socket"))?;
        let process = context.process_of(client);
        let fd = context.bring(client, process)?;
        let credentials = &image.processes[process].threads[0].credentials;
        let user = Credentials {
            pid: image.processes[process].task.pid,
            uid: credentials.uid.effective,
            gid: credentials.gid.effective,
            groups: credentials.groups.clone(),
        };
        let own = identity(context, process)?;
        let mut batch = Batch::new();
        as_user(&mut batch, Some(&user), &own, |batch| add_connect(batch, fd, &to));
        add_shutdown(&mut batch, fd, socket);
        let setting = set_options(&mut batch, fd, kind_of(socket), &socket.options, When::Late);
        let replies = context.run(process, &batch)?;
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    Ok(())
}

pub(super) fn add_connect(batch: &mut Batch, fd: impl Into<Arg>, name: &[u8]) {
    let address = address(name);
    let slot = batch.bytes(&address);
    batch.call(Sysno::connect, &[fd.into(), slot.into(), address.len().into()]);
}

pub(super) fn add_shutdown(batch: &mut Batch, fd: RemoteFd, saved: &UnixSocket) {
    let how = match saved.shutdown {
        0 => return,
        RCV_SHUTDOWN => libc::SHUT_RD,
        SEND_SHUTDOWN => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    batch.call(Sysno::shutdown, args![fd, how]);
}

/// One end of a pair that is being made.
pub(super) struct End<'a> {
    /// `None` if this end is closed again.
    saved: Option<(FileId, &'a UnixSocket)>,
    name: &'a [u8],
    process: usize,
    fd: RemoteFd,
}

impl<'a> End<'a> {
    fn of(file: FileId, saved: &'a UnixSocket) -> End<'a> {
        End { saved: Some((file, saved)), name: &saved.name, process: 0, fd: RemoteFd(-1) }
    }

    fn credentials(&self) -> Option<&'a Credentials> {
        self.saved.and_then(|(_, saved)| saved.peer.as_ref())
    }

    fn queue(&self) -> &'a [Message] {
        self.saved.map_or(&[], |(_, saved)| &saved.queue)
    }

    /// Whether files are in its queue, which may not be there yet.
    fn waits_for_files(&self) -> bool {
        self.queue().iter().any(|message| !message.descriptors.is_empty())
    }
}

/// Makes both ends of a connection, or one whose other end is closed again.
pub(super) fn pair(
    context: &mut RebuildFile<'_>,
    saved: &UnixSocket,
    peer: Option<&UnixSocket>,
    peer_file: FileId,
) -> Result<(), RestoreError> {
    let mut one = End::of(context.id, saved);
    let mut other = match (peer, &saved.state) {
        (Some(peer), _) => End::of(peer_file, peer),
        (None, State::Orphaned { name, .. }) => End { saved: None, name, process: 0, fd: RemoteFd(-1) },
        (None, _) => return Err(context.mismatch("it has no other end")),
    };
    if saved.kind == libc::SOCK_DGRAM || (one.name.is_empty() && other.name.is_empty()) {
        socketpair(context, saved.kind, [&mut one, &mut other])?;
    } else if is_accepted(|name| listens(context.image, name), one.name, other.name) {
        connection(context, saved.kind, &mut other, &mut one)?;
    } else {
        connection(context, saved.kind, &mut one, &mut other)?;
    }
    let later = one.waits_for_files() || other.waits_for_files();
    if !later {
        complete(context, &one, &other)?;
    } else if other.saved.is_none() {
        context.keep(context.id, other.process, other.fd);
    }
    for end in [&one, &other] {
        if let Some((file, _)) = end.saved {
            context.stage(file, end.process, end.fd)?;
        }
    }
    Ok(())
}

/// What a pair gets when all files are there that are to be in its queues.
pub(super) fn finish_pair(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let mut one = End::of(context.id, saved);
    let mut other = match &saved.state {
        // Once for both.
        State::Connected { to } if *to > context.id => return Ok(()),
        State::Connected { to } => match unix_socket(context.image, *to) {
            Some(peer) => End::of(*to, peer),
            None => return Ok(()),
        },
        State::Orphaned { name, .. } => End { saved: None, name, process: 0, fd: RemoteFd(-1) },
        _ => return Ok(()),
    };
    if !one.waits_for_files() && !other.waits_for_files() {
        return Ok(());
    }
    let mut quiet = Vec::new();
    for end in [&mut one, &mut other] {
        (end.process, end.fd) = match end.saved {
            Some((file, _)) => context.place(file),
            None => context.kept(context.id).ok_or_else(|| context.mismatch("its other end is lost"))?,
        };
        if let Some((file, _)) = end.saved {
            quiet.extend(Quiet::begin(context, file, end.process, end.fd)?);
        }
    }
    complete(context, &one, &other)?;
    quiet.into_iter().try_for_each(|quiet| quiet.end(context))
}

/// Queues, what is closed, and what is set last, of two ends that are connected.
fn complete(context: &mut RebuildFile<'_>, one: &End<'_>, other: &End<'_>) -> Result<(), RestoreError> {
    fill(context, other, one)?;
    fill(context, one, other)?;
    if other.saved.is_none() {
        let mut batch = Batch::new();
        if one.saved.is_some_and(|(_, saved)| matches!(saved.state, State::Orphaned { reset: true, .. })) {
            let byte = batch.room(1);
            batch.call(Sysno::sendto, args![one.fd, byte, 1, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT, 0, 0]);
            context.run(one.process, &std::mem::take(&mut batch))?;
        }
        batch.call(Sysno::close, args![other.fd]);
        context.run(other.process, &batch)?;
    }
    for end in [one, other] {
        let Some((_, saved)) = end.saved else { continue };
        let mut batch = Batch::new();
        add_shutdown(&mut batch, end.fd, saved);
        let setting = set_options(&mut batch, end.fd, kind_of(saved), &saved.options, When::Late);
        let replies = context.run(end.process, &batch)?;
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    Ok(())
}

/// Which of two connected sockets, at least one of them with a name, was accepted: it has the name of the listening one,
/// while the other has one only if it was bound before it was connected.
pub(super) fn is_accepted(listens: impl Fn(&[u8]) -> bool, name: &[u8], other: &[u8]) -> bool {
    // NUL and five hexadecimal digits: given by the kernel to a socket that connects with SO_PASSCRED.
    let automatic = |name: &[u8]| name.len() == 6 && name[0] == 0 && name[1..].iter().all(u8::is_ascii_hexdigit);
    match (name.is_empty(), other.is_empty()) {
        (false, true) => true,
        (true, _) => false,
        (false, false) => listens(name) || (!listens(other) && !automatic(name)),
    }
}

/// Whether a socket of the image listens under a name.
pub(super) fn listens(image: &Image, name: &[u8]) -> bool {
    let sockets = (0..image.files.len() as u32).filter_map(|file| unix_socket(image, FileId(file)));
    sockets.into_iter().any(|socket| matches!(socket.state, State::Listening { .. }) && socket.name == name)
}

/// Adds what belongs to a socket from its beginning.
pub(super) fn add_beginning(
    context: &mut RebuildFile<'_>,
    end: &End<'_>,
    own: &Identity,
    bind: bool,
) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let mut file = None;
    let mut setting = None;
    if let Some((_, saved)) = end.saved {
        add_owner(&mut batch, end.fd, saved, own);
        setting = Some(set_options(&mut batch, end.fd, kind_of(saved), &saved.options, When::Early));
        file = saved.file.as_ref();
    }
    let place = match end.saved {
        _ if !bind || end.name.is_empty() => Place::Open,
        Some((_, saved)) => place_of(context, saved)?,
        None => hidden(context, end.name)?,
    };
    if bind && !end.name.is_empty() {
        add_bind(&mut batch, end.fd, end.name, &place, file.map_or(0o777, |file| file.mode));
    }
    let replies = context.run(end.process, &batch)?;
    if let Some(setting) = setting {
        setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    }
    match file.filter(|_| bind) {
        Some(file) => own_file(file),
        None => Ok(()),
    }
}

/// Two sockets made together. Of datagram sockets one may have a name.
pub(super) fn socketpair(
    context: &mut RebuildFile<'_>,
    kind: i32,
    ends: [&mut End<'_>; 2],
) -> Result<(), RestoreError> {
    let credentials = ends[0].credentials().or(ends[1].credentials());
    let process = process_of(context, credentials);
    let own = identity(context, process)?;
    let mut batch = Batch::new();
    let fds = batch.room(8);
    as_user(&mut batch, credentials, &own, |batch| {
        batch.call(Sysno::socketpair, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds]);
    });
    let replies = context.run(process, &batch)?;
    let made = [replies.u32(fds), replies.u32(fds.after(4))].map(|fd| RemoteFd(fd as i32));
    let spare = context.targets[process].footprint().spare_fds;
    let mut batch = Batch::new();
    let lifted = made.map(|fd| batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]));
    for fd in made {
        batch.call(Sysno::close, args![fd]);
    }
    let replies = context.run(process, &batch)?;
    for (end, lifted) in ends.into_iter().zip(lifted) {
        (end.process, end.fd) = (process, replies.fd(lifted));
        add_beginning(context, end, &own, true)?;
    }
    Ok(())
}

/// A client that connects, and what a listening socket gives for it.
pub(super) fn connection(
    context: &mut RebuildFile<'_>,
    kind: i32,
    client: &mut End<'_>,
    server: &mut End<'_>,
) -> Result<(), RestoreError> {
    let place = hidden(context, server.name)?;
    // Each end shows who was on the other side.
    (client.process, server.process) =
        (process_of(context, server.credentials()), process_of(context, client.credentials()));
    let (own, others) = (identity(context, server.process)?, identity(context, client.process)?);
    let mut batch = Batch::new();
    let listener = batch.call(Sysno::socket, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0]);
    let listener = context.lift(server.process, &mut batch, listener);
    add_bind(&mut batch, listener, server.name, &place, 0o777);
    as_user(&mut batch, client.credentials(), &own, |batch| batch.call(Sysno::listen, args![listener, 16]));
    let listener = context.run(server.process, &batch)?.fd(listener);

    let mut batch = Batch::new();
    let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0]);
    let fd = context.lift(client.process, &mut batch, fd);
    client.fd = context.run(client.process, &batch)?.fd(fd);
    add_beginning(context, client, &others, true)?;
    let mut batch = Batch::new();
    place.at(&mut batch, |batch| {
        as_user(batch, server.credentials(), &others, |batch| {
            add_connect(batch, client.fd, place.leads_to(server.name))
        })
    });
    context.run(client.process, &batch)?;

    // An abstract name can be found by others: what they connected is not ours.
    let expected = context.targets[client.process].pid();
    for _ in 0..64 {
        let mut batch = Batch::new();
        let flags = libc::SOCK_CLOEXEC;
        let fd = batch.call(Sysno::accept4, args![listener, 0, 0, flags]);
        let fd = context.lift(server.process, &mut batch, fd);
        let peer = get(&mut batch, fd, libc::SOL_SOCKET, libc::SO_PEERCRED, 12);
        let replies = context.run(server.process, &batch)?;
        let mut batch = Batch::new();
        if got(&replies, peer).and_then(number) == Some(expected.0 as u32) {
            server.fd = replies.fd(fd);
            batch.call(Sysno::close, args![listener]);
            context.run(server.process, &batch)?;
            return add_beginning(context, server, &own, false);
        }
        batch.call(Sysno::close, args![replies.fd(fd)]);
        context.run(server.process, &batch)?;
    }
    Err(context.mismatch(format!("others connect to {} all the time", show(server.name))))
}

/// Sends what one end had not read from the other.
pub(super) fn fill(context: &mut RebuildFile<'_>, from: &End<'_>, to: &End<'_>) -> Result<(), RestoreError> {
    let Some((_, saved)) = to.saved else { return Ok(()) };
    send(context, saved.kind, to.queue(), &Route { process: from.process, fd: from.fd, to: None })
}
