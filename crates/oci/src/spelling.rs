//! Names of fields that another reader would take for ones that count. Go's `encoding/json`, by
//! which Docker, containerd and registries read, passes over case, and of two spellings takes the
//! later; a document that leaves it to the reader what it says is refused. Knows the names, not
//! what the fields mean.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::manifest::shown;

/// The fields of an object that count, in every accepted spelling, and what is in them.
pub(crate) struct Shape(pub(crate) &'static [(&'static str, Option<&'static Shape>)]);

/// Refuses a document in which the name of a field that counts is spelled in another way.
pub(crate) fn check(bytes: &[u8], shape: &'static Shape) -> Result<(), serde_json::Error> {
    Check(shape).deserialize(&mut serde_json::Deserializer::from_slice(bytes))
}

/// As Go folds: beside ASCII case there are the long s and the Kelvin sign.
fn fold(letter: char) -> char {
    match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        letter => letter.to_ascii_lowercase(),
    }
}

fn is_alike(one: &str, other: &str) -> bool {
    one.chars().map(fold).eq(other.chars().map(fold))
}

fn refuse_alike(fields: &[(&str, Option<&Shape>)], name: &str) -> Result<(), String> {
    match fields.iter().find(|(known, _)| is_alike(known, name)) {
        None => Ok(()),
        Some((known, _)) => {
            let name = shown(name);
            Err(format!("the field {name:?} would be {known:?} to other readers"))
        }
    }
}

#[derive(Clone, Copy)]
struct Check(&'static Shape);

impl<'de> DeserializeSeed<'de> for Check {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Check {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Check(Shape(fields)) = self;
        while let Some(name) = map.next_key::<String>()? {
            match fields.iter().find(|(known, _)| *known == name) {
                Some((_, Some(inner))) => map.next_value_seed(Check(inner))?,
                Some((_, None)) => {
                    map.next_value::<IgnoredAny>()?;
                }
                None => {
                    refuse_alike(fields, &name).map_err(A::Error::custom)?;
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}
