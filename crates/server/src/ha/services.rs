//! Watched services: between the API and the records.

use virtward_api::{Code, HaService, Problem};
use virtward_decide::ha::probe::{ProbePolicy, Restart, Rung, Step, Watched};
use virtward_engine::ha::probe::Target;

use crate::failures::Result;

/// Services that one VM may have watched.
const SERVICES_MAX: usize = 32;
/// Longest times that make sense, in seconds.
const TIME_S_MAX: u64 = 86_400;
const EVERY_S: u64 = 10;
const GRACE_S: u64 = 60;

fn invalid(text: String) -> Problem {
    Problem::new(Code::Invalid, text)
}

fn ms(what: &str, seconds: u64, least: u64) -> Result<u64> {
    if !(least..=TIME_S_MAX).contains(&seconds) {
        return Err(invalid(format!("{what} = {seconds}: from {least} to {TIME_S_MAX} seconds")));
    }
    Ok(seconds * 1000)
}

/// As records have them.
pub(super) fn read(wanted: &[HaService]) -> Result<Vec<Watched>> {
    if wanted.len() > SERVICES_MAX {
        return Err(invalid(format!("{} services; at most {SERVICES_MAX} are watched", wanted.len())));
    }
    wanted.iter().map(one).collect()
}

fn one(wanted: &HaService) -> Result<Watched> {
    Target::parse(&wanted.check).map_err(invalid)?;
    let restart = match (&wanted.restart_unit, &wanted.restart_command) {
        (None, None) => None,
        (Some(unit), None) => {
            Target::parse(&format!("unit:{unit}")).map_err(|_| invalid(format!("{unit:?} is no name of a unit")))?;
            Some(Restart::Unit(unit.clone()))
        }
        (None, Some(command)) => match command.first() {
            Some(program) if program.starts_with('/') => Some(Restart::Command(command.clone())),
            _ => return Err(invalid("restart_command: give the program by its whole path".into())),
        },
        (Some(_), Some(_)) => return Err(invalid("restart_unit or restart_command, not both".into())),
    };
    let mut policy = ProbePolicy::default();
    if let Some(failures) = wanted.failures {
        if !(1..=1000).contains(&failures) {
            return Err(invalid(format!("failures = {failures}: from 1 to 1000")));
        }
        policy.failures = failures;
    }
    if let Some(actions) = &wanted.actions {
        policy.steps = actions.iter().map(|action| step(&policy, action)).collect::<Result<_>>()?;
    }
    if let Some(grace_s) = wanted.grace_s {
        let grace_ms = ms("grace_s", grace_s, 0)?;
        policy.steps.iter_mut().for_each(|step| step.grace_ms = grace_ms);
    }
    Ok(Watched {
        check: wanted.check.clone(),
        every_ms: ms("every_s", wanted.every_s.unwrap_or(EVERY_S), 1)?,
        grace_ms: ms("grace_s", wanted.grace_s.unwrap_or(GRACE_S), 0)?,
        restart,
        policy,
    })
}

fn step(of: &ProbePolicy, action: &str) -> Result<Step> {
    let known = ProbePolicy::default().steps;
    known.into_iter().chain(of.steps.iter().cloned()).find(|step| name(step.action) == action).ok_or_else(|| {
        invalid(format!("{action:?} is no action: restart-service, restart-vm, relocate or switch-to-standby"))
    })
}

fn name(rung: Rung) -> &'static str {
    match rung {
        Rung::RestartService => "restart-service",
        Rung::RestartVm => "restart-vm",
        Rung::Relocate => "relocate",
        Rung::SwitchToStandby => "switch-to-standby",
    }
}

/// As the API shows them.
pub(super) fn show(services: &[Watched]) -> Vec<HaService> {
    let one = |watched: &Watched| {
        let (restart_unit, restart_command) = match &watched.restart {
            None => (None, None),
            Some(Restart::Unit(unit)) => (Some(unit.clone()), None),
            Some(Restart::Command(command)) => (None, Some(command.clone())),
        };
        HaService {
            check: watched.check.clone(),
            every_s: Some(watched.every_ms / 1000),
            failures: Some(watched.policy.failures),
            grace_s: Some(watched.grace_ms / 1000),
            restart_unit,
            restart_command,
            actions: Some(watched.policy.steps.iter().map(|step| name(step.action).to_owned()).collect()),
        }
    };
    services.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(check: &str) -> HaService {
        HaService { check: check.into(), ..HaService::default() }
    }

    #[test]
    fn what_is_written_is_shown_as_it_was_and_mistakes_are_named() {
        let whole = HaService {
            every_s: Some(2),
            failures: Some(2),
            grace_s: Some(15),
            restart_command: Some(vec!["/bin/true".into()]),
            actions: Some(vec!["restart-service".into(), "relocate".into()]),
            ..service("tcp://10.0.0.5:80")
        };
        let one = std::slice::from_ref(&whole);
        assert_eq!(show(&read(one).unwrap()), one);
        for (wrong, word) in [
            (service("10.0.0.5:80"), "tcp://HOST:PORT"),
            (HaService { every_s: Some(0), ..whole.clone() }, "every_s"),
            (HaService { failures: Some(0), ..whole.clone() }, "failures"),
            (HaService { restart_unit: Some("nginx".into()), ..whole.clone() }, "not both"),
            (HaService { restart_command: Some(vec!["true".into()]), ..whole.clone() }, "whole path"),
            (HaService { actions: Some(vec!["explode".into()]), ..whole }, "is no action"),
        ] {
            let problem = read(&[wrong]).expect_err(word);
            assert!(problem.detail.contains(word), "{}", problem.detail);
        }
    }
}
