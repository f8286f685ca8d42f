//! Policies as they were applied: checked, kept, made ready for the planner.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, RwLock},
};

use jiff::{Timestamp, tz::TimeZoneDatabase};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtward_api::{Code, FieldError, Finding, FindingSeverity, PolicyDocument, Problem};
use virtward_cluster::Compare;
use virtward_decide::{
    policy::{
        check::{self, Known},
        diff, file,
    },
    schedule::Compiled,
};
use virtward_model::Policy;

use crate::{
    failures::Result,
    kv::{self, Kv},
    table::Table,
};

/// A policy as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stored {
    /// The policy.
    pub policy: Policy,
    /// The text that it was applied from.
    pub source: Option<String>,
    /// Rises with every change.
    pub revision: u64,
    /// When it was last changed.
    pub updated: Timestamp,
    /// By whom.
    pub updated_by: String,
    /// When its schedule came into force.
    pub since: Timestamp,
}

/// A policy as it is stored, and ready for scheduling unless it does not compile any more.
type Entry = (Stored, Option<Compiled>);

/// All policies.
pub struct Policies {
    kv: Kv,
    zones: TimeZoneDatabase,
    /// As they are stored.
    pub table: Table<String, Stored>,
    /// The same, ready for use.
    all: RwLock<BTreeMap<String, Arc<Entry>>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

fn key(name: &str) -> String {
    format!("/v1/policies/{name}")
}

/// A document that was read.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The policies in it, as far as they could be read.
    pub policies: Vec<Policy>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Policies {
    /// Those of the state store.
    pub async fn load(kv: Kv) -> Result<Self> {
        let zones = TimeZoneDatabase::from_env();
        let table = Table::<String, Stored>::load(&kv, "/v1/policies/").await?;
        let all = table.all().into_iter().map(|(name, stored)| (name, compile(&stored, &zones))).collect();
        Ok(Self { kv, zones, table, all: RwLock::new(all), changing: tokio::sync::Mutex::new(()) })
    }

    /// A policy is another one now, or gone.
    pub fn news(&self, name: &str) {
        let now = self.table.get(&name.to_owned()).map(|stored| compile(&stored, &self.zones));
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        match now {
            Some(entry) => _ = all.insert(name.to_owned(), entry),
            None => _ = all.remove(name),
        }
    }

    /// All, by name, with what is ready for the planner.
    pub fn all(&self) -> Vec<Arc<(Stored, Option<Compiled>)>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One.
    pub fn get(&self, name: &str) -> Result<Arc<(Stored, Option<Compiled>)>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.get(name).cloned().ok_or_else(|| {
            Problem::new(Code::NotFound, format!("there is no policy called {name}"))
                .hint("virtward policy get shows what there is")
        })
    }

    /// The policy alone, if there is one of that name.
    pub fn policy(&self, name: &str) -> Option<Policy> {
        self.get(name).ok().map(|found| found.0.policy.clone())
    }

    /// Ready for the planner.
    pub fn compiled(&self) -> Vec<Compiled> {
        self.all().iter().filter_map(|entry| entry.1.clone()).collect()
    }

    /// Makes a policy that is not kept ready for the planner.
    pub fn try_compile(&self, policy: Policy, since: Timestamp) -> Option<Compiled> {
        Compiled::new(policy, since, &self.zones).ok()
    }

    /// Reads and checks a document.
    pub fn parse(
        &self,
        document: &PolicyDocument,
        repositories: &BTreeSet<String>,
        hosts: &BTreeSet<String>,
    ) -> Result<Parsed> {
        let known = Known { zones: &self.zones, repositories: Some(repositories), hosts: Some(hosts) };
        match (&document.source, &document.policy) {
            (Some(source), None) => {
                let name = document.file.as_deref().unwrap_or("policy");
                Ok(match file::parse(name, source, &known) {
                    Ok(policies) => Parsed { policies, findings: Vec::new() },
                    Err(problems) => {
                        let findings = problems.into_iter().map(|problem| Finding {
                            severity: FindingSeverity::Error,
                            message: with_hint(problem.message, problem.hint),
                            line: u32::try_from(problem.line).ok(),
                            field: problem.field,
                        });
                        Parsed { policies: Vec::new(), findings: findings.collect() }
                    }
                })
            }
            (None, Some(value)) => Ok(from_json(value, &known)),
            _ => Err(Problem::new(Code::BadRequest, "send either source (a policy file) or policy (JSON)")),
        }
    }

