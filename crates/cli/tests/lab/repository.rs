//! The repository's bad days: full, unreadable, damaged, gone; several processes at once. Image files are the source, so
//! that no lab is needed.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{VIRTWARD, check_failure, noise, run, text, tool, wait};

const LIMIT: Duration = Duration::from_secs(120);

/// A repository of its own with a key file, and what is needed to use it.
struct Shop {
    dir: tempfile::TempDir,
    repo: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Shop {
    fn new() -> Self {
        Self::on(None)
    }

    /// With the repository on an ext4 of its own, of that many bytes.
    fn on(disk: Option<u64>) -> Self {
        let dir = tempfile::Builder::new().prefix("virtward-test-").tempdir().expect("a directory");
        let mut shop = Self { repo: dir.path().join("repo"), dir, mounts: Vec::new() };
        if let Some(bytes) = disk {
            let (image, at) = (shop.path("disk"), shop.path("mnt"));
            File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
            std::fs::create_dir(&at).expect("a directory");
            tool("mkfs.ext4", &["-q", "-F", "-m", "0", "-O", "^has_journal", utf8(&image)]);
            tool("mount", &["-o", "loop", utf8(&image), utf8(&at)]);
            shop.repo = at.join("repo");
            shop.mounts.push(at);
        }
        let line = |key: &str, path: &Path| format!("{key} = {:?}\n", path.display().to_string());
        let config = line("repo", &shop.repo)
            + &line("runtime-dir", &shop.path("run"))
            + &line("scratch-dir", &shop.path("scratch"));
        std::fs::write(shop.path("config.toml"), config).expect("a configuration");
        shop.ok(&["repo", "init"]);
        shop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str, seed: u64, bytes: usize) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, noise(seed, bytes)).expect("an image");
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(VIRTWARD);
        for name in ["VIRTWARD_REPO", "VIRTWARD_CONNECT", "VIRTWARD_PASSWORD_FILE", "VIRTWARD_KEY_FILE"] {
            command.env_remove(name);
        }
        command.arg("--config").arg(self.path("config.toml")).args(arguments);
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        run(self.command(arguments), LIMIT)
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "virtward {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn fails(&self, arguments: &[&str], code: i32, words: &[&str]) -> String {
        check_failure(&self.output(arguments), arguments, code, words)
    }

    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("virtward starts")
    }

    /// Backs up an image; the id of the restore point.
    fn back_up(&self, image: &Path) -> String {
        let said: Value = serde_json::from_str(&self.ok(&["--json", "backup", "image", utf8(image)])).expect("JSON");
        said["id"].as_str().expect("an id").to_owned()
    }

    /// Restores a point and compares it with the image that it came from.
    fn assert_restores(&self, point: &str, image: &Path) {
        let to = self.path("restored.raw");
        let _ = std::fs::remove_file(&to);
        self.ok(&["restore", "disk", point, "--to", utf8(&to)]);
        assert!(std::fs::read(&to).expect("restored") == std::fs::read(image).expect("an image"), "{point} differs");
    }

    /// Verifies everything, which must find damage; the report.
    fn damage(&self, mode: &str) -> Value {
        let output = self.output(&["--json", "backup", "verify", "--all", "--mode", mode]);
        assert_eq!(output.status.code(), Some(9), "{mode}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }

    fn objects(&self, prefix: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.repo.join(prefix), &mut found);
        found.sort();
        found
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        for at in self.mounts.iter().rev() {
            let _ = Command::new("umount").arg(at).status();
        }
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => collect(&path, found),
            path => found.push(path),
        }
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_full_disk_fails_one_backup_and_no_other() {
    let shop = Shop::on(Some(112 << 20));
    let small = shop.image("small.raw", 1, 8 << 20);
    let large = shop.image("large.raw", 2, 40 << 20);
    let point = shop.back_up(&small);
    let filler = shop.path("mnt/filler");
    std::fs::write(&filler, vec![1; 76 << 20]).expect("room for the filler");
    shop.fails(&["backup", "image", utf8(&large)], 10, &["no space left", "free space"]);
    assert_eq!(shop.ok(&["--json", "backup", "list"]).matches("\"id\"").count(), 1, "a failed backup was published");
    shop.assert_restores(&point, &small);
    shop.ok(&["repo", "check"]);
    std::fs::remove_file(&filler).expect("the filler goes");
    let later = shop.back_up(&large);
    shop.assert_restores(&later, &large);
    shop.ok(&["backup", "verify", "--all", "--mode", "full"]);
}

#[test]
fn whoever_may_not_read_or_write_is_told() {
    let shop = Shop::new();
    let image = shop.image("a.raw", 1, 3 << 20);
    let point = shop.back_up(&image);
    // Everything but the repository is open to all.
    for name in ["", "config.toml", "repo.key", "a.raw"] {
        tool("chmod", &["a+rX", utf8(&shop.path(name))]);
    }
    let binary = shop.path("virtward");
    std::fs::copy(VIRTWARD, &binary).expect("a copy that others can run");
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&binary);
        command.arg("--config").arg(shop.path("config.toml")).args(arguments).current_dir("/");
        run(command, LIMIT)
    };
    tool("chmod", &["-R", "go-rwx", utf8(&shop.repo)]);
    let back_up = ["backup", "image", utf8(&image)];
    for arguments in [&["backup", "list"][..], &back_up, &["repo", "info"], &["backup", "verify", "--all"]] {
        check_failure(&as_nobody(arguments), arguments, 11, &["ermission denied", utf8(&shop.repo)]);
    }
    tool("chmod", &["-R", "a+rX", utf8(&shop.repo)]);
    assert!(as_nobody(&["backup", "list"]).status.success());
    assert!(as_nobody(&["backup", "verify", &point]).status.success(), "reading needs no permission to write");
    check_failure(&as_nobody(&back_up), &back_up, 11, &["ermission denied"]);
    check_failure(&as_nobody(&["backup", "delete", &point, "--yes"]), &[], 11, &["ermission denied"]);
    shop.assert_restores(&point, &image);
    // The destination of a restore is somebody else's too.
    let locked = shop.path("locked");
    std::fs::create_dir(&locked).expect("a directory");
    let to = locked.join("x.raw");
    check_failure(&as_nobody(&["restore", "disk", &point, "--to", utf8(&to)]), &[], 11, &[utf8(&locked)]);
}

