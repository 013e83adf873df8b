//! The messages between page server and client.
//!
//! ```text
//! server: "CKPTPS01", 32 random bytes
//! client: "CKPTPS01", 32 random bytes, length of the image's name (u16), name, HMAC-SHA-256 (32 bytes)
//! server: HMAC-SHA-256 (32 bytes)              from here on every message is sealed:
//! client: Request, again and again             length (u32), ciphertext with its tag
//! server: Answer to each, in the same order
//! ```
//!
//! By TLS all of this goes through that, and messages are not sealed once more.

use std::io::{self, Read, Write};

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::Token;

pub const MAGIC: &[u8; 8] = b"CKPTPS01";
/// Longest name of an image.
pub const LONGEST_NAME: usize = 1024;
/// Most bytes that one answer brings, before they are sealed.
pub const MOST: usize = 1 << 20;
const TAG: usize = 16;

/// What proves to the other side that one has the token.
pub fn proof(token: &Token, side: &str, theirs: &[u8; 32], ours: &[u8; 32], name: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&token.0).expect("any length will do");
    for part in [side.as_bytes(), &theirs[..], &ours[..], name] {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// Whether two proofs are the same, in a time that does not tell where they differ.
pub fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

fn nonce(number: &mut u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_le_bytes());
    *number += 1;
    *Nonce::from_slice(&nonce)
}

/// One direction of a connection: every message has the next number.
pub struct Seal {
    /// None where TLS seals all that is said.
    cipher: Option<ChaCha20Poly1305>,
    number: u64,
}

impl Seal {
    /// For the messages of one side.
    pub fn new(token: &Token, side: &str, server: &[u8; 32], client: &[u8; 32]) -> Seal {
        let key = proof(token, &format!("seal of {side}"), server, client, b"");
        Seal { cipher: Some(ChaCha20Poly1305::new(Key::from_slice(&key))), number: 0 }
    }

    /// For messages that TLS seals.
    pub fn none() -> Seal {
        Seal { cipher: None, number: 0 }
    }

    /// A message as it goes over the wire.
    pub fn close(&mut self, message: &[u8]) -> io::Result<Vec<u8>> {
        let Some(cipher) = &self.cipher else {
            return Ok([&(message.len() as u32).to_le_bytes()[..], message].concat());
        };
        let length = ((message.len() + TAG) as u32).to_le_bytes();
        let nonce = nonce(&mut self.number);
        let sealed = cipher.encrypt(&nonce, Payload { msg: message, aad: &length });
        let sealed = sealed.map_err(|_| io::Error::other("sealing failed"))?;
        let mut bytes = length.to_vec();
        bytes.extend(sealed);
        Ok(bytes)
    }

    /// Length of the message that begins with these four bytes, without them.
    pub fn length(head: [u8; 4]) -> io::Result<usize> {
        let length = u32::from_le_bytes(head) as usize;
        if (1..=MOST + Answer::HEAD + TAG).contains(&length) { Ok(length) } else { Err(garbage()) }
    }

    pub fn open(&mut self, sealed: &[u8]) -> io::Result<Vec<u8>> {
        let Some(cipher) = &self.cipher else { return Ok(sealed.to_vec()) };
        let length = (sealed.len() as u32).to_le_bytes();
        let nonce = nonce(&mut self.number);
        cipher.decrypt(&nonce, Payload { msg: sealed, aad: &length }).map_err(|_| garbage())
    }

    pub fn send(&mut self, to: &mut impl Write, message: &[u8]) -> io::Result<()> {
        to.write_all(&self.close(message)?)
    }

    pub fn receive(&mut self, from: &mut impl Read) -> io::Result<Vec<u8>> {
        let mut head = [0; 4];
        from.read_exact(&mut head)?;
        let mut sealed = vec![0; Seal::length(head)?];
        from.read_exact(&mut sealed)?;
        self.open(&sealed)
    }
}

pub fn garbage() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what came is not of a page server that has this token")
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Names and sizes of the files of the image, as JSON.
    Files,
    /// Bytes of one of these files, by its place in that list.
    Read { file: u32, offset: u64, length: u32 },
    /// Where the next bytes of one of these files are that are no hole: begin and end, 16 bytes; the size twice at its end.
    Data { file: u32, offset: u64 },
    /// Pages of the page file.
    Pages { first: u64, pages: u32 },
}

