//! Pruning, holding and recovering restore points through the real binary.

use std::fs;

use crate::common::{Sandbox, fill, tool};
use serde_json::Value;

/// A repository with so many restore points of one image, each with a byte of its own; their ids, oldest first.
fn with_points(count: u64) -> (Sandbox, Vec<String>) {
    let sandbox = Sandbox::with_repository();
    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let make = |number: u64| {
        fill(&image, number << 20, 1 << 20, number + 1);
        let tag = format!("run-{number}");
        let point = sandbox.json(&["backup", "image", "disk.raw", "--tag", &tag]);
        point["id"].as_str().unwrap().to_owned()
    };
    let ids = (0..count).map(make).collect();
    (sandbox, ids)
}

fn ids(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|point| point["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn prune_says_why_and_deletes_what_no_rule_keeps() {
    let (sandbox, points) = with_points(4);
    sandbox.run(&["backup", "prune"]).code(2).says("--keep-daily");
    sandbox.run(&["backup", "prune", "--keep-last", "0"]).code(2).says("keeps nothing");
    sandbox.run(&["backup", "prune", "--keep-within", "6m"]).code(2).says("6mo");
    sandbox.run(&["backup", "prune", "--keep-last", "1", "--also-newest"]).code(2).says("VM");
    sandbox.run(&["backup", "prune", "nothing", "--keep-last", "1"]).code(3);
    let rules = ["backup", "prune", "--keep-last", "2", "--keep-tag", "run-0"];
    let dry = sandbox.run(&[&rules[..], &["--dry-run"]].concat()).ok();
    assert!(dry.stdout.contains("1 of 4 restore points would be deleted"), "{}", dry.stdout);
    let line = |id: &str| dry.stdout.lines().find(|line| line.contains(&id[..8])).unwrap().to_owned();
    assert!(line(&points[0]).contains("kept") && line(&points[0]).ends_with("tag run-0"), "{}", dry.stdout);
    assert!(line(&points[1]).ends_with("not among the last 2, not tagged"), "{}", dry.stdout);
    assert!(line(&points[3]).ends_with("last"), "{}", dry.stdout);
    assert_eq!(ids(&sandbox.json(&["backup", "list"])), points, "a dry run deletes nothing");
    let report = sandbox.json(&rules);
    assert_eq!(report["deleted"], serde_json::json!([points[1]]));
    assert_eq!(report["points"][3]["reasons"][0]["rule"], "last");
    assert_eq!(ids(&sandbox.json(&["backup", "list"])), [&*points[0], &*points[2], &*points[3]]);
    sandbox.run(&["backup", "restore"]).code(2);
    sandbox.run(&["repo", "check"]).ok();
}

#[test]
fn rules_and_protection_come_from_the_configuration_and_flags_replace_the_rules() {
    let (sandbox, points) = with_points(3);
    sandbox.write("etc/config.toml", "[retention]\nkeep-last = 1\nmin-age = \"1h\"\n");
    let dry = sandbox.run(&["backup", "prune", "--dry-run"]).ok();
    assert!(dry.stdout.contains("younger than 1h") && dry.stdout.contains("0 of 3"), "{}", dry.stdout);
    let report = sandbox.json(&["backup", "prune", "--min-age", "0d", "--dry-run"]);
    assert_eq!((report["dry_run"].as_bool(), report["deleted"].as_array().map(Vec::len)), (Some(true), Some(0)));
    let going = |report: &Value| report["points"].as_array().unwrap().iter().filter(|p| p["kept"] == false).count();
    assert_eq!(going(&report), 2);
    let report = sandbox.json(&["backup", "prune", "--min-age", "0d", "--keep-last", "2", "--dry-run"]);
    assert_eq!(going(&report), 1);
    let report = sandbox.json(&["backup", "prune", "disk", "--min-age", "0d", "--keep-tag", "run-0", "--also-newest"]);
    assert_eq!(report["deleted"].as_array().unwrap().len(), 2);
    assert_eq!(ids(&sandbox.json(&["backup", "list"])), points[..1]);
}

#[test]
fn a_held_restore_point_stays_and_everything_says_why() {
    let (sandbox, points) = with_points(3);
    let id = &*points[0];
    let held = sandbox.json(&["backup", "hold", "add", &id[..8], "--reason", "case 17, ask legal"]);
    assert_eq!((held[0]["point"].as_str(), held[0]["reason"].as_str()), (Some(id), Some("case 17, ask legal")));
    sandbox.run(&["backup", "hold", "add", id, "--reason", " "]).code(2);
    sandbox.run(&["backup", "hold", "add", "ffff", "--reason", "x"]).code(3);
    let refused = sandbox.run(&["backup", "delete", id, "--yes", "--json"]).code(4).says("case 17, ask legal");
    assert!(refused.error()["hint"].as_str().unwrap().contains("hold remove"), "{}", refused.stdout);
    let pruned = sandbox.run(&["backup", "prune", "--keep-last", "1"]).ok();
    assert!(pruned.stdout.contains("held: case 17, ask legal"), "{}", pruned.stdout);
    let list = sandbox.json(&["backup", "list"]);
    assert_eq!(ids(&list), [&*points[0], &*points[2]]);
    assert_eq!((list[0]["held"].as_str(), list[1]["held"].as_str()), (Some("case 17, ask legal"), None));
    for command in [&["backup", "list"][..], &["backup", "show", id], &["backup", "hold", "list"]] {
        let ran = sandbox.run(command).ok();
        assert!(ran.stdout.contains("case 17, ask legal"), "{command:?}: {}", ran.stdout);
    }
    sandbox.run(&["backup", "hold", "remove", &points[2]]).code(3).says("not held");
    sandbox.run(&["backup", "hold", "remove", &id[..8]]).ok();
    assert_eq!(sandbox.json(&["backup", "hold", "list"]), serde_json::json!([]));
    sandbox.run(&["backup", "delete", id, "--yes"]).ok();
}

#[test]
fn what_was_deleted_is_listed_recovered_and_restores() {
    let (sandbox, points) = with_points(2);
    let newest = &*points[1];
    sandbox.run(&["backup", "recover", newest]).code(3).says("no deleted restore points");
    sandbox.run(&["backup", "delete", "disk@latest", "--yes"]).ok();
    let list = sandbox.json(&["backup", "recover"]);
    assert_eq!((ids(&list), list.as_array().unwrap().len()), (vec![newest.to_owned()], 1));
    let time = |field: &str| list[0][field].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let days = time("recoverable_until").duration_since(time("deleted")).as_hours() / 24;
    assert_eq!((days, list[0]["vm"].as_str()), (7, Some("disk")));
    let shown = sandbox.run(&["backup", "recover", "--list"]).ok();
    assert!(shown.stdout.contains(&newest[..8]) && shown.stdout.contains("RECOVERABLE UNTIL"), "{}", shown.stdout);
    sandbox.run(&["backup", "recover", "ffff"]).code(3).says("recover --list");
    assert_eq!(sandbox.json(&["backup", "recover", "disk@latest"])["recovered"], serde_json::json!([newest]));
    assert_eq!(ids(&sandbox.json(&["backup", "list"])), points);
    assert_eq!(sandbox.json(&["backup", "recover"]), serde_json::json!([]));
    sandbox.run(&["restore", "disk", newest, "--to", "back.raw"]).ok();
    tool("qemu-img", &["compare", &sandbox.text("disk.raw"), &sandbox.text("back.raw")]);
}

#[test]
fn what_lost_its_data_is_not_recovered_and_the_loss_is_shown() {
    let (sandbox, points) = with_points(1);
    sandbox.run(&["backup", "delete", &points[0], "--yes"]).ok();
    fs::remove_dir_all(sandbox.path("repo/data")).unwrap();
    let ran = sandbox.run(&["backup", "recover", &points[0]]).code(9).says("cannot be recovered");
    assert!(ran.stdout.contains("disk.raw") || ran.stdout.contains("lost at bytes"), "{}", ran.stdout);
    assert_eq!(sandbox.json(&["backup", "list"]), serde_json::json!([]));
}

#[test]
fn a_restore_point_that_cannot_be_read_is_named_and_left_alone() {
    let (sandbox, points) = with_points(3);
    use std::os::unix::fs::PermissionsExt;
    let path = sandbox.path(format!("repo/points/{}", points[0]));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let report = sandbox.json(&["backup", "prune", "--keep-last", "1"]);
    assert_eq!(report["deleted"], serde_json::json!([points[1]]));
    assert_eq!(report["unreadable"][0]["object"], format!("points/{}", points[0]));
    assert!(path.exists());
}