#[test]
fn a_read_only_repository_still_restores() {
    let mut shop = Shop::new();
    let image = shop.image("a.raw", 1, 3 << 20);
    let point = shop.back_up(&image);
    let repo = shop.repo.clone();
    tool("mount", &["--bind", utf8(&repo), utf8(&repo)]);
    shop.mounts.push(repo.clone());
    tool("mount", &["-o", "remount,bind,ro", utf8(&repo)]);
    shop.ok(&["backup", "list"]);
    shop.ok(&["backup", "verify", "--all"]);
    shop.assert_restores(&point, &image);
    shop.fails(&["backup", "image", utf8(&image)], 11, &["ermission denied"]);
    shop.fails(&["backup", "delete", &point, "--yes"], 11, &["ermission denied"]);
}

#[test]
fn what_is_no_repository_or_a_newer_one_is_said_before_anything_is_touched() {
    let shop = Shop::new();
    let image = shop.image("a.raw", 1, 1 << 20);
    let point = shop.back_up(&image);
    std::fs::write(shop.path("password"), "wrong\n").expect("a password");
    let wrong = shop.path("password");
    shop.fails(&["--password-file", utf8(&wrong), "backup", "list"], 8, &["wrong password", utf8(&shop.repo)]);
    std::fs::write(shop.path("other.key"), noise(4, 64)).expect("a key");
    let other = shop.path("other.key");
    shop.fails(&["--key-file", utf8(&other), "restore", "disk", &point, "--to", "/x"], 8, &[]);
    let (gone, empty) = (shop.path("gone"), shop.path("empty"));
    std::fs::create_dir(&empty).expect("a directory");
    for place in [&gone, &empty, &image] {
        shop.fails(&["--repo", utf8(place), "backup", "list"], 7, &[utf8(place)]);
        shop.fails(&["--repo", utf8(place), "backup", "image", utf8(&image)], 7, &[]);
    }
    assert!(!gone.exists() && std::fs::read_dir(&empty).expect("a directory").next().is_none());

    let config = shop.repo.join("config");
    let whole = std::fs::read(&config).expect("the description");
    let newer = with_format(&whole, 2);
    std::fs::write(&config, newer).expect("another description");
    for arguments in [&["backup", "list"][..], &["backup", "image", utf8(&image)], &["repo", "check"]] {
        shop.fails(arguments, 7, &["format 2", "upgrade"]);
    }
    // Damaged or lost, it is replaced by the copy that every key slot carries.
    for damaged in [&whole[..whole.len() / 2], b"", b"garbage"] {
        std::fs::write(&config, damaged).expect("damage");
        shop.assert_restores(&point, &image);
    }
    std::fs::remove_file(&config).expect("removed");
    shop.assert_restores(&point, &image);
    shop.fails(&["repo", "check"], 9, &["config"]);
}

