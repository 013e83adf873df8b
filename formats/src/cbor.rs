//! Decodes the plain CBOR that v1 uses, from bytes that may be anything.
//!
//! Why not a library: it takes a third of the time that ciborium takes (a tree of 100 processes has 1.5 MB of manifest,
//! and its restore 40 ms), and refuses what v1 does not use instead of passing over it: tags, floats, unknown lengths,
//! numbers in a longer form than need be. ciborium encodes, and the tests compare what both decode.
//!
//! Nothing here calls itself but through the types that are decoded, of which none contains itself, so nesting is
//! bounded by them; what no type asks for is an error and never skipped. A length is believed only so far as there are
//! bytes, and no list is made larger than the items that have come.

use std::fmt;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Visitor};
use serde::forward_to_deserialize_any;

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Error {
        Error(message.to_string())
    }
}

/// Decodes bytes that are one item with nothing after it, of at most `max_items` items.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], max_items: u64) -> Result<T, Error> {
    let mut decoder = Decoder { bytes, place: 0, items_left: max_items };
    let value = T::deserialize(&mut decoder).map_err(|Error(what)| {
        let place = decoder.place;
        if what.ends_with(" of the manifest") {
            Error(what)
        } else {
            Error(format!("{what} before byte {place} of the manifest"))
        }
    })?;
    if decoder.place == bytes.len() { Ok(value) } else { Err(decoder.error("more than a manifest")) }
}

struct Decoder<'de> {
    bytes: &'de [u8],
    place: usize,
    items_left: u64,
}

/// Major types (RFC 8949, 3.1).
const UNSIGNED: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;

const FALSE: u8 = 0xf4;
const TRUE: u8 = 0xf5;
const NULL: u8 = 0xf6;

impl<'de> Decoder<'de> {
    fn error(&self, what: &str) -> Error {
        Error(format!("{what} at byte {} of the manifest", self.place))
    }

    fn peek(&self) -> Result<u8, Error> {
        self.bytes.get(self.place).copied().ok_or_else(|| self.error("an item is missing"))
    }

    /// The one byte of `false`, `true` or `null`.
    fn simple(&mut self) -> Result<(), Error> {
        self.place += 1;
        self.count()
    }

    fn count(&mut self) -> Result<(), Error> {
        match self.items_left.checked_sub(1) {
            Some(left) => self.items_left = left,
            None => return Err(self.error("too many items")),
        }
        Ok(())
    }

    /// The head of an item: its major type and its number.
    fn head(&mut self) -> Result<(u8, u64), Error> {
        let first = self.peek()?;
        self.count()?;
        let number = match first & 31 {
            small @ 0..24 => {
                self.place += 1;
                u64::from(small)
            }
            long @ 24..28 => {
                let width = 1 << (long - 24);
                let start = self.place + 1;
                let Some(field) = self.bytes.get(start..start + width) else {
                    return Err(self.error("a cut-off number"));
                };
                let number = field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
                if number < [24, 1 << 8, 1 << 16, 1 << 32][usize::from(long - 24)] {
                    return Err(self.error("a number that is not in its shortest form"));
                }
                self.place = start + width;
                number
            }
            _ => return Err(self.error("an item of unknown length")),
        };
        Ok((first >> 5, number))
    }

    /// The head of an item of one major type.
    fn head_of(&mut self, major: u8, what: &str) -> Result<u64, Error> {
        if self.peek()? >> 5 != major {
            return Err(self.error(&format!("something else where {what} must be")));
        }
        Ok(self.head()?.1)
    }

    /// The head of what holds `length` things of at least `least` bytes each.
    fn length_of(&mut self, major: u8, least: u64, what: &str) -> Result<u64, Error> {
        let start = self.place;
        let length = self.head_of(major, what)?;
        if length <= (self.bytes.len() - self.place) as u64 / least {
            return Ok(length);
        }
        self.place = start;
        Err(self.error("a length that goes beyond the end"))
    }

