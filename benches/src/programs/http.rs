//! A connection for each question, so that none is left when the program is saved.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// A port that nobody listens on. It may be taken before it is used; then the program does not come up, and says so.
pub fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| format!("no free port: {error}"))?;
    Ok(listener.local_addr().map_err(|error| format!("no free port: {error}"))?.port())
}

/// For those who wait to the end.
pub static NEVER: AtomicBool = AtomicBool::new(false);

/// Tries until somebody listens, or it is given up.
pub fn connect(port: u16, within: Duration, give_up: &AtomicBool) -> Result<TcpStream, String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let begun = Instant::now();
    loop {
        let left = within.saturating_sub(begun.elapsed());
        match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
            Ok(stream) => {
                let limits = [stream.set_read_timeout(Some(within)), stream.set_write_timeout(Some(within))];
                limits.into_iter().collect::<Result<(), _>>().map_err(|error| format!("port {port}: {error}"))?;
                stream.set_nodelay(true).map_err(|error| format!("port {port}: {error}"))?;
                return Ok(stream);
            }
            Err(error) if begun.elapsed() > within || give_up.load(SeqCst) => {
                return Err(format!("port {port}: {error}"));
            }
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
}

/// The body of the answer.
pub fn get(port: u16, path: &str, within: Duration, give_up: &AtomicBool) -> Result<String, String> {
    let mut stream = connect(port, within, give_up)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let done = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
    done.map_err(|error| format!("GET {path}: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(format!("GET {path}: half an answer"))?;
    if !head.contains(" 200 ") {
        return Err(format!("GET {path}: {}", head.lines().next().unwrap_or("")));
    }
    Ok(body.trim().to_string())
}

/// Waits until the program has closed its side of all connections: a connection cannot be saved.
pub fn settle(port: u16) -> Result<(), String> {
    let connected = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        let (_, local) = local.rsplit_once(':')?;
        // LISTEN and TIME_WAIT are no connections of a process.
        (u16::from_str_radix(local, 16).ok()? == port && !matches!(state, "0A" | "06")).then_some(())
    };
    super::wait_for("closing connections", super::PATIENCE, &NEVER, || {
        let tables =
            ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
        Ok(!tables.iter().flat_map(|table| table.lines()).any(|line| connected(line).is_some()))
    })
}