/// The description of a repository with another format, intact otherwise.
fn with_format(config: &[u8], format: u32) -> Vec<u8> {
    let header = u32::from_le_bytes(config[12..16].try_into().expect("four bytes")) as usize;
    let json = String::from_utf8(config[20..20 + header].to_vec()).expect("JSON");
    let json = json.replacen("\"format\":1", &format!("\"format\":{format}"), 1);
    let mut changed = config[..20].to_vec();
    changed[12..16].copy_from_slice(&(json.len() as u32).to_le_bytes());
    changed.extend_from_slice(json.as_bytes());
    let sum = blake3::hash(&changed);
    changed.extend_from_slice(sum.as_bytes());
    changed
}

/// What can happen to a file.
#[derive(Clone, Copy, Debug)]
enum Harm {
    Flip,
    Cut,
    Remove,
}

impl Harm {
    fn to(self, path: &Path) {
        let length = path.metadata().expect("an object").len();
        let open = || File::options().read(true).write(true).open(path).expect("an object");
        match self {
            Harm::Flip => {
                let (file, mut byte) = (open(), [0]);
                file.read_exact_at(&mut byte, length / 2).expect("read");
                file.write_all_at(&[byte[0] ^ 1], length / 2).expect("write");
            }
            Harm::Cut => open().set_len(length * 2 / 3).expect("cut"),
            Harm::Remove => std::fs::remove_file(path).expect("removed"),
        }
    }
}

#[test]
fn every_kind_of_damage_is_found_named_and_costs_no_other_restore_point() {
    let shop = Shop::new();
    let (one, two) = (shop.image("one.raw", 1, 5 << 20), shop.image("two.raw", 2, 5 << 20));
    let first = shop.back_up(&one);
    let kinds = ["data", "meta", "index", "points"];
    let victims: Vec<PathBuf> = kinds.iter().map(|kind| shop.objects(kind)[0].clone()).collect();
    let second = shop.back_up(&two);
    let copy = shop.path("copy");
    tool("cp", &["-a", utf8(&shop.repo), utf8(&copy)]);
    for (kind, victim) in kinds.iter().zip(&victims) {
        for harm in [Harm::Flip, Harm::Cut, Harm::Remove] {
            let what = format!("{harm:?} of {kind}");
            harm.to(victim);
            let points = |report: &Value| report["damaged_points"].as_array().expect("points").clone();
            if (*kind, harm as u8) == ("points", Harm::Remove as u8) {
                // A restore point that is gone without a trace cannot be told from one that was deleted.
                shop.fails(&["restore", "disk", &first, "--to", utf8(&shop.path("x.raw"))], 3, &[]);
            } else {
                let report = shop.damage("full");
                let objects = report["damaged"].to_string();
                assert!(
                    objects.contains(victim.file_name().unwrap().to_str().unwrap()) || *kind == "index",
                    "{what}: {objects}"
                );
                if *kind == "data" {
                    let points = points(&report);
                    assert_eq!(points.len(), 1, "{what}: {report}");
                    assert_eq!(points[0]["id"], first.as_str(), "{what}");
                    assert_eq!(points[0]["disks"][0]["target"], "one.raw", "{what}");
                    assert!(points[0]["disks"][0]["ranges"][0]["end"].as_u64().unwrap() > 0, "{what}: {report}");
                }
                let quick = if matches!(harm, Harm::Flip) { "ciphertext" } else { "light" };
                shop.damage(quick);
            }
            shop.assert_restores(&second, &two);
            tool("rm", &["-rf", utf8(&shop.repo)]);
            tool("cp", &["-a", utf8(&copy), utf8(&shop.repo)]);
        }
    }
    shop.ok(&["backup", "verify", "--all", "--mode", "full"]);
}

