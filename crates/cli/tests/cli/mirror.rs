//! Copies in another repository, healing from them, and keys that only write, through the real binary.

use std::{fs, path::Path};

use crate::common::{Sandbox, fill, tool};

/// A repository with two restore points of an image, and a second one with its own password.
fn two_repositories() -> (Sandbox, String) {
    let sandbox = Sandbox::with_repository();
    let password = sandbox.write("offsite.pw", "offsite\n");
    sandbox.run(&["repo", "init", "--repo", "offsite", "--password-file", &password]).ok();
    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    fill(&image, 0, 5 << 20, 1);
    sandbox.run(&["backup", "image", "disk.raw"]).ok();
    fill(&image, 2 << 20, 1 << 20, 2);
    sandbox.run(&["backup", "image", "disk.raw"]).ok();
    (sandbox, password)
}

fn restores(sandbox: &Sandbox, from: &[&str]) {
    sandbox.run(&[&["restore", "disk", "disk@latest", "--to", "back.raw", "--overwrite"], from].concat()).ok();
    tool("qemu-img", &["compare", &sandbox.text("disk.raw"), &sandbox.text("back.raw")]);
}

#[test]
fn a_copy_is_made_once_and_restores_without_the_original() {
    let (sandbox, password) = two_repositories();
    let copy = ["repo", "copy", "--to", "offsite", "--to-password-file", &password];
    sandbox.run(&copy[..4]).code(8).says("--to-password-file");
    sandbox.run(&["repo", "copy", "--to", "nowhere"]).code(7).says("nowhere");
    sandbox.run(&["repo", "copy", "--to", "repo"]).code(7).says("same repository");
    sandbox.run(&[&copy[..], &["nothing"]].concat()).code(3);
    let first = sandbox.json(&[&copy[..], &["disk@latest"]].concat());
    assert_eq!((first["copied"].as_array().unwrap().len(), first["failed"].as_array().unwrap().len()), (1, 0));
    let rest = sandbox.run(&copy).ok();
    assert!(rest.stdout.contains("copied 1 restore points"), "{}", rest.stdout);
    let again = sandbox.json(&copy);
    assert_eq!((again["copied"].as_array().unwrap().len(), again["present"].as_array().unwrap().len()), (0, 2));
    let own = sandbox.json(&["backup", "list"]);
    fs::remove_dir_all(sandbox.path("repo")).unwrap();
    let there = ["--repo", "offsite", "--password-file", &password];
    let list = sandbox.json(&[&["backup", "list"], &there[..]].concat());
    assert_eq!((&list[0]["id"], &list[1]["id"]), (&own[0]["id"], &own[1]["id"]));
    assert_eq!(list[0]["copied_from"]["point"], own[0]["id"]);
    let shown = sandbox.run(&[&["backup", "show", "disk@latest"], &there[..]].concat()).ok();
    assert!(shown.stdout.contains("from repository"), "{}", shown.stdout);
    restores(&sandbox, &there);
}

#[test]
fn lost_packs_heal_from_the_copy() {
    let (sandbox, password) = two_repositories();
    sandbox.run(&["repo", "copy", "--to", "offsite", "--to-password-file", &password]).ok();
    for dir in ["repo/data", "repo/meta"] {
        fs::remove_dir_all(sandbox.path(dir)).unwrap();
    }
    sandbox.run(&["restore", "disk", "disk@latest", "--to", "back.raw"]).code(9);
    let heal = ["repo", "heal", "--from", "offsite", "--from-password-file", &password];
    let healed = sandbox.json(&heal);
    assert_eq!(healed["healed"].as_array().unwrap().len(), 2, "{healed}");
    assert_eq!(healed["damaged_points"], serde_json::json!([]));
    restores(&sandbox, &[]);
    let verified = sandbox.run(&["backup", "verify", "disk@latest", "--json"]);
    assert_eq!(verified.json()["damaged_points"], serde_json::json!([]), "{}", verified.stdout);
    let again = sandbox.run(&heal).ok();
    assert!(again.stdout.contains("0 restore points healed"), "{}", again.stdout);
}

