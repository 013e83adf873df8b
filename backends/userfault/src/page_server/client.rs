//! The other side of the page server: fetches what a restore needs at once, and gives a pager its pages.
//!
//! A pager has two connections, so that a page that a thread waits for does not queue behind those of the sweep. On the
//! second one, requests are sent ahead of the answers. A connection that breaks, stalls or brings nonsense is made anew,
//! again and again for as long as the patience lasts; a page that comes is checked against the checksum of the manifest.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_core::PAGE_SIZE;
use ckpt_core::resource::memory::{ObjectId, Pages};
use ckpt_core::store::ImageReader;

use super::channel::{Channel, Credentials};
use super::random;
use super::wire::{self, Answer, LONGEST_NAME, MAGIC, MOST, Request, Seal};
use crate::outstanding::Run;
use crate::source::{Checksums, Source};
use crate::working_set::{self, Fetched};
use crate::{Options, lazy_mappings, lazy_objects};

/// Where pages come from, if not from a file.
#[derive(Clone, Debug)]
pub struct PagesFrom {
    /// `HOST:PORT`.
    pub address: String,
    /// The image, by its name in the server's directory.
    pub image: String,
    pub credentials: Credentials,
    /// How long the server may be gone before the restore fails, or, after the release, the tree is given up.
    pub patience: Duration,
}

/// One answer may take so long.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two attempts to connect, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Pages in one request of the sweep.
const CHUNK: u64 = 64;
/// Such requests on their way at a time: 4 MiB.
const ON_THEIR_WAY: usize = 16;
/// Pages that come with one that is waited for.
const AROUND: u64 = 16;

/// A connection to a page server, past its handshake.
struct Link {
    channel: Channel,
    to_server: Seal,
    from_server: Seal,
    /// What has come and is not a whole message yet.
    begun: Vec<u8>,
}