#[test]
fn several_processes_write_and_read_at_once() {
    let shop = Shop::new();
    let images: Vec<PathBuf> = (0..5u64)
        .map(|number| {
            // Half of it is common to all of them, so they race for the same chunks.
            let path = shop.path(&format!("vm{number}.raw"));
            let content = [noise(99, 6 << 20), noise(number, 3 << 20)].concat();
            std::fs::write(&path, content).expect("an image");
            path
        })
        .collect();
    for round in 0..2 {
        let writers: Vec<Child> = images.iter().map(|image| shop.start(&["backup", "image", utf8(image)])).collect();
        for writer in writers {
            let output = writer.wait_with_output().expect("virtward ends");
            assert!(output.status.success(), "round {round}: {}", text(&output));
        }
    }
    shop.ok(&["repo", "check"]);
    shop.ok(&["backup", "verify", "--all", "--mode", "full"]);
    let out = shop.path("out");
    std::fs::create_dir(&out).expect("a directory");
    let readers: Vec<(Child, PathBuf, &PathBuf)> = images
        .iter()
        .map(|image| {
            let stem = image.file_stem().unwrap().to_str().unwrap();
            let to = out.join(format!("{stem}.raw"));
            (shop.start(&["restore", "disk", &format!("{stem}@latest"), "--to", utf8(&to)]), to, image)
        })
        .collect();
    for (reader, to, image) in readers {
        let output = reader.wait_with_output().expect("virtward ends");
        assert!(output.status.success(), "{}", text(&output));
        assert!(std::fs::read(&to).unwrap() == std::fs::read(image).unwrap(), "{}", to.display());
    }
    let mut left = Vec::new();
    collect(&out, &mut left);
    assert_eq!(left.len(), images.len(), "{left:?}");
}

#[test]
fn a_repository_deleted_under_a_backup_is_no_success() {
    let shop = Shop::new();
    let image = shop.image("a.raw", 1, 12 << 20);
    let backup = shop.start(&["backup", "image", utf8(&image), "--bandwidth", "4MiB"]);
    wait("the lease of the backup", LIMIT, || !shop.objects("leases").is_empty());
    std::fs::remove_dir_all(&shop.repo).or_else(|_| std::fs::remove_dir_all(&shop.repo)).expect("deleted");
    let output = backup.wait_with_output().expect("virtward ends");
    let said = text(&output);
    assert!(matches!(output.status.code(), Some(1 | 7 | 9)), "{:?}: {said}", output.status.code());
    assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
    shop.fails(&["backup", "list"], 7, &[]);
}

#[test]
fn the_next_backup_stores_again_what_is_lost_or_damaged() {
    for harm in [Harm::Remove, Harm::Cut, Harm::Flip] {
        let shop = Shop::new();
        let image = shop.image("one.raw", 1, 5 << 20);
        let damaged = shop.back_up(&image);
        harm.to(&shop.objects("data")[0]);
        // What is gone or cut is noticed by any backup; a flipped byte only by a verification.
        if matches!(harm, Harm::Flip) {
            shop.damage("full");
        }
        let healed = shop.back_up(&image);
        shop.assert_restores(&healed, &image);
        // Chunks have names by content: what is there again is there for all.
        shop.assert_restores(&damaged, &image);
    }
}
