//! Fencing devices: what can take another host's power away, driven through the distribution's fence agents.
//!
//! An agent is a program that reads `key=value` lines on its standard input (the fence-agents API), so that secrets never
//! stand on a command line; what it prints is untrusted. Levels are as the field knows them: a level is done when every
//! device of it is (two power supplies), and the next level is tried when one is not.
//!
//! Invariant: [`off`] says [`Outcome::Off`] only after `status`, asked after the switch or found so before, said off
//! for every device of a level. An agent's word that it switched, and its `reboot`, are never believed.

mod check;
mod metadata;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::{BoxFuture, join_all};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub use check::{Finding, check};
pub use metadata::{Metadata, Parameter};

use super::process::{self, words};

/// Where the distribution puts its agents.
const AGENT_DIR: &str = "/usr/sbin";
/// Longest secret that makes sense.
const SECRET_BYTES: u64 = 4096;
/// Between two questions whether it is off yet.
const VERIFY_PAUSE: Duration = Duration::from_millis(500);
/// Between two attempts on one device.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// What `status` ends with.
const EXIT_ON: i32 = 0;
const EXIT_OFF: i32 = 2;

/// One way to take a host's power away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What people call it.
    pub name: String,
    /// The agent: a name such as `fence_ipmilan`, or an absolute path.
    pub agent: String,
    /// Level 1 is tried first; all devices of a level must succeed.
    #[serde(default = "one")]
    pub level: u8,
    /// The agent's parameters, as its manual page names them.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
    /// Parameters whose value is the first line of a file that others cannot read: `password = "/etc/virtward/h1.ipmi"`.
    #[serde(default)]
    pub secrets: BTreeMap<String, PathBuf>,
    /// How long one call of the agent may take, in seconds.
    #[serde(default = "timeout_s")]
    pub timeout_s: u16,
    /// How long after a switch `status` may still say on, in seconds.
    #[serde(default = "verify_s")]
    pub verify_s: u16,
    /// Further attempts after a failed one.
    #[serde(default = "one")]
    pub retries: u8,
}

fn one() -> u8 {
    1
}

fn timeout_s() -> u16 {
    20
}

fn verify_s() -> u16 {
    10
}

/// What an agent can be asked. There is no reboot: [`cycle`] switches off, verifies and switches on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Is the host's power on?
    Status,
    /// Take it away.
    Off,
    /// Give it back.
    On,
    /// Does the device itself answer?
    Monitor,
    /// What parameters and actions are there? Asks no device.
    Metadata,
    /// Do the parameters make sense? Asks no device.
    ValidateAll,
}

impl Action {
    /// As the agents call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Off => "off",
            Self::On => "on",
            Self::Monitor => "monitor",
            Self::Metadata => "metadata",
            Self::ValidateAll => "validate-all",
        }
    }
}

/// What a device says of the power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Power {
    On,
    Off,
}

/// Why a device gave no usable answer. The text fits into a sentence about the device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such program.
    #[error("there is no agent {agent}; install the package fence-agents, or correct its name")]
    NoAgent {
        /// The agent's name.
        agent: String,
    },
    /// A parameter that cannot be passed on.
    #[error("{0}")]
    Parameter(String),
    /// A secret's file is missing, empty or open to others.
    #[error("{0}")]
    Secret(String),
    /// It took too long; the agent and all its children are gone.
    #[error("{action}: no answer in {limit_s} s; the agent was killed")]
    Timeout {
        /// What was asked.
        action: &'static str,
        /// How long it had, in seconds.
        limit_s: u16,
    },
    /// The agent failed, or said nothing that can be understood.
    #[error("{action}: {said}")]
    Failed {
        /// What was asked.
        action: &'static str,
        /// Its last words.
        said: String,
    },
}

impl Device {
    /// Asks the agent, once. The standard output of a call that succeeded (for `status`: on or off).
    async fn call(&self, action: Action) -> Result<(i32, String), Error> {
        let agent = self.path()?;
        let input = self.input(action)?;
        let limit = Duration::from_secs(self.timeout_s.max(1).into());
        let home = [("HOME", "/root".to_owned())];
        let ended =
            process::run(&agent, &[], &home, input.as_bytes(), limit).await.map_err(|failure| match failure {
                process::Failure::Timeout { .. } => {
                    Error::Timeout { action: action.as_str(), limit_s: self.timeout_s.max(1) }
                }
                start => Error::Failed { action: action.as_str(), said: start.to_string() },
            })?;
        let failed = |said: String| Error::Failed { action: action.as_str(), said: self.redact(said, &input) };
        let said = || reason(&ended.stderr, &ended.stdout);
        match ended.status.code() {
            Some(code @ EXIT_ON) => Ok((code, ended.stdout)),
            Some(code @ EXIT_OFF) if action == Action::Status => Ok((code, ended.stdout)),
            Some(code) => Err(failed(format!("{} (exit status {code})", said()))),
            None => Err(failed(format!("{} ({})", said(), ended.status))),
        }
    }

