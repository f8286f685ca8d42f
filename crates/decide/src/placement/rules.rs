//! The file in which an administrator says what a survey cannot see: how important VMs are, what belongs together, what is
//! kept free for failures. TOML; VMs and hosts by name.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, de::Error as _};
use uuid::Uuid;
use virtward_model::{
    Bytes,
    world::{Failover, HostName, Limits, Mode, Overcommit, Priority, Resources, Rule, RuleKind, World},
};

/// A rules file, read but not yet applied.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rules {
    /// Failures that room is kept for.
    failover: Failures,
    /// How much more is given out than there is.
    overcommit: Given,
    /// By host name.
    hosts: BTreeMap<String, HostRules>,
    /// By VM name.
    vms: BTreeMap<String, VmRules>,
    /// What belongs together, and what apart.
    rule: Vec<Between>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Failures {
    failures: u32,
    domain_level: Option<usize>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Given {
    memory_percent: u32,
    memory_failover_percent: u32,
    cpu_percent: u32,
}

impl Default for Given {
    fn default() -> Self {
        let Overcommit { memory_percent, memory_failover_percent, cpu_percent } = Overcommit::default();
        Self { memory_percent, memory_failover_percent, cpu_percent }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct HostRules {
    fault_domain: Vec<String>,
    spare: bool,
    /// What the host keeps for itself: CPUs, and memory as in `4GiB`.
    reserved_cpus: Option<f64>,
    #[serde(deserialize_with = "size")]
    reserved_memory: Option<Bytes>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct VmRules {
    priority: Option<Priority>,
    shares: Option<u32>,
    mode: Option<Mode>,
    failover: bool,
    reserved_cpus: Option<f64>,
    limit_cpus: Option<f64>,
    replicas: BTreeSet<HostName>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Between {
    name: String,
    kind: Kind,
    #[serde(default = "yes")]
    must: bool,
    vms: Vec<String>,
    #[serde(default)]
    hosts: Vec<HostName>,
    level: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Together,
    Apart,
    ApartDomains,
    OnHosts,
    NotOnHosts,
}

fn size<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Bytes>, D::Error> {
    String::deserialize(input)?.parse().map(Some).map_err(|error| D::Error::custom(format!("{error}")))
}

fn yes() -> bool {
    true
}

/// Reads a rules file.
///
/// # Errors
/// What is wrong, with its line, for people.
pub fn parse(text: &str) -> Result<Rules, String> {
    let rules: Rules = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    for rule in &rules.rule {
        let hosts = matches!(rule.kind, Kind::OnHosts | Kind::NotOnHosts);
        if hosts == rule.hosts.is_empty() {
            let what = if hosts { "names no hosts" } else { "is not about hosts, and names some" };
            return Err(format!("rule {:?} {what}", rule.name));
        }
        if (rule.kind == Kind::ApartDomains) != rule.level.is_some() {
            return Err(format!("rule {:?}: a level belongs to apart-domains, and only there", rule.name));
        }
    }
    let numbers = rules.vms.values().flat_map(|vm| [vm.reserved_cpus, vm.limit_cpus]);
    let numbers = numbers.chain(rules.hosts.values().map(|host| host.reserved_cpus)).flatten();
    if let Some(bad) = numbers.into_iter().find(|cpus| !(0.0..=100_000.0).contains(cpus)) {
        return Err(format!("{bad} is no number of CPUs"));
    }
    Ok(rules)
}

fn milli(cpus: f64) -> u64 {
    (cpus * 1000.0).round() as u64
}

impl Rules {
    /// Puts the rules into a world. Names that are not in it are returned, for people: a VM that is off is no mistake, a
    /// name that was mistyped is one.
    pub fn apply(&self, world: &mut World) -> Vec<String> {
        let mut unknown = Vec::new();
        world.failover = Failover { failures: self.failover.failures, domain_level: self.failover.domain_level };
        world.overcommit = Overcommit {
            memory_percent: self.overcommit.memory_percent,
            memory_failover_percent: self.overcommit.memory_failover_percent.max(self.overcommit.memory_percent),
            cpu_percent: self.overcommit.cpu_percent,
        };
        for (name, rules) in &self.hosts {
            let Some(host) = world.hosts.iter_mut().find(|host| &host.name.0 == name) else {
                unknown.push(format!("host {name}"));
                continue;
            };
            host.fault_domain.clone_from(&rules.fault_domain);
            host.spare = rules.spare;
            host.reserved.cpu_milli = rules.reserved_cpus.map_or(host.reserved.cpu_milli, milli);
            host.reserved.memory = rules.reserved_memory.unwrap_or(host.reserved.memory);
        }
        for (name, rules) in &self.vms {
            let mut any = false;
            for vm in world.vms.iter_mut().filter(|vm| &vm.name == name) {
                any = true;
                vm.priority = rules.priority.unwrap_or(vm.priority);
                vm.shares = rules.shares.unwrap_or(vm.shares);
                vm.mode = rules.mode.or(vm.mode);
                vm.failover |= rules.failover;
                let reserved = rules.reserved_cpus.map_or(vm.reservation.cpu_milli, milli);
                vm.reservation = Resources { cpu_milli: reserved, ..vm.reservation };
                vm.limits = Limits { cpu_milli: rules.limit_cpus.map(milli).or(vm.limits.cpu_milli), ..vm.limits };
                vm.replicas.extend(rules.replicas.iter().cloned());
            }
            if !any {
                unknown.push(format!("VM {name}"));
            }
        }
        for rule in &self.rule {
            self.relate(world, rule, &mut unknown);
        }
        unknown
    }

    fn relate(&self, world: &mut World, rule: &Between, unknown: &mut Vec<String>) {
        let mut vms: Vec<Uuid> = Vec::new();
        for name in &rule.vms {
            match world.vms.iter().find(|vm| &vm.name == name) {
                Some(vm) => vms.push(vm.id),
                None => unknown.push(format!("VM {name} in rule {}", rule.name)),
            }
        }
        let known = |host: &&HostName| world.hosts.iter().any(|have| have.name == **host);
        unknown.extend(rule.hosts.iter().filter(|h| !known(h)).map(|h| format!("host {h} in rule {}", rule.name)));
        let hosts = rule.hosts.iter().filter(known).cloned().collect();
        let kind = match rule.kind {
            Kind::Together => RuleKind::Together,
            Kind::Apart => RuleKind::Apart,
            Kind::ApartDomains => RuleKind::ApartDomains { level: rule.level.unwrap_or(0) },
            Kind::OnHosts => RuleKind::OnHosts { hosts },
            Kind::NotOnHosts => RuleKind::NotOnHosts { hosts },
        };
        world.rules.push(Rule { name: rule.name.clone(), must: rule.must, kind, vms });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtward_model::world;

    fn world() -> World {
        let size = Resources { cpu_milli: 1000, memory: Bytes(1 << 30), ..Resources::default() };
        let host = |name| world::Host::new(name, Resources { cpu_milli: 8000, ..size });
        let vm =
            |n, name: &str| world::Vm { host: Some("h1".into()), ..world::Vm::new(Uuid::from_u128(n), name, size) };
        World { hosts: vec![host("h1"), host("h2")], vms: vec![vm(1, "db1"), vm(2, "db2")], ..World::default() }
    }

    #[test]
    fn what_an_administrator_says_reaches_the_world_and_mistyped_names_are_told() {
        let text = r#"
            [failover]
            failures = 1
            [overcommit]
            memory-percent = 120
            [hosts.h2]
            spare = true
            fault-domain = ["rack-2"]
            reserved-memory = "4GiB"
            [vms.db1]
            priority = 1
            failover = true
            reserved-cpus = 0.5
            [vms.dbx]
            priority = 2
            [[rule]]
            name = "databases apart"
            kind = "apart"
            vms = ["db1", "db2", "db3"]
            [[rule]]
            name = "licence"
            kind = "on-hosts"
            hosts = ["h1", "h9"]
            vms = ["db1"]
            must = false
        "#;
        let mut world = world();
        let unknown = parse(text).unwrap().apply(&mut world);
        assert_eq!(unknown, ["VM dbx", "VM db3 in rule databases apart", "host h9 in rule licence"]);
        assert_eq!((world.failover.failures, world.overcommit.memory_failover_percent), (1, 120));
        assert!(world.hosts[1].spare && world.hosts[1].reserved.memory == Bytes(4 << 30));
        assert_eq!((world.vms[0].priority.level(), world.vms[0].reservation.cpu_milli), (1, 500));
        assert!(world.rules[0].must && !world.rules[1].must);
        assert_eq!(world.rules[1].kind, RuleKind::OnHosts { hosts: vec!["h1".into()] });
        world.check().unwrap();
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_or_its_rule() {
        for (text, words) in [
            ("[failover]\nfailure = 1", "line 2"),
            ("[vms.a]\npriority = 9", "priority 9"),
            ("[vms.a]\nreserved-cpus = -1.0", "no number of CPUs"),
            ("[[rule]]\nname = \"r\"\nkind = \"on-hosts\"\nvms = []", "names no hosts"),
            ("[[rule]]\nname = \"r\"\nkind = \"apart\"\nvms = []\nlevel = 1", "apart-domains"),
            ("[[rule]]\nname = \"r\"\nkind = \"nearby\"\nvms = []", "nearby"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
