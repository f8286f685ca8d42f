//! Garbage collection through the real binary: what it frees, what it says, and that it can die anywhere.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::common::{Sandbox, fill, tool};

/// Two restore points of an image that share a few chunks; the first is deleted.
fn with_garbage() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    let image = sandbox.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(24 << 20).unwrap();
    fill(&image, 0, 8 << 20, 1);
    let first = sandbox.json(&["backup", "image", "disk.raw"]);
    fill(&image, 0, 6 << 20, 2);
    sandbox.json(&["backup", "image", "disk.raw"]);
    sandbox.run(&["backup", "delete", first["id"].as_str().unwrap(), "--yes"]).ok();
    sandbox
}

fn used(sandbox: &Sandbox) -> u64 {
    let used = tool("du", &["-s", "-B1", &sandbox.text("repo")]);
    used.split_whitespace().next().unwrap().parse().unwrap()
}

fn assert_whole(sandbox: &Sandbox) {
    sandbox.run(&["repo", "check"]).ok();
    let _ = fs::remove_file(sandbox.path("back.raw"));
    sandbox.run(&["restore", "disk", "image/disk@latest", "--to", "back.raw", "--format", "raw"]).ok();
    tool("cmp", &[&sandbox.text("disk.raw"), &sandbox.text("back.raw")]);
}

#[test]
fn space_comes_back_when_the_grace_period_has_ended() {
    let sandbox = with_garbage();
    let before = used(&sandbox);
    let ran = sandbox.run(&["repo", "gc"]).ok();
    assert!(ran.stdout.contains("1 deleted restore points can still be recovered"), "{}", ran.stdout);
    assert!(used(&sandbox) + (1 << 20) > before);
    let said = sandbox.json(&["repo", "gc", "--grace", "0", "--budget", "100%", "--dry-run"]);
    assert_eq!(said["dry_run"], true);
    assert!(said["pending_bytes"].as_u64().unwrap() > 2 << 20, "{said}");
    assert!(used(&sandbox) + (1 << 20) > before);
    let report = sandbox.json(&["repo", "gc", "--grace", "0", "--budget", "100%"]);
    assert!(report["freed_bytes"].as_u64().unwrap() > 2 << 20, "{report}");
    assert_eq!(report["pending_packs"], 0, "{report}");
    assert!(used(&sandbox) + (2 << 20) < before, "{} after {before}", used(&sandbox));
    assert_whole(&sandbox);
    sandbox.run(&["repo", "gc", "--grace", "soon"]).code(2).says("90s, 30m, 12h");
    sandbox.run(&["repo", "gc", "--budget", "200%"]).code(2);
}

#[test]
fn what_cannot_be_read_stops_it_with_a_way_out() {
    let sandbox = with_garbage();
    let before = used(&sandbox);
    let segment = fs::read_dir(sandbox.path("repo/index")).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(&segment).unwrap();
    fs::write(&segment, "not an index segment").unwrap();
    sandbox.run(&["repo", "gc", "--grace", "0"]).code(9).says("rebuild-index");
    assert!(used(&sandbox) + (1 << 20) > before);
    sandbox.run(&["repo", "rebuild-index"]).ok();
    sandbox.run(&["repo", "gc", "--grace", "0"]).ok();
    assert_whole(&sandbox);
}

#[test]
fn killed_anywhere_it_loses_nothing_and_the_next_one_ends_it() {
    let sandbox = with_garbage();
    let origin = sandbox.text("repo.origin");
    fs::rename(sandbox.path("repo"), &origin).unwrap();
    let again = || {
        let _ = fs::remove_dir_all(sandbox.path("repo"));
        tool("cp", &["-a", &origin, &sandbox.text("repo")]);
    };
    again();
    let began = Instant::now();
    sandbox.run(&["repo", "gc", "--grace", "0", "--budget", "100%"]).ok();
    let whole = began.elapsed();
    const KILLS: u32 = 12;
    for number in 0..KILLS {
        again();
        // The second half of the run is where things change.
        let delay = whole / 3 + (whole - whole / 3) * number / KILLS;
        let mut command = sandbox.command(&["repo", "gc", "--grace", "0", "--budget", "100%"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(delay.max(Duration::from_millis(1)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_whole(&sandbox);
        let report = sandbox.json(&["repo", "gc", "--grace", "0", "--budget", "100%"]);
        assert_eq!(report["notes"].as_array().map(Vec::len), Some(0), "kill {number}: {report}");
        assert_whole(&sandbox);
    }
}