    /// Whether the power is on. Exit status 2 alone is not believed to mean off: an interpreter that cannot read the
    /// agent ends with 2 as well, so the agent must also print `Status: OFF`, as all of them do.
    pub async fn status(&self) -> Result<Power, Error> {
        let (code, said) = self.call(Action::Status).await?;
        let says = |word: &str| said.lines().any(|line| line.trim().eq_ignore_ascii_case(word));
        match code {
            EXIT_OFF if says("Status: OFF") => Ok(Power::Off),
            EXIT_ON if !says("Status: OFF") => Ok(Power::On),
            _ => Err(Error::Failed {
                action: "status",
                said: format!("exit status {code}, but it said {:?}; that is not believed", words(&said)),
            }),
        }
    }

    /// Whether the device itself answers.
    pub async fn monitor(&self) -> Result<(), Error> {
        self.call(Action::Monitor).await.map(drop)
    }

    /// Gives the power back, and verifies it.
    pub async fn on(&self) -> Result<(), Error> {
        self.call(Action::On).await?;
        self.reach(Power::On).await
    }

    /// Takes the power away, and verifies it; asks first, as a device that is off need not be switched. `Ok` is a proof.
    async fn off(&self, may: May<'_>) -> Result<(), Error> {
        let mut last = Error::Failed { action: "off", said: "not tried".into() };
        for attempt in 0..=self.retries {
            if attempt > 0 {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            if let Ok(Power::Off) = self.status().await {
                return Ok(());
            }
            if !may().await {
                return Err(Error::Failed { action: "off", said: "no longer wanted, or that is not known".into() });
            }
            // A device that fails to say its status may still switch, and one that fails to switch may have switched.
            let switched = self.call(Action::Off).await;
            match self.reach(Power::Off).await {
                Ok(()) => return Ok(()),
                Err(unverified) => last = switched.err().unwrap_or(unverified),
            }
        }
        Err(last)
    }

    /// Asks until the power is as wanted, for `verify_s`.
    async fn reach(&self, wanted: Power) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(self.verify_s.into());
        loop {
            let seen = self.status().await;
            if seen.as_ref().is_ok_and(|power| *power == wanted) {
                return Ok(());
            }
            if tokio::time::Instant::now() + VERIFY_PAUSE > deadline {
                let (want, is) = if wanted == Power::Off { ("off", "on") } else { ("on", "off") };
                let said = format!("was switched {want}, but status still says {is} after {} s", self.verify_s);
                return Err(seen
                    .err()
                    .unwrap_or(Error::Failed { action: if wanted == Power::Off { "off" } else { "on" }, said }));
            }
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
    }

    /// The agent's file.
    fn path(&self) -> Result<String, Error> {
        let named = Path::new(&self.agent);
        let path = if named.is_absolute() {
            named.to_owned()
        } else {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
            if !self.agent.starts_with("fence_") || !self.agent.chars().all(plain) {
                return Err(Error::Parameter(format!(
                    "{:?} is no agent; give a name such as fence_ipmilan, or an absolute path",
                    self.agent
                )));
            }
            Path::new(AGENT_DIR).join(named)
        };
        let found = path.is_file().then(|| path.to_str().map(str::to_owned)).flatten();
        found.ok_or_else(|| Error::NoAgent { agent: self.agent.clone() })
    }

    /// What the agent reads.
    fn input(&self, action: Action) -> Result<Zeroizing<String>, Error> {
        let mut text = Zeroizing::new(format!("action={}\n", action.as_str()));
        let mut seen = BTreeSet::from(["action"]);
        for (name, value) in &self.parameters {
            self.add(&mut text, &mut seen, name, value)?;
        }
        // Neither question needs a secret, and metadata is asked before there is one.
        if action != Action::Metadata {
            for (name, path) in &self.secrets {
                self.add(&mut text, &mut seen, name, &read_secret(path)?)?;
            }
        }
        Ok(text)
    }

    fn add<'a>(
        &self,
        text: &mut String,
        seen: &mut BTreeSet<&'a str>,
        name: &'a str,
        value: &str,
    ) -> Result<(), Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::Parameter(format!("{name:?} is no name of a parameter")));
        }
        if !seen.insert(name) {
            return Err(Error::Parameter(match name {
                "action" => "the parameter action is not to be given; Virtward chooses it".into(),
                _ => format!("the parameter {name} is given twice, as a value and as a secret"),
            }));
        }
        // A line break would smuggle in another parameter.
        if value.chars().any(char::is_control) {
            return Err(Error::Parameter(format!(
                "the parameter {name} holds a line break or another control character"
            )));
        }
        text.push_str(name);
        text.push('=');
        text.push_str(value);
        text.push('\n');
        Ok(())
    }

    /// Takes the secrets out of what an agent said, should it repeat its input.
    fn redact(&self, said: String, input: &str) -> String {
        let secret = |line: &&str| line.split_once('=').is_some_and(|(name, _)| self.secrets.contains_key(name));
        let values = input.lines().filter(secret).filter_map(|line| Some(line.split_once('=')?.1));
        values.filter(|value| !value.is_empty()).fold(said, |said, value| said.replace(value, "(secret)"))
    }
}

