//! Planning by example, by property, and over simulated days. Here: worlds to plan for.

mod cases;
mod simulation;

use jiff::{SignedDuration, tz::TimeZoneDatabase};
use virtward_model::{Policy, Retention, select::Select};

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn minutes(count: i64) -> SignedDuration {
    SignedDuration::from_mins(count)
}

/// A policy for every VM, with some fields changed.
fn policy(name: &str, cron: &str, change: impl FnOnce(&mut Policy)) -> Compiled {
    let mut policy = Policy {
        name: name.into(),
        repository: "main".into(),
        select: Select { any: vec!["name:*".parse().unwrap()], ..Select::default() },
        retention: Retention { daily: 7, ..Retention::default() },
        ..Policy::default()
    };
    policy.schedule.cron = vec![cron.into()];
    policy.schedule.time_zone = "UTC".into();
    change(&mut policy);
    Compiled::new(policy, at("2026-01-01T00:00:00Z"), &TimeZoneDatabase::bundled()).unwrap()
}

/// `host/name` for each VM; every VM has a disk on the storage `nfs`.
fn world(vms: &[&str], policies: Vec<Compiled>) -> ScheduleInput {
    let vms: Vec<VmFacts> = (1_u128..)
        .zip(vms)
        .map(|(number, vm)| {
            let (host, name) = vm.split_once('/').unwrap();
            VmFacts {
                uuid: Uuid::from_u128(number),
                name: name.into(),
                host: Some(host.into()),
                storages: vec!["nfs".into()],
                first_seen: at("2026-01-01T00:00:00Z"),
                ..VmFacts::default()
            }
        })
        .collect();
    let hosts = vms.iter().filter_map(|vm| vm.host.clone()).map(|host| (host, HostState::Up)).collect();
    ScheduleInput { policies, vms, hosts, scheduling_since: at("2026-01-01T00:00:00Z"), ..ScheduleInput::default() }
}

impl ScheduleInput {
    fn uuid(&self, name: &str) -> Uuid {
        self.vms.iter().find(|vm| vm.name == name).unwrap().uuid
    }

    /// Plans, has the plan checked, and gives `name policy` of the starts.
    fn starts(&self, now: &str) -> Vec<String> {
        let (starts, report) = plan(self, at(now));
        assert_eq!(lint::check(self, at(now), &starts, &report), Vec::<String>::new());
        let name = |uuid| self.vms.iter().find(|vm| vm.uuid == uuid).unwrap().name.clone();
        starts.iter().map(|start| format!("{} {}", name(start.vm), start.policy)).collect()
    }

    /// What the report says of a VM and a policy, in UTC.
    fn says(&self, now: &str, vm: &str, policy: &str) -> String {
        let (_, report) = plan(self, at(now));
        let number = self.policies.iter().position(|compiled| compiled.policy().name == policy).unwrap();
        let line = report.lines.iter().find(|line| line.vm == self.uuid(vm) && line.policy == number);
        line.unwrap().state.text(&jiff::tz::TimeZone::UTC)
    }

    fn job(&mut self, vm: &str, policy: &str, started: &str) {
        let facts = self.vms.iter().find(|facts| facts.name == vm).unwrap();
        self.running.push(Job {
            vm: facts.uuid,
            policy: Some(policy.into()),
            host: facts.host.clone().unwrap(),
            proxies: Vec::new(),
            storages: facts.storages.clone(),
            repository: "main".into(),
            started: at(started),
        });
    }

    /// A run of three minutes that ended.
    fn ran(&mut self, vm: &str, policy: &str, due: &str, started: &str, number: u32, outcome: Outcome) {
        let (uuid, started) = (self.uuid(vm), at(started));
        let history = self.history.entry(uuid).or_default().entry(policy.into()).or_default();
        if outcome == Outcome::Succeeded {
            history.newest = Some(started);
        }
        history.last = Some(Attempt { due: at(due), started, ended: started + minutes(3), number, outcome });
    }
}