#[test]
fn what_the_other_repository_does_not_have_is_named() {
    let (sandbox, password) = two_repositories();
    fs::remove_dir_all(sandbox.path("repo/data")).unwrap();
    let ran = sandbox.run(&["repo", "heal", "--from", "offsite", "--from-password-file", &password]).code(9);
    assert!(ran.stdout.contains("no copy of it") && ran.stdout.contains("affected: "), "{}", ran.stdout);
}

#[test]
fn a_write_only_key_backs_up_and_says_which_key_a_restore_needs() {
    let sandbox = Sandbox::new();
    sandbox.run(&["repo", "init", "--sealed"]).ok();
    let image = sandbox.path("disk.raw");
    fill(&image, 0, 3 << 20, 1);
    let (host, safe) = (sandbox.text("host.key"), sandbox.write("safe.pw", "in the safe\n"));
    sandbox.run(&["repo", "key", "add", "--new-password-file", &safe, "--label", "safe"]).ok();
    let added = sandbox.json(&["repo", "key", "add", "--write-only", "--new-key-file", &host, "--label", "host7"]);
    assert_eq!((added["write_only"].as_bool(), added["generation"].as_u64()), (Some(true), Some(1)));
    let as_host = ["--key-file", &*host];
    sandbox.run(&[&["backup", "image", "disk.raw"], &as_host[..]].concat()).ok();
    sandbox.run(&[&["backup", "list"], &as_host[..]].concat()).ok();
    let restore = ["restore", "disk", "disk@latest", "--to", "back.raw"];
    let refused = sandbox.run(&[&restore[..], &as_host[..]].concat()).code(8).says("not read them");
    assert!(refused.stderr.contains("\"safe\" (password, "), "{}", refused.stderr);
    assert!(!refused.stderr.contains("host7") && !Path::new(&sandbox.text("back.raw")).exists());
    restores(&sandbox, &[]);
    let verify = ["backup", "verify", "--all"];
    let refused = sandbox.run(&[&verify[..], &as_host[..]].concat()).code(8).says("--mode ciphertext");
    assert!(refused.stderr.contains("\"safe\" (password, "), "{}", refused.stderr);
    sandbox.run(&[&verify[..], &["--mode", "ciphertext"], &as_host[..]].concat()).ok();
    let listed = sandbox.run(&["repo", "key", "list"]).ok();
    assert!(listed.stdout.lines().any(|line| line.contains("host7") && !line.contains("read")), "{}", listed.stdout);
}

#[test]
fn keys_rotate_and_old_restore_points_stay_readable() {
    let (sandbox, _) = two_repositories();
    let safe = sandbox.write("safe.pw", "in the safe\n");
    sandbox.run(&["repo", "key", "add", "--new-password-file", &safe, "--label", "safe"]).ok();
    let host = sandbox.text("host.key");
    sandbox.run(&["repo", "key", "add", "--write-only", "--new-key-file", &host]).code(7).says("rotate --sealed");
    assert!(!Path::new(&host).exists(), "a key that opens nothing is not left lying around");
    let refused = sandbox.run(&["repo", "key", "rotate"]).code(4).says("safe");
    assert!(refused.stderr.contains("--drop-other-keys"), "{}", refused.stderr);
    let rotated = sandbox.json(&["repo", "key", "rotate", "--sealed", "--and-password-file", &safe]);
    assert_eq!((rotated["generation"].as_u64(), rotated["keys"].as_array().unwrap().len()), (Some(2), 2));
    sandbox.run(&["repo", "key", "add", "--write-only", "--new-key-file", &host]).ok();
    sandbox.run(&["backup", "image", "disk.raw", "--key-file", &host]).ok();
    restores(&sandbox, &[]);
    restores(&sandbox, &["--password-file", &safe]);
    sandbox.run(&["backup", "verify", "--all"]).ok();
    sandbox.run(&["repo", "key", "rotate", "--drop-other-keys"]).ok();
    sandbox.run(&["backup", "list", "--password-file", &safe]).code(8);
    sandbox.run(&["backup", "list", "--key-file", &host]).code(8);
    restores(&sandbox, &[]);
}
