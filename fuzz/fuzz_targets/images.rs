//! Arbitrary bytes as a disk image of every format.
#![no_main]

use std::sync::LazyLock;

/// In memory, with a file that images may name.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a temporary directory");
    std::fs::write(dir.path().join("b"), [0; 4096]).expect("a file");
    dir
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtward_engine::fuzz::image(DIR.path(), data));
