//! Arbitrary bytes as what people write: POINT, policies, schedules, sizes, ages.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_decide::fuzz::words(data));
