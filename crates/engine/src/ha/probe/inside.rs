//! Probes inside a guest, through its agent.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;
use virtward_decide::ha::probe::Restart;
use virtward_hypervisor::Hypervisor;

use super::{Verdict, tame};

/// How long the agent may take to take a command.
const AGENT_S: u32 = 5;
/// Between two questions whether a command has ended.
const POLL: Duration = Duration::from_millis(200);

/// A probe inside a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum InsideProbe {
    /// A command ends with 0.
    Exec {
        /// The program, by its whole path, and its arguments. No shell.
        command: Vec<String>,
    },
    /// A systemd unit is active.
    Unit {
        /// Its name.
        unit: String,
    },
}

/// Probes inside a guest, for at most `limit`. A guest whose agent does not answer is unknown here: whether that means
/// anything is for who watches the guest itself.
pub async fn probe_inside(hypervisor: &dyn Hypervisor, vm: Uuid, probe: &InsideProbe, limit: Duration) -> Verdict {
    let command = match probe {
        InsideProbe::Exec { command } => command.clone(),
        InsideProbe::Unit { unit } => match unit_name(unit) {
            Some(unit) => ["systemctl", "is-active", "--", unit].map(str::to_owned).into(),
            None => return Verdict::Unknown(format!("{unit:?} is no name of a unit")),
        },
    };
    let asked = run(hypervisor, vm, &command, limit);
    match tokio::time::timeout(limit + Duration::from_secs(AGENT_S.into()), asked).await {
        Ok(Ok(Some((0, said)))) => Verdict::Up(tame(&said)),
        Ok(Ok(Some((code, said)))) => Verdict::Down(tame(&format!("{} ended with {code} {said}", command[0]))),
        Ok(Ok(None)) => Verdict::Down(format!("{} did not end in {} ms", command[0], limit.as_millis())),
        Ok(Err(why)) => Verdict::Unknown(tame(&why)),
        Err(_) => Verdict::Unknown("the guest agent does not answer".into()),
    }
}

/// Restarts a service inside a guest.
pub async fn restart(hypervisor: &dyn Hypervisor, vm: Uuid, how: &Restart, limit: Duration) -> Result<(), String> {
    let command = match how {
        Restart::Command(command) => command.clone(),
        Restart::Unit(unit) => {
            let unit = unit_name(unit).ok_or_else(|| format!("{unit:?} is no name of a unit"))?;
            ["systemctl", "restart", "--", unit].map(str::to_owned).into()
        }
    };
    let name = command.join(" ");
    match run(hypervisor, vm, &command, limit).await? {
        Some((0, _)) => Ok(()),
        Some((code, said)) => Err(tame(&format!("{name} ended with {code} {said}"))),
        None => Err(format!("{name} did not end in {} ms", limit.as_millis())),
    }
}

pub(super) fn unit_name(unit: &str) -> Option<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ":-_.@\\".contains(c);
    (!unit.is_empty() && unit.len() < 256 && unit.chars().all(plain)).then_some(unit)
}

/// Exit status and first output of a command, `None` if it did not end in time (it goes on in the guest, as the agent
/// cannot end it).
async fn run(
    hypervisor: &dyn Hypervisor,
    vm: Uuid,
    command: &[String],
    limit: Duration,
) -> Result<Option<(i64, String)>, String> {
    let (path, arguments) = command.split_first().ok_or("no command is given")?;
    let deadline = Instant::now() + limit;
    let start = json!({"execute": "guest-exec", "arguments": {"path": path, "arg": arguments, "capture-output": true}});
    let started = ask(hypervisor, vm, &start).await?;
    let pid = started["pid"].as_i64().ok_or("the guest agent gave no process number")?;
    let question = json!({"execute": "guest-exec-status", "arguments": {"pid": pid}});
    loop {
        let status = ask(hypervisor, vm, &question).await?;
        if status["exited"].as_bool() == Some(true) {
            let signal = status["signal"].as_i64().map(|signal| 128 + signal);
            let code = status["exitcode"].as_i64().or(signal).ok_or("the guest agent gave no exit status")?;
            let stream = |name: &str| status[name].as_str().map(first_words).unwrap_or_default();
            let (out, err) = (stream("out-data"), stream("err-data"));
            return Ok(Some((code, if out.trim().is_empty() { err } else { out })));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn ask(hypervisor: &dyn Hypervisor, vm: Uuid, command: &Value) -> Result<Value, String> {
    let answer = hypervisor.agent(vm, &command.to_string(), AGENT_S).await.map_err(|error| error.message)?;
    let answer: Value = serde_json::from_str(&answer).map_err(|_| "the guest agent answers no JSON")?;
    Ok(answer.get("return").cloned().unwrap_or(answer))
}

/// The beginning of a Base64 text, decoded; a guest may send megabytes, or anything.
fn first_words(text: &str) -> String {
    use base64::Engine;
    const KEPT: usize = 400;
    let head = text.get(..text.len().min(KEPT)).unwrap_or_default();
    let bytes = base64::engine::general_purpose::STANDARD.decode(head).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
