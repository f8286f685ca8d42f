//! Full disks and sudden ends, through the real binary: nothing half-done stays, and the operator has a way out.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::{Sandbox, fill, tool};

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A small file system of its own, mounted inside the sandbox.
struct Disk(PathBuf);

impl Disk {
    fn new(sandbox: &Sandbox, kind: &str) -> Self {
        let (image, at) = (sandbox.text("fs"), sandbox.path("mnt"));
        fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
        match kind {
            "ext4" => tool("mkfs.ext4", &["-q", "-F", "-m", "0", &image]),
            kind => tool(&format!("mkfs.{kind}"), &["-q", "-f", &image]),
        };
        fs::create_dir(&at).unwrap();
        tool("mount", &["-o", "loop", &image, utf8(&at)]);
        Self(at)
    }

    fn available(&self) -> u64 {
        let said = tool("df", &["--output=avail", "-B1", utf8(&self.0)]);
        said.lines().last().unwrap().trim().parse().unwrap()
    }

    /// Somebody else's file takes all but so many bytes.
    fn leave(&self, bytes: u64) {
        let filler = self.0.join("filler");
        tool("fallocate", &["-l", &(self.available() - bytes).to_string(), utf8(&filler)]);
    }

    /// Somebody else's file takes every block that is left.
    fn leave_nothing(&self) {
        let mut file = fs::File::create(self.0.join("last-blocks")).unwrap();
        while file.write_all(&[1; 4096]).and_then(|()| file.sync_data()).is_ok() {}
        assert!(self.available() < 64 << 10, "{} left", self.available());
    }

