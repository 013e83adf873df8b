//! The page server: gives out the files of the images in one directory, to whoever has the token.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ckpt_core::PAGE_SIZE;
use nix::dir::Dir;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};

use super::channel::{Channel, Credentials};
use super::random;
use crate::working_set;

use super::wire::{self, Answer, LONGEST_NAME, MAGIC, MOST, Request, Seal};

/// Who has not proved that it has the token by then is sent away.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client that asks for nothing for so long is sent away, and may come back.
const IDLE: Duration = Duration::from_secs(600);
/// A client that does not take its answer.
const STUCK: Duration = Duration::from_secs(60);
/// Connections at a time.
const MOST_CONNECTIONS: usize = 128;

/// A page server that listens.
pub struct PageServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    directory: OwnedFd,
    credentials: Credentials,
    connections: AtomicUsize,
}

impl PageServer {
    /// Listens for clients that want images of a directory.
    ///
    /// # Errors
    /// In words.
    pub fn listen(directory: &Path, address: &str, credentials: Credentials) -> Result<PageServer, String> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = nix::fcntl::open(directory, flags, Mode::empty());
        let directory = opened.map_err(|errno| format!("{}: {errno}", directory.display()))?;
        let addresses = address.to_socket_addrs().map_err(|error| format!("{address}: {error}"))?;
        let listener = TcpListener::bind(&addresses.collect::<Vec<_>>()[..]);
        let listener = listener.map_err(|error| format!("listening on {address}: {error}"))?;
        let shared = Shared { directory, credentials, connections: AtomicUsize::new(0) };
        Ok(PageServer { listener, shared: Arc::new(shared) })
    }

    /// Where it listens: with the port, where the kernel was to choose one.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until it is ended. `note` is told what went wrong with a client.
    pub fn serve(&self, note: impl Fn(String) + Send + Sync + 'static) -> ! {
        let note = Arc::new(note);
        loop {
            let (stream, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    note(format!("accepting a client: {error}"));
                    // Out of descriptors, say: some will be free again.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let (shared, note) = (self.shared.clone(), note.clone());
            if shared.connections.fetch_add(1, Ordering::SeqCst) >= MOST_CONNECTIONS {
                shared.connections.fetch_sub(1, Ordering::SeqCst);
                note(format!("{peer}: sent away, as {MOST_CONNECTIONS} connections are open"));
                continue;
            }
            let (begun, noted) = (shared.clone(), note.clone());
            let attending = std::thread::Builder::new().spawn(move || {
                if let Err(error) = attend(&shared, stream)
                    && error.kind() != io::ErrorKind::UnexpectedEof
                {
                    note(format!("{peer}: {error}"));
                }
                shared.connections.fetch_sub(1, Ordering::SeqCst);
            });
            if let Err(error) = attending {
                begun.connections.fetch_sub(1, Ordering::SeqCst);
                noted(format!("{peer}: sent away, as no thread can be started: {error}"));
            }
        }
    }
}

/// Reads with one deadline for everything, so that nobody stays for ever by a byte now and then.
struct Deadline<'a>(&'a mut Channel, Instant);

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_by(self.1)?;
        self.0.read(buffer)
    }
}

fn attend(shared: &Shared, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HANDSHAKE))?;
    let until = Instant::now() + HANDSHAKE;
    let mut channel = Channel::to_client(stream, shared.credentials.tls.as_ref(), until)?;
    channel.write_within(STUCK)?;
    let token = shared.credentials.token();
    let server = random()?;
    channel.write_all(&[&MAGIC[..], &server].concat())?;
    let mut patient = Deadline(&mut channel, until);
    let mut hello = [0; 8 + 32 + 2];
    patient.read_exact(&mut hello)?;
    let client: [u8; 32] = hello[8..40].try_into().expect("32 bytes");
    let length = u16::from_le_bytes([hello[40], hello[41]]) as usize;
    if &hello[..8] != MAGIC || length > LONGEST_NAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a client of this version"));
    }
    let mut name = vec![0; length];
    patient.read_exact(&mut name)?;
    let mut proof = [0; 32];
    patient.read_exact(&mut proof)?;
    if !wire::same(&proof, &wire::proof(&token, "client", &server, &client, &name)) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not have the token"));
    }
    channel.write_all(&wire::proof(&token, "server", &server, &client, &name))?;
    let is_sealed = channel.is_sealed();
    let seal = |side| if is_sealed { Seal::none() } else { Seal::new(&token, side, &server, &client) };
    let (mut from_client, mut to_client) = (seal("client"), seal("server"));
    let image = Image::open(&shared.directory, &name);
    let mut sender = Sender::default();
    loop {
        let message = from_client.receive(&mut Deadline(&mut channel, Instant::now() + IDLE))?;
        let request = Request::decode(&message).ok_or_else(wire::garbage)?;
        let answer = match &image {
            Ok(image) => image.answer(request),
            Err(why) => Err(why.clone()),
        };
        sender.send(&mut channel, &mut to_client, answer, matches!(request, Request::Pages { .. }))?;
    }
}

/// Sends answers, compressed when it pays: while earlier ones still wait for the wire, the time for packing costs nothing.
#[derive(Default)]
struct Sender {
    /// So many answers go as they are before packing is tried again, as the last one did not become smaller.
    rest: u32,
}