/// Why an agent failed. The agents' library writes `TIME ERROR: reason`, several of them, between Python's warnings and a
/// line on how to get help; other agents just say something last.
fn reason(stderr: &str, stdout: &str) -> String {
    let errors = stderr.lines().filter_map(|line| Some(line.split_once("ERROR: ")?.1.trim()));
    let errors: Vec<&str> = errors.filter(|reason| !reason.starts_with("Please use")).take(3).collect();
    if !errors.is_empty() {
        return words(&errors.join("; "));
    }
    if stderr.trim().is_empty() { words(stdout) } else { words(stderr) }
}

fn read_secret(path: &Path) -> Result<Zeroizing<String>, Error> {
    use std::os::unix::fs::MetadataExt;
    let wrong = |why: String| Error::Secret(format!("the secret in {}: {why}", path.display()));
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let meta = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if meta.is_file() && meta.mode() & 0o077 != 0 {
        return Err(wrong(format!("others can read it (mode {:o}); chmod 600 it", meta.mode() & 0o777)));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(SECRET_BYTES).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(wrong("its first line is empty".into()));
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// What came of an attempt to take a host's power away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Proved: every device of a level says off.
    Off {
        /// The level that did it.
        level: u8,
        /// Its devices.
        devices: Vec<String>,
    },
    /// Not proved, whatever may have happened to the host; why, for each device that was tried.
    Unproven {
        /// `DEVICE: reason`.
        reasons: Vec<String>,
    },
}

/// Whether a host is still to be switched off. Asked right before each switch: devices take seconds to answer, in which a
/// host may have ended its guests itself and come back.
pub type May<'a> = &'a (dyn Fn() -> BoxFuture<'a, bool> + Sync);

/// Takes a host's power away through the first level that can prove it. The devices of a level work at the same time.
/// Safe to repeat and to drop at any point, which ends the agents; bounded by the devices' own limits.
pub async fn off(devices: &[Device]) -> Outcome {
    off_while(devices, &|| Box::pin(async { true })).await
}

/// [`off`] of a host that is left alone once `may` says no.
pub async fn off_while(devices: &[Device], may: May<'_>) -> Outcome {
    let levels: BTreeSet<u8> = devices.iter().map(|device| device.level).collect();
    let mut reasons = Vec::new();
    for level in levels {
        let tried: Vec<&Device> = devices.iter().filter(|device| device.level == level).collect();
        let results = join_all(tried.iter().map(|device| device.off(may))).await;
        let failed: Vec<String> = tried
            .iter()
            .zip(results)
            .filter_map(|(device, result)| Some(format!("{}: {}", device.name, result.err()?)))
            .collect();
        if failed.is_empty() {
            return Outcome::Off { level, devices: tried.iter().map(|device| device.name.clone()).collect() };
        }
        reasons.extend(failed);
    }
    if devices.is_empty() {
        reasons.push("the host has no fencing device".into());
    }
    Outcome::Unproven { reasons }
}

/// Gives a host's power back through every device; the reasons of those that failed.
pub async fn on(devices: &[Device]) -> Vec<String> {
    let results = join_all(devices.iter().map(Device::on)).await;
    let failed = |(device, result): (&Device, Result<(), Error>)| Some(format!("{}: {}", device.name, result.err()?));
    devices.iter().zip(results).filter_map(failed).collect()
}

/// A reboot that can be believed: off, verified, and on again. The host counts as off once, whatever `on` does; that it
/// stays off is then among the second value's reasons.
pub async fn cycle(devices: &[Device]) -> (Outcome, Vec<String>) {
    match off(devices).await {
        Outcome::Off { level, devices: names } => {
            let used: Vec<Device> = devices.iter().filter(|device| device.level == level).cloned().collect();
            (Outcome::Off { level, devices: names }, on(&used).await)
        }
        unproven => (unproven, Vec::new()),
    }
}

#[cfg(test)]
mod tests;