impl Link {
    fn open(from: &PagesFrom) -> io::Result<Link> {
        let mut last = io::Error::other("it has no address");
        for address in from.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, ANSWER) {
                Ok(stream) => return Link::shake_hands(from, stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn shake_hands(from: &PagesFrom, stream: TcpStream) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(ANSWER))?;
        let deadline = Instant::now() + ANSWER;
        let mut channel = Channel::to_server(stream, from.credentials.tls.as_ref(), &from.address, deadline)?;
        let token = from.credentials.token();
        let mut hello = [0; 40];
        read_until(&mut channel, &mut hello, deadline)?;
        if &hello[..8] != MAGIC {
            return Err(wire::garbage());
        }
        let server: [u8; 32] = hello[8..].try_into().expect("32 bytes");
        let client = random()?;
        let name = from.image.as_bytes();
        if name.len() > LONGEST_NAME {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of the image is too long"));
        }
        let length = (name.len() as u16).to_le_bytes();
        let proof = wire::proof(&token, "client", &server, &client, name);
        channel.write_all(&[&MAGIC[..], &client, &length, name, &proof].concat())?;
        let mut answer = [0; 32];
        read_until(&mut channel, &mut answer, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(io::ErrorKind::PermissionDenied, "it does not accept this token")
            }
            _ => error,
        })?;
        if !wire::same(&answer, &wire::proof(&token, "server", &server, &client, name)) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not have this token"));
        }
        let is_sealed = channel.is_sealed();
        let seal = |side| if is_sealed { Seal::none() } else { Seal::new(&token, side, &server, &client) };
        Ok(Link { channel, to_server: seal("client"), from_server: seal("server"), begun: Vec::new() })
    }

    fn ask(&mut self, request: Request) -> io::Result<()> {
        self.to_server.send(&mut self.channel, &request.encode())
    }

    /// The next answer, within a time.
    fn hear(&mut self) -> io::Result<Answer> {
        let deadline = Instant::now() + ANSWER;
        let mut head = [0; 4];
        read_until(&mut self.channel, &mut head, deadline)?;
        let mut sealed = vec![0; Seal::length(head)?];
        read_until(&mut self.channel, &mut sealed, deadline)?;
        Answer::decode(&self.from_server.open(&sealed)?)
    }

    /// The next answer, if it has come whole. Not to be mixed with [`hear`](Link::hear).
    fn overhear(&mut self) -> io::Result<Option<Answer>> {
        loop {
            let wanted = match self.begun.first_chunk() {
                None => 4,
                Some(&head) => 4 + Seal::length(head)?,
            };
            if wanted > 4 && self.begun.len() == wanted {
                let message = self.from_server.open(&self.begun[4..])?;
                self.begun.clear();
                return Answer::decode(&message).map(Some);
            }
            let have = self.begun.len();
            self.begun.resize(wanted, 0);
            let read = self.channel.read_now(&mut self.begun[have..]);
            self.begun.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// One question, one answer.
    fn fetch(&mut self, request: Request) -> io::Result<Answer> {
        self.ask(request)?;
        self.hear()
    }
}

/// Reads all of a buffer by a deadline, however slowly it comes.
fn read_until(channel: &mut Channel, buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        channel.read_by(deadline)?;
        match channel.read(&mut buffer[done..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A server that is gone for a while: how long, and when to try again.
#[derive(Debug)]
struct Absence {
    since: Option<Instant>,
    next: Instant,
    pause: Duration,
}

impl Absence {
    fn new() -> Absence {
        Absence { since: None, next: Instant::now(), pause: PAUSE.0 }
    }

    fn over(&mut self) {
        self.since = None;
        self.pause = PAUSE.0;
    }

    /// Something failed. The error, where the patience is at its end.
    fn note(&mut self, from: &PagesFrom, error: &io::Error) -> Result<(), String> {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) >= from.patience || error.kind() == io::ErrorKind::PermissionDenied {
            let seconds = now.duration_since(since).as_secs();
            return Err(format!("the page server {} has given no pages for {seconds} s: {error}", from.address));
        }
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE.1);
        Ok(())
    }
}

/// Asks until there is an answer, or the patience is at its end.
fn insist(
    from: &PagesFrom,
    link: &mut Option<Link>,
    absence: &mut Absence,
    request: Request,
) -> Result<Vec<u8>, String> {
    loop {
        let attempt = (|| {
            if link.is_none() {
                *link = Some(Link::open(from)?);
            }
            link.as_mut().expect("just opened").fetch(request)
        })();
        match attempt {
            Ok(Answer::Content(content)) => {
                absence.over();
                return Ok(content);
            }
            Ok(Answer::No(why)) => return Err(why),
            Err(error) => {
                *link = None;
                absence.note(from, &error)?;
                std::thread::sleep(absence.next.saturating_duration_since(Instant::now()));
            }
        }
    }
}

/// Everything of an image but the pages that may follow later: files without a name, which are gone with whoever has them
/// open.
pub struct Stub {
    name: PathBuf,
    files: BTreeMap<String, File>,
    working_sets: Fetched,
}

impl Stub {
    /// What stands for the directory of the image in messages.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Its files, for whoever opens it as an image.
    ///
    /// # Errors
    /// Where no more files may be open.
    pub fn files(&self) -> io::Result<BTreeMap<String, File>> {
        self.files.iter().map(|(name, file)| Ok((name.clone(), file.try_clone()?))).collect()
    }

    /// The working sets that the server has beside the image.
    pub fn working_sets(&self) -> &Fetched {
        &self.working_sets
    }
}

/// A new file without a name: where temporary files are, or in memory where that file system has none such.
fn nameless() -> io::Result<File> {
    let place = std::env::temp_dir();
    let file = File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(place);
    file.or_else(|_| {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        Ok(File::from(nix::sys::memfd::memfd_create("ckpt-pages-from", flags)?))
    })
}

/// Fetches an image from a page server, without its pages: the page file is one hole.
///
/// # Errors
/// In words.
pub fn fetch(from: &PagesFrom) -> Result<Stub, String> {
    let name = Path::new(&from.address).join(&from.image);
    let mut stub = Stub { name, files: BTreeMap::new(), working_sets: Fetched::default() };
    let mut client = Client { from, link: None, absence: Absence::new() };
    let list = client.insist(Request::Files)?;
    let list: Vec<(String, u64)> =
        serde_json::from_slice(&list).map_err(|error| format!("{}: {error}", from.address))?;
    for (index, (name, size)) in list.iter().enumerate() {
        let number = index as u32;
        match name.as_str() {
            working_set::FILE => stub.working_sets.recorded = client.read(number, *size)?,
            working_set::GUESS => stub.working_sets.guess = client.read(number, *size)?,
            _ => {
                let known = match name.as_str() {
                    PAGES => index == 0,
                    "image.cbor" => true,
                    blob => blob.strip_prefix("blob-").is_some_and(|number| number.parse::<u32>().is_ok()),
                };
                if !known {
                    return Err(format!("the page server {} names a file that is of no image: {name:?}", from.address));
                }
                let failed = |error: io::Error| format!("a copy of {}: {error}", stub.name.join(name).display());
                let file = nameless().and_then(|file| file.set_len(*size).map(|()| file)).map_err(failed)?;
                if name != PAGES {
                    client.copy(number, name, *size, |content, at| file.write_all_at(content, at).map_err(failed))?;
                }
                stub.files.insert(name.clone(), file);
            }
        }
    }
    Ok(stub)
}

/// The name of the page file.
const PAGES: &str = "pages.bin";

/// What fetches an image.
struct Client<'a> {
    from: &'a PagesFrom,
    link: Option<Link>,
    absence: Absence,
}

impl Client<'_> {
    fn insist(&mut self, request: Request) -> Result<Vec<u8>, String> {
        insist(self.from, &mut self.link, &mut self.absence, request)
    }

    /// Hands out what a file of the server has, without its holes: a deleted file may be large and a hole for the most
    /// part.
    fn copy(
        &mut self,
        file: u32,
        name: &str,
        size: u64,
        mut take: impl FnMut(&[u8], u64) -> Result<(), String>,
    ) -> Result<(), String> {
        let address = &self.from.address;
        let (mut offset, mut end) = (0, 0);
        loop {
            if offset == end {
                let answer = self.insist(Request::Data { file, offset })?;
                let words: Vec<u64> = answer
                    .chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
                    .collect();
                match words[..] {
                    [start, _] if start >= size => return Ok(()),
                    [start, until] if (offset..until).contains(&start) => (offset, end) = (start, until.min(size)),
                    _ => return Err(format!("the page server {address} does not know what is in {name:?}")),
                }
            }
            let length = (end - offset).min(MOST as u64) as u32;
            let content = self.insist(Request::Read { file, offset, length })?;
            if content.len() != length as usize {
                return Err(format!("the page server {address} gave {} bytes of {length}", content.len()));
            }
            take(&content, offset)?;
            offset += u64::from(length);
        }
    }

    /// A small file, whole. None where it is too large for what it should be.
    fn read(&mut self, file: u32, size: u64) -> Result<Option<Vec<u8>>, String> {
        if size > working_set::LONGEST {
            return Ok(None);
        }
        let mut bytes = vec![0; size as usize];
        self.copy(file, "a working set", size, |content, at| {
            bytes[at as usize..][..content.len()].copy_from_slice(content);
            Ok(())
        })?;
        Ok(Some(bytes))
    }
}

