//! `[health]` of the configuration: who knows how this host's hardware is, and what follows. From the file's words to what
//! the daemon is told.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;
use virtward_server::config::{HealthConfig, RedfishConfig};

use crate::exit::{Failure, Kind};

/// Every key of the sections, as it is written there.
pub const KEYS: [(&str, &[&str]); 2] = [
    ("health", &["metrics", "redfish", "interval-s", "evacuate"]),
    ("redfish", &["url", "user", "password-file", "ca-file", "insecure"]),
];

/// `[health]`: who knows how this host's hardware is, and what follows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Health {
    /// URLs of pages of metrics, as Prometheus reads them.
    pub metrics: Vec<String>,
    /// The management controller.
    pub redfish: Option<Redfish>,
    /// Seconds between two looks.
    pub interval_s: Option<u64>,
    /// Whether a host that fails is emptied.
    pub evacuate: bool,
}

/// `[health.redfish]`: a management controller.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Redfish {
    /// `https://HOST`.
    pub url: String,
    /// User.
    pub user: Option<String>,
    /// File whose first line is the password.
    pub password_file: Option<PathBuf>,
    /// Authorities (PEM) that its certificate may come from.
    pub ca_file: Option<PathBuf>,
    /// Do not check its certificate.
    pub insecure: bool,
}

/// What the daemon is told.
pub fn settle(settings: &Health) -> Result<HealthConfig, Failure> {
    let base = HealthConfig::default();
    let usage = |message: String| Failure::new(Kind::Usage, format!("[health] {message}"));
    let is_web = |url: &str| url.starts_with("http://") || url.starts_with("https://");
    if let Some(url) = settings.metrics.iter().find(|url| !is_web(url)) {
        return Err(usage(format!("metrics: {url:?} is no URL; give one such as http://127.0.0.1:9100/metrics")));
    }
    let redfish = settings.redfish.as_ref().map(|of| {
        if !is_web(&of.url) {
            return Err(usage(format!("redfish.url: {:?} is no URL; give one such as https://10.9.0.1", of.url)));
        }
        let login = match (&of.user, &of.password_file) {
            (Some(user), Some(file)) => Some((user.clone(), file.clone())),
            (None, None) => None,
            _ => return Err(usage("redfish: user and password-file go together".into())),
        };
        Ok(RedfishConfig { url: of.url.clone(), login, ca_file: of.ca_file.clone(), insecure: of.insecure })
    });
    let interval = settings.interval_s.map_or(base.interval, Duration::from_secs);
    if interval.is_zero() {
        return Err(usage("interval-s is at least 1".into()));
    }
    if settings.evacuate && settings.metrics.is_empty() && settings.redfish.is_none() {
        return Err(usage("evacuate: nothing says when; name metrics or redfish".into()));
    }
    Ok(HealthConfig {
        metrics: settings.metrics.clone(),
        redfish: redfish.transpose()?,
        interval,
        evacuate: settings.evacuate,
    })
}
