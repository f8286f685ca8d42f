//! Bad days of the daemon as a process: its state damaged, gone, without room; and whom it tells.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    common::Sandbox,
    serve::{Daemon, LIMIT, ask, connect, place, wait},
};

const POLICY: &str = "[[policy]]\nname = \"gold\"\nrepository = \"default\"\nselect.any = [\"name:nothing\"]\n\
                      schedule = { cron = \"0 3 * * *\", time-zone = \"UTC\" }\nretention = { keep-daily = 7 }\n";

/// Ends a daemon in order.
fn stop(mut daemon: Daemon) {
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.wait().success());
}

/// A place with a policy in the state, a copy of the state, and no daemon.
fn with_backup() -> (Sandbox, PathBuf, PathBuf) {
    let sandbox = place();
    let file = sandbox.write("gold.toml", POLICY);
    let daemon = Daemon::start(&sandbox);
    sandbox.run(&["policy", "apply", "-f", &file]).ok();
    stop(daemon);
    // At its start a daemon makes the copy that is due.
    let daemon = Daemon::start(&sandbox);
    let copies = || -> Vec<Value> { sandbox.json(&["state", "list"]).as_array().unwrap().clone() };
    wait("a backup of the state", || !copies().is_empty());
    stop(daemon);
    let copy = copies()[0]["file"].as_str().unwrap().into();
    let state = sandbox.path("state/state.db");
    (sandbox, state, copy)
}

/// The command that a message advises, as arguments.
fn advised(stderr: &str) -> Vec<String> {
    let at = stderr.find("virtward state restore").unwrap_or_else(|| panic!("no advice in:\n{stderr}"));
    let command = stderr[at..].lines().next().unwrap().trim_end_matches(['`', '.']);
    command.split_whitespace().skip(1).map(str::to_owned).collect()
}

#[test]
fn a_damaged_state_names_the_command_that_brings_it_back() {
    let (sandbox, state, copy) = with_backup();
    let good = fs::read(&state).unwrap();
    let mut page = good.clone();
    page[4096..8192].fill(0);
    let mut flipped = good.clone();
    let at = good.windows(4).position(|part| part == b"gold").unwrap();
    flipped[at] ^= 1;
    let damages: [(&str, Option<Vec<u8>>); 7] = [
        ("emptied", Some(Vec::new())),
        ("cut", Some(good[..good.len() / 2].to_vec())),
        ("a page of zeros", Some(page)),
        ("one bit", Some(flipped)),
        ("another file", Some(b"no database at all, but long enough to be one\n".repeat(300))),
        ("gone", None),
        ("unharmed", Some(good)),
    ];
    for (what, bytes) in damages {
        match &bytes {
            Some(bytes) => fs::write(&state, bytes).unwrap(),
            None => fs::remove_file(&state).unwrap(),
        }
        if what != "unharmed" {
            let ran = sandbox.run(&["serve", "--connect", &connect(&sandbox)]).code(1).says(state.to_str().unwrap());
            assert!(ran.stderr.contains(copy.to_str().unwrap()), "{what}: {}", ran.stderr);
            assert_eq!(bytes, fs::read(&state).ok(), "{what}: what is damaged is evidence");
            let command = advised(&ran.stderr);
            let ran = sandbox.run(&command.iter().map(String::as_str).collect::<Vec<_>>()).ok();
            if bytes.is_some() {
                ran.says("is kept as");
            }
        } else {
            let restored = sandbox.json(&["state", "restore"]);
            assert_eq!(restored["from"].as_str(), copy.to_str(), "{restored}");
            assert!(Path::new(restored["set_aside"].as_str().unwrap()).exists());
        }
        let daemon = Daemon::start(&sandbox);
        sandbox.run(&["policy", "get", "gold"]).ok();
        // Nothing is taken away from a daemon that runs.
        sandbox.run(&["state", "restore"]).code(5).says(&daemon.0.id().to_string()).says("systemctl stop");
        stop(daemon);
    }
}

