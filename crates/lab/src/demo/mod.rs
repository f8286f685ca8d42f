//! The main jobs told as a story: two guests are backed up, changed, backed up again; one loses its disk and comes back. Then
//! one of three other hosts loses its power, and its guests run on elsewhere.
//!
//! Everything is done from outside, by the two binaries, as a person would do it at a shell. The story succeeds only if
//! every proof in it held. `DEMO_KEEP=1` leaves the lab and the repository for a look around, and a daemon that looks
//! after them; the next demo, or `demo --clear`, takes all of it away.

mod daemon;
mod failover;
mod moves;

use std::{
    fs::OpenOptions,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Prints the checksum of every file on a guest's data disk, in order, but for the count of boots that the guest keeps.
const CHECKSUMS: &str = "cd /data && find . -path ./.lab -prune -o -type f -exec sha256sum {} + | sort -k 2";
const LAB: &str = "demo";
const HOST: &str = "h1";
const GUESTS: [(&str, &str, &str); 2] = [("web1", "2GiB", "300MiB"), ("db1", "1GiB", "100MiB")];

/// Tells the story with the given `virtward` binary, or only clears away what an earlier one left.
pub fn run(virtward: &Path, clear: bool) -> Result<()> {
    ensure!(
        clear || virtward.exists(),
        "there is no {}; build it with: cargo build --release -p virtward-cli",
        virtward.display()
    );
    let keep = std::env::var("DEMO_KEEP").is_ok_and(|value| value == "1");
    let dir = PathBuf::from("/var/lib/virtward-lab").join(format!("{LAB}-demo"));
    let mut demo = Demo {
        virtward: virtward.to_owned(),
        lab: std::env::current_exe().context("find this program")?,
        dir,
        begun: Instant::now(),
        steps: Vec::new(),
    };
    demo.clear()?;
    if clear {
        return Ok(());
    }
    let outcome = demo.tell();
    match (&outcome, keep) {
        (Ok(()), true) => daemon::leave(&demo).map(|()| demo.say_where()),
        (Err(_), true) => {
            demo.say_where();
            outcome
        }
        (_, false) => demo.clear().and(outcome),
    }
}

struct Demo {
    virtward: PathBuf,
    lab: PathBuf,
    dir: PathBuf,
    begun: Instant,
    steps: Vec<(String, Duration)>,
}

impl Demo {
    fn tell(&mut self) -> Result<()> {
        println!(
            "Virtward, the main jobs: back up running VMs, lose one, get it back; lose a host, and nothing with it.\n"
        );
        self.step("A host with libvirt, and two guests that boot", Self::guests)?;
        self.step("An encrypted repository", |demo| demo.virtward(&["repo", "init"]).map(drop))?;
        self.step("Full backup of both while they run", |demo| demo.back_up("full"))?;
        let before = self.step("What is in web1 now, by checksum", |demo| demo.checksums("web1"))?;
        self.step("Life goes on inside web1: 16 MiB written, a file deleted", Self::change)?;
        self.step("Incremental backup: only what changed is read", |demo| demo.back_up("incremental"))?;
        let after = self.step("What is in web1 now, by checksum", |demo| demo.checksums("web1"))?;
        ensure!(before != after, "the change inside web1 changed nothing");
        self.step("Disaster: web1 loses power, its disk is overwritten", Self::destroy)?;
        self.step("Restore web1 in place and boot it", |demo| demo.restore("web1", "web1@latest", &["--overwrite"]))?;
        let restored = self.step("Proof: every file of web1 is what it was", |demo| demo.checksums("web1"))?;
        same_files("web1", &after, &restored)?;
        let point = self.earliest("web1")?;
        self.step("Restore the older restore point beside it", |demo| demo.restore("web1-before", &point, &[]))?;
        let old =
            self.step("Proof: the copy is web1 as it was before the change", |demo| demo.checksums("web1-before"))?;
        same_files("web1-before", &before, &old)?;
        self.step("Verify the whole repository: decrypt and hash everything", |demo| {
            print_indented(&demo.virtward(&["backup", "verify", "--all", "--mode", "full"])?);
            demo.virtward(&["repo", "check"]).map(drop)
        })?;
        failover::tell(self)?;
        moves::tell(self)?;
        self.summary();
        Ok(())
    }

    fn step<T>(&mut self, title: &str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        println!("{}. {title}", self.steps.len() + 1);
        let begun = Instant::now();
        let done = work(self).with_context(|| format!("step {} ({title}) failed", self.steps.len() + 1))?;
        let took = begun.elapsed();
        println!("   {:.1} s\n", took.as_secs_f64());
        self.steps.push((title.to_owned(), took));
        Ok(done)
    }

    fn guests(&mut self) -> Result<()> {
        std::fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        self.lab(&["up", "--hosts", "1"])?;
        let uri: Value = serde_json::from_str(&self.lab(&["--json", "env", "--host", HOST])?)?;
        let uri = uri["VIRTWARD_CONNECT"].as_str().context("the lab did not say where its libvirt is")?;
        self.write("password", "a demonstration is no secret\n")?;
        self.write("config.toml", &self.config(uri))?;
        for (name, size, fill) in GUESTS {
            self.lab(&["vm", "create", name, "--host", HOST, "--disk", size, "--fill", fill])?;
            println!("   {name}: a disk of {size} with {fill} of files");
        }
        for (name, ..) in GUESTS {
            self.lab(&["vm", "wait", name])?;
        }
        Ok(())
    }

    fn config(&self, uri: &str) -> String {
        let path = |name: &str| self.dir.join(name).display().to_string();
        format!(
            "connect = {uri:?}\nrepo = {:?}\npassword-file = {:?}\nruntime-dir = {:?}\nscratch-dir = {:?}\n",
            path("repo"),
            path("password"),
            path("run"),
            path("scratch")
        )
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.dir.join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).with_context(|| format!("write {}", path.display()))
    }

    fn back_up(&mut self, kind: &str) -> Result<()> {
        let said = self.virtward(&["--json", "backup", "run", "--all"])?;
        println!(
            "   {:6} {:12} {:>10} {:>10} {:>10} {:>10}  frozen",
            "VM", "kind", "size", "read", "stored", "seconds"
        );
        let mut seen = 0;
        for line in said.lines() {
            let run: Value = serde_json::from_str(line).context("the result of a backup is not JSON")?;
            let sum = |field: &str| -> u64 {
                run["disks"].as_array().into_iter().flatten().filter_map(|disk| disk[field].as_u64()).sum()
            };
            println!(
                "   {:6} {:12} {:>10} {:>10} {:>10} {:>10.2}  {} ms",
                run["vm"].as_str().unwrap_or("?"),
                run["kind"].as_str().unwrap_or("?"),
                mib(sum("size_bytes")),
                mib(sum("read_bytes")),
                mib(sum("stored_bytes")),
                run["duration_ms"].as_u64().unwrap_or(0) as f64 / 1000.0,
                run["quiesce"]["frozen_ms"]
            );
            ensure!(run["kind"] == kind, "{} should have been {kind}: {run}", run["vm"]);
            ensure!(run["quiesce"]["outcome"] == "frozen", "{} was not quiesced: {run}", run["vm"]);
            ensure!(kind == "full" || sum("read_bytes") < 100 << 20, "too much was read: {run}");
            seen += 1;
        }
        ensure!(seen == GUESTS.len(), "{seen} VMs were backed up, not {}", GUESTS.len());
        Ok(())
    }

    fn change(&mut self) -> Result<()> {
        let script = "dd if=/dev/urandom of=/data/new bs=1M count=16 2>/dev/null && \
                      rm -f \"$(find /data -type f -size +64k | sort | head -n 1)\" && sync";
        self.guest("web1", script).map(drop)
    }

    fn checksums(&mut self, vm: &str) -> Result<String> {
        let text = self.guest(vm, CHECKSUMS)?;
        ensure!(text.lines().count() > 10, "{vm} has hardly any files: {text}");
        Ok(text)
    }

    fn destroy(&mut self) -> Result<()> {
        let disk = self.first_disk("web1")?;
        self.lab(&["host", "exec", HOST, "--", "virsh", "destroy", "web1"])?;
        let mut file = OpenOptions::new().write(true).open(&disk).with_context(|| format!("open {disk}"))?;
        let noise = vec![0xa5; 1 << 20];
        file.seek(SeekFrom::Start(0))?;
        for _ in 0..64 {
            file.write_all(&noise)?;
        }
        println!("   the first 64 MiB of {disk} are garbage now");
        Ok(())
    }

    fn first_disk(&self, vm: &str) -> Result<String> {
        let shown: Value =
            serde_json::from_str(&self.virtward(&["--json", "backup", "show", &format!("{vm}@latest")])?)?;
        shown["disks"][0]["source"].as_str().map(str::to_owned).context("the restore point names no disk")
    }

    fn earliest(&self, vm: &str) -> Result<String> {
        let listed = self.virtward(&["--json", "backup", "list", vm])?;
        let points: Vec<Value> = match serde_json::from_str(&listed)? {
            Value::Array(points) => points,
            other => other["points"].as_array().cloned().unwrap_or_default(),
        };
        let first = points.iter().min_by_key(|point| point["taken"].as_str().map(str::to_owned));
        first.and_then(|point| point["id"].as_str()).map(str::to_owned).context("no restore point is listed")
    }

    fn restore(&mut self, name: &str, point: &str, more: &[&str]) -> Result<()> {
        let mut arguments = vec!["restore", "vm", point, "--name", name, "--start"];
        arguments.extend(more);
        print_indented(&self.virtward(&arguments)?);
        self.lab(&["vm", "wait", name]).map(drop)
    }

    fn guest(&self, vm: &str, script: &str) -> Result<String> {
        self.lab(&["vm", "exec", vm, "--", "sh", "-c", script])
    }

    fn lab(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.lab);
        command.args(["--name", LAB]).args(arguments);
        said(command)
    }

    fn virtward(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.virtward);
        for name in ["VIRTWARD_REPO", "VIRTWARD_CONNECT", "VIRTWARD_PASSWORD_FILE", "VIRTWARD_KEY_FILE"] {
            command.env_remove(name);
        }
        command.arg("--quiet").arg("--config").arg(self.dir.join("config.toml")).args(arguments);
        said(command)
    }

    fn clear(&self) -> Result<()> {
        daemon::end(&self.dir)?;
        self.lab(&["down"])?;
        failover::clear(self)?;
        moves::clear(self)?;
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    fn say_where(&self) {
        println!("DEMO_KEEP=1: the lab and the repository are still there.");
        println!("   {} --config {} vm list", self.virtward.display(), self.dir.join("config.toml").display());
        println!("   {} demo --clear     takes everything away again", self.lab.display());
    }

    fn summary(&self) {
        println!("Every proof held.\n");
        for (index, (title, took)) in self.steps.iter().enumerate() {
            println!("   {:2}. {title:<60} {:>6.1} s", index + 1, took.as_secs_f64());
        }
        println!("       {:<60} {:>6.1} s", "in all", self.begun.elapsed().as_secs_f64());
    }
}

/// Proves that two lists of checksums are the same.
fn same_files(vm: &str, expected: &str, found: &str) -> Result<()> {
    let lost: Vec<&str> = expected.lines().filter(|line| !found.lines().any(|other| other == *line)).collect();
    ensure!(
        expected == found,
        "{} of {} files of {vm} are missing or differ:\n{}",
        lost.len(),
        expected.lines().count(),
        lost.join("\n")
    );
    println!("   {} files, all equal\n", found.lines().count());
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn print_indented(text: &str) {
    text.lines().for_each(|line| println!("   {line}"));
}

/// Runs a command that must succeed and gives what it printed.
fn said(mut command: Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output: Output = command.stdin(Stdio::null()).output().with_context(|| format!("run {shown}"))?;
    if !output.status.success() {
        bail!("{shown}\n{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
