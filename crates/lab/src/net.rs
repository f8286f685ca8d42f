//! The lab's network: a bridge on the machine, a namespace and a link per host, partitions and rate limits.
//!
//! Every link on the machine carries the alias `virtward-lab:NAME`, so that `down` finds it without any state file.
//! Inside a host, `br0` has the address and the uplink `eth0`; guests are put on `br0`, as on a real host. Partitions
//! act on what the host itself sends and receives, not on what its guests do.

use std::{collections::BTreeSet, fmt::Write, fs, net::Ipv4Addr, path::Path, str::FromStr};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{
    names::LabName,
    proc::netns_path,
    run::{run, run_with_input},
    state::{Fault, Host, Lab, netns_prefix},
};

/// The network of lab number `index`.
pub fn subnet(index: u8) -> String {
    format!("10.167.{index}")
}

/// The first number whose network and interface names are free, given what the machine has.
pub fn free_index(links: &BTreeSet<String>, routes: &[(Ipv4Addr, u8)]) -> Option<u8> {
    (1..=250).find(|&index| {
        let bridge = format!("vwlab{index}");
        let named =
            links.iter().any(|l| l.strip_prefix(&bridge).is_some_and(|rest| rest.is_empty() || rest.starts_with('h')));
        !named && !routes.iter().any(|&(net, len)| overlaps(net, len, Ipv4Addr::new(10, 167, index, 0), 24))
    })
}

fn overlaps(a: Ipv4Addr, a_len: u8, b: Ipv4Addr, b_len: u8) -> bool {
    let shared = a_len.min(b_len).min(32);
    let mask = if shared == 0 { 0 } else { u32::MAX << (32 - shared) };
    u32::from(a) & mask == u32::from(b) & mask
}

#[derive(Deserialize)]
struct Link {
    ifname: String,
    #[serde(default)]
    ifalias: String,
}

#[derive(Deserialize)]
struct Route {
    dst: String,
}

fn links() -> Result<Vec<Link>> {
    serde_json::from_str(&run("ip", &["-j", "link"])?).context("cannot read the output of ip -j link")
}

/// Chooses a network that nothing on this machine uses. Hold the machine's lock until the bridge exists.
pub fn choose_index() -> Result<u8> {
    let names = links()?.into_iter().map(|l| l.ifname).collect();
    let table = run("ip", &["-j", "-4", "route", "show", "table", "all"])?;
    let routes: Vec<Route> = serde_json::from_str(&table).context("cannot read the output of ip -j route")?;
    // A default route covers everything and forbids nothing.
    let routes: Vec<_> = routes.iter().filter_map(|r| parse_route(&r.dst)).filter(|&(_, len)| len > 0).collect();
    free_index(&names, &routes).context("every network 10.167.1.0/24 to 10.167.250.0/24 is in use on this machine")
}

fn parse_route(dst: &str) -> Option<(Ipv4Addr, u8)> {
    match dst.split_once('/') {
        Some((net, len)) => Some((net.parse().ok()?, len.parse().ok()?)),
        None => Some((dst.parse().ok()?, 32)),
    }
}

/// Creates the bridge, with the machine itself at address 1.
pub fn create_bridge(lab: &Lab) -> Result<()> {
    let (bridge, net) = (lab.bridge(), subnet(lab.index));
    ip_batch(
        None,
        &format!(
            "link add {bridge} type bridge forward_delay 0\n\
             link set {bridge} alias {alias}\n\
             addr add {net}.1/24 dev {bridge}\n\
             link set {bridge} up\n",
            alias = alias(&lab.name),
        ),
    )
}