#[test]
fn the_newest_copy_that_is_intact_is_taken_and_an_export_does_too() {
    let (sandbox, state, copy) = with_backup();
    let daemon = Daemon::start(&sandbox);
    sandbox.run(&["cluster", "backup-state", &sandbox.text("export.json")]).ok();
    stop(daemon);
    // A newer copy, and a damaged one.
    let newer = copy.with_file_name("20990101T000000Z-r9.db");
    fs::write(&newer, &fs::read(&copy).unwrap()[..5000]).unwrap();
    fs::write(&state, b"").unwrap();
    let restored = sandbox.json(&["state", "restore"]);
    assert_eq!(restored["from"].as_str(), copy.to_str(), "{restored}");
    assert!(restored["skipped"][0].as_str().unwrap().contains("20990101"), "{restored}");
    sandbox.run(&["state", "restore", newer.to_str().unwrap()]).code(9).says("nothing was changed");

    // Without any copy only what is kept elsewhere helps, and the message says so.
    fs::remove_dir_all(copy.parent().unwrap()).unwrap();
    fs::write(&state, b"x".repeat(5000)).unwrap();
    sandbox.run(&["serve"]).code(1).says("there is no automatic backup").says("virtward state restore FILE");
    sandbox.run(&["state", "restore"]).code(3).says("there is none");
    sandbox.run(&["state", "restore", &sandbox.text("export.json")]).ok();
    let daemon = Daemon::start(&sandbox);
    sandbox.run(&["policy", "get", "gold"]).ok();
    stop(daemon);
    sandbox
        .run(&["cluster", "restore-state", state.to_str().unwrap(), "--replace"])
        .code(4)
        .says("virtward state restore");
}

