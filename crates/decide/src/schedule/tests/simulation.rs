//! Whole days of planning, minute by minute, with backups that take time, fail, and are interrupted. Every plan goes by
//! the linter; in the end nobody may have been forgotten or served twice.

use std::collections::BTreeSet;

use proptest::prelude::*;
use virtward_model::policy::Retries;

use super::*;

/// A small generator, so that a seed is a whole history.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % sides
    }
}

struct Simulation {
    input: ScheduleInput,
    dice: Dice,
    /// Ends of running jobs, with the start that each came from.
    ends: Vec<(Timestamp, Start)>,
    /// VM, policy, the time served.
    good: Vec<(Uuid, String, Timestamp)>,
    failures_percent: u64,
    longest_min: u64,
}

impl Simulation {
    fn tick(&mut self, now: Timestamp) {
        let (ended, running) = std::mem::take(&mut self.ends).into_iter().partition(|(end, _)| *end <= now);
        self.ends = running;
        let ended: Vec<(Timestamp, Start)> = ended;
        for (end, start) in ended {
            let place = self.input.running.iter().position(|job| job.vm == start.vm).unwrap();
            let job = self.input.running.remove(place);
            let outcome = match self.dice.roll(100) {
                roll if roll < self.failures_percent => Outcome::Failed,
                roll if roll < self.failures_percent + 3 => Outcome::Interrupted,
                _ => Outcome::Succeeded,
            };
            let history = self.input.history.entry(start.vm).or_default().entry(start.policy.clone()).or_default();
            if outcome == Outcome::Succeeded {
                history.newest = Some(job.started);
                self.good.push((start.vm, start.policy.clone(), start.due));
            }
            let number = start.attempt;
            history.last = Some(Attempt { due: start.due, started: job.started, ended: end, number, outcome });
        }
        let (starts, report) = plan(&self.input, now);
        assert_eq!(lint::check(&self.input, now, &starts, &report), Vec::<String>::new(), "at {now}");
        for start in starts {
            let vm = self.input.vms.iter().find(|vm| vm.uuid == start.vm).unwrap();
            let policy = self.input.policies.iter().find(|policy| policy.policy().name == start.policy).unwrap();
            self.input.running.push(Job {
                vm: start.vm,
                policy: Some(start.policy.clone()),
                host: start.host.clone(),
                proxies: start.proxy.clone().into_iter().collect(),
                storages: vm.storages.clone(),
                repository: policy.policy().repository.clone(),
                started: now,
            });
            let length = 1 + self.dice.roll(self.longest_min);
            self.ends.push((now + minutes(i64::try_from(length).unwrap()), start));
        }
    }
}