/// Fetches the pages of an image that are needed before the release into the page file of its stub. They are checked when
/// they are read from there, as those of every image.
///
/// # Errors
/// In words.
pub fn fetch_eager(from: &PagesFrom, stub: &Stub, reader: &dyn ImageReader, options: &Options) -> Result<(), String> {
    let image = reader.image();
    let lazy: Vec<ObjectId> = lazy_objects(image, options).map(|(id, _)| id).collect();
    let eager = image.memory_objects.iter().enumerate().filter(|(id, _)| !lazy.contains(&ObjectId(*id as u32)));
    let mut wanted: Vec<Pages> = eager.flat_map(|(_, object)| object.pages.iter().copied()).collect();
    for process in &image.processes {
        let lazy: Vec<u64> = lazy_mappings(&process.memory, options).map(|mapping| mapping.start).collect();
        let eager = process.memory.mappings.iter().filter(|mapping| !lazy.contains(&mapping.start));
        wanted.extend(eager.flat_map(|mapping| mapping.pages.iter().copied()));
    }
    wanted.sort_unstable_by_key(|pages| pages.extent.first);
    // Joined, and cut into what one request may ask for.
    let mut requests: Vec<(u64, u64)> = Vec::new();
    const AT_ONCE: u64 = MOST as u64 / PAGE_SIZE;
    for pages in wanted {
        let (mut first, end) = (pages.extent.first, pages.extent.first + pages.extent.pages);
        while first < end {
            match requests.last_mut() {
                Some((start, length)) if *start + *length == first && *length < AT_ONCE => {
                    let more = (end - first).min(AT_ONCE - *length);
                    *length += more;
                    first += more;
                }
                _ => {
                    let length = (end - first).min(AT_ONCE);
                    requests.push((first, length));
                    first += length;
                }
            }
        }
    }
    let failed = |error: io::Error| format!("a copy of {}: {error}", stub.name.join(PAGES).display());
    let Some(file) = stub.files.get(PAGES) else { return Ok(()) };
    let (mut link, mut absence) = (None, Absence::new());
    for (first, pages) in requests {
        let content = insist(from, &mut link, &mut absence, Request::Pages { first, pages: pages as u32 })?;
        if content.len() as u64 != pages * PAGE_SIZE {
            return Err(format!("the page server {} gave {} bytes for {pages} pages", from.address, content.len()));
        }
        file.write_all_at(&content, first * PAGE_SIZE).map_err(failed)?;
    }
    Ok(())
}

