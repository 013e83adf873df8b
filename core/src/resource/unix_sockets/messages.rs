//! Messages put back into the queues of Unix sockets.

use super::*;

/// Where messages are sent from, and to.
pub(super) struct Route<'a> {
    pub(super) process: usize,
    pub(super) fd: RemoteFd,
    /// Of a datagram socket that is not connected.
    pub(super) to: Option<&'a [u8]>,
}

pub(super) fn send(
    context: &mut RebuildFile<'_>,
    kind: i32,
    messages: &[Message],
    route: &Route<'_>,
) -> Result<(), RestoreError> {
    if messages.is_empty() {
        return Ok(());
    }
    let total: usize = messages.iter().map(|message| message.data.len() + 1024).sum();
    let before = room_to_send(context, route, total)?;
    let mut batch = Batch::new();
    let mut sent: Vec<(CallId, usize)> = Vec::new();
    for message in messages {
        // A read ends where the bytes end that descriptors came with.
        let is_whole = kind != libc::SOCK_STREAM || !message.descriptors.is_empty();
        let piece = if is_whole { message.data.len().max(1) } else { PIECE };
        let mut passed = Vec::with_capacity(message.descriptors.len());
        for &file in &message.descriptors {
            passed.push(context.bring(file, route.process)?);
        }
        // An empty datagram is a message too.
        let empty = [[].as_slice()];
        let pieces: Vec<&[u8]> =
            if message.data.is_empty() { empty.to_vec() } else { message.data.chunks(piece).collect() };
        for data in pieces {
            if !batch.has_room(1, data.len() + 512 + 4 * passed.len()) {
                send_batch(context, route, &std::mem::take(&mut batch), &std::mem::take(&mut sent))?;
            }
            sent.push((add_send(&mut batch, route, data, message.credentials, &passed), data.len()));
        }
    }
    send_batch(context, route, &batch, &sent)?;
    let mut batch = Batch::new();
    if let Some((size, lock)) = before {
        let half = batch.bytes(&(size / 2).to_ne_bytes());
        let lock = batch.bytes(&lock.to_ne_bytes());
        for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
            batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, option, half, 4]);
        }
        batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, sockets::SO_BUF_LOCK, lock, 4]);
        context.run(route.process, &batch)?;
    }
    Ok(())
}

pub(super) fn send_batch(
    context: &mut RebuildFile<'_>,
    route: &Route<'_>,
    batch: &Batch,
    sent: &[(CallId, usize)],
) -> Result<(), RestoreError> {
    let replies = context.run(route.process, batch)?;
    match sent.iter().find(|(call, length)| replies.value(*call) != *length as u64) {
        Some((call, length)) => {
            let went = replies.value(*call);
            Err(context.mismatch(format!("of a message of {length} bytes in its queue, {went} were taken")))
        }
        None => Ok(()),
    }
}

/// Makes the send buffer large enough for a long queue. Gives size and lock to be put back.
pub(super) fn room_to_send(
    context: &mut RebuildFile<'_>,
    route: &Route<'_>,
    total: usize,
) -> Result<Option<(u32, u32)>, RestoreError> {
    if total < 64 * 1024 {
        return Ok(None);
    }
    let mut batch = Batch::new();
    let size = get(&mut batch, route.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 4);
    let lock = get(&mut batch, route.fd, libc::SOL_SOCKET, sockets::SO_BUF_LOCK, 4);
    let large = batch.bytes(&(total.saturating_mul(2).min(1 << 30) as u32).to_ne_bytes());
    for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
        batch.try_call(Sysno::setsockopt, args![route.fd, libc::SOL_SOCKET, option, large, 4]);
    }
    let replies = context.run(route.process, &batch)?;
    let value = |read| got(&replies, read).and_then(number);
    Ok(value(size).map(|size| (size, value(lock).unwrap_or_default())))
}

