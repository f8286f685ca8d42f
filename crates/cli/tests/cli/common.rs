//! A place of its own for each test, and the real binary run in it.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

/// Longest that one run of the binary may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    /// Exit status; 128 and the signal's number if a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Asserts the exit status.
    #[track_caller]
    pub fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, expected, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code(0)
    }

    /// Asserts that standard error contains a text.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "{text:?} is not in:\n{}", self.stderr);
        self
    }

    /// Standard output as one JSON document.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in:\n{}\nstderr:\n{}", self.stdout, self.stderr))
    }

    /// The `error` object that `--json` prints.
    #[track_caller]
    pub fn error(&self) -> Value {
        self.json().get("error").cloned().unwrap_or_else(|| panic!("no error in {}", self.stdout))
    }
}

/// A directory with a repository location, a configuration file, and no way to the host's own settings.
pub struct Sandbox {
    dir: TempDir,
}

impl Sandbox {
    /// An empty one.
    pub fn new() -> Self {
        let sandbox = Self { dir: tempfile::Builder::new().prefix("virtward-cli-").tempdir().expect("tempdir") };
        fs::create_dir(sandbox.path("etc")).unwrap();
        sandbox.write("etc/config.toml", "");
        sandbox
    }

    /// One with a repository that opens with the default key file.
    pub fn with_repository() -> Self {
        let sandbox = Self::new();
        sandbox.run(&["repo", "init"]).ok();
        sandbox
    }

    /// A path inside.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path inside as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// Writes a file, readable by its owner only.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        use std::os::unix::fs::PermissionsExt;
        fs::write(self.path(name), content).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
        self.text(name)
    }

    /// The binary, told to stay inside.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtward"));
        for name in ["VIRTWARD_PASSWORD_FILE", "VIRTWARD_KEY_FILE", "VIRTWARD_LOG", "RUST_LOG"] {
            command.env_remove(name);
        }
        command
            .env("VIRTWARD_CONFIG", self.path("etc/config.toml"))
            .env("VIRTWARD_REPO", self.path("repo"))
            .env("VIRTWARD_CONNECT", "qemu+unix:///system?socket=/nonexistent/virtward-test")
            .env("RUST_BACKTRACE", "1")
            .env("TZ", "UTC")
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .args(args);
        command
    }

    /// Runs to the end.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().expect("virtward starts"))
    }

    /// Runs with `--json` and gives the one document that it prints.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        self.run(&args).ok().json()
    }
}

/// Waits for a process, for a limited time, and collects what it says. Panics and backtraces fail the test.
#[track_caller]
pub fn finish(mut child: Child) -> Ran {
    use std::os::unix::process::ExitStatusExt;
    drop(child.stdin.take());
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let pid = child.id();
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait()));
    let status = ended.recv_timeout(LIMIT).unwrap_or_else(|_| {
        signal(pid, "KILL");
        panic!("virtward did not end within {LIMIT:?}");
    });
    let status = status.expect("wait");
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    let ran = Ran { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
    for word in ["panicked", "stack backtrace", "RUST_BACKTRACE"] {
        assert!(!ran.stderr.contains(word), "{}", ran.stderr);
    }
    ran
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut data = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut data);
        }
        String::from_utf8_lossy(&data).into_owned()
    })
}

/// Sends a signal to a process that the test started.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
}

/// Runs another program and insists that it works.
#[track_caller]
pub fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Writes `bytes` of reproducible, hardly compressible data at `offset` of a file, making the file as long as needed.
pub fn fill(path: &Path, offset: u64, bytes: usize, seed: u64) {
    use std::io::{Seek, SeekFrom};
    let mut state = seed | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&data).unwrap();
}
