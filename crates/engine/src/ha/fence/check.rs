//! Whether a device could be relied on, found out without switching anything.

use super::{Action, Device, Error, Power};

/// One step of a check. A device is good when none is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at: `parameters`, `validate-all`, `monitor`, `status`.
    pub step: &'static str,
    /// What was found, or what is wrong and what to do.
    pub outcome: Result<String, String>,
}

/// Looks at a device in every way that changes nothing, and stops at the first step that fails, as the later ones would
/// only repeat it.
pub async fn check(device: &Device) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |step, outcome: Result<String, String>| {
        let good = outcome.is_ok();
        findings.push(Finding { step, outcome });
        good
    };
    let text = |error: Error| error.to_string();
    if !note("parameters", parameters(device).await) {
        return findings;
    }
    let validated = device.call(Action::ValidateAll).await;
    if !note("validate-all", validated.map(|_| "accepted".to_owned()).map_err(text)) {
        return findings;
    }
    let answered = device.monitor().await;
    if !note("monitor", answered.map(|()| "the device answers".to_owned()).map_err(text)) {
        return findings;
    }
    let power = device.status().await;
    note("status", power.map(|power| if power == Power::On { "on" } else { "off" }.to_owned()).map_err(text));
    findings
}

/// Every parameter is one that the agent knows, and none that it requires is missing.
async fn parameters(device: &Device) -> Result<String, String> {
    let metadata = device.metadata().await.map_err(|error| error.to_string())?;
    let given = || device.parameters.keys().chain(device.secrets.keys());
    for name in given() {
        if metadata.parameters.iter().all(|known| known.name != *name) {
            let hint = metadata.closest(name).map_or_else(String::new, |known| format!("; did you mean {known}?"));
            return Err(format!("{} has no parameter {name}{hint} (man {})", device.agent, device.agent));
        }
    }
    // Parameters of deprecated names stand beside their successors, each of them "required": one of those that describe
    // the same thing is enough.
    let missing = metadata.parameters.iter().filter(|known| known.required && known.name != "action").find(|known| {
        let same = |other: &&super::Parameter| other.description == known.description;
        !metadata.parameters.iter().filter(same).any(|alias| given().any(|name| *name == alias.name))
    });
    match missing {
        Some(known) => Err(format!("{} needs the parameter {} ({})", device.agent, known.name, known.description)),
        None => Ok(format!("{} given", given().count())),
    }
}