pub(super) fn add_send(
    batch: &mut Batch,
    route: &Route<'_>,
    data: &[u8],
    credentials: Option<(Pid, u32, u32)>,
    passed: &[RemoteFd],
) -> CallId {
    let content = batch.bytes(data);
    let vector = batch.words(&[0, data.len() as u64]);
    batch.pointer(vector, 0, content);
    let name = route.to.map(address);
    let mut control = Vec::new();
    let mut add = |kind: i32, words: &[u32]| {
        // struct cmsghdr: length, level, type
        control.extend((16 + 4 * words.len() as u64).to_ne_bytes());
        for word in [libc::SOL_SOCKET as u32, kind as u32].iter().chain(words) {
            control.extend(word.to_ne_bytes());
        }
        control.resize(control.len().next_multiple_of(8), 0);
    };
    if let Some((pid, uid, gid)) = credentials {
        add(libc::SCM_CREDENTIALS, &[pid.0 as u32, uid, gid]);
    }
    if !passed.is_empty() {
        add(libc::SCM_RIGHTS, &passed.iter().map(|fd| fd.0 as u32).collect::<Vec<_>>());
    }
    let name_length = name.as_ref().map_or(0, |name| name.len() as u64);
    let header = batch.words(&[0, name_length, 0, 1, 0, control.len() as u64, 0]);
    if let Some(name) = name {
        let name = batch.bytes(&name);
        batch.pointer(header, 0, name);
    }
    batch.pointer(header, 16, vector);
    if !control.is_empty() {
        let control = batch.bytes(&control);
        batch.pointer(header, 32, control);
    }
    batch.call(Sysno::sendmsg, args![route.fd, header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL])
}

/// A name by which a datagram socket of the image is reached from anywhere.
pub(super) fn reach(context: &RebuildFile<'_>, saved: &UnixSocket) -> Result<Vec<u8>, RestoreError> {
    match &saved.file {
        _ if saved.name.first() == Some(&0) => Ok(saved.name.clone()),
        Some(file) if file.path.as_os_str().len() <= NAME_MAX => Ok(file.path.as_os_str().as_bytes().to_vec()),
        _ => Err(context.mismatch(format!("{} cannot be reached to send to it", show(&saved.name)))),
    }
}

/// What a datagram socket gets when all names are there: its queue, and then its destination.
pub(super) fn finish_datagrams(saved: &UnixSocket, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let fd = context.bring(context.id, process)?;
    let quiet = if saved.queue.is_empty() { None } else { Quiet::begin(context, context.id, process, fd)? };
    for message in &saved.queue {
        let to = reach(context, saved)?;
        let route = match message.sender {
            Some(sender) => {
                let process = context.process_of(sender);
                Route { process, fd: context.bring(sender, process)?, to: Some(&to) }
            }
            None => {
                let mut batch = Batch::new();
                let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
                let fd = batch.call(Sysno::socket, args![libc::AF_UNIX, kind, 0]);
                Route { process, fd: context.run(process, &batch)?.fd(fd), to: Some(&to) }
            }
        };
        send(context, saved.kind, std::slice::from_ref(message), &route)?;
        if message.sender.is_none() {
            context.close(route.process, route.fd)?;
        }
    }
    let mut batch = Batch::new();
    match &saved.state {
        State::Connected { to } => {
            let peer = unix_socket(context.image, *to).ok_or_else(|| context.mismatch("its peer is no Unix socket"))?;
            add_connect(&mut batch, fd, &reach(context, peer)?);
        }
        State::Outside { name } => add_connect(&mut batch, fd, name),
        _ => {}
    }
    add_shutdown(&mut batch, fd, saved);
    let setting = set_options(&mut batch, fd, kind_of(saved), &saved.options, When::Late);
    let replies = context.run(process, &batch)?;
    setting.verify(&replies).map_err(|what| context.mismatch(what))?;
    quiet.map_or(Ok(()), |quiet| quiet.end(context))
}

/// A file that does not signal what comes: the signals for the messages of an image were sent long ago.
pub(super) struct Quiet {
    process: usize,
    fd: RemoteFd,
    flags: i32,
}

impl Quiet {
    /// `None` where it would not signal anything (`O_ASYNC`).
    pub(super) fn begin(
        context: &mut RebuildFile<'_>,
        file: FileId,
        process: usize,
        fd: RemoteFd,
    ) -> Result<Option<Quiet>, RestoreError> {
        let flags = context.image.files[file.0 as usize].flags;
        if flags & libc::O_ASYNC == 0 {
            return Ok(None);
        }
        let mut batch = Batch::new();
        batch.call(Sysno::fcntl, args![fd, libc::F_SETFL, flags & !libc::O_ASYNC]);
        context.run(process, &batch)?;
        Ok(Some(Quiet { process, fd, flags }))
    }

    pub(super) fn end(self, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        batch.call(Sysno::fcntl, args![self.fd, libc::F_SETFL, self.flags]);
        context.run(self.process, &batch).map(drop)
    }
}