/// Creates a host's namespace and its link to the bridge.
pub fn create_host(lab: &Lab, host: &Host) -> Result<()> {
    let (netns, port, bridge) = (lab.netns(host), lab.port(host), lab.bridge());
    ip_batch(
        None,
        &format!(
            "netns add {netns}\n\
             link add {port} type veth peer name eth0 netns {netns}\n\
             link set {port} alias {alias}\n\
             link set {port} master {bridge}\n\
             link set {port} up\n",
            alias = alias(&lab.name),
        ),
    )?;
    ip_batch(
        Some(&netns),
        &format!(
            "link set lo up\n\
             link add br0 address {mac} type bridge forward_delay 0\n\
             link set eth0 master br0\n\
             link set eth0 up\n\
             addr add {address}/24 dev br0\n\
             link set br0 up\n\
             route add default via {net}.1\n",
            address = host.address,
            net = subnet(lab.index),
            // Its own: a bridge without one takes the lowest of its ports, which may be that of a guest's interface, and such
            // a guest that migrates takes the host's address along.
            mac = bridge_mac(lab, host),
        ),
    )
}

/// The address of a host's bridge on the network below IP.
fn bridge_mac(lab: &Lab, host: &Host) -> String {
    let last: u8 = host.address.rsplit('.').next().and_then(|last| last.parse().ok()).unwrap_or_default();
    format!("02:76:77:00:{:02x}:{last:02x}", lab.index)
}

/// Plugs a host's cable in or out.
pub fn set_port(lab: &Lab, host: &Host, up: bool) -> Result<()> {
    run("ip", &["link", "set", &lab.port(host), if up { "up" } else { "down" }]).map(drop)
}

/// Removes every link and namespace of a lab, by what they are called, whatever the state file says.
pub fn remove_all(name: &LabName) -> Result<()> {
    for link in links()? {
        if link.ifalias == alias(name) {
            let removed = run("ip", &["link", "del", &link.ifname]);
            // A veth end goes with its other end, which may have been removed a moment ago.
            removed.map(drop).or_else(|e| if exists(&link.ifname) { Err(e) } else { Ok(()) })?;
        }
    }
    for netns in namespaces(name) {
        run("ip", &["netns", "del", &netns])?;
    }
    Ok(())
}

fn exists(link: &str) -> bool {
    Path::new("/sys/class/net").join(link).exists()
}

/// The network namespaces of a lab.
pub fn namespaces(name: &LabName) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Vec::new() };
    let prefix = netns_prefix(name);
    entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&prefix)).collect()
}

/// Makes the filters of every host match the partitions in the state.
pub fn apply_faults(lab: &Lab) -> Result<()> {
    for host in &lab.hosts {
        let netns = netns_path(&lab.netns(host));
        run_with_input("nsenter", &[&format!("--net={}", netns.display()), "nft", "-f", "-"], &ruleset(lab, host))?;
    }
    Ok(())
}

/// The filter of one host. Only the host that a partition names needs rules: both directions pass through it.
fn ruleset(lab: &Lab, host: &Host) -> String {
    let mut sent = String::new();
    let mut heard = String::new();
    for Fault { from, one_way, .. } in lab.faults.iter().filter(|f| f.host == host.name) {
        let peer = from.as_ref().and_then(|name| lab.host(name).ok());
        let (to, by) = match peer {
            Some(peer) => (format!("ip daddr {}", peer.address), format!("ip saddr {}", peer.address)),
            None => ("oifname != \"lo\"".to_owned(), "iifname != \"lo\"".to_owned()),
        };
        let _ = write!(sent, "{to} drop; ");
        if !one_way {
            let _ = write!(heard, "{by} drop; ");
        }
    }
    format!(
        "table inet virtward_lab\n\
         delete table inet virtward_lab\n\
         table inet virtward_lab {{\n\
         chain sent {{ type filter hook output priority 0; {sent} }}\n\
         chain heard {{ type filter hook input priority 0; {heard} }}\n\
         }}\n"
    )
}

