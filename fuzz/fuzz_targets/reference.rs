//! References and sources: no panic, and what is printed means the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::{Digest, Platform, Reference, Source};

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        let printed = reference.to_string();
        assert_eq!(printed.parse::<Reference>().expect("its own text parses"), reference);
        assert!(!reference.repository().contains(".."), "{printed}");
    }
    let _ = text.parse::<Source>();
    let _ = text.parse::<Platform>();
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
});