/// The daemon, with a file system of its own of so many MiB mounted at a directory that has the same in it as before.
fn cramped(sandbox: &Sandbox, at: &str, mib: u32) -> Daemon {
    let at = sandbox.text(at);
    fs::create_dir_all(&at).unwrap();
    let script = r#"cp -a "$1" "$1.copy" && mount -t tmpfs -o "size=$2m" tmpfs "$1" && cp -a "$1.copy/." "$1" &&
                    shift 2 && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", &at, &mib.to_string()]);
    command.arg(env!("CARGO_BIN_EXE_virtward")).args(["serve", "--connect", &connect(sandbox)]);
    command.env("VIRTWARD_CONFIG", sandbox.path("etc/config.toml")).env("VIRTWARD_REPO", sandbox.path("repo"));
    let log = fs::File::create(sandbox.path("log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    Daemon::spawn(sandbox, command)
}

/// A directory as the daemon sees it.
fn inside(sandbox: &Sandbox, daemon: &Daemon, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", daemon.0.id())).join(sandbox.path(name).strip_prefix("/").unwrap())
}

/// The newest event of a kind.
fn event(daemon: &Daemon, kind: &str) -> Value {
    ask(daemon, "GET", &format!("/api/v1/events?kind={kind}"), "")["items"][0].clone()
}

#[test]
fn a_repository_that_runs_full_is_told_and_that_it_has_room_again() {
    let sandbox = place();
    let config = fs::read_to_string(sandbox.path("etc/config.toml")).unwrap();
    sandbox.write("etc/config.toml", format!("{config}reconcile-s = 1\n"));
    let daemon = cramped(&sandbox, "repo", 40);
    let ballast = inside(&sandbox, &daemon, "repo").join("ballast");
    fs::write(&ballast, vec![0u8; 38 << 20]).unwrap();
    wait("the warning", || event(&daemon, "repository-space")["severity"] == "warning");
    let told = event(&daemon, "repository-space");
    let text = told["message"].as_str().unwrap();
    assert!(text.contains("repository default is nearly full") && text.contains("keep less"), "{told}");
    fs::remove_file(&ballast).unwrap();
    wait("the end of it", || event(&daemon, "repository-space")["severity"] == "info");
    stop(daemon);
}

/// Status and text of a plain answer.
fn plain(sandbox: &Sandbox, path: &str) -> (u16, String) {
    let mut stream = std::os::unix::net::UnixStream::connect(sandbox.path("run/api.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[test]
fn without_room_for_its_state_it_says_so_and_goes_on_when_there_is() {
    let sandbox = place();
    let daemon = cramped(&sandbox, "state", 8);
    assert_eq!(plain(&sandbox, "/readyz").0, 200);
    let state = inside(&sandbox, &daemon, "state");
    let ballast = state.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    // What is open takes room also when it has no name any more.
    drop(file);
    // What fits in the last pages still works; then nothing does.
    let mut made = 0;
    let refused = loop {
        let ran = sandbox.run(&["token", "create", &format!("t{made}")]);
        if ran.code != 0 {
            break ran;
        }
        made += 1;
        assert!(made < 500, "the disk never was full");
    };
    refused.says("no space left");
    let (status, text) = plain(&sandbox, "/readyz");
    assert!(status == 503 && (text.contains("no room left") || text.contains("no space left")), "{status} {text}");
    assert_eq!(plain(&sandbox, "/healthz").0, 200, "it lives");
    let hosts = ask(&daemon, "GET", "/api/v1/hosts", "");
    assert_eq!(hosts["items"][0]["state"], "up", "what needs no writing works: {hosts}");
    wait("the event", || {
        let events = ask(&daemon, "GET", "/api/v1/events?kind=state-disk", "");
        events["items"].as_array().is_some_and(|all| all.iter().any(|event| event["severity"] == "error"))
    });

    fs::remove_file(&ballast).unwrap();
    wait("readiness", || plain(&sandbox, "/readyz").0 == 200);
    sandbox.run(&["token", "create", "afterwards"]).ok();
    let names = sandbox.json(&["token", "list"]);
    assert_eq!(names.as_array().unwrap().len(), made + 1, "{names}");
    // The audit log has no torn entry, and what could not be recorded then is there now.
    let audit = fs::read_to_string(state.join("audit.jsonl")).unwrap();
    let read = |line| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let audit: Vec<Value> = audit.lines().map(read).collect();
    let granted = audit.iter().filter(|entry| entry["action"] == "token.create" && entry["status"] == 201).count();
    assert_eq!(granted, made + 1, "{audit:?}");
    let ids: Vec<u64> = audit.iter().map(|entry| entry["id"].as_u64().unwrap()).collect();
    assert!(ids.iter().zip(1..).all(|(id, number)| *id == number), "{ids:?}");
    stop(daemon);
    let log = fs::read_to_string(sandbox.path("log")).unwrap();
    assert!(!log.contains("panicked") && log.to_lowercase().contains("no space left"), "{log}");
}

/// A web server for one kind of request: takes it, answers 204, hands out what it got.
fn receiver() -> (u16, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, got) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let (mut text, mut part) = (String::new(), [0; 4096]);
            loop {
                let wanted = text.split_once("\r\n\r\n").and_then(|(head, body)| {
                    let length =
                        head.to_lowercase().split_once("content-length: ")?.1.lines().next()?.trim().parse().ok()?;
                    Some(body.len() >= length)
                });
                if wanted == Some(true) {
                    break;
                }
                match stream.read(&mut part) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => text.push_str(&String::from_utf8_lossy(&part[..read])),
                }
            }
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    (port, got)
}

#[test]
fn notifications_are_tried_with_and_without_a_daemon_and_change_with_a_reload() {
    let sandbox = place();
    let (port, got) = receiver();
    sandbox.run(&["notify", "test"]).code(3).says("no notification channel");
    let without = fs::read_to_string(sandbox.path("etc/config.toml")).unwrap();
    sandbox.write("url", format!("http://127.0.0.1:{port}/very-secret\n"));
    sandbox.write("secret", "a-secret-of-mine\n");
    let section = format!(
        "\n[notify]\ngroup-wait = \"1s\"\n[notify.webhook.ops]\nurl-file = {:?}\nsecret-file = {:?}\n",
        sandbox.text("url"),
        sandbox.text("secret")
    );
    let with = format!("{without}{section}");
    sandbox.write("etc/config.toml", with.replace("secret-file", "secretfile"));
    sandbox.run(&["notify", "test"]).code(2).says("secretfile").says("did you mean \"secret-file\"");
    sandbox.write("etc/config.toml", &with);
    let ran = sandbox.run(&["notify", "test", "--json"]).ok();
    assert!(!ran.stdout.contains("very-secret") && !ran.stdout.contains("a-secret"), "{}", ran.stdout);
    assert_eq!(ran.json()[0]["is_ok"], true);
    let message = got.recv_timeout(LIMIT).unwrap();
    assert!(message.contains("notify-test") && message.to_lowercase().contains("webhook-signature: v1,"), "{message}");

    sandbox.write("etc/config.toml", &without);
    let daemon = Daemon::start(&sandbox);
    sandbox.run(&["notify", "test"]).code(3);
    sandbox.write("etc/config.toml", &with);
    daemon.signal(rustix::process::Signal::HUP);
    wait("the reload", || sandbox.json(&["notify", "list"])[0]["name"] == "ops");
    sandbox.run(&["notify", "test", "nobody"]).code(3).says("ops");
    let ran = sandbox.run(&["notify", "test", "ops"]).ok();
    assert!(ran.stdout.contains("accepted") && !ran.stdout.contains("very-secret"), "{}", ran.stdout);
    assert!(got.recv_timeout(LIMIT).unwrap().contains("notify-test"));
    // A reload that is refused is told, through the channel that is still there.
    sandbox.write("etc/config.toml", with.replace("[notify]", "[notfy]"));
    daemon.signal(rustix::process::Signal::HUP);
    let told = got.recv_timeout(LIMIT).unwrap();
    assert!(told.contains("config-refused") && told.contains("notfy"), "{told}");
    sandbox.write("etc/config.toml", with.replace(&port.to_string(), "9"));
    sandbox.write("url", "http://127.0.0.1:9/\n");
    sandbox.run(&["notify", "test"]).code(1).says("ops did not take the message");
    stop(daemon);
}

/// The fields of an entry as the journal takes it: `NAME=VALUE` or `NAME`, a length, and so many bytes.
fn fields(mut rest: &[u8]) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut all = BTreeMap::new();
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        rest = match line.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                all.insert(text(&line[..at]), text(&line[at + 1..]));
                after
            }
            None => {
                let (length, after) = after.split_at(8);
                let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap();
                all.insert(text(line), text(&after[..length]));
                &after[length + 1..]
            }
        };
    }
    all
}

