//! TCP connections within the tree.
//!
//! A restore connects again: one end binds its port and connects, the other comes from a listening socket of ours at its
//! address, and what had not been read is sent anew. So it takes no privilege, and is the same for all. Both ends have their
//! addresses, their options and every byte in order; an end that was closed, or that sends no more, does so after the last.
//!
//! Not kept, as nobody can tell: sequence numbers, round-trip times and the congestion window; what of the data was in the
//! queue of the sender and what in that of the receiver; sizes of buffers that the program has not set.
//!
//! - What waits to be read is read with `MSG_PEEK`, which leaves it in place.
//! - What was written and has not arrived (the receiver had no room for it) stays with the sender. An ordinary user cannot
//!   read it there: with CAP_NET_ADMIN `TCP_REPAIR` shows it, switched on and off within one batch.
//! - Connections that wait to be accepted are made again at their listening socket, in any order. What was sent into one of them
//!   nobody can read: that is refused.
//! - An end that nobody has open any more has sent all that it will (`FIN`). One that somebody outside of the tree has is
//!   refused.

mod collect;
mod rebuild;

use super::*;
use crate::image::Image;
use crate::resource::descriptors::{FileId, FileKind};
pub use collect::Ends;
pub(super) use collect::{collect, is_in_use, with_ends};
pub(super) use rebuild::{finish, finish_waiting, rebuild, rebuild_waiting};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    pub remote: SocketAddr,
    /// The other end; `None` if it was closed.
    pub to: Option<FileId>,
    /// 1: the program receives no more, 2: it sends no more (`shutdown`).
    pub shutdown: u8,
    /// Received and not read, and then what the other end had sent and not brought over.
    pub queue: Vec<u8>,
}

const RCV_SHUTDOWN: u8 = 1;
const SEND_SHUTDOWN: u8 = 2;

/// Addresses of IPv4, also where a socket of IPv6 has them.
fn plain(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

type Address = (IpAddr, u16);

/// Whether two ends of an image are each other's.
pub(super) fn is_consistent(saved: &InetSocket, connection: &Connection, image: &Image) -> bool {
    let Some(local) = saved.local else { return false };
    if plain(local) == plain(connection.remote) {
        return false;
    }
    let Some(to) = connection.to else { return true };
    match connection_of(image, to) {
        Some((other, others)) => {
            other.local.is_some_and(|address| plain(address) == plain(connection.remote))
                && plain(others.remote) == plain(local)
                && others.to.is_some_and(|back| connection_of(image, back).is_some_and(|(one, _)| one == saved))
        }
        None => false,
    }
}

pub(super) fn connection_of(image: &Image, file: FileId) -> Option<(&InetSocket, &Connection)> {
    match &image.files.get(file.0 as usize)?.kind {
        FileKind::InetSocket(socket) => match &socket.state {
            State::Established(connection) => Some((socket, connection)),
            _ => None,
        },
        _ => None,
    }
}

/// All connections of an image.
pub(super) fn all(image: &Image) -> impl Iterator<Item = FileId> + '_ {
    (0..image.files.len() as u32).map(FileId).filter(|&file| connection_of(image, file).is_some())
}

#[cfg(test)]
mod tests {
    use super::collect::inode_in;
    use super::rebuild::split;
    use super::*;

    #[test]
    fn sockets_in_the_table_of_the_kernel() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n\
            1: 0000000000000000FFFF00000100007F:0016 0000000000000000FFFF00000200007F:0017 08 0:0 0:0 0 0 0 0 1\n";
        let at = |text: &str| plain(text.parse().unwrap());
        assert_eq!(inode_in(table, at("127.0.0.1:8080"), at("127.0.0.1:50000")), Some(4711));
        assert_eq!(inode_in(table, at("127.0.0.1:50000"), at("127.0.0.1:8080")), None, "the other way round");
        assert_eq!(inode_in(table, at("127.0.0.1:22"), at("127.0.0.2:23")), Some(0), "closed, and IPv4 in IPv6");
    }

    #[test]
    fn what_must_be_set_before_there_is_a_port() {
        let option = |level, option| SocketOption { level, option, value: vec![1, 0, 0, 0] };
        let only = option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
        let delay = option(libc::IPPROTO_TCP, libc::TCP_NODELAY);
        let reuse = option(libc::SOL_SOCKET, libc::SO_REUSEADDR);
        assert_eq!(split(&[delay.clone(), only.clone(), reuse]), (vec![only], vec![delay]));
    }
}
