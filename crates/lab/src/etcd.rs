//! An etcd for the lab: one member on each of the first three hosts, or a single one.

use std::{fs, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{
    host::HostRef,
    names::HostName,
    run::{run, wait_until},
    state::{Host, Lab, write_atomically},
};

/// The hosts that get a member, given how many there are: an even number of voters is worth less than one fewer.
pub fn members(hosts: u8) -> Vec<HostName> {
    (1..=if hosts >= 3 { 3 } else { 1 }).map(HostName::numbered).collect()
}

/// Where clients reach the members.
pub fn endpoints(lab: &Lab) -> Vec<String> {
    member_hosts(lab).map(|h| format!("http://{}:2379", h.address)).collect()
}

fn member_hosts(lab: &Lab) -> impl Iterator<Item = &Host> {
    lab.hosts.iter().filter(|h| lab.etcd.contains(&h.name))
}

/// Starts a host's member in the background. Its data are on the host's disk and outlive a power cut.
pub fn start_member(at: HostRef<'_>) -> Result<()> {
    let (name, address) = (at.host.name.as_str(), &at.host.address);
    let dir = at.lab.host_var_dir(at.host).join("etcd");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let log = fs::File::create(at.lab.host_var_dir(at.host).join("log/etcd.log")).context("cannot create etcd.log")?;
    let cluster: Vec<String> = member_hosts(at.lab).map(|h| format!("{}=http://{}:2380", h.name, h.address)).collect();
    let mut command = at.command("setsid")?;
    command
        .args(["etcd", "--name", name, "--data-dir"])
        .arg(&dir)
        .args(["--listen-peer-urls", &format!("http://{address}:2380")])
        .args(["--initial-advertise-peer-urls", &format!("http://{address}:2380")])
        .args(["--listen-client-urls", &format!("http://{address}:2379,http://127.0.0.1:2379")])
        .args(["--advertise-client-urls", &format!("http://{address}:2379")])
        .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"])
        .args(["--initial-cluster-token", &format!("virtward-lab-{}", at.lab.name)])
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot use etcd.log")?)
        .stderr(log);
    let child = command.spawn().context("cannot run nsenter")?;
    write_atomically(&at.lab.host_run_dir(at.host).join("etcd.pid"), child.id().to_string().as_bytes())
}

/// Waits until the members elected a leader and serve.
pub fn wait_ready(lab: &Lab) -> Result<()> {
    let endpoints = endpoints(lab).join(",");
    let args = [
        "ETCDCTL_API=3",
        "etcdctl",
        "--endpoints",
        &endpoints,
        "--dial-timeout=1s",
        "--command-timeout=2s",
        "endpoint",
        "health",
    ];
    let mut last = None;
    if !wait_until(Duration::from_secs(30), || run("env", &args).map_err(|e| last = Some(e)).is_ok()) {
        let reason = last.map_or_else(String::new, |e| format!("{e:#}"));
        bail!("etcd does not come up (see {}/h*/log/etcd.log): {reason}", Lab::var_dir(&lab.name).display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_has_an_odd_number_of_members() {
        for (hosts, expected) in [(1, 1), (2, 1), (3, 3), (5, 3)] {
            assert_eq!(members(hosts).len(), expected, "{hosts} hosts");
        }
    }
}
