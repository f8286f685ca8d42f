//! The index of a repository, lost and made again through the real binary.

use std::fs;

use crate::common::{Sandbox, fill, tool};

fn with_backup() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    fill(&image, 0, 5 << 20, 1);
    sandbox.json(&["backup", "image", "disk.raw"]);
    sandbox
}

fn assert_restores(sandbox: &Sandbox) {
    let _ = fs::remove_file(sandbox.path("back.raw"));
    sandbox.run(&["restore", "disk", "image/disk@latest", "--to", "back.raw", "--format", "raw"]).ok();
    tool("cmp", &[&sandbox.text("disk.raw"), &sandbox.text("back.raw")]);
}

#[test]
fn an_index_that_is_lost_is_made_again_from_the_packs() {
    let sandbox = with_backup();
    let before = sandbox.json(&["repo", "check"]);
    fs::remove_dir_all(sandbox.path("repo/index")).unwrap();
    sandbox.run(&["repo", "check"]).code(9);
    let report = sandbox.json(&["repo", "rebuild-index"]);
    assert_eq!(report["chunks"], before["chunks"]);
    assert_eq!((report["segments"].as_u64(), report["replaced"].as_u64()), (Some(1), Some(0)));
    assert_eq!(report["damaged"].as_array().map(Vec::len), Some(0));
    sandbox.run(&["repo", "check"]).ok();
    assert_restores(&sandbox);
}

#[test]
fn a_damaged_index_is_replaced_and_a_damaged_pack_is_reported() {
    let sandbox = with_backup();
    let segment = fs::read_dir(sandbox.path("repo/index")).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(&segment).unwrap();
    fs::write(&segment, "not an index segment").unwrap();
    sandbox.run(&["repo", "check"]).code(9);
    let ran = sandbox.run(&["repo", "rebuild-index"]).ok();
    assert!(ran.stdout.contains("in place of 1"), "{}", ran.stdout);
    assert!(!segment.exists());
    assert_restores(&sandbox);

    let pack = tool("find", &[&sandbox.text("repo/data"), "-type", "f"]);
    let pack = pack.lines().next().unwrap();
    let mut bytes = fs::read(pack).unwrap();
    let tail = bytes.len() - 10;
    bytes[tail] ^= 1;
    fs::remove_file(pack).unwrap();
    fs::write(pack, bytes).unwrap();
    let ran = sandbox.run(&["repo", "rebuild-index", "--json"]).code(9).says("damaged tables");
    assert_eq!((ran.json()["damaged"].as_array().unwrap().len(), ran.json()["salvaged"].as_u64()), (1, Some(1)));
    // The records themselves are whole, and the old index knew them.
    assert_restores(&sandbox);
}

#[test]
fn help_has_examples() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["repo", "rebuild-index", "--help"]).ok();
    assert!(ran.stdout.contains("virtward repo rebuild-index --json"), "{}", ran.stdout);
}
