//! Requests in JSON from anyone who may ask for something. The first letter says which: `a` is the
//! first method of the service.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|request: &[u8]| {
    let Some((method, json)) = request.split_first() else { return };
    builderd::testing::read_request(usize::from(method.wrapping_sub(b'a')), json);
});