    fn give_back(&self, name: &str) {
        fs::remove_file(self.0.join(name)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

/// A repository on a small disk.
fn on_a_disk(kind: &str) -> (Sandbox, Disk) {
    let sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, kind);
    fs::create_dir(disk.0.join("repo")).unwrap();
    std::os::unix::fs::symlink(disk.0.join("repo"), sandbox.path("repo")).unwrap();
    sandbox.run(&["repo", "init"]).ok();
    fs::File::create(sandbox.path("disk.raw")).unwrap().set_len(16 << 20).unwrap();
    (sandbox, disk)
}

/// Changes a part of the disk, so that older restore points need some of what newer ones need.
fn change(sandbox: &Sandbox, round: u64) {
    fill(&sandbox.path("disk.raw"), round % 3 * (5 << 20), 6 << 20, 1001 + 2 * round);
}

fn assert_restores(sandbox: &Sandbox, image: &str) {
    let _ = fs::remove_file(sandbox.path("back.raw"));
    sandbox.run(&["restore", "disk", "image/disk@latest", "--to", "back.raw", "--format", "raw"]).ok();
    tool("cmp", &[&sandbox.text(image), &sandbox.text("back.raw")]);
}

const COLLECT: [&str; 6] = ["repo", "gc", "--grace", "0", "--budget", "100%"];

#[test]
fn a_disk_that_backups_have_filled_is_tidied_by_the_usual_commands() {
    for kind in ["ext4", "xfs"] {
        let (sandbox, disk) = on_a_disk(kind);
        disk.leave(72 << 20);
        let mut done = 0;
        let failed = loop {
            assert!(done < 40, "the disk does not get full");
            change(&sandbox, done);
            let ran = sandbox.run(&["backup", "image", "disk.raw"]);
            if ran.code != 0 {
                break ran;
            }
            fs::copy(sandbox.path("disk.raw"), sandbox.path("good.raw")).unwrap();
            done += 1;
        };
        failed.code(10).says("no space left").says("virtward repo gc --grace 0");
        assert!(done > 4, "{done}");
        assert_restores(&sandbox, "good.raw");
        let pruned = sandbox.json(&["backup", "prune", "--keep-last", "1"]);
        let report = sandbox.json(&COLLECT);
        assert!(report["freed_bytes"].as_u64().unwrap() > 30 << 20, "{kind}: {report} after {pruned}");
        assert_eq!((&report["pending_packs"], &report["short_of_space"]), (&0.into(), &false.into()), "{report}");
        assert_restores(&sandbox, "good.raw");
        sandbox.run(&["backup", "image", "disk.raw"]).ok();
        assert_restores(&sandbox, "disk.raw");
        sandbox.run(&["repo", "check"]).ok();
        sandbox.run(&["backup", "verify", "--all", "--mode", "full"]).ok();
    }
}

#[test]
fn a_disk_without_one_free_block_loses_nothing_and_is_tidied_once_there_are_a_few() {
    for kind in ["ext4", "xfs"] {
        let (sandbox, disk) = on_a_disk(kind);
        for round in 0..4 {
            change(&sandbox, round);
            sandbox.run(&["backup", "image", "disk.raw"]).ok();
        }
        sandbox.run(&["backup", "prune", "--keep-last", "1"]).ok();
        // Deleted restore points, without the few blocks that would be free once they are forgotten.
        fs::remove_dir_all(sandbox.path("repo/trash")).unwrap();
        disk.leave(2 << 20);
        disk.leave_nothing();
        let ran = sandbox.run(&COLLECT);
        // Some file systems find a place for the few bytes all the same.
        if ran.code != 0 {
            ran.code(10).says("no space left");
        }
        sandbox.run(&["repo", "check"]).ok();
        assert_restores(&sandbox, "disk.raw");
        disk.give_back("last-blocks");
        sandbox.run(&COLLECT).ok();
        let used = tool("du", &["-sB1", utf8(&disk.0.join("repo"))]);
        let used: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
        // A pack of which more than half is needed stays as it is.
        assert!(used < 20 << 20, "{kind}: {used} bytes for a disk of 16 MiB");
        sandbox.run(&["backup", "image", "disk.raw"]).ok();
        assert_restores(&sandbox, "disk.raw");
        sandbox.run(&["repo", "check"]).ok();
    }
}

#[test]
fn a_copy_to_a_full_disk_says_so_and_goes_on_when_there_is_space() {
    let sandbox = Sandbox::with_repository();
    let disk = Disk::new(&sandbox, "ext4");
    let there = utf8(&disk.0.join("repo")).to_owned();
    sandbox.run(&["repo", "init", "--repo", &there]).ok();
    for round in 0..3 {
        fs::File::create(sandbox.path("disk.raw")).unwrap().set_len(12 << 20).unwrap();
        fill(&sandbox.path("disk.raw"), 0, 12 << 20, 51 + 2 * round);
        sandbox.run(&["backup", "image", "disk.raw"]).ok();
    }
    disk.leave(32 << 20);
    let copy = ["repo", "copy", "--to", &there];
    sandbox.run(&copy).code(10).says("no space left").says(&there);
    let list = ["backup", "list", "--json", "--repo", &there];
    let copied = sandbox.run(&list).ok().json().as_array().unwrap().len();
    assert!((1..3).contains(&copied), "{copied} fit");
    sandbox.run(&["backup", "verify", "--all", "--mode", "full", "--repo", &there]).ok();
    sandbox.run(&["repo", "check"]).ok();
    disk.give_back("filler");
    let report = sandbox.json(&copy);
    assert_eq!(
        (report["copied"].as_array().unwrap().len(), report["present"].as_array().unwrap().len()),
        (3 - copied, copied)
    );
    sandbox.run(&["backup", "verify", "--all", "--mode", "full", "--repo", &there]).ok();
}

/// Runs a command and kills it once it has come so far; whether it had ended before.
fn killed_once(sandbox: &Sandbox, args: &[&str], has_come_so_far: impl Fn() -> bool) -> bool {
    let mut child = sandbox.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() && !has_come_so_far() {
        assert!(Instant::now() < until, "{args:?} neither ends nor comes that far");
        std::thread::sleep(Duration::from_micros(200));
    }
    let was_done = child.try_wait().unwrap().is_some();
    let _ = child.kill();
    child.wait().unwrap();
    was_done
}

/// How many files there are in a directory and below.
fn files(dir: &str) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(utf8(&entry.path())),
            _ => 1,
        })
        .sum()
}

