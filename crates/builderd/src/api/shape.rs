//! JSON before it is read as a message: an object wherever a message belongs, and of an enum's
//! words only those that it has. The reader of messages would take a list for fields in their
//! order, and names no field in its errors.
//!
//! Names and words come from the descriptors; unknown names are passed over. What else may be
//! wrong with a text (its syntax, numbers, times) is for the reader to say.

use std::cell::OnceCell;
use std::fmt;

use api::{Field, Kind, Message};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::convert::{invalid, none_of};
use crate::build::service::ServiceError;

/// What the outermost value is called, which has no name.
const WHOLE: &str = "message";
/// Longest word that is repeated to its sender, in letters.
const WORD_CHARS_MAX: usize = 64;

/// Refuses JSON that has not the form of `message`; of one that is not ours it only must be an
/// object.
pub(super) fn check(message: Option<&'static Message>, json: &[u8]) -> Result<(), ServiceError> {
    let fields = message.map_or(&[][..], |message| message.fields);
    let found = OnceCell::new();
    let look = Look { wanted: Wanted::Message(fields), place: None, found: &found };
    // Other errors than those that were found here are the reader's to name.
    let _ = look.deserialize(&mut serde_json::Deserializer::from_slice(json));
    found.into_inner().map_or(Ok(()), Err)
}

/// Where in a text, from the outermost name on.
struct Place<'a> {
    above: Option<&'a Place<'a>>,
    name: &'static str,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(above) = self.above {
            write!(f, "{above}.")?;
        }
        f.write_str(self.name)
    }
}

/// What belongs somewhere.
#[derive(Clone, Copy)]
enum Wanted {
    Message(&'static [Field]),
    Word(&'static [&'static str]),
    /// Any number of messages or words.
    Many(&'static Field),
    /// The reader knows.
    Other,
}

impl Wanted {
    fn of(field: &'static Field) -> Self {
        match field.is_repeated {
            true => Self::Many(field),
            false => Self::each_of(field),
        }
    }

    fn each_of(field: &'static Field) -> Self {
        match field.kind {
            Kind::Message(name) => {
                api::message(name).map_or(Self::Other, |message| Self::Message(message.fields))
            }
            Kind::Enum(name) => api::words(name).map_or(Self::Other, Self::Word),
            Kind::Number | Kind::Number64 | Kind::Bool | Kind::Text | Kind::Map => Self::Other,
        }
    }
}

/// Looks at one value.
struct Look<'a> {
    wanted: Wanted,
    place: Option<&'a Place<'a>>,
    /// What is wrong, once something is.
    found: &'a OnceCell<ServiceError>,
}

impl Look<'_> {
    fn field(&self) -> String {
        self.place.map_or_else(|| WHOLE.to_owned(), Place::to_string)
    }

    fn stop<T, E: Error>(&self, wrong: ServiceError) -> Result<T, E> {
        let error = E::custom(&wrong);
        // Nothing is looked at behind the first.
        let _ = self.found.set(wrong);
        Err(error)
    }

    /// A value that is no object.
    fn is<E: Error>(&self, what: &str) -> Result<(), E> {
        match self.wanted {
            Wanted::Message(_) => {
                let problem = format!("is {what}, where an object ({{…}}) belongs");
                self.stop(invalid(&self.field(), problem))
            }
            Wanted::Word(_) | Wanted::Many(_) | Wanted::Other => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Look<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Look<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.is(if value { "true" } else { "false" })
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.is("a number")
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.is("a number")
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.is("a number")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        match self.wanted {
            Wanted::Word(words) if !words.contains(&text) => {
                let said: String = text.chars().take(WORD_CHARS_MAX).collect();
                self.stop(none_of(&self.field(), format_args!("{said:?}"), words))
            }
            Wanted::Word(_) | Wanted::Message(_) | Wanted::Many(_) | Wanted::Other => {
                self.is("a text")
            }
        }
    }

    /// A field that is null is not set; the whole must be.
    fn visit_unit<E: Error>(self) -> Result<(), E> {
        if self.place.is_some() { Ok(()) } else { self.is("null") }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let each = match self.wanted {
            Wanted::Many(field) => Wanted::each_of(field),
            Wanted::Message(_) | Wanted::Word(_) | Wanted::Other => Wanted::Other,
        };
        self.is("a list")?;
        let (place, found) = (self.place, self.found);
        while list.next_element_seed(Look { wanted: each, place, found })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let fields = match self.wanted {
            Wanted::Message(fields) => fields,
            Wanted::Word(_) | Wanted::Many(_) | Wanted::Other => &[],
        };
        while let Some(field) = map.next_key_seed(Name(fields))? {
            let Some(field) = field else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let place = Place { above: self.place, name: field.name };
            let look = Look { wanted: Wanted::of(field), place: Some(&place), found: self.found };
            map.next_value_seed(look)?;
        }
        Ok(())
    }
}

