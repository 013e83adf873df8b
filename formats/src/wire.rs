//! [`Wire`]: the conversions between live types and the frozen structs that stand for them on the wire.
//!
//! Live types (in `ckpt-core`) change as the project does and derive no serde. Wire structs are frozen per version and do.
//! Two macros write both the struct and the conversions:
//!
//! ```ignore
//! wire_struct! {
//!     /// A pipe.
//!     pub struct PipeV1 for ckpt_core::resource::pipes::Pipe { size: u64, data: Bytes, reader: Option<u32> }
//! }
//! wire_enum! {
//!     pub enum ShapeV1 for ckpt_core::resource::shapes::Shape { Point, Circle { radius: u64 }, Polygon(PolygonV1) }
//! }
//! ```
//!
//! Field names are those of the live struct; field types are wire types:
//!
//! | live | wire |
//! |---|---|
//! | `bool`, integers, `String` | the same |
//! | `Vec<u8>`, `[u8; N]`, `PathBuf`, `OsString` | [`Bytes`] |
//! | `Option<T>`, `Vec<T>`, tuples and `[T; N]` up to 4 | the same, of the wire type of `T` |
//! | `Pid`, `RemoteFd` | `i32` |
//! | `FileId`, `ObjectId`, `DeletedId`, `BlobId` | `u32` |
//! | `RemotePtr` | `u64` |
//! | `PageExtent` | `(u64, u64)` |
//! | a struct or enum of a kind | its `...V1` |
//!
//! For anything else implement [`Wire`] by hand beside the struct: live to wire cannot fail, wire to live must check all
//! that the type cannot say.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use ckpt_core::resource::descriptors::FileId;
use ckpt_core::resource::files::DeletedId;
use ckpt_core::resource::memory::ObjectId;
use ckpt_core::store::{BlobId, PageExtent};
use ckpt_core::{Pid, RemoteFd, RemotePtr};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

/// A wire type that stands for a live type.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not stand for `{Live}` on the wire",
    note = "`Bytes` stands for `Vec<u8>`, `[u8; N]`, `PathBuf` and `OsString`; see the table in formats/src/wire.rs"
)]
pub trait Wire<Live>: Sized {
    fn from_live(live: &Live) -> Self;

    /// # Errors
    /// When the value cannot be one of the live type, or points outside of the image: see [`Bounds`]. Nothing is
    /// allocated beyond what `self` holds.
    fn into_live(self, bounds: &Bounds) -> Result<Live, Invalid>;

    /// Some value that can be converted both ways, for property tests and the golden image: whoever declares a wire
    /// struct has its kind tested.
    fn any(entropy: &mut Entropy<'_>) -> Live;
}

/// Bytes that decide what [`Wire::any`] gives. When they are used up, everything is zero or empty.
#[derive(Clone, Debug)]
pub struct Entropy<'a> {
    pub bytes: &'a [u8],
    pub bounds: Bounds,
}

impl Entropy<'_> {
    pub fn byte(&mut self) -> u8 {
        self.bytes.split_off_first().copied().unwrap_or(0)
    }

    /// Small numbers and large ones.
    pub fn number(&mut self) -> u64 {
        let width = [1, 1, 2, 4, 8][usize::from(self.byte() % 5)];
        (0..width).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// Less than `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// Of a list: short, as lists are in lists.
    pub fn length(&mut self) -> usize {
        [0, 1, 1, 2, 3][usize::from(self.byte() % 5)]
    }

    pub fn text(&mut self) -> String {
        (0..self.byte() % 12)
            .map(|_| match self.byte() % 100 {
                95 => 'é',
                96 => '\n',
                97 => '\0',
                98 => '語',
                99 => '🦀',
                ascii => char::from(b' ' + ascii),
            })
            .collect()
    }

    /// A name without NUL, and any byte else.
    pub fn name(&mut self) -> Vec<u8> {
        (0..self.byte() % 12).map(|_| self.byte().max(1)).collect()
    }
}

/// How much the image holds of everything that a number in it may point to. An id or page extent is checked where it is
/// converted, so that no kind can forget to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub files: u32,
    pub memory_objects: u32,
    pub deleted_files: u32,
    pub blobs: u32,
    /// Pages in the page file.
    pub pages: u64,
}

/// A decoded value that no image can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Where it is: `processes.0.memory.mappings.3.flags`.
    pub place: String,
    pub why: String,
}

