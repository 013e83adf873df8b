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

use super::wire::{self, Answer, LONGEST_NAME, MAGIC, MOST, Request, Seal};
use super::{Token, random};

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
    token: Token,
    connections: AtomicUsize,
}

impl PageServer {
    /// Listens for clients that want images of a directory.
    ///
    /// # Errors
    /// In words.
    pub fn listen(directory: &Path, address: &str, token: Token) -> Result<PageServer, String> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = nix::fcntl::open(directory, flags, Mode::empty());
        let directory = opened.map_err(|errno| format!("{}: {errno}", directory.display()))?;
        let addresses = address.to_socket_addrs().map_err(|error| format!("{address}: {error}"))?;
        let listener = TcpListener::bind(&addresses.collect::<Vec<_>>()[..]);
        let listener = listener.map_err(|error| format!("listening on {address}: {error}"))?;
        let shared = Shared { directory, token, connections: AtomicUsize::new(0) };
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
struct Deadline<'a>(&'a TcpStream, Instant);

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.1.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.0.set_read_timeout(Some(left))?;
        (&mut &*self.0).read(buffer)
    }
}

fn attend(shared: &Shared, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(STUCK))?;
    let mut patient = Deadline(&stream, Instant::now() + HANDSHAKE);
    let server = random()?;
    (&mut &stream).write_all(&[&MAGIC[..], &server].concat())?;
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
    if !wire::same(&proof, &wire::proof(&shared.token, "client", &server, &client, &name)) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not have the token"));
    }
    (&mut &stream).write_all(&wire::proof(&shared.token, "server", &server, &client, &name))?;
    let mut from_client = Seal::new(&shared.token, "client", &server, &client);
    let mut to_client = Seal::new(&shared.token, "server", &server, &client);
    let image = Image::open(&shared.directory, &name);
    let mut sender = Sender::new(&stream);
    loop {
        let message = from_client.receive(&mut Deadline(&stream, Instant::now() + IDLE))?;
        let request = Request::decode(&message).ok_or_else(wire::garbage)?;
        let answer = match &image {
            Ok(image) => image.answer(request),
            Err(why) => Err(why.clone()),
        };
        sender.send(&mut to_client, answer, matches!(request, Request::Pages { .. }))?;
    }
}

/// Sends answers, compressed when it pays: when packing takes less time than is saved on the wire.
struct Sender<'a> {
    stream: &'a TcpStream,
    /// Nanoseconds that a byte took on the wire, of late.
    per_byte: f64,
    /// So many answers go as they are before packing is tried again.
    rest: u32,
}

impl Sender<'_> {
    fn new(stream: &TcpStream) -> Sender<'_> {
        Sender { stream, per_byte: 0.0, rest: 0 }
    }

    fn send(&mut self, seal: &mut Seal, answer: Result<Vec<u8>, String>, may_pack: bool) -> io::Result<()> {
        let message = match answer {
            Err(why) => Answer::no(&why),
            Ok(content) if !may_pack || self.rest > 0 => {
                self.rest = self.rest.saturating_sub(1);
                Answer::plain(&content)
            }
            Ok(content) => {
                let begun = Instant::now();
                let packed = lz4_flex::block::compress(&content);
                let cost = begun.elapsed().as_nanos() as f64;
                let saved = content.len().saturating_sub(packed.len());
                if saved as f64 * self.per_byte < cost || saved * 8 < content.len() {
                    self.rest = 32;
                }
                if saved > 0 { Answer::packed(content.len(), &packed) } else { Answer::plain(&content) }
            }
        };
        let bytes = seal.close(&message)?;
        let begun = Instant::now();
        (&mut &*self.stream).write_all(&bytes)?;
        if bytes.len() >= 4096 {
            let now = begun.elapsed().as_nanos() as f64 / bytes.len() as f64;
            self.per_byte += (now - self.per_byte) / 8.0;
        }
        Ok(())
    }
}

/// The files of an image, open.
struct Image {
    /// The manifest and the blobs, with their sizes.
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
        Ok(Image { files: files.collect::<Result<_, _>>()?, pages })
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
            // The first of the list is the page file, which is asked for by pages.
            Request::Read { file, offset, length } => match self.files.get((file as usize).wrapping_sub(1)) {
                Some((.., file)) => read(file, offset, length as usize),
                None => Err("there is no such file".into()),
            },
            Request::Pages { first, pages } => {
                let offset = first.checked_mul(PAGE_SIZE).ok_or("there is no such page")?;
                read(&self.pages, offset, (u64::from(pages) * PAGE_SIZE) as usize)
            }
        }
    }
}
