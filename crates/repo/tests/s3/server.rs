//! A real S3 server of its own for a test: on a free loopback port, over a temporary directory, gone with the test.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use virtward_repo::{
    Store,
    store::s3::{S3Options, S3Store},
};

pub const ACCESS_KEY: &str = "VIRTWARDTEST";
pub const SECRET_KEY: &str = "a-secret-that-no-message-shows";
pub const BUCKET: &str = "backups";

/// The server that `scripts/setup.sh test` builds.
fn program() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("inside target").join("tools/bin/s3s-fs");
    assert!(path.exists(), "{} is not there; scripts/setup.sh test builds it", path.display());
    path
}

pub struct Server {
    child: Option<Child>,
    root: TempDir,
    pub port: u16,
}

impl Server {
    pub fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(BUCKET)).unwrap();
        // The port is free a moment before the server takes it: somebody else may be faster.
        for _ in 0..10 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
            if let Some(child) = launch(root.path(), port) {
                return Self { child: Some(child), root, port };
            }
        }
        panic!("the S3 server does not start");
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
    /// After [`Server::kill`]: on the same port, with what it had stored.
    pub fn revive(&mut self) {
        self.child = Some(launch(self.root.path(), self.port).expect("the S3 server comes back"));
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
    /// A store at a prefix of the bucket.
    pub fn store(&self, prefix: &str) -> Arc<S3Store> {
        store_at(&self.endpoint(), prefix)
    }
    /// The file in which the server keeps an object.
    pub fn file(&self, prefix: &str, name: &str) -> PathBuf {
        self.root.path().join(BUCKET).join(prefix).join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn launch(root: &Path, port: u16) -> Option<Child> {
    // Dies with the thread of the test, even if that is killed.
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .arg(program())
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY])
        .arg(root)
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the S3 server can be started");
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Some(child);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

pub fn env(name: &str) -> Option<String> {
    match name {
        "AWS_ACCESS_KEY_ID" => Some(ACCESS_KEY.into()),
        "AWS_SECRET_ACCESS_KEY" => Some(SECRET_KEY.into()),
        "HOME" => Some("/nonexistent".into()),
        _ => None,
    }
}

pub fn options(endpoint: &str) -> S3Options {
    S3Options { endpoint: Some(endpoint.into()), ..S3Options::default() }
}

pub fn store_at(endpoint: &str, prefix: &str) -> Arc<S3Store> {
    Arc::new(S3Store::open_with_env(&format!("{BUCKET}/{prefix}"), &options(endpoint), &env).unwrap())
}

/// All names, sorted.
pub fn names(store: &dyn Store) -> Vec<String> {
    let mut names = Vec::new();
    store
        .list("", &mut |object| {
            names.push(object.name);
            Ok(())
        })
        .unwrap();
    names.sort();
    names
}
