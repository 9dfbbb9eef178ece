//! How much a request may bring. What is kept with a build is shown again by every list, so
//! that each of its parts has a bound, and the whole of it has one too.

use std::fmt::Display;

use buffa::{EnumValue, Enumeration};

use crate::build::service::ServiceError;

/// Longest name, key, label, tag and id, in bytes.
pub(super) const TEXT_BYTES_MAX: usize = 256;
/// Longest image reference: registry, repository, tag and digest are shorter at their longest.
pub(super) const IMAGE_BYTES_MAX: usize = 1024;
/// Longest password or token of a registry: some are signed documents.
pub(super) const SECRET_BYTES_MAX: usize = 16 << 10;
/// Longest reason for a cancel.
pub(super) const REASON_BYTES_MAX: usize = 1024;
/// Longest config as it is kept: JSON without secrets. As many labels as there may be, each as
/// long as it may be, take half of it.
pub(super) const ECHO_BYTES_MAX: usize = 64 << 10;
/// Most labels of a build.
pub(super) const LABELS_MAX: usize = 64;
/// Most commands of a build, and the longest.
pub(super) const COMMANDS_MAX: usize = 32;
pub(super) const COMMAND_BYTES_MAX: usize = 4096;
/// Most tags to try: each may cost a request to the registry.
pub(super) const PULL_TAGS_MAX: usize = 16;

/// Letters of what a caller wrote that an answer quotes.
const QUOTED_CHARS_MAX: usize = 64;

/// What a caller wrote, but not all of a long text.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

/// A field that a request gets wrong.
pub(in super::super) fn invalid(field: &str, problem: impl ToString) -> ServiceError {
    ServiceError::Invalid { field: field.to_owned(), problem: problem.to_string() }
}

/// What an enum has not, with the words that it has.
pub(in super::super) fn none_of(field: &str, said: impl Display, words: &[&str]) -> ServiceError {
    invalid(field, format!("{said} is none of {}", words.join(", ")))
}

/// An enum's value. A number without a word means something that this service does not know, and
/// what was asked for would not be what is done.
pub(super) fn known<E: Enumeration + 'static>(
    field: &str,
    value: EnumValue<E>,
) -> Result<E, ServiceError> {
    value.as_known().ok_or_else(|| {
        let words: Vec<&str> = E::values().iter().map(E::proto_name).collect();
        none_of(field, value.to_i32(), &words)
    })
}

/// A text that is kept.
pub(super) fn bounded(field: &str, text: &str, bytes_max: usize) -> Result<String, ServiceError> {
    match text.len() <= bytes_max {
        true => Ok(text.to_owned()),
        false => Err(invalid(field, format!("is longer than {bytes_max} bytes"))),
    }
}

/// How many there may be of something.
pub(super) fn few(field: &str, count: usize, most: usize) -> Result<(), ServiceError> {
    match count <= most {
        true => Ok(()),
        false => Err(invalid(field, format!("are more than {most}"))),
    }
}