/// A fortnight about both changes of clocks: every VM has one good run for each night of its zone, no more and no less.
#[test]
fn every_night_once_also_when_clocks_change() {
    for (from, nights) in [("2026-03-22T12:00:00Z", 10_i64), ("2026-10-18T12:00:00Z", 10)] {
        let nightly = policy("nightly", "30 2 * * *", |policy| {
            policy.schedule.time_zone = "Europe/Berlin".into();
            policy.schedule.jitter = Seconds::minutes(20);
            policy.retries.count = 9;
        });
        let mut input = world(&["h1/a", "h1/b", "h2/c", "h2/d"], vec![nightly]);
        input.vms.iter_mut().for_each(|vm| vm.first_seen = at(from));
        let mut simulation = Simulation {
            input,
            dice: Dice(7),
            ends: Vec::new(),
            good: Vec::new(),
            failures_percent: 20,
            longest_min: 30,
        };
        let zone = TimeZoneDatabase::bundled().get("Europe/Berlin").unwrap();
        for minute in 0..nights * 24 * 60 {
            simulation.tick(at(from) + minutes(minute));
        }
        let mut served: Vec<(Uuid, jiff::civil::Date)> =
            simulation.good.iter().map(|(vm, _, due)| (*vm, due.to_zoned(zone.clone()).date())).collect();
        served.sort_unstable();
        let once: BTreeSet<_> = served.iter().copied().collect();
        assert_eq!(once.len(), served.len(), "a night was served twice");
        assert_eq!(once.len(), 4 * usize::try_from(nights).unwrap(), "a night was forgotten");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Tight limits, several policies, failures: whatever the history, every plan is sound and nobody starves.
    #[test]
    fn every_plan_is_sound_and_nobody_is_forgotten(
        seed in any::<u64>(),
        total in 2_u32..8,
        per_host in 1_u32..4,
        per_storage in 1_u32..6,
        failures_percent in 0_u64..25,
        gap in prop::sample::select(vec![0_u64, 20, 90]),
        proxies in prop::sample::subsequence(vec!["b1", "b2", "h3", "away"], 0..4),
    ) {
        let window = virtward_model::policy::Window {
            start: "20:00".parse().unwrap(),
            end: "11:00".parse().unwrap(),
            days: Vec::new(),
        };
        let policies = vec![
            policy("nightly", "0 21 * * *", |policy| {
                policy.schedule.window = Some(window);
                policy.schedule.jitter = Seconds::minutes(40);
                policy.retries = Retries { count: 20, backoff: Seconds(10) };
                policy.proxy = proxies.iter().map(|name| (*name).to_owned()).collect();
            }),
            policy("databases", "15 */2 * * *", |policy| {
                policy.priority = 5;
                policy.repository = "other".into();
                policy.select.any = vec!["name:db*".parse().unwrap()];
                policy.schedule.max_lateness = Some(Seconds::hours(1));
            }),
        ];
        let vms = ["h1/db1", "h1/a", "h1/b", "h2/db2", "h2/c", "h3/d", "h3/e", "h3/f"];
        let mut input = world(&vms, policies);
        let from = at("2026-02-01T12:00:00Z");
        input.vms.iter_mut().for_each(|vm| vm.first_seen = from);
        input.scheduling_since = from;
        input.daemons = ["h1", "h2", "h3", "b1", "b2"].map(str::to_owned).into();
        input.limits = Limits {
            total,
            per_host: Limit::each(per_host),
            per_storage: Limit::each(per_storage),
            per_repository: Limit::each(4),
            host_gap: Seconds(gap),
        };
        let mut simulation =
            Simulation { input, dice: Dice(seed), ends: Vec::new(), good: Vec::new(), failures_percent, longest_min: 25 };
        for minute in 0..48 * 60 {
            simulation.tick(from + minutes(minute));
        }
        let nights: BTreeSet<_> = simulation.good.iter().filter(|(_, policy, _)| policy == "nightly").collect();
        let runs = simulation.good.iter().filter(|(_, policy, _)| policy == "nightly").count();
        prop_assert_eq!(runs, nights.len(), "served twice");
        prop_assert_eq!(runs, 2 * vms.len(), "forgotten");
    }

    /// The order in which VMs are listed does not matter, nor does planning the same twice.
    #[test]
    fn the_same_facts_give_the_same_plan(seed in any::<u64>(), minute in 0_i64..180) {
        let policies = vec![policy("a", "0 * * * *", |_| {}), policy("b", "*/20 * * * *", |policy| {
            policy.priority = 1;
            policy.proxy = vec!["b1".into(), "b2".into()];
        })];
        let mut input = world(&["h1/a", "h1/b", "h2/c", "h2/d", "h3/e", "h3/f"], policies);
        input.limits.total = 3;
        input.daemons = ["b1", "b2"].map(str::to_owned).into();
        let now = at("2026-02-01T12:00:00Z") + minutes(minute);
        let (starts, _) = plan(&input, now);
        let mut dice = Dice(seed);
        for last in (1..input.vms.len()).rev() {
            let other = usize::try_from(dice.roll(last as u64 + 1)).unwrap();
            input.vms.swap(last, other);
        }
        prop_assert_eq!(plan(&input, now).0, starts);
    }
}
