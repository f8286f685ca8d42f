//! Programs of others (fence agents, storage hooks), bounded in time and output, that leave nothing behind.
//!
//! An agent starts children of its own, some in sessions of their own (ssh behind a pseudo-terminal), so killing a
//! process or its group is not enough. As root, each program runs in a PID namespace: when its first process dies, the
//! kernel kills all of them; and that process dies with this one (`setpriv --pdeathsig`, `unshare --kill-child`).

use std::{
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
};

/// What is kept of each of standard output and standard error; the rest is read and forgotten.
const KEPT_BYTES: usize = 64 << 10;
/// How long the pipes of a program that has ended may stay open.
const DRAIN: Duration = Duration::from_secs(2);

/// How a program ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub status: ExitStatus,
    /// The beginning of its standard output.
    pub stdout: String,
    /// The beginning of its standard error.
    pub stderr: String,
}

/// Why there is no end to report.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("cannot run {program}: {source}")]
    Start { program: String, source: std::io::Error },
    #[error("no answer in {} s; it was killed", .limit.as_secs_f32())]
    Timeout { limit: Duration },
}

/// Runs a program with `input` on its standard input. Dropping the future kills all of it.
pub(super) async fn run(
    program: &str,
    arguments: &[String],
    environment: &[(&str, String)],
    input: &[u8],
    limit: Duration,
) -> Result<Ended, Failure> {
    let start = |source| Failure::Start { program: program.to_owned(), source };
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if rustix::process::geteuid().is_root() {
        // A shell is the namespace's first process, as the first one lacks the ordinary effects of signals.
        command.args(["unshare", "--fork", "--pid", "--kill-child=KILL", "sh", "-c", "\"$@\"; exit $?", "sh"]);
    }
    command.arg(program).args(arguments).env_clear().env("LC_ALL", "C");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
    command.envs(environment.iter().map(|(name, value)| (*name, value.as_str())));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
    let mut child = command.spawn().map_err(start)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read its input says why by its exit.
            let _ = stdin.write_all(input).await;
        }
    };
    let mut kept = (Vec::new(), Vec::new());
    let ended = tokio::time::timeout(limit, async {
        let talk = async { tokio::join!(feed, keep(stdout, &mut kept.0), keep(stderr, &mut kept.1)) };
        tokio::pin!(talk);
        tokio::select! {
            biased;
            _ = &mut talk => child.wait().await,
            status = child.wait() => {
                // The pipes close with the last process of the program; outside a namespace one may go on.
                let _ = tokio::time::timeout(DRAIN, &mut talk).await;
                status
            }
        }
    })
    .await;
    match ended {
        Ok(status) => Ok(Ended {
            status: status.map_err(start)?,
            stdout: String::from_utf8_lossy(&kept.0).into_owned(),
            stderr: String::from_utf8_lossy(&kept.1).into_owned(),
        }),
        Err(_) => {
            // Returns when it is gone, so that nobody's next attempt meets it.
            let _ = child.kill().await;
            Err(Failure::Timeout { limit })
        }
    }
}

/// Reads to the end, keeps the beginning.
async fn keep(pipe: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count) = pipe.read(&mut buffer).await {
        if count == 0 {
            return;
        }
        kept.extend_from_slice(&buffer[..count.min(KEPT_BYTES - kept.len())]);
    }
}

/// What a program said, for a message: its last line that says anything, without control characters, cut.
pub(super) fn words(text: &str) -> String {
    const LONGEST: usize = 300;
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let clean: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect();
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Instant};

    use super::*;

    fn shell(script: &str) -> Vec<String> {
        vec!["-c".into(), script.into()]
    }

    #[tokio::test]
    async fn input_output_and_exit_pass() {
        let ended =
            run("sh", &shell("cat; echo bad >&2; exit 3"), &[("X", "1".into())], b"hello\n", Duration::from_secs(20))
                .await
                .unwrap();
        assert_eq!(
            (ended.status.code(), ended.stdout.as_str(), words(&ended.stderr).as_str()),
            (Some(3), "hello\n", "bad")
        );
    }

    #[tokio::test]
    async fn endless_output_is_read_and_not_kept() {
        let script = "head -c 20000000 /dev/zero; exit 0";
        let ended = run("sh", &shell(script), &[], b"", Duration::from_secs(60)).await.unwrap();
        assert!(ended.status.success() && ended.stdout.len() <= KEPT_BYTES);
    }

    #[tokio::test]
    async fn a_killed_program_leaves_nothing_not_even_in_a_session_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("alive");
        // The grandchild leaves the group and the session and marks that it lives.
        let script = format!("setsid sh -c 'while :; do echo >> {}; sleep 0.1; done' & sleep 600", mark.display());
        let started = Instant::now();
        let failure = run("sh", &shell(&script), &[], b"", Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(failure, Failure::Timeout { .. }), "{failure}");
        assert!(started.elapsed() < Duration::from_secs(60));
        if rustix::process::geteuid().is_root() {
            still(&mark).await;
        }
        // The same when nobody waits any more.
        let again = dir.path().join("again");
        let script = format!("setsid sh -c 'while :; do echo >> {}; sleep 0.1; done' & sleep 600", again.display());
        let script = shell(&script);
        let whole = run("sh", &script, &[], b"", Duration::from_secs(600));
        let dropped = tokio::time::timeout(Duration::from_secs(1), whole);
        assert!(dropped.await.is_err());
        if rustix::process::geteuid().is_root() {
            still(&again).await;
        }
    }

    /// Waits until the file has stopped growing, within a bound.
    async fn still(mark: &Path) {
        let size = || std::fs::metadata(mark).map(|meta| meta.len()).unwrap_or(0);
        let mut last = size();
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = size();
            if now == last {
                return;
            }
            last = now;
        }
        panic!("something of the killed program goes on");
    }

    #[test]
    fn words_of_others_are_tamed() {
        assert_eq!(words("first\n\u{1b}[31mred\u{7}\n\n"), "[31mred");
        assert_eq!(words(&"x".repeat(10_000)).len(), 300);
        assert_eq!(words(""), "");
    }
}