/// The pages of a page server.
pub struct Remote<'a> {
    from: PagesFrom,
    checksums: Checksums,
    reader: &'a dyn ImageReader,
    /// For what is waited for.
    urgent: Option<Link>,
    absence: Absence,
    /// For the sweep.
    bulk: Option<Link>,
    bulk_absence: Absence,
    /// To be asked for on it.
    wanted: VecDeque<(u64, u64)>,
    /// Asked for, and when.
    on_their_way: VecDeque<(u64, u64, Instant)>,
    /// What has come, by its first page.
    here: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Remote<'a> {
    pub fn new(from: PagesFrom, checksums: Checksums, reader: &'a dyn ImageReader) -> Remote<'a> {
        Remote {
            from,
            checksums,
            reader,
            urgent: None,
            absence: Absence::new(),
            bulk: None,
            bulk_absence: Absence::new(),
            wanted: VecDeque::new(),
            on_their_way: VecDeque::new(),
            here: BTreeMap::new(),
        }
    }

    /// Copies a page that has come, and lets go of what lies before it in the same answer.
    fn take(&mut self, page: u64, into: &mut [u8]) -> bool {
        let Some((&first, content)) = self.here.range(..=page).next_back() else { return false };
        let at = ((page - first) * PAGE_SIZE) as usize;
        let Some(found) = content.get(at..at + PAGE_SIZE as usize) else { return false };
        into.copy_from_slice(found);
        if at + PAGE_SIZE as usize == content.len() {
            self.here.remove(&first);
        }
        true
    }

    fn is_here(&self, page: u64) -> bool {
        let found = self.here.range(..=page).next_back();
        found.is_some_and(|(first, content)| (page - first) * PAGE_SIZE < content.len() as u64)
    }

    /// Sends requests, and takes answers that have come. Waits for nothing but for a connection.
    fn pump(&mut self) -> Result<(), String> {
        if self.wanted.is_empty() && self.on_their_way.is_empty() {
            return Ok(());
        }
        if self.bulk.is_none() {
            if Instant::now() < self.bulk_absence.next {
                return Ok(());
            }
            match Link::open(&self.from) {
                Ok(link) => self.bulk = Some(link),
                Err(error) => return self.bulk_absence.note(&self.from, &error),
            }
        }
        match self.exchange() {
            Ok(None) => Ok(()),
            Ok(Some(why)) => Err(why),
            Err(error) => {
                self.bulk = None;
                // Once more, in the same order.
                while let Some((first, pages, _)) = self.on_their_way.pop_back() {
                    self.wanted.push_front((first, pages));
                }
                self.bulk_absence.note(&self.from, &error)
            }
        }
    }

    /// The error is one of the connection; what comes out is what the server says that it cannot do.
    fn exchange(&mut self) -> io::Result<Option<String>> {
        let Some(link) = &mut self.bulk else { return Ok(None) };
        while self.on_their_way.len() < ON_THEIR_WAY && self.here.len() < 4 * ON_THEIR_WAY {
            let Some((first, pages)) = self.wanted.pop_front() else { break };
            // Noted first: it is asked for again if that fails.
            self.on_their_way.push_back((first, pages, Instant::now()));
            link.ask(Request::Pages { first, pages: pages as u32 })?;
        }
        while let Some(&(first, pages, since)) = self.on_their_way.front() {
            match link.overhear()? {
                Some(Answer::Content(content)) if content.len() as u64 == pages * PAGE_SIZE => {
                    self.on_their_way.pop_front();
                    self.here.insert(first, content);
                    self.bulk_absence.over();
                    // The time of the next begins when it is its turn.
                    if let Some((.., next)) = self.on_their_way.front_mut() {
                        *next = Instant::now();
                    }
                }
                Some(Answer::Content(_)) => return Err(wire::garbage()),
                Some(Answer::No(why)) => return Ok(Some(why)),
                None if since.elapsed() > ANSWER => return Err(io::ErrorKind::TimedOut.into()),
                None => break,
            }
        }
        Ok(None)
    }
}

