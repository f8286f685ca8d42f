//! Commands in a guest through its agent, and waiting for a guest.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::virsh::Virsh;

/// What a command in a guest left.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status; 128 plus the signal when one ended it, as a shell reports it.
    pub exit_code: u8,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Whether the agent kept only the beginning of the output (it keeps 16 MiB).
    pub truncated: bool,
}

/// Runs a command in a guest and waits for its end.
pub fn exec(virsh: &Virsh, vm: &str, words: &[String], timeout: Duration) -> Result<Outcome> {
    let (program, args) = words.split_first().context("no command given")?;
    let request = json!({"execute": "guest-exec",
        "arguments": {"path": program, "arg": args, "env": ["PATH=/bin:/sbin", "HOME=/root"], "capture-output": true}});
    let started = virsh
        .agent(vm, &request, 30)
        .with_context(|| format!("cannot run {program} in {vm}; is its agent up? (virtward-lab vm wait {vm})"))?;
    let pid = started["pid"].as_i64().with_context(|| format!("the agent of {vm} gave no process number"))?;
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(10);
    loop {
        let status = virsh.agent(vm, &json!({"execute": "guest-exec-status", "arguments": {"pid": pid}}), 30)?;
        if status["exited"].as_bool() == Some(true) {
            return outcome(&status);
        }
        if Instant::now() >= deadline {
            bail!("{program} in {vm} has not ended after {} s; it goes on there as process {pid}", timeout.as_secs());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

fn outcome(status: &Value) -> Result<Outcome> {
    let stream = |name: &str| match status[name].as_str() {
        Some(text) => decode_base64(text).with_context(|| format!("the agent sent a damaged {name}")),
        None => Ok(Vec::new()),
    };
    let code = match (status["exitcode"].as_u64(), status["signal"].as_u64()) {
        (_, Some(signal)) => 128 + signal.min(127),
        (Some(code), None) => code,
        (None, None) => bail!("the agent gave no exit status"),
    };
    Ok(Outcome {
        exit_code: u8::try_from(code).unwrap_or(u8::MAX),
        stdout: stream("out-data")?,
        stderr: stream("err-data")?,
        truncated: ["out-truncated", "err-truncated"].iter().any(|k| status[*k].as_bool() == Some(true)),
    })
}

/// Asks a guest's agent for a sign of life.
pub fn ping(virsh: &Virsh, vm: &str) -> Result<()> {
    virsh.agent(vm, &json!({"execute": "guest-ping"}), 2).map(drop)
}

/// RFC 4648 with padding; `None` for anything else.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end().as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let groups = text.chunks(4).len();
    for (n, group) in text.chunks(4).enumerate() {
        let padding = group.iter().rev().take_while(|&&c| c == b'=').count();
        if group.len() != 4 || padding > 2 || (padding > 0 && n + 1 != groups) {
            return None;
        }
        let mut bits = 0u32;
        for &c in &group[..4 - padding] {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * padding;
        out.extend_from_slice(&bits.to_be_bytes()[1..4 - padding]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_and_damage_is_noticed() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFyIQ==", "foobar!")] {
            assert_eq!(decode_base64(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(decode_base64("/+8A"), Some(vec![0xff, 0xef, 0]));
        for bad in ["Z", "Zg=", "Zg==Zg==", "Z===", "====", "Zm9*"] {
            assert_eq!(decode_base64(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_signal_is_an_exit_status() {
        let outcome = outcome(&json!({"exited": true, "signal": 9, "out-data": "b2s="})).unwrap();
        assert_eq!((outcome.exit_code, outcome.stdout.as_slice(), outcome.truncated), (137, &b"ok"[..], false));
        assert!(super::outcome(&json!({"exited": true})).is_err());
    }
}
