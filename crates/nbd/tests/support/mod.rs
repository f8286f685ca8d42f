//! Real NBD servers for tests: started on a socket in a temporary directory, killed by process id when dropped.
#![allow(dead_code, reason = "every test file uses another part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use virtward_nbd::{Address, Options, ReconnectPolicy};

pub const MIB: u64 = 1 << 20;

/// A running server. Its directory lives as long as it.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts `program` and waits for its socket, or for the file that it writes when it is ready.
    pub fn start(program: &str, arguments: &[&str], socket: &Path) -> Server {
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
        let mut server = Server { child, socket: socket.to_path_buf() };
        let began = Instant::now();
        while !is_ready(&server.socket) {
            assert!(server.child.try_wait().unwrap().is_none(), "{program} {arguments:?} ended at once");
            assert!(began.elapsed() < Duration::from_secs(20), "{program} {arguments:?} opens no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// `nbdkit` with its own arguments behind the usual ones.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> Server {
        let mut all = vec!["--foreground", "--exit-with-parent", "--unix", socket.to_str().unwrap()];
        all.extend(arguments);
        Server::start("nbdkit", &all, socket)
    }

    /// `qemu-nbd`, persistent, for up to eight clients.
    pub fn qemu_nbd(socket: &Path, arguments: &[&str]) -> Server {
        let mut all = vec!["--persistent", "--shared=8", "--socket", socket.to_str().unwrap()];
        all.extend(arguments);
        Server::start("qemu-nbd", &all, socket)
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    /// Kills it at once, as a crash does.
    pub fn kill(mut self) {
        self.end();
    }

    /// Waits for it to end by itself.
    pub fn wait_for_end(&mut self, limit: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < limit {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether a socket listens. That its file exists is not enough, and to try it would count as a client.
fn is_ready(path: &Path) -> bool {
    const LISTENING: &str = "00010000";
    if !path.exists() {
        return false;
    }
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let listens = |line: &str| line.split_whitespace().nth(3) == Some(LISTENING);
    path.is_file() || sockets.lines().any(|line| line.ends_with(path.to_str().unwrap()) && listens(line))
}

/// Runs a program to its end, which must be a success.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Options with limits that suit tests.
pub fn options() -> Options {
    Options {
        connect_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(20),
        reconnect: ReconnectPolicy::never(),
        ..Options::default()
    }
}

/// Bytes that tell their offset, so that misplaced data is seen.
pub fn pattern(offset: u64, length: usize) -> Vec<u8> {
    // The same as nbdkit's pattern plugin: every aligned 8 bytes hold their own offset, big-endian.
    (offset..offset + length as u64).map(|at| (at & !7).to_be_bytes()[(at & 7) as usize]).collect()
}
