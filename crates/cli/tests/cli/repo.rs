//! Repositories and their keys through the real binary: what works, and what each way of going wrong looks like.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::common::Sandbox;

#[test]
fn init_without_any_setting_makes_a_key_file_that_later_commands_find() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["repo", "init"]).ok();
    let key = sandbox.path("etc/repo.key");
    assert!(ran.stdout.contains(key.to_str().unwrap()), "{}", ran.stdout);
    assert!(ran.stdout.contains("Copy it now"), "{}", ran.stdout);
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let info = sandbox.json(&["repo", "info"]);
    assert_eq!((info["format"].as_u64(), info["points"].as_u64()), (Some(1), Some(0)));
    sandbox.run(&["repo", "check"]).ok();
    let before = fs::read(&key).unwrap();
    let again = sandbox.run(&["repo", "init"]).code(4).says("already");
    assert!(again.stderr.contains("hint:"), "{}", again.stderr);
    assert_eq!(fs::read(&key).unwrap(), before);
    sandbox.run(&["repo", "info"]).ok();
}

#[test]
fn an_init_that_fails_leaves_no_key_behind() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("repo")).unwrap();
    sandbox.write("repo/precious", "data");
    sandbox.run(&["repo", "init"]).code(4).says("not empty");
    assert!(!sandbox.path("etc/repo.key").exists());
    assert!(sandbox.path("repo/precious").exists());
}

#[test]
fn a_password_file_opens_and_a_wrong_one_does_not() {
    let sandbox = Sandbox::new();
    let right = sandbox.write("right", "correct horse\n");
    let wrong = sandbox.write("wrong", "incorrect horse\n");
    sandbox.run(&["repo", "init", "--password-file", &right]).ok();
    assert!(!sandbox.path("etc/repo.key").exists());
    sandbox.run(&["repo", "info", "--password-file", &right]).ok();
    let ran = sandbox.run(&["repo", "info", "--password-file", &wrong, "--json"]).code(8).says("wrong password");
    assert_eq!(ran.error()["kind"], "wrong-secret");
    assert!(ran.stderr.contains(&wrong), "the file that was tried is named:\n{}", ran.stderr);
    sandbox.run(&["repo", "info"]).code(8).says("--password-file");
    sandbox.run(&["repo", "info", "--password-file", "/nonexistent"]).code(3).says("/nonexistent");
    let empty = sandbox.write("empty", "\n");
    sandbox.run(&["repo", "info", "--password-file", &empty]).code(2).says("empty");
}

#[test]
fn a_secret_that_others_can_read_is_pointed_out() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("pw", "secret\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    sandbox.run(&["repo", "init", "--password-file", &file]).ok().says("chmod 600");
}

#[test]
fn flag_beats_environment_beats_configuration() {
    let sandbox = Sandbox::new();
    let password = sandbox.write("pw", "secret\n");
    sandbox.write("etc/config.toml", format!("repo = \"{}\"\npassword-file = \"{password}\"\n", sandbox.text("a")));
    let unset = |args: &[&str]| {
        let mut command = sandbox.command(args);
        command.env_remove("VIRTWARD_REPO");
        crate::common::finish(command.spawn().unwrap())
    };
    unset(&["repo", "init"]).ok();
    assert!(sandbox.path("a/config").exists());
    sandbox.run(&["repo", "init"]).ok();
    assert!(sandbox.path("repo/config").exists());
    sandbox.run(&["repo", "init", "--repo", "b"]).ok();
    assert!(sandbox.path("b/config").exists());
}

#[test]
fn what_is_no_repository_is_called_so_before_a_secret_is_wanted() {
    let sandbox = Sandbox::new();
    sandbox.run(&["repo", "info"]).code(7).says("not a Virtward repository");
    fs::create_dir(sandbox.path("repo")).unwrap();
    let ran = sandbox.run(&["backup", "list", "--json"]).code(7).says("hint:");
    assert_eq!(ran.error()["kind"], "repository");
    sandbox.run(&["repo", "info", "--repo", "ftp://host/repo"]).code(7);
    sandbox.run(&["repo", "info", "--repo", "s3://bucket"]).code(11).says("no credentials");
}

#[test]
fn a_newer_format_is_refused_with_the_way_out() {
    let sandbox = Sandbox::with_repository();
    let path = sandbox.path("repo/config");
    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 32);
    let at = bytes.windows(10).position(|part| part == b"\"format\":1").expect("the format is in clear");
    bytes[at + 9] = b'9';
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, bytes).unwrap();
    sandbox.run(&["repo", "info"]).code(7).says("upgrade virtward");
}

#[test]
fn keys_are_added_listed_and_removed_but_never_the_last() {
    let sandbox = Sandbox::with_repository();
    let first = sandbox.json(&["repo", "key", "list"])[0]["id"].as_str().unwrap().to_owned();
    sandbox.run(&["repo", "key", "remove", &first]).code(4).says("last");
    let password = sandbox.write("pw", "second way in\n");
    let added = sandbox.json(&["repo", "key", "add", "--new-password-file", &password, "--label", "office"]);
    assert_eq!((added["kind"].as_str(), added["label"].as_str()), (Some("password"), Some("office")));
    let usb = sandbox.text("usb.key");
    sandbox.run(&["repo", "key", "add", "--new-key-file", &usb]).ok();
    assert_eq!(sandbox.json(&["repo", "key", "list"]).as_array().unwrap().len(), 3);
    sandbox.run(&["repo", "info", "--key-file", &usb]).ok();
    sandbox.run(&["repo", "key", "remove", "ffffffffff"]).code(3).says("repo key list");
    sandbox.run(&["repo", "key", "remove", &first[..8]]).ok();
    sandbox.run(&["repo", "info"]).code(8);
    sandbox.run(&["repo", "info", "--password-file", &password]).ok();
    sandbox.run(&["repo", "key", "add", "--password-file", &password]).code(2).says("--new-password-file");
}

#[test]
fn a_short_key_file_is_refused() {
    let sandbox = Sandbox::new();
    let short = sandbox.write("short.key", "abc");
    sandbox.run(&["repo", "init", "--key-file", &short]).code(8).says("at least 32");
    assert!(!sandbox.path("repo/config").exists());
}

#[test]
fn a_key_file_that_is_named_and_missing_is_made_by_init_only() {
    let sandbox = Sandbox::new();
    let key = sandbox.text("deep/own.key");
    sandbox.run(&["repo", "init", "--key-file", &key]).ok();
    sandbox.run(&["repo", "info", "--key-file", &key]).ok();
    sandbox.run(&["repo", "info", "--key-file", "other.key"]).code(3);
    assert!(!sandbox.path("other.key").exists());
}

#[test]
fn a_damaged_repository_fails_its_check() {
    let sandbox = Sandbox::with_repository();
    let keys = fs::read_dir(sandbox.path("repo/keys")).unwrap().map(|entry| entry.unwrap().path());
    for key in keys {
        let mut bytes = fs::read(&key).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&key, bytes).unwrap();
    }
    let ran = sandbox.run(&["repo", "check", "--json"]).code(9);
    assert_eq!(ran.error()["kind"], "damaged");
}