/// A bandwidth as tc writes it, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rate(pub Option<String>);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let positive = number.len() <= 9 && number.parse::<u32>().is_ok_and(|n| n > 0);
        if positive && ["bit", "kbit", "mbit", "gbit"].contains(&unit) {
            Ok(Self(Some(text.to_owned())))
        } else {
            Err(format!("{text:?} is not a rate; write one such as 100mbit or 1gbit, or none"))
        }
    }
}

/// Limits both directions of a host's link, or lifts the limit.
pub fn limit(lab: &Lab, host: &Host, rate: &Rate) -> Result<()> {
    let (netns, port) = (lab.netns(host), lab.port(host));
    for prefix in [&["-n", &netns, "qdisc"][..], &["qdisc"][..]] {
        let device = if prefix.len() == 1 { port.as_str() } else { "eth0" };
        let call = |rest: &[&str]| run("tc", &[prefix, rest].concat());
        match &rate.0 {
            // A burst that holds a large segment at any rate; 50 ms of queue, as a switch port has.
            Some(rate) => {
                call(&["replace", "dev", device, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])
                    .map(drop)?
            }
            None => {
                if call(&["show", "dev", device])?.contains("tbf") {
                    call(&["del", "dev", device, "root"])?;
                }
            }
        }
    }
    Ok(())
}

fn alias(name: &LabName) -> String {
    format!("virtward-lab:{name}")
}

fn ip_batch(netns: Option<&str>, commands: &str) -> Result<()> {
    let mut args = netns.map_or(vec![], |n| vec!["-n", n]);
    args.extend(["-batch", "-"]);
    match run_with_input("ip", &args, commands) {
        Ok(_) => Ok(()),
        Err(e) => bail!("{e:#} (in the commands: {})", commands.trim().replace('\n', "; ")),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::names::HostName;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn labs_get_distinct_networks_that_nothing_else_uses() {
        assert_eq!(free_index(&set(&["lo", "eth0"]), &[]), Some(1));
        assert_eq!(free_index(&set(&["vwlab1", "vwlab1h1"]), &[]), Some(2));
        // A port that a crash left without its bridge blocks its number; a longer number does not.
        assert_eq!(free_index(&set(&["vwlab1h2"]), &[]), Some(2));
        assert_eq!(free_index(&set(&["vwlab12"]), &[]), Some(1));
        assert_eq!(free_index(&set(&[]), &[(Ipv4Addr::new(10, 167, 1, 128), 25)]), Some(2));
        assert_eq!(free_index(&set(&[]), &[(Ipv4Addr::new(10, 167, 0, 0), 20)]), Some(16));
        assert_eq!(free_index(&set(&[]), &[(Ipv4Addr::new(10, 0, 0, 0), 8)]), None);
        assert_eq!(free_index(&set(&[]), &[(Ipv4Addr::new(192, 168, 0, 0), 16)]), Some(1));
    }

    #[test]
    fn rates_parse() {
        assert_eq!("100mbit".parse(), Ok(Rate(Some("100mbit".into()))));
        assert_eq!("none".parse(), Ok(Rate(None)));
        for bad in ["", "100", "0mbit", "-1mbit", "100mb", "1e9bit", "100mbit; reboot"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_partition_filters_at_the_host_it_names_only() {
        let host = |n: u8| Host {
            name: HostName::numbered(n),
            address: format!("10.167.1.{}", 10 + n),
            uuid: Uuid::nil(),
            rate_limit: None,
        };
        let fault = Fault { host: HostName::numbered(1), from: Some(HostName::numbered(2)), one_way: true };
        let lab = Lab {
            name: "t".parse().unwrap(),
            index: 1,
            hosts: vec![host(1), host(2)],
            etcd: vec![],
            root: None,
            faults: vec![fault],
            daemon: None,
            complete: true,
        };
        let rules = ruleset(&lab, &lab.hosts[0]);
        assert!(rules.contains("ip daddr 10.167.1.12 drop") && !rules.contains("saddr"), "{rules}");
        assert!(!ruleset(&lab, &lab.hosts[1]).contains("drop"));
    }
}
