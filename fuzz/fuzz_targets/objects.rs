//! Arbitrary bytes as any object of a repository, and as any answer of an object store.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_repo::fuzz::everything(data));