    /// Applies one policy, at `revision` if it is given.
    pub async fn put(
        &self,
        policy: Policy,
        source: Option<String>,
        revision: Option<u64>,
        who: &str,
    ) -> Result<Stored> {
        let _one = self.changing.lock().await;
        let name = policy.name.clone();
        let now = Timestamp::now();
        let before = self.kv.get::<Stored>(&key(&name)).await?;
        let at = before.as_ref().map_or(0, |(stored, _)| stored.revision);
        if revision.is_some_and(|expected| expected != at) {
            return Err(Problem::new(Code::RevisionMismatch, format!("policy {name} is at revision {at}"))
                .hint("read it again, and apply the change to what is there now"));
        }
        let old: Vec<Policy> = before.iter().map(|(stored, _)| stored.policy.clone()).collect();
        let reschedules = diff::diff(&old, std::slice::from_ref(&policy)).iter().any(diff::Difference::reschedules);
        let since = before.as_ref().filter(|_| !reschedules).map_or(now, |(stored, _)| stored.since);
        let stored = Stored { policy, source, revision: at + 1, updated: now, updated_by: who.to_owned(), since };
        let compare = match &before {
            Some((_, entry)) => entry.unchanged(),
            None => Compare::absent(key(&name)),
        };
        let Some(at) = self.kv.commit(vec![compare], vec![kv::put(&key(&name), &stored)?]).await? else {
            return Err(Problem::new(Code::RevisionMismatch, format!("policy {name} was changed by somebody else"))
                .hint("read it again, and apply the change to what is there now"));
        };
        self.table.put(name.clone(), at, stored.clone());
        self.news(&name);
        Ok(stored)
    }

    /// Removes one.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let _one = self.changing.lock().await;
        self.get(name)?;
        if let Some(at) = self.kv.delete(&[key(name)]).await? {
            self.table.delete(&name.to_owned(), at);
        }
        self.news(name);
        Ok(())
    }
}

fn compile(stored: &Stored, zones: &TimeZoneDatabase) -> Arc<(Stored, Option<Compiled>)> {
    let compiled = Compiled::new(stored.policy.clone(), stored.since, zones);
    if let Err(findings) = &compiled {
        tracing::error!(policy = stored.policy.name, ?findings, "a policy is not valid (any more); it does nothing");
    }
    Arc::new((stored.clone(), compiled.ok()))
}

fn with_hint(message: String, hint: Option<String>) -> String {
    match hint {
        Some(hint) => format!("{message}; {hint}"),
        None => message,
    }
}

fn from_json(value: &Value, known: &Known<'_>) -> Parsed {
    let policy: Policy = match serde_json::from_value(value.clone()) {
        Ok(policy) => policy,
        Err(error) => {
            let finding = Finding {
                severity: FindingSeverity::Error,
                field: String::new(),
                message: error.to_string(),
                line: None,
            };
            return Parsed { policies: Vec::new(), findings: vec![finding] };
        }
    };
    let findings = check::check(std::slice::from_ref(&policy), known).into_iter().map(|finding| Finding {
        severity: FindingSeverity::Error,
        field: finding.field,
        message: with_hint(finding.message, finding.hint),
        line: None,
    });
    Parsed { findings: findings.collect(), policies: vec![policy] }
}

/// The findings as the errors of a refused request.
pub fn refusal(findings: &[Finding]) -> Problem {
    let first = findings.first().map(|finding| finding.message.clone()).unwrap_or_default();
    let errors = findings.iter().map(|finding| FieldError {
        field: finding.field.clone(),
        message: finding.message.clone(),
        line: finding.line,
    });
    Problem::new(Code::Invalid, format!("the policy is not valid: {first}")).errors(errors.collect())
}