    fn take(&mut self, length: u64) -> &'de [u8] {
        let taken = &self.bytes[self.place..self.place + length as usize];
        self.place += length as usize;
        taken
    }

    fn text(&mut self) -> Result<&'de str, Error> {
        let length = self.length_of(TEXT, 1, "text")?;
        str::from_utf8(self.take(length)).map_err(|_| self.error("text that is not UTF-8"))
    }

    /// A map of one pair, up to the value: the name of a variant that holds something.
    fn variant(&mut self) -> Result<&'de str, Error> {
        match self.length_of(MAP, 2, "a variant")? {
            1 => self.text(),
            _ => Err(self.error("a variant of more than one pair")),
        }
    }
}

/// What the derived code asks for and this CBOR has.
impl<'de> de::Deserializer<'de> for &mut Decoder<'de> {
    type Error = Error;

    /// Asked for only by what takes anything, which nothing in an image does.
    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(self.error("an item that no image has"))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let value = match self.peek()? {
            FALSE => false,
            TRUE => true,
            _ => return Err(self.error("something else where true or false must be")),
        };
        self.simple()?;
        visitor.visit_bool(value)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.head()? {
            (UNSIGNED, number) => visitor.visit_u64(number),
            (NEGATIVE, number) => match i64::try_from(number) {
                Ok(number) => visitor.visit_i64(-1 - number),
                Err(_) => Err(self.error("a number that is too small")),
            },
            _ => Err(self.error("something else where a number must be")),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(self.head_of(UNSIGNED, "a number that is not negative")?)
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let length = self.length_of(BYTES, 1, "a byte string")?;
        visitor.visit_borrowed_bytes(self.take(length))
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.peek()? == NULL {
            self.simple()?;
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let length = self.length_of(ARRAY, 1, "a list")?;
        let mut rest = Rest { decoder: self, left: length };
        let value = visitor.visit_seq(&mut rest)?;
        rest.end(value)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let length = self.length_of(MAP, 2, "a struct")?;
        let mut rest = Rest { decoder: self, left: length };
        let value = visitor.visit_map(&mut rest)?;
        rest.end(value)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.peek()? >> 5 == TEXT {
            let name = self.text()?;
            visitor.visit_enum(de::value::BorrowedStrDeserializer::new(name))
        } else {
            visitor.visit_enum(Held { decoder: self })
        }
    }

    forward_to_deserialize_any! { i128 u128 f32 f64 char unit unit_struct map ignored_any }
}

/// What is left of a list or a struct.
struct Rest<'a, 'de> {
    decoder: &'a mut Decoder<'de>,
    left: u64,
}

impl Rest<'_, '_> {
    fn next(&mut self) -> bool {
        let more = self.left > 0;
        self.left = self.left.saturating_sub(1);
        more
    }

    /// A fixed number of items must be all.
    fn end<T>(&self, value: T) -> Result<T, Error> {
        if self.left == 0 { Ok(value) } else { Err(self.decoder.error("a list that is too long")) }
    }
}

impl<'de> de::SeqAccess<'de> for Rest<'_, 'de> {
    type Error = Error;

    // No `size_hint`: nothing is allocated for items that have not come.
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        if self.next() { seed.deserialize(&mut *self.decoder).map(Some) } else { Ok(None) }
    }
}

impl<'de> de::MapAccess<'de> for Rest<'_, 'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        if !self.next() {
            return Ok(None);
        }
        let name = self.decoder.text()?;
        seed.deserialize(BorrowedStrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(&mut *self.decoder)
    }
}

/// A variant that holds something.
struct Held<'a, 'de> {
    decoder: &'a mut Decoder<'de>,
}

impl<'de> de::EnumAccess<'de> for Held<'_, 'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self), Error> {
        let name = self.decoder.variant()?;
        Ok((seed.deserialize(BorrowedStrDeserializer::new(name))?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Held<'_, 'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Err(self.decoder.error("content of a variant that holds nothing"))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(self.decoder)
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Error> {
        de::Deserializer::deserialize_tuple(self.decoder, length, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        de::Deserializer::deserialize_struct(self.decoder, "", fields, visitor)
    }
}