impl Request {
    pub fn encode(self) -> [u8; 24] {
        let (kind, small, large) = match self {
            Request::Files => (1u32, 0u64, 0u64),
            Request::Read { file, offset, length } => (2, u64::from(file) << 32 | u64::from(length), offset),
            Request::Pages { first, pages } => (3, u64::from(pages), first),
            Request::Data { file, offset } => (4, u64::from(file), offset),
        };
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&small.to_le_bytes());
        bytes[16..].copy_from_slice(&large.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Request> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (small, large) = (word(8), word(16));
        Some(match word(0) {
            1 => Request::Files,
            2 => Request::Read { file: (small >> 32) as u32, offset: large, length: small as u32 },
            3 => Request::Pages { first: large, pages: u32::try_from(small).ok()? },
            4 => Request::Data { file: u32::try_from(small).ok()?, offset: large },
            _ => return None,
        })
    }
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Content(Vec<u8>),
    /// Why not, in words.
    No(String),
}

impl Answer {
    /// Kind (u32) and length of the content (u32).
    pub const HEAD: usize = 8;
    const PLAIN: u32 = 1;
    const PACKED: u32 = 2;
    const NO: u32 = 3;

    pub fn encode(kind: u32, length: usize, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Answer::HEAD + content.len());
        bytes.extend(kind.to_le_bytes());
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend(content);
        bytes
    }

    pub fn plain(content: &[u8]) -> Vec<u8> {
        Answer::encode(Answer::PLAIN, content.len(), content)
    }

    /// `packed` is `length` bytes, compressed as an LZ4 block.
    pub fn packed(length: usize, packed: &[u8]) -> Vec<u8> {
        Answer::encode(Answer::PACKED, length, packed)
    }

    pub fn no(why: &str) -> Vec<u8> {
        Answer::encode(Answer::NO, why.len(), why.as_bytes())
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Answer> {
        let (head, content) = bytes.split_at_checked(Answer::HEAD).ok_or_else(garbage)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let length = word(4) as usize;
        match word(0) {
            Answer::PLAIN if content.len() == length => Ok(Answer::Content(content.to_vec())),
            Answer::PACKED if length <= MOST => {
                let mut unpacked = vec![0; length];
                match lz4_flex::block::decompress_into(content, &mut unpacked) {
                    Ok(got) if got == length => Ok(Answer::Content(unpacked)),
                    _ => Err(garbage()),
                }
            }
            Answer::NO => Ok(Answer::No(String::from_utf8_lossy(content).into_owned())),
            _ => Err(garbage()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_come_out_as_they_went_in() {
        for request in [
            Request::Files,
            Request::Read { file: 7, offset: 1 << 40, length: MOST as u32 },
            Request::Pages { first: u64::MAX >> 1, pages: 256 },
            Request::Data { file: 3, offset: 1 << 40 },
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        let content = vec![7; 5000];
        assert_eq!(Answer::decode(&Answer::plain(&content)).unwrap(), Answer::Content(content.clone()));
        let packed = lz4_flex::block::compress(&content);
        assert_eq!(Answer::decode(&Answer::packed(5000, &packed)).unwrap(), Answer::Content(content));
        assert!(Answer::decode(&Answer::packed(4999, &packed)).is_err());
        assert!(Answer::decode(&Answer::packed(MOST + 1, &packed)).is_err());
    }

    #[test]
    fn what_is_sealed_cannot_be_changed_repeated_or_opened_by_others() {
        let token = |secret: &str| Token(secret.as_bytes().to_vec());
        let seal = |secret, side| Seal::new(&token(secret), side, &[1; 32], &[2; 32]);
        let sealed = seal("a secret", "server").close(b"content").unwrap();
        assert_eq!(seal("a secret", "server").open(&sealed[4..]).unwrap(), b"content");
        assert!(seal("another secret", "server").open(&sealed[4..]).is_err());
        assert!(seal("a secret", "client").open(&sealed[4..]).is_err());
        for at in 4..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(seal("a secret", "server").open(&changed[4..]).is_err(), "byte {at}");
        }
        let mut once = seal("a secret", "server");
        once.open(&sealed[4..]).unwrap();
        assert!(once.open(&sealed[4..]).is_err(), "the same message again");
    }
}
