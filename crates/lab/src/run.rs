//! Running the system's tools: ip, nft, virsh, qemu-img, mkfs.
//!
//! Every call is bounded in time, and a failure names the command and what it said. Output is text and is kept in
//! memory, so this is not for tools that print without end.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// How long an ordinary tool may take.
pub const TOOL_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a command to its end and returns what it printed.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    output_of(&mut command, None, TOOL_TIMEOUT)
}

/// Runs a command with `input` on its standard input.
pub fn run_with_input(program: &str, args: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    output_of(&mut command, Some(input), TOOL_TIMEOUT)
}

/// Runs a command to its end within `timeout` and returns its standard output; a non-zero exit is an error that holds
/// its standard error.
pub fn output_of(command: &mut Command, input: Option<&str>, timeout: Duration) -> Result<String> {
    let shown = show(command);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| {
        format!("cannot run {}; scripts/setup.sh lab installs what the lab needs", command.get_program().display())
    })?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
        // A tool that ends without reading everything says why on stderr, which is the better message.
        let _ = pipe.write_all(text.as_bytes());
    }
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{shown}: no end after {} s, given up", timeout.as_secs());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    let output = collect(stdout);
    if !status.success() {
        let reason = collect(stderr);
        let reason = if reason.trim().is_empty() { status.to_string() } else { reason.trim().to_owned() };
        bail!("{shown}: {reason}");
    }
    Ok(output)
}

/// A reader thread, so that a full pipe cannot stop the tool. A tool may leave a daemon behind that keeps the pipe
/// open; nobody waits for that (see `collect`).
fn drain(pipe: Option<impl Read + Send + 'static>) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut chunk = vec![0; 64 << 10];
        while let Ok(n) = pipe.read(&mut chunk) {
            if n == 0 || sender.send(chunk[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// All that was read until the pipe closed, or until it stayed silent after the tool's own end.
fn collect(receiver: std::sync::mpsc::Receiver<Vec<u8>>) -> String {
    let mut all = Vec::new();
    while let Ok(chunk) = receiver.recv_timeout(Duration::from_secs(1)) {
        all.extend(chunk);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// The command as a person would type it, cut to a readable length.
fn show(command: &Command) -> String {
    let mut shown = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        shown.push(' ');
        shown.push_str(&arg.to_string_lossy());
    }
    if shown.chars().count() > 200 {
        shown = shown.chars().take(200).chain("...".chars()).collect();
    }
    shown
}

/// Asks `done` until it says yes or `timeout` has passed; tells which.
pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(2);
    loop {
        let asked = Instant::now();
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        // Whatever is asked must not take the time of what is waited for.
        thread::sleep(pause.max((asked.elapsed() * 2).min(Duration::from_millis(500))));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_its_words() {
        let error = run("sh", &["-c", "echo no such thing >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("no such thing"), "{error}");
    }

    #[test]
    fn a_tool_that_hangs_is_given_up() {
        let started = Instant::now();
        let error = output_of(Command::new("sleep").arg("60"), None, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("given up") && started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn long_output_and_input_pass() {
        let text = "x".repeat(1 << 20);
        assert_eq!(run_with_input("cat", &[], &text).unwrap(), text);
    }
}