#[test]
fn under_systemd_logs_go_to_the_journal_with_their_fields() {
    let sandbox = place();
    // The daemon has a /run of its own in which the journal's socket is this test's.
    fs::create_dir_all(sandbox.path("own-run/systemd/journal")).unwrap();
    let journal = std::os::unix::net::UnixDatagram::bind(sandbox.path("own-run/systemd/journal/socket")).unwrap();
    journal.set_read_timeout(Some(LIMIT)).unwrap();
    let script =
        r#"mount --bind "$1" /run && shift && exec env "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)" "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", &sandbox.text("own-run")]);
    command.arg(env!("CARGO_BIN_EXE_virtward")).args(["serve", "--connect", &connect(&sandbox)]);
    command.env("VIRTWARD_CONFIG", sandbox.path("etc/config.toml")).env("VIRTWARD_REPO", sandbox.path("repo"));
    let log = fs::File::create(sandbox.path("log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    let daemon = Daemon::spawn(&sandbox, command);
    wait("the VM", || ask(&daemon, "GET", "/api/v1/vms", "")["total"] == 1);
    let job = ask(&daemon, "POST", "/api/v1/jobs/backup", "{\"vm\": \"web1\"}")["id"].as_str().unwrap().to_owned();
    let mut buffer = vec![0; 64 << 10];
    let entry = loop {
        let read = journal.recv(&mut buffer).expect("an entry about the job");
        let entry = fields(&buffer[..read]);
        if entry.get("VIRTWARD_JOB") == Some(&job) {
            break entry;
        }
    };
    for (field, value) in [("MESSAGE", "job begins"), ("PRIORITY", "5"), ("SYSLOG_IDENTIFIER", "virtward")] {
        assert_eq!(entry.get(field).map(String::as_str), Some(value), "{entry:?}");
    }
    assert!(entry["VIRTWARD_VM"].contains("web1"), "{entry:?}");
    stop(daemon);
}

#[test]
fn a_daemon_that_does_not_start_tells_why_once() {
    let (sandbox, state, copy) = with_backup();
    let (port, got) = receiver();
    let config = fs::read_to_string(sandbox.path("etc/config.toml")).unwrap();
    let hook = format!("{config}\n[notify.webhook.ops]\nurl = \"http://127.0.0.1:{port}/\"\n");
    sandbox.write("etc/config.toml", hook);
    fs::write(&state, b"").unwrap();
    for _ in 0..3 {
        sandbox.run(&["serve", "--connect", &connect(&sandbox)]).code(1).says("damaged");
    }
    let message = got.recv_timeout(LIMIT).unwrap();
    for part in ["daemon-not-started", "does not start", "virtward state restore", copy.to_str().unwrap()] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
    assert!(got.try_recv().is_err(), "it was told again");
    // It was mended, and breaks again: that is news.
    sandbox.run(&["state", "restore"]).ok();
    stop(Daemon::start(&sandbox));
    fs::write(&state, b"").unwrap();
    sandbox.run(&["serve", "--connect", &connect(&sandbox)]).code(1);
    assert!(got.recv_timeout(LIMIT).unwrap().contains("does not start"));
}

/// The library that shows programs another time of day, from Debian's package faketime.
fn faketime() -> PathBuf {
    let dirs = fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path());
    let found = dirs.map(|dir| dir.join("faketime/libfaketimeMT.so.1")).find(|path| path.exists());
    found.expect("faketime is installed: scripts/setup.sh test")
}

#[test]
fn a_clock_that_jumps_days_ahead_and_back_stops_nothing() {
    let sandbox = place();
    let policy = POLICY.replace("name:nothing", "name:web1");
    let file = sandbox.write("gold.toml", policy);
    let clock = sandbox.write("clock", "+0d\n");
    let mut command = sandbox.command(&["serve", "--connect", &connect(&sandbox)]);
    command.env("LD_PRELOAD", faketime()).env("FAKETIME_TIMESTAMP_FILE", &clock).env("FAKETIME_NO_CACHE", "1");
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
    let log = fs::File::create(sandbox.path("log")).unwrap();
    command.stdout(Stdio::null()).stderr(log);
    let daemon = Daemon::spawn(&sandbox, command);
    sandbox.run(&["policy", "apply", "-f", &file]).ok();
    let jobs = || ask(&daemon, "GET", "/api/v1/jobs?kind=backup", "")["items"].as_array().unwrap().clone();
    wait("the plan", || sandbox.run(&["policy", "explain", "web1"]).ok().stdout.contains("selected by"));
    assert!(jobs().is_empty(), "nothing is due before three o'clock: {:?}", jobs());

    // Three days on, three nights were missed: one run makes up for them.
    fs::write(&clock, "+3d\n").unwrap();
    wait("the run that is due", || jobs().iter().any(|job| job["state"] == "succeeded"));
    assert_eq!(jobs().len(), 1, "{:?}", jobs());
    // Put right, its history is in the future, which holds nothing up.
    fs::write(&clock, "+0d\n").unwrap();
    let made = ask(&daemon, "POST", "/api/v1/jobs/backup", "{\"vm\": \"web1\"}");
    let id = made["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    wait("a backup by hand", || ask(&daemon, "GET", &format!("/api/v1/jobs/{id}"), "")["state"] == "succeeded");
    assert_eq!(plain(&sandbox, "/readyz").0, 200);
    fs::write(&clock, "-40d\n").unwrap();
    wait("a look at the host", || ask(&daemon, "GET", "/api/v1/vms", "")["total"] == 1);
    assert_eq!(plain(&sandbox, "/readyz").0, 200);
    fs::write(&clock, "+0d\n").unwrap();
    stop(daemon);
    let points = sandbox.json(&["backup", "list"]);
    assert_eq!(points.as_array().unwrap().len(), 2, "{points}");
    let log = fs::read_to_string(sandbox.path("log")).unwrap();
    assert!(!log.contains("panicked") && !log.contains("breaks its own rules"), "{log}");
}
