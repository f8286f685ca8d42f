//! Arbitrary bytes as what an NBD server says, in the handshake and in all framings of the transmission phase.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_nbd::fuzz::wire(data));
