//! What the descriptors say of names: which fields a message has, how they are called in JSON
//! and which of them JSON writes in a way that plain JSON would not.

/// A message.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Its full name.
    pub name: &'static str,
    /// Its fields, in the order of the file.
    pub fields: &'static [Field],
}

/// A field of a message.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in the file, in snake_case.
    pub name: &'static str,
    /// Its name in canonical JSON, in camelCase.
    pub json_name: &'static str,
    /// What its values are.
    pub kind: Kind,
    /// Whether it has any number of values.
    pub is_repeated: bool,
}

/// What the values of a field are, as far as JSON makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Numbers that JSON writes as numbers.
    Number,
    /// Numbers of 64 bits, which canonical JSON writes as text.
    Number64,
    /// True or false.
    Bool,
    /// Text, and whatever JSON writes as text: times, bytes.
    Text,
    /// Words of the enum of this name.
    Enum(&'static str),
    /// Messages of this name.
    Message(&'static str),
    /// A map from text; its keys are the user's.
    Map,
}

/// An enum.
#[derive(Clone, Copy, Debug)]
pub struct Enum {
    /// Its full name.
    pub name: &'static str,
    /// Its words, in the order of the file.
    pub words: &'static [&'static str],
}

/// A method of the service.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// Full name of the message it takes.
    pub input: &'static str,
    /// Full name of the message it answers with.
    pub output: &'static str,
    /// Whether it answers with a stream of them.
    pub streams: bool,
    /// Whether it changes nothing, so that it may be called with GET.
    pub is_safe: bool,
}

/// The message of this full name.
pub fn message(name: &str) -> Option<&'static Message> {
    MESSAGES.iter().find(|message| message.name == name)
}

/// The words of the enum of this full name.
pub fn words(name: &str) -> Option<&'static [&'static str]> {
    ENUMS.iter().find(|listed| listed.name == name).map(|listed| listed.words)
}

include!(concat!(env!("OUT_DIR"), "/names.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_a_field_or_a_method_names_is_there() {
        let fields = MESSAGES.iter().flat_map(|message| message.fields);
        for field in fields {
            if let Kind::Message(name) = field.kind {
                assert!(message(name).is_some(), "{name}");
            }
            if let Kind::Enum(name) = field.kind {
                assert!(words(name).is_some_and(|words| !words.is_empty()), "{name}");
            }
        }
        for method in METHODS {
            assert!(message(method.input).is_some() && message(method.output).is_some());
        }
        assert_eq!(METHODS.len(), 8);
    }

    #[test]
    fn kinds_are_those_of_the_file() {
        let field = |of: &str, name: &str| {
            let found = message(of).unwrap().fields.iter().find(|field| field.name == name);
            *found.unwrap()
        };
        let labels = field("builder.v1.BuildConfig", "labels");
        assert_eq!((labels.kind, labels.is_repeated), (Kind::Map, false));
        let size = field("builder.v1.MicroVMRootfs", "size_limit_bytes");
        assert_eq!((size.kind, size.json_name), (Kind::Number64, "sizeLimitBytes"));
        let builds = field("builder.v1.ListBuildsResponse", "builds");
        assert_eq!(builds.kind, Kind::Message("builder.v1.BuildJob"));
        assert!(builds.is_repeated);
        assert_eq!(field("builder.v1.BuildJob", "created_at").kind, Kind::Text);
        let state = field("builder.v1.BuildJob", "state");
        assert_eq!(state.kind, Kind::Enum("builder.v1.BuildState"));
        let direct = ["INIT_STRATEGY_DIRECT", "INIT_STRATEGY_DIRECT_EXEC"];
        let words = words("builder.v1.InitStrategy").unwrap();
        assert!(direct.iter().all(|word| words.contains(word)), "both names of one number");
    }
}