impl Invalid {
    pub fn new(why: impl Into<String>) -> Invalid {
        Invalid { place: String::new(), why: why.into() }
    }

    /// The same, one level further out.
    pub fn within(mut self, outer: impl fmt::Display) -> Invalid {
        self.place = if self.place.is_empty() { outer.to_string() } else { format!("{outer}.{}", self.place) };
        self
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.place.is_empty() { f.write_str(&self.why) } else { write!(f, "{}: {}", self.place, self.why) }
    }
}

/// What may stand in a list. `u8` may not: a list of bytes is [`Bytes`].
#[diagnostic::on_unimplemented(message = "a list of `{Self}` has no wire form", note = "write `Bytes` for `Vec<u8>`")]
pub trait Item {}

/// A CBOR byte string.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        struct Buffer;
        impl Visitor<'_> for Buffer {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a byte string")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Buffer)
    }
}

/// Types that are their own wire form, and how to make one of a number.
macro_rules! identical {
    ($($type:ty: $any:expr),* $(,)?) => {$(
        impl Wire<$type> for $type {
            fn from_live(live: &$type) -> $type {
                live.clone()
            }
            fn into_live(self, _bounds: &Bounds) -> Result<$type, Invalid> {
                Ok(self)
            }
            fn any(entropy: &mut Entropy<'_>) -> $type {
                let any: fn(&mut Entropy<'_>) -> $type = $any;
                any(entropy)
            }
        }
    )*};
}

identical! {
    bool: |entropy| entropy.byte() & 1 == 1,
    u8: |entropy| entropy.byte(),
    u16: |entropy| entropy.number() as u16,
    u32: |entropy| entropy.number() as u32,
    u64: |entropy| entropy.number(),
    i8: |entropy| entropy.byte() as i8,
    i16: |entropy| entropy.number() as i16,
    i32: |entropy| entropy.number() as i32,
    i64: |entropy| entropy.number() as i64,
    String: |entropy| entropy.text(),
}

macro_rules! items {
    ($($type:ty),*) => { $(impl Item for $type {})* };
}

items!(bool, u16, u32, u64, i8, i16, i32, i64, String, Bytes);
impl<T> Item for Option<T> {}
impl<T> Item for Vec<T> {}
impl<A, B> Item for (A, B) {}
impl<A, B, C> Item for (A, B, C) {}
impl<A, B, C, D> Item for (A, B, C, D) {}

/// Newtypes around a number.
macro_rules! numbers {
    ($($live:ident: $wire:ty $(, in $bound:ident)?);* $(;)?) => {$(
        impl Wire<$live> for $wire {
            fn from_live(live: &$live) -> $wire {
                live.0
            }
            #[allow(unused_variables)]
            fn into_live(self, bounds: &Bounds) -> Result<$live, Invalid> {
                $(if self >= bounds.$bound {
                    return Err(Invalid::new(format!(
                        "{} {self} of {} {}",
                        stringify!($live), bounds.$bound, stringify!($bound)
                    )));
                })?
                Ok($live(self))
            }
            fn any(entropy: &mut Entropy<'_>) -> $live {
                $(if true {
                    return $live(entropy.below(entropy.bounds.$bound.max(1).into()) as $wire);
                })?
                $live(entropy.number() as $wire)
            }
        }
    )*};
}

numbers! {
    Pid: i32;
    RemoteFd: i32;
    RemotePtr: u64;
    FileId: u32, in files;
    ObjectId: u32, in memory_objects;
    DeletedId: u32, in deleted_files;
    BlobId: u32, in blobs;
}

/// `(first, pages)`.
impl Wire<PageExtent> for (u64, u64) {
    fn from_live(live: &PageExtent) -> (u64, u64) {
        (live.first, live.pages)
    }
    fn into_live(self, bounds: &Bounds) -> Result<PageExtent, Invalid> {
        let (first, pages) = self;
        match first.checked_add(pages) {
            Some(end) if pages > 0 && end <= bounds.pages => Ok(PageExtent { first, pages }),
            _ => Err(Invalid::new(format!("{pages} pages from {first} in a page file of {}", bounds.pages))),
        }
    }
    fn any(entropy: &mut Entropy<'_>) -> PageExtent {
        let first = entropy.below(entropy.bounds.pages.max(1));
        PageExtent { first, pages: 1 + entropy.below(entropy.bounds.pages.saturating_sub(first).max(1)) }
    }
}

impl Wire<Vec<u8>> for Bytes {
    fn from_live(live: &Vec<u8>) -> Bytes {
        Bytes(live.clone())
    }
    fn into_live(self, _bounds: &Bounds) -> Result<Vec<u8>, Invalid> {
        Ok(self.0)
    }
    fn any(entropy: &mut Entropy<'_>) -> Vec<u8> {
        (0..entropy.byte() % 40).map(|_| entropy.byte()).collect()
    }
}

impl<const N: usize> Wire<[u8; N]> for Bytes {
    fn from_live(live: &[u8; N]) -> Bytes {
        Bytes(live.to_vec())
    }
    fn into_live(self, _bounds: &Bounds) -> Result<[u8; N], Invalid> {
        let length = self.0.len();
        self.0.try_into().map_err(|_| Invalid::new(format!("{length} bytes instead of {N}")))
    }
    fn any(entropy: &mut Entropy<'_>) -> [u8; N] {
        std::array::from_fn(|_| entropy.byte())
    }
}

impl Wire<OsString> for Bytes {
    fn from_live(live: &OsString) -> Bytes {
        Bytes(live.as_bytes().to_vec())
    }
    fn into_live(self, _bounds: &Bounds) -> Result<OsString, Invalid> {
        // No name in the kernel has one, and every call that is given one fails.
        if self.0.contains(&0) { Err(Invalid::new("a NUL byte in a name")) } else { Ok(OsString::from_vec(self.0)) }
    }
    fn any(entropy: &mut Entropy<'_>) -> OsString {
        OsString::from_vec(entropy.name())
    }
}

impl Wire<PathBuf> for Bytes {
    fn from_live(live: &PathBuf) -> Bytes {
        Bytes(live.as_os_str().as_bytes().to_vec())
    }
    fn into_live(self, bounds: &Bounds) -> Result<PathBuf, Invalid> {
        Wire::<OsString>::into_live(self, bounds).map(PathBuf::from)
    }
    fn any(entropy: &mut Entropy<'_>) -> PathBuf {
        PathBuf::from("/").join(OsString::from_vec(entropy.name()))
    }
}

impl<L, W: Wire<L>> Wire<Option<L>> for Option<W> {
    fn from_live(live: &Option<L>) -> Option<W> {
        live.as_ref().map(W::from_live)
    }
    fn into_live(self, bounds: &Bounds) -> Result<Option<L>, Invalid> {
        self.map(|wire| wire.into_live(bounds)).transpose()
    }
    fn any(entropy: &mut Entropy<'_>) -> Option<L> {
        (entropy.byte() & 1 == 1).then(|| W::any(entropy))
    }
}

impl<L, W: Wire<L> + Item> Wire<Vec<L>> for Vec<W> {
    fn from_live(live: &Vec<L>) -> Vec<W> {
        live.iter().map(W::from_live).collect()
    }
    fn into_live(self, bounds: &Bounds) -> Result<Vec<L>, Invalid> {
        let mut live = Vec::with_capacity(self.len());
        for (index, wire) in self.into_iter().enumerate() {
            live.push(wire.into_live(bounds).map_err(|invalid| invalid.within(index))?);
        }
        Ok(live)
    }
    fn any(entropy: &mut Entropy<'_>) -> Vec<L> {
        (0..entropy.length()).map(|_| W::any(entropy)).collect()
    }
}

macro_rules! tuples {
    ($($wire:ident $live:ident $number:tt),*) => {
        impl<$($live, $wire: Wire<$live>),*> Wire<($($live,)*)> for ($($wire,)*) {
            fn from_live(live: &($($live,)*)) -> ($($wire,)*) {
                ($($wire::from_live(&live.$number),)*)
            }
            fn into_live(self, bounds: &Bounds) -> Result<($($live,)*), Invalid> {
                Ok(($(self.$number.into_live(bounds).map_err(|invalid: Invalid| invalid.within($number))?,)*))
            }
            fn any(entropy: &mut Entropy<'_>) -> ($($live,)*) {
                ($($wire::any(entropy),)*)
            }
        }
    };
}

tuples!(W0 L0 0, W1 L1 1);
tuples!(W0 L0 0, W1 L1 1, W2 L2 2);
tuples!(W0 L0 0, W1 L1 1, W2 L2 2, W3 L3 3);

macro_rules! arrays {
    ($($length:literal),*) => {$(
        impl<L, W: Wire<L> + Item> Wire<[L; $length]> for [W; $length] {
            fn from_live(live: &[L; $length]) -> [W; $length] {
                std::array::from_fn(|index| W::from_live(&live[index]))
            }
            fn into_live(self, bounds: &Bounds) -> Result<[L; $length], Invalid> {
                let live: Vec<L> = Vec::from(self).into_live(bounds)?;
                live.try_into().map_err(|_| Invalid::new("wrong length"))
            }
            fn any(entropy: &mut Entropy<'_>) -> [L; $length] {
                std::array::from_fn(|_| W::any(entropy))
            }
        }
    )*};
}

arrays!(2, 3, 4);

/// Declares a wire struct and its conversions from and to the live struct with the same fields. On the wire it is a map
/// from field names.
macro_rules! wire_struct {
    ($(#[$meta:meta])* pub struct $name:ident for $live:path { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name { $(pub $field: $type,)* }

        impl $crate::wire::Wire<$live> for $name {
            #[allow(unused_variables)]
            fn from_live(live: &$live) -> $name {
                $name { $($field: <$type as $crate::wire::Wire<_>>::from_live(&live.$field),)* }
            }
            #[allow(unused_variables)]
            fn into_live(self, bounds: &$crate::wire::Bounds) -> Result<$live, $crate::wire::Invalid> {
                type Live = $live;
                Ok(Live {
                    $($field: <$type as $crate::wire::Wire<_>>::into_live(self.$field, bounds)
                        .map_err(|invalid: $crate::wire::Invalid| invalid.within(stringify!($field)))?,)*
                })
            }
            #[allow(unused_variables)]
            fn any(entropy: &mut $crate::wire::Entropy<'_>) -> $live {
                type Live = $live;
                Live { $($field: <$type as $crate::wire::Wire<_>>::any(entropy),)* }
            }
        }

        impl $crate::wire::Item for $name {}
    };
}

/// Declares a wire enum and its conversions from and to the live enum with the same variants: unit, of one value, or
/// with named fields. On the wire a unit variant is its name, any other a map of one pair, name and content.
macro_rules! wire_enum {
    ($(#[$meta:meta])* pub enum $name:ident for $live:path {
        $($variant:ident $(($inner:ty))? $({ $($field:ident: $type:ty),* $(,)? })?),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub enum $name { $($variant $(($inner))? $({ $($field: $type),* })?,)* }

        impl $crate::wire::Wire<$live> for $name {
            fn from_live(live: &$live) -> $name {
                type Live = $live;
                match live {
                    $(Live::$variant $(($crate::wire::binding!($inner, inner)))? $({ $($field),* })? =>
                        $name::$variant
                            $((<$inner as $crate::wire::Wire<_>>::from_live(inner)))?
                            $({ $($field: <$type as $crate::wire::Wire<_>>::from_live($field)),* })?,)*
                }
            }
            #[allow(unused_variables)]
            fn into_live(self, bounds: &$crate::wire::Bounds) -> Result<$live, $crate::wire::Invalid> {
                type Live = $live;
                Ok(match self {
                    $($name::$variant $(($crate::wire::binding!($inner, inner)))? $({ $($field),* })? =>
                        Live::$variant
                            $((<$inner as $crate::wire::Wire<_>>::into_live(inner, bounds)
                                .map_err(|invalid: $crate::wire::Invalid| invalid.within(stringify!($variant)))?))?
                            $({ $($field: <$type as $crate::wire::Wire<_>>::into_live($field, bounds)
                                .map_err(|invalid: $crate::wire::Invalid| invalid.within(stringify!($field)))?),* })?,)*
                })
            }
            fn any(entropy: &mut $crate::wire::Entropy<'_>) -> $live {
                type Live = $live;
                let variants: &[fn(&mut $crate::wire::Entropy<'_>) -> Live] = &[
                    $(|_entropy| Live::$variant
                        $((<$inner as $crate::wire::Wire<_>>::any(_entropy)))?
                        $({ $($field: <$type as $crate::wire::Wire<_>>::any(_entropy)),* })?,)*
                ];
                variants[usize::from(entropy.byte()) % variants.len()](entropy)
            }
        }

        impl $crate::wire::Item for $name {}
    };
}

/// A name to bind to, once for each `$type`.
macro_rules! binding {
    ($type:ty, $name:ident) => {
        $name
    };
}

pub(crate) use {binding, wire_enum, wire_struct};
