//! Where readings come from: a page of metrics, or a tree of Redfish documents. Both are strangers: what is read is bounded
//! in size, number and time, and links lead nowhere else.

use std::{
    collections::{BTreeSet, VecDeque},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use ureq::{
    Agent,
    tls::{TlsConfig, TlsProvider},
};
use virtward_decide::health::{
    Trouble,
    metrics::{self, Counters},
    redfish,
};

use crate::{
    config::{HealthConfig, RedfishConfig},
    notify::trust,
};

/// For one answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// For all documents of a controller; they are slow.
const TREE_MAX: Duration = Duration::from_secs(90);
const PAGE_BYTES_MAX: u64 = 16 << 20;
const DOCUMENT_BYTES_MAX: u64 = 1 << 20;
const DOCUMENTS_MAX: usize = 200;
const ROOT: &str = "/redfish/v1/";

/// One that knows how the hardware is.
pub struct Source {
    of: Of,
    troubles: Vec<Trouble>,
    has_answered: bool,
}

#[derive(Clone)]
enum Of {
    Metrics { url: String, counters: Counters },
    Redfish(RedfishConfig),
}

/// All that the configuration names.
pub fn all(config: &HealthConfig) -> Vec<Source> {
    let metrics = config.metrics.iter().map(|url| Of::Metrics { url: url.clone(), counters: Counters::new() });
    let redfish = config.redfish.iter().cloned().map(Of::Redfish);
    metrics.chain(redfish).map(|of| Source { of, troubles: Vec::new(), has_answered: false }).collect()
}

impl Source {
    /// For people.
    pub fn name(&self) -> &str {
        match &self.of {
            Of::Metrics { url, .. } => url,
            Of::Redfish(config) => &config.url,
        }
    }

    /// What it said last.
    pub fn troubles(&self) -> &[Trouble] {
        &self.troubles
    }

    /// Whether it ever said anything.
    pub fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Asks it anew; why not, if it does not answer.
    pub async fn read(&mut self) -> Result<(), String> {
        let of = self.of.clone();
        let asked = tokio::task::spawn_blocking(move || ask(of)).await;
        let (of, troubles) = asked.map_err(|error| format!("a worker thread ended early: {error}"))??;
        (self.of, self.troubles, self.has_answered) = (of, troubles, true);
        Ok(())
    }
}

fn ask(of: Of) -> Result<(Of, Vec<Trouble>), String> {
    match of {
        Of::Metrics { url, mut counters } => {
            let agent = agent(&url, None, false)?;
            let page = get(&agent, &url, None, PAGE_BYTES_MAX)?.ok_or_else(|| answered(404))?;
            let troubles = metrics::troubles(&String::from_utf8_lossy(&page), &mut counters);
            Ok((Of::Metrics { url, counters }, troubles))
        }
        Of::Redfish(config) => {
            let troubles = tree(&config)?;
            Ok((Of::Redfish(config), troubles))
        }
    }
}

/// Reads what the root leads to, breadth first.
fn tree(config: &RedfishConfig) -> Result<Vec<Trouble>, String> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let agent = agent(&config.url, config.ca_file.as_deref(), config.insecure)?;
    let login = match &config.login {
        Some((user, file)) => {
            let password = trust::secret(file).map_err(|failure| failure.text)?;
            Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
        }
        None => None,
    };
    let (mut found, mut seen) = (Vec::new(), BTreeSet::from([ROOT.to_owned()]));
    let mut waiting = VecDeque::from([ROOT.to_owned()]);
    let ends = Instant::now() + TREE_MAX;
    while let Some(path) = waiting.pop_front() {
        if Instant::now() >= ends {
            return Err(format!("it did not tell everything in {} s", TREE_MAX.as_secs()));
        }
        let url = format!("{}{path}", config.url.trim_end_matches('/'));
        let bytes = match get(&agent, &url, login.as_deref(), DOCUMENT_BYTES_MAX)? {
            Some(bytes) => bytes,
            // A part that its vendor forgot is no reason to know nothing of the others.
            None if path != ROOT => continue,
            None => return Err(answered(404)),
        };
        let document: Value = serde_json::from_slice(&bytes).map_err(|error| format!("{path} is no JSON: {error}"))?;
        found.extend(redfish::troubles(&document));
        for link in redfish::links(&document) {
            if seen.len() < DOCUMENTS_MAX && seen.insert(link.clone()) {
                waiting.push_back(link);
            }
        }
    }
    Ok(found)
}

fn agent(url: &str, ca_file: Option<&Path>, insecure: bool) -> Result<Agent, String> {
    let tls = match insecure {
        // Its authorities do not matter, and may not be there.
        true => TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .disable_verification(true)
            .build(),
        false => trust::tls(url, ca_file).map_err(|failure| failure.text)?,
    };
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(ANSWER_MAX))
        .proxy(None)
        .tls_config(tls);
    Ok(Agent::new_with_config(config.build()))
}

fn answered(status: u16) -> String {
    format!("it answered {status}")
}

/// What is there; none if nothing is.
fn get(agent: &Agent, url: &str, login: Option<&str>, bytes_max: u64) -> Result<Option<Vec<u8>>, String> {
    let mut request = agent.get(url).header("user-agent", concat!("virtward/", env!("CARGO_PKG_VERSION")));
    if let Some(login) = login {
        request = request.header("authorization", login);
    }
    let mut answer = request.call().map_err(|error| trust::explained(&error.to_string()))?;
    match answer.status().as_u16() {
        200 => {
            let body = answer.body_mut().with_config().limit(bytes_max).read_to_vec();
            body.map(Some).map_err(|error| error.to_string())
        }
        401 | 403 => Err("it refuses the user; check user and password-file".into()),
        404 => Ok(None),
        status => Err(answered(status)),
    }
}
