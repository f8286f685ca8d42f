//! Everything about one VM: which policies are for it and by which rule, what ran, what comes next, what is waited for.

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::Seconds;

use super::{Attempt, Carrier, Limit, Report, ScheduleInput, Selection, State, due::Current, proxy, select};

/// Everything about one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation<'a> {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub name: &'a str,
    /// Every policy, in the order of the input.
    pub policies: Vec<PolicyExplanation<'a>>,
}

/// One policy and the VM.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyExplanation<'a> {
    /// The policy.
    pub policy: &'a str,
    /// Whether it is for the VM, and why.
    pub selection: Selection<'a>,
    /// What is with it now; none if it is not for the VM.
    pub state: Option<&'a State>,
    /// Who does it, as things are, and why, for people; none if it is not for the VM, or nobody knows where that is.
    pub carrier: Option<Carrier<'a>>,
    /// When the schedule has the next run, jitter included; none if it is not for the VM, or paused.
    pub next: Option<Timestamp>,
    /// The last run that ended.
    pub last: Option<Attempt>,
    /// The instant that the newest restore point holds.
    pub newest: Option<Timestamp>,
    /// Age of the newest restore point, if it is beyond the objective.
    pub rpo_exceeded: Option<Seconds>,
}

/// Explains one VM by the report of a plan that was made of the same input at the same time.
pub fn explain<'a>(input: &'a ScheduleInput, now: Timestamp, report: &'a Report, vm: Uuid) -> Option<Explanation<'a>> {
    let facts = input.vms.iter().find(|facts| facts.uuid == vm)?;
    let histories = input.history.get(&vm);
    let policies = input.policies.iter().enumerate().map(|(number, compiled)| {
        let policy = compiled.policy();
        let history = histories.and_then(|histories| histories.get(&policy.name));
        let selection = select::judge(&policy.select, facts);
        let comes = selection.is_selected() && !policy.paused;
        let line = report.lines.iter().find(|line| line.vm == vm && line.policy == number);
        let breach = report.rpo.iter().find(|breach| breach.vm == vm && breach.policy == number);
        PolicyExplanation {
            policy: &policy.name,
            state: line.map(|line| &line.state),
            carrier: facts.host.as_deref().filter(|_| selection.is_selected()).and_then(|host| {
                // Which of several it would be, the room at that time decides.
                proxy::choose(host, &policy.proxy, &input.daemons, |_| 0, &Limit::each(1)).ok()
            }),
            next: comes.then(|| Current::new(compiled, now, input.scheduling_since).next(facts)).flatten(),
            last: history.and_then(|history| history.last),
            newest: history.and_then(|history| history.newest),
            rpo_exceeded: breach.map(|breach| breach.age),
            selection,
        }
    });
    Some(Explanation { vm, name: &facts.name, policies: policies.collect() })
}