/// Finds a field by its name, in either spelling.
struct Name(&'static [Field]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Option<&'static Field>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Option<&'static Field>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().find(|field| field.name == name || field.json_name == name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn wrong(message: &str, value: &Value) -> Option<String> {
        let checked = check(api::message(message), value.to_string().as_bytes());
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn only_an_object_is_a_message() {
        for (value, what) in [
            (json!([]), "a list"),
            (json!([{"build_id": "build_1"}]), "a list"),
            (json!("{}"), "a text"),
            (json!(1), "a number"),
            (json!(-1), "a number"),
            (json!(1.5), "a number"),
            (json!(true), "true"),
            (Value::Null, "null"),
        ] {
            let said = format!("message: is {what}, where an object ({{…}}) belongs");
            assert_eq!(wrong("builder.v1.GetBuildRequest", &value), Some(said.clone()));
            assert_eq!(wrong("of.another.Service", &value), Some(said));
        }
        assert_eq!(wrong("builder.v1.GetBuildRequest", &json!({})), None);
        assert_eq!(wrong("of.another.Service", &json!({"a": []})), None);
    }

    #[test]
    fn messages_inside_are_objects_or_not_set() {
        let wrong = |config| wrong("builder.v1.CreateBuildRequest", &json!({ "config": config }));
        assert!(wrong(json!([])).is_some_and(|said| said.starts_with("config: is a list")));
        let said = wrong(json!({"source": {"dockerImage": ["nginx"]}})).unwrap();
        assert!(said.starts_with("config.source.docker_image: is a list"), "{said}");
        assert_eq!(wrong(json!({"tenant": null, "labels": {"tier": "x"}})), None);
        assert_eq!(wrong(json!({"novelty": [], "retryPolicy": {"retryOn": ["X"]}})), None);
    }

    #[test]
    fn words_that_an_enum_has_not_are_named_with_those_it_has() {
        let list = |filter| wrong("builder.v1.ListBuildsRequest", &filter);
        for name in ["state_filter", "stateFilter"] {
            let said = list(json!({name: ["BUILD_STATE_FAILED", "BUILD_STATE_FALIED"]})).unwrap();
            let start = "state_filter: \"BUILD_STATE_FALIED\" is none of BUILD_STATE_UNSPECIFIED, ";
            assert!(said.starts_with(start) && said.contains(", BUILD_STATE_FAILED, "), "{said}");
        }
        assert_eq!(list(json!({"state_filter": ["BUILD_STATE_FAILED", 7, null]})), None);
        assert!(list(json!({"state_filter": ["build_state_failed"]})).is_some());
        let target = |init: &str| {
            let target = json!({"microvm_rootfs": {"init_strategy": init}});
            let request = json!({"config": {"target": target}});
            wrong("builder.v1.CreateBuildRequest", &request)
        };
        assert_eq!(target("INIT_STRATEGY_DIRECT"), None);
        assert_eq!(target("INIT_STRATEGY_DIRECT_EXEC"), None, "both of its names");
        assert!(target(&"x".repeat(1 << 20)).is_some_and(|said| said.len() < 400));
    }

    #[test]
    fn what_cannot_be_read_is_left_to_the_reader() {
        for text in ["", "{", "{\"build_id\": ", "{} {}", "{\"build_id\": 1}", "nul"] {
            let checked = check(api::message("builder.v1.GetBuildRequest"), text.as_bytes());
            assert!(checked.is_ok(), "{text}");
        }
    }
}
