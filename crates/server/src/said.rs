//! What decisions say, taken apart for other languages: for each text that [`virtward_decide::schedule`] writes there is a
//! [`Said`] that says the same.

use serde_json::Value;
use virtward_api::{Said, Saying};
use virtward_decide::{
    arbiter::Operation,
    schedule::{Carrier, Cause, HostState, LeftOut, Selection, State, Why},
};

/// A text with what it says: what people are told.
#[derive(Clone, Debug, PartialEq)]
pub struct Sentence {
    /// In English.
    pub text: String,
    /// For other languages; none where it is only said in English.
    pub said: Option<Said>,
}

impl Sentence {
    /// One that is said in every language.
    pub fn new(text: impl Into<String>, said: impl Into<Said>) -> Self {
        Self { text: text.into(), said: Some(said.into()) }
    }
}

/// Of [`Why::text`].
pub fn why(why: &Why) -> Said {
    let of = Said::from;
    match why {
        Why::Backoff { until } => of(Saying::WaitsBackoff).with("until_at", until.to_string()),
        Why::Window { opens: Some(opens) } => of(Saying::WaitsWindow).with("opens_at", opens.to_string()),
        Why::Window { opens: None } => of(Saying::WaitsWindowClosed),
        Why::Busy(operation) => busy(*operation),
        Why::OtherPolicy(policy) => of(Saying::WaitsPolicy).with("policy", policy.as_str()),
        Why::NoHost => of(Saying::WaitsNoHost),
        Why::Host(host, HostState::Down) => of(Saying::WaitsHostDown).with("host", host.as_str()),
        Why::Host(host, _) => of(Saying::WaitsHostSilent).with("host", host.as_str()),
        Why::Total(limit) => of(Saying::WaitsTotal).with("limit", *limit),
        Why::HostLimit(host, limit) => limited(Saying::WaitsHostLimit, "host", host, *limit),
        Why::StorageLimit(storage, limit) => limited(Saying::WaitsStorageLimit, "storage", storage, *limit),
        Why::RepositoryLimit(name, limit) => limited(Saying::WaitsRepositoryLimit, "repository", name, *limit),
        Why::HostGap { host, until } => {
            of(Saying::WaitsHostGap).with("host", host.as_str()).with("until_at", until.to_string())
        }
    }
}

fn limited(saying: Saying, what: &str, name: &str, limit: u32) -> Said {
    Said::from(saying).with(what, name).with("limit", limit)
}

/// An operation on a VM is under way.
pub fn busy(operation: Operation) -> Said {
    Said::from(Saying::WaitsOperation).with("operation", word(operation))
}

/// An operation as the dictionaries of the web interface know it.
pub fn word(operation: Operation) -> String {
    operation.name().replace(' ', "-")
}

/// Of [`State::text`]. When the next run is, whoever shows this shows beside it.
pub fn state(state: &State) -> Said {
    let due = |saying: Saying, at: &jiff::Timestamp| Said::from(saying).with("due_at", at.to_string());
    match state {
        State::Paused => Saying::RunPaused.into(),
        State::Running { since } => Said::from(Saying::RunSince).with("since_at", since.to_string()),
        State::Idle { left_out: Some((at, why)), .. } => match why {
            LeftOut::TooLate => due(Saying::RunTooLate, at),
            LeftOut::Missed => due(Saying::RunMissed, at),
            LeftOut::Failed(tries) => due(Saying::RunFailed, at).with("tries", *tries),
            LeftOut::Cancelled => due(Saying::RunCancelled, at),
        },
        State::Idle { next: Some(next), left_out: None } => {
            Said::from(Saying::RunIdle).with("next_at", next.to_string())
        }
        State::Idle { next: None, left_out: None } => Saying::RunNever.into(),
        State::Starts { due: at, attempt, cause } => match cause {
            Cause::Scheduled => due(Saying::RunStarts, at),
            Cause::CaughtUp => due(Saying::RunCaughtUp, at),
            Cause::Retry => due(Saying::RunRetry, at).with("attempt", *attempt),
            Cause::Resumed => due(Saying::RunResumed, at),
        },
        State::Waits { due: at, why: what } => due(Saying::RunWaits, at).with("what", why(what)),
    }
}

