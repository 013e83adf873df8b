//! The backends under test: a crate that nobody names registers nothing. One line joins.

use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ckpt_core::store::ImageReader;
use ckpt_core::{Backend, Restorer, inventory};
use ckpt_preload as _;
use ckpt_ptrace as _;
use ckpt_userfault::{Options, PageServer, PagesFrom, Token, UserfaultRestorer};
use nix::unistd::{ForkResult, fork};

// Once more with no sweep and nothing filled beforehand that need not be: every page comes by a fault.
inventory::submit! {
    Backend {
        name: BY_FAULT,
        summary: "as userfault, but every page comes by a fault",
        capability: ckpt_userfault::capability,
        probe: ckpt_userfault::probe,
        launcher: None,
        dumper: None,
        restorer: Some(|| Box::new(UserfaultRestorer::new(Options { sweep: false, eager_pages: 0, ..Options::default() }))),
    }
}

// And with the image at a page server, of which the restore has nothing but what that gives.
inventory::submit! {
    Backend {
        name: FROM_SERVER,
        summary: "as userfault, with the image at a page server",
        capability: ckpt_userfault::capability,
        probe: ckpt_userfault::probe,
        launcher: None,
        dumper: None,
        restorer: Some(|| Box::new(UserfaultRestorer::new(from_server("")))),
    }
}

const BY_FAULT: &str = "userfault-by-fault";
const FROM_SERVER: &str = "userfault-from-server";

/// Whether a backend is one of the two above: another with other options.
pub fn is_variant(backend: &Backend) -> bool {
    [BY_FAULT, FROM_SERVER].contains(&backend.name)
}

/// The name of the process that serves the images of a trial, which is no part of its tree.
pub const SERVER: &str = "ckpt-images";
/// In the network namespace of the trial. None that the kernel gives away: who connects to one that nobody listens at, and is
/// given the very same, is connected with himself.
const ADDRESS: &str = "127.0.0.1:7470";

fn token() -> Token {
    Token::of(b"a secret of the suite").expect("it is long enough")
}

fn from_server(image: &str) -> Options {
    let (address, image) = (ADDRESS.to_string(), image.to_string());
    let pages_from = Some(PagesFrom { address, image, credentials: token().into(), patience: Duration::from_secs(10) });
    Options { eager_pages: 0, pages_from, ..Options::default() }
}

/// An image as a backend opens it, and the restorer for that.
pub struct Opened {
    pub restorer: Box<dyn Restorer>,
    pub reader: Box<dyn ImageReader>,
}

/// Opens an image for a restore by a backend: from its directory, or from a page server, which is started.
pub fn open(backend: &Backend, image: &Path) -> Result<Opened, String> {
    let reader = |image: &Path| ckpt_formats::open(image).map_err(|error| error.to_string());
    if backend.name != FROM_SERVER {
        let restorer = backend.restorer.ok_or("it has no restorer")?();
        return Ok(Opened { restorer, reader: reader(image)? });
    }
    let name = image.file_name().and_then(|name| name.to_str()).ok_or("an image without a name")?;
    start_server(image.parent().ok_or("an image without a directory")?)?;
    let options = from_server(name);
    let from = options.pages_from.as_ref().expect("it has a server");
    let stub = ckpt_userfault::fetch(from)?;
    let files = stub.files().map_err(|error| error.to_string())?;
    let reader = ckpt_formats::open_files(stub.name(), files).map_err(|error| error.to_string())?;
    ckpt_userfault::fetch_eager(from, &stub, &*reader, &options)?;
    Ok(Opened { restorer: Box::new(UserfaultRestorer::new(options)), reader })
}

/// Starts the server of a trial, where it does not run yet. It ends with the namespaces of the trial.
fn start_server(directory: &Path) -> Result<(), String> {
    if TcpStream::connect(ADDRESS).is_ok() {
        return Ok(());
    }
    // SAFETY: drivers have one thread.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Child => {
            let _ = nix::sys::prctl::set_name(&std::ffi::CString::new(SERVER).expect("no NUL"));
            // Not of the session of whoever restores, and with a parent that outlives that.
            let _ = nix::unistd::setsid();
            match PageServer::listen(directory, ADDRESS, token().into()) {
                Ok(server) => server.serve(|trouble| eprintln!("page server: {trouble}")),
                Err(why) => {
                    eprintln!("page server: {why}");
                    std::process::exit(1)
                }
            }
        }
        ForkResult::Parent { .. } => {
            let begun = Instant::now();
            while TcpStream::connect(ADDRESS).is_err() {
                if begun.elapsed() > Duration::from_secs(10) {
                    return Err("the page server does not listen".into());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }
    }
}
