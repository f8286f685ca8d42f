//! Arbitrary bytes as libvirt's XML, read by the driver and rewritten by a restore.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    virtward_hypervisor::fuzz::definitions(data);
    virtward_engine::fuzz::definition(data);
});