/// Of [`Selection`].
pub fn selection(selection: &Selection<'_>) -> Said {
    match selection {
        Selection::Selected(rules) => {
            let rules: Vec<Value> = rules.iter().map(|rule| rule.to_string().into()).collect();
            Said::from(Saying::SelectedBy).with("rules", rules)
        }
        Selection::Excluded(rule) => Said::from(Saying::ExcludedBy).with("rule", rule.to_string()),
        Selection::Lacks(rule) => Said::from(Saying::LacksRule).with("rule", rule.to_string()),
        Selection::NoneHolds => Saying::NoRuleHolds.into(),
        Selection::Nothing => Saying::NoRules.into(),
    }
}

/// Of [`Carrier::text`].
pub fn carrier(carrier: &Carrier<'_>, host: &str) -> Said {
    let of = |saying: Saying| Said::from(saying).with("host", host);
    match carrier {
        Carrier::Own => of(Saying::RunsHere),
        Carrier::OwnIsNamed => of(Saying::RunsHereNamed),
        Carrier::NoneAnswers(names) => of(Saying::RunsHereNoProxy).with("names", names.to_vec()),
        Carrier::Proxy(name) => of(Saying::RunsByProxy).with("name", *name),
    }
}

#[cfg(test)]
mod tests {
    use jiff::{Timestamp, tz::TimeZone};

    use super::*;

    /// Everything that can be waited for; a new one does not compile before it is here.
    fn waits() -> Vec<Why> {
        let (host, until) = ("h1".to_owned(), Timestamp::UNIX_EPOCH);
        let all = vec![
            Why::Backoff { until },
            Why::Window { opens: Some(until) },
            Why::Window { opens: None },
            Why::OtherPolicy("gold".into()),
            Why::NoHost,
            Why::Host(host.clone(), HostState::Down),
            Why::Host(host.clone(), HostState::Unknown),
            Why::Total(2),
            Why::HostLimit(host.clone(), 2),
            Why::StorageLimit("/srv".into(), 2),
            Why::RepositoryLimit("main".into(), 2),
            Why::HostGap { host, until },
        ];
        all.into_iter().chain(Operation::ALL.map(Why::Busy)).collect()
    }

    fn states() -> Vec<State> {
        let due = Timestamp::UNIX_EPOCH;
        let lefts = [LeftOut::TooLate, LeftOut::Missed, LeftOut::Failed(1), LeftOut::Failed(3), LeftOut::Cancelled];
        let causes = [Cause::Scheduled, Cause::CaughtUp, Cause::Retry, Cause::Resumed];
        let mut all = vec![
            State::Paused,
            State::Running { since: due },
            State::Idle { next: Some(due), left_out: None },
            State::Idle { next: None, left_out: None },
        ];
        all.extend(lefts.map(|why| State::Idle { next: None, left_out: Some((due, why)) }));
        all.extend(causes.map(|cause| State::Starts { due, attempt: 2, cause }));
        all.extend(waits().into_iter().map(|why| State::Waits { due, why }));
        all
    }

    #[test]
    fn whatever_is_decided_can_be_said_in_every_language() {
        let rule: virtward_model::select::Rule = "name:web*".parse().unwrap();
        let names = ["h2".to_owned(), "h3".to_owned()];
        let selections = [
            Selection::Selected(vec![&rule, &rule]),
            Selection::Excluded(&rule),
            Selection::Lacks(&rule),
            Selection::NoneHolds,
            Selection::Nothing,
        ];
        let carriers = [Carrier::Own, Carrier::OwnIsNamed, Carrier::NoneAnswers(&names), Carrier::Proxy("h2")];
        let (waits, states) = (waits(), states());
        let all = waits.iter().map(why).chain(states.iter().map(state));
        let all = all.chain(selections.iter().map(selection)).chain(carriers.iter().map(|one| carrier(one, "h1")));
        let all: Vec<Said> = all.collect();
        assert!(all.len() > 50);
        for said in all {
            assert_eq!(crate::web::cannot_say(&said), None, "{said:?}");
        }
    }

    #[test]
    fn what_differs_in_english_differs_in_other_languages() {
        let texts = |state: &State| (state.text(&TimeZone::UTC), serde_json::to_string(&super::state(state)).unwrap());
        let mut all: Vec<(String, String)> = states().iter().map(texts).collect();
        all.sort();
        all.dedup();
        let mut other: Vec<&String> = all.iter().map(|(_, said)| said).collect();
        other.sort();
        other.dedup();
        assert_eq!(all.len(), other.len());
    }
}
