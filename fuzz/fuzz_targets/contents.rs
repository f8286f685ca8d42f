//! Arbitrary bytes as what is behind a seal of the repository, and as the texts that object stores and their users give.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_repo::fuzz::contents(data));
