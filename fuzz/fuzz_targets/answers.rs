//! Arbitrary bytes as answers of QEMU and of guest agents.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_hypervisor::fuzz::answers(data));