/// Bytes that wait for the wire from which on it is what everything waits for: half of an answer for the sweep.
const WAITING: usize = 128 << 10;

impl Sender {
    fn send(
        &mut self,
        channel: &mut Channel,
        seal: &mut Seal,
        answer: Result<Vec<u8>, String>,
        may_pack: bool,
    ) -> io::Result<()> {
        let message = match answer {
            Err(why) => Answer::no(&why),
            Ok(content) if !may_pack || self.rest > 0 || channel.unsent() < WAITING => {
                self.rest = self.rest.saturating_sub(1);
                Answer::plain(&content)
            }
            Ok(content) => {
                let packed = lz4_flex::block::compress(&content);
                let saved = content.len().saturating_sub(packed.len());
                if saved * 8 < content.len() {
                    self.rest = 4;
                }
                if saved > 0 { Answer::packed(content.len(), &packed) } else { Answer::plain(&content) }
            }
        };
        channel.write_all(&seal.close(&message)?)
    }
}

/// The files of an image, open.
struct Image {
    /// The manifest, the blobs and the working sets, with their sizes.
    files: Vec<(String, u64, File)>,
    pages: File,
}

impl Image {
    /// Opens an image by its name below a directory. No name leads out of it, and no symbolic link is followed.
    fn open(directory: &OwnedFd, name: &[u8]) -> Result<Image, String> {
        let name = std::str::from_utf8(name).map_err(|_| "the name of the image is not UTF-8".to_string())?;
        let said = |what: String| format!("the page server has no image {name}: {what}");
        let parts: Option<Vec<_>> = Path::new(name)
            .components()
            .filter(|part| *part != Component::CurDir)
            .map(|part| if let Component::Normal(part) = part { Some(part) } else { None })
            .collect();
        let Some(parts) = parts.filter(|parts| !parts.is_empty()) else {
            return Err(said("a name below its directory is wanted, with no .. in it".into()));
        };
        let mut inside: Option<OwnedFd> = None;
        for part in parts {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let opened = openat(inside.as_ref().unwrap_or(directory), part, flags, Mode::empty());
            inside = Some(opened.map_err(|errno| said(errno.to_string()))?);
        }
        let inside = inside.expect("a name has a part");
        let open = |file: &str| -> Result<(File, u64), String> {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let opened = openat(&inside, file, flags, Mode::empty());
            let opened = File::from(opened.map_err(|errno| said(format!("{file}: {errno}")))?);
            match opened.metadata() {
                Ok(found) if found.is_file() => Ok((opened, found.len())),
                _ => Err(said(format!("{file} is not a regular file"))),
            }
        };
        let (pages, _) = open("pages.bin")?;
        let mut names = vec!["image.cbor".to_string()];
        let listing = openat(&inside, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .and_then(Dir::from_fd);
        for entry in listing.map_err(|errno| said(errno.to_string()))?.iter().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix("blob-").is_some_and(|number| number.parse::<u32>().is_ok()) {
                names.push(name);
            }
        }
        let files = names.into_iter().map(|name| open(&name).map(|(file, size)| (name, size, file)));
        let mut files = files.collect::<Result<Vec<_>, _>>()?;
        // Hints, which may be there or not.
        let hints = [working_set::FILE, working_set::GUESS];
        files
            .extend(hints.into_iter().filter_map(|name| open(name).ok().map(|(file, size)| (name.into(), size, file))));
        Ok(Image { files, pages })
    }

    /// The first of the list is the page file, which is asked for by pages.
    fn file(&self, number: u32) -> Result<&File, String> {
        let found = self.files.get((number as usize).wrapping_sub(1));
        found.map(|(.., file)| file).ok_or_else(|| "there is no such file".into())
    }

    fn answer(&self, request: Request) -> Result<Vec<u8>, String> {
        let read = |file: &File, offset: u64, length: usize| {
            if length > MOST {
                return Err("too much at once".to_string());
            }
            let mut bytes = vec![0; length];
            let read = file.read_exact_at(&mut bytes, offset);
            read.map(|()| bytes).map_err(|error| format!("reading the image: {error}"))
        };
        match request {
            Request::Files => {
                let pages = self.pages.metadata().map_err(|error| error.to_string())?.len();
                let mut list: Vec<(&str, u64)> = vec![("pages.bin", pages)];
                list.extend(self.files.iter().map(|(name, size, _)| (name.as_str(), *size)));
                serde_json::to_vec(&list).map_err(|error| error.to_string())
            }
            Request::Read { file, offset, length } => read(self.file(file)?, offset, length as usize),
            Request::Data { file, offset } => {
                let file = self.file(file)?;
                let size = file.metadata().map_err(|error| error.to_string())?.len();
                let offset = i64::try_from(offset).map_err(|_| "there is no such place")?;
                let (start, end) = match lseek(file, offset, Whence::SeekData) {
                    Ok(start) => (start as u64, lseek(file, start, Whence::SeekHole).map_or(size, |end| end as u64)),
                    Err(_) => (size, size),
                };
                Ok([start.to_le_bytes(), end.to_le_bytes()].concat())
            }
            Request::Pages { first, pages } => {
                let offset = first.checked_mul(PAGE_SIZE).ok_or("there is no such page")?;
                read(&self.pages, offset, (u64::from(pages) * PAGE_SIZE) as usize)
            }
        }
    }
}