fn count(sandbox: &Sandbox, args: &[&str]) -> usize {
    sandbox.run(args).ok().json().as_array().unwrap().len()
}

#[test]
fn a_prune_that_is_killed_has_deleted_some_and_goes_on() {
    const POINTS: usize = 16;
    const KILLS: usize = 10;
    let sandbox = Sandbox::with_repository();
    fill(&sandbox.path("disk.raw"), 0, 1 << 20, 1);
    for round in 0..POINTS {
        fill(&sandbox.path("disk.raw"), 0, 100 << 10, 2 + round as u64);
        sandbox.run(&["backup", "image", "disk.raw"]).ok();
    }
    let origin = sandbox.text("repo.origin");
    fs::rename(sandbox.path("repo"), &origin).unwrap();
    let again = || {
        let _ = fs::remove_dir_all(sandbox.path("repo"));
        tool("cp", &["-a", &origin, &sandbox.text("repo")]);
    };
    let prune = ["backup", "prune", "--keep-last", "2"];
    let mut half_way = 0;
    for number in 0..KILLS {
        again();
        let trash = sandbox.text("repo/trash");
        killed_once(&sandbox, &prune, || files(&trash) > number);
        sandbox.run(&["repo", "check"]).ok();
        let listed = count(&sandbox, &["backup", "list", "--json"]);
        let deleted = count(&sandbox, &["backup", "recover", "--json"]);
        // Each is in one place or the other; what was on its way is listed.
        assert_eq!(listed + deleted, POINTS, "kill {number}");
        assert!(listed >= 2);
        half_way += u32::from(listed > 2 && deleted > 0);
        sandbox.run(&prune).ok();
        assert_eq!(count(&sandbox, &["backup", "list", "--json"]), 2, "kill {number}");
        assert_restores(&sandbox, "disk.raw");
    }
    assert!(half_way > 0, "no kill met a prune at work");
}

#[test]
fn a_copy_that_is_killed_has_published_nothing_half_done_and_goes_on() {
    const KILLS: usize = 10;
    let sandbox = Sandbox::with_repository();
    let there = sandbox.text("there");
    sandbox.run(&["repo", "init", "--repo", &there]).ok();
    fs::File::create(sandbox.path("disk.raw")).unwrap().set_len(24 << 20).unwrap();
    for round in 0..3 {
        change(&sandbox, round);
        sandbox.run(&["backup", "image", "disk.raw"]).ok();
    }
    let origin = sandbox.text("there.origin");
    fs::rename(&there, &origin).unwrap();
    let again = || {
        let _ = fs::remove_dir_all(&there);
        tool("cp", &["-a", &origin, &there]);
    };
    again();
    let before = files(&there);
    let copy = ["repo", "copy", "--to", &there];
    sandbox.run(&copy).ok();
    let written = files(&there) - before;
    let mut interrupted = 0;
    for number in 0..KILLS {
        again();
        let enough = before + 1 + number * written / KILLS;
        interrupted += u32::from(!killed_once(&sandbox, &copy, || files(&there) >= enough));
        sandbox.run(&["repo", "check", "--repo", &there]).ok();
        // What is listed is whole, however many that are.
        sandbox.run(&["backup", "verify", "--all", "--mode", "full", "--repo", &there]).ok();
        sandbox.run(&copy).ok();
        assert_eq!(count(&sandbox, &["backup", "list", "--json", "--repo", &there]), 3, "kill {number}");
        let _ = fs::remove_file(sandbox.path("back.raw"));
        let restore = ["restore", "disk", "image/disk@latest", "--to", "back.raw", "--format", "raw", "--repo", &there];
        sandbox.run(&restore).ok();
        tool("cmp", &[&sandbox.text("disk.raw"), &sandbox.text("back.raw")]);
    }
    assert!(interrupted > 2, "{interrupted} of {KILLS} kills came in time");
    sandbox.run(&["repo", "check"]).ok();
}
