//! What a registry says in headers, and the token server in its answer.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|answer: &[u8]| oci::testing::read_answer(answer));