impl Source for Remote<'_> {
    fn announce(&mut self, run: Run) {
        let (mut first, end) = (run.first, run.first + run.pages);
        while first < end {
            let pages = (end - first).min(CHUNK);
            self.wanted.push_back((first, pages));
            first += pages;
        }
    }

    fn is_ready(&mut self, run: Run) -> Result<bool, String> {
        self.pump()?;
        let ends = [run.first, run.first + run.pages - 1];
        let has = |first: u64, pages: u64, page: u64| (first..first + pages).contains(&page);
        let is_coming = |page: u64| {
            self.wanted.iter().any(|&(first, pages)| has(first, pages, page))
                || self.on_their_way.iter().any(|&(first, pages, _)| has(first, pages, page))
        };
        let coming = ends.into_iter().any(|page| !self.is_here(page) && is_coming(page));
        // What was announced comes; where room is what is missing, it is made by what nobody took.
        if coming && self.on_their_way.is_empty() && self.bulk.is_some() {
            self.here.clear();
        }
        Ok(!coming)
    }

    fn read<'b>(&'b mut self, run: Run, _in_order: bool, buffer: &'b mut [u8]) -> Result<&'b [u8], String> {
        for (number, page) in (run.first..).zip(buffer.chunks_exact_mut(PAGE_SIZE as usize)) {
            if self.take(number, page) {
                continue;
            }
            let pages = AROUND.min(self.checksums.end().saturating_sub(number)).max(1);
            let request = Request::Pages { first: number, pages: pages as u32 };
            let content = insist(&self.from, &mut self.urgent, &mut self.absence, request)?;
            if content.len() as u64 != pages * PAGE_SIZE {
                return Err(format!(
                    "the page server {} gave {} bytes for {pages} pages",
                    self.from.address,
                    content.len()
                ));
            }
            page.copy_from_slice(&content[..PAGE_SIZE as usize]);
            if pages > 1 {
                self.here.insert(number + 1, content[PAGE_SIZE as usize..].to_vec());
            }
        }
        match self.checksums.first_wrong(run, buffer)? {
            None => Ok(buffer),
            Some(page) => {
                Err(format!("from the page server {}: {}", self.from.address, self.reader.damaged_page(page)))
            }
        }
    }
}
