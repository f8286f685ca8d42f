//! Reads hosts into a [`World`]: what they have, what runs there, what it uses, and which host could run what.
//!
//! What a VM requires of a host is told in labels: `image:PATH` for each disk, which a host offers that sees the file;
//! `network:NAME` and `link:NAME` for what its interfaces are plugged into. The checks before a migration look closer (CPU,
//! machine type, the same file and not only one of the same name); a survey is for deciding, and cheap.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;
use virtward_hypervisor::{DomainStats, Hypervisor, JobKind};
use virtward_model::{
    Bytes, DiskSource, HostOffer, Link, Machine,
    world::{FORMAT, Host, HostName, HostState, Resources, Stuck, Vm, World},
};

use crate::{Error, Result};

/// What is kept of a host's memory for the host itself: a sixteenth, and half a gibibyte at least, but never more than a
/// quarter.
const HOST_MEMORY_PARTS: u64 = 16;
const HOST_MEMORY_MIN: u64 = 512 << 20;

/// A host that is surveyed.
#[derive(Clone)]
pub struct Surveyed {
    /// As this process reaches it.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Takes no VMs, and why.
    pub closed: Option<String>,
    /// Its VMs that are off are listed, too: they take nothing, and have a definition that can move.
    pub with_inactive: bool,
}

/// One host's answers.
struct Seen {
    offer: HostOffer,
    vms: Vec<(virtward_model::Vm, Machine, Option<JobKind>)>,
    before: (Instant, Vec<DomainStats>),
    after: (Instant, Vec<DomainStats>),
}

/// Reads all hosts, with what their VMs used during `interval`. VMs that are off are left out, if not asked for: they take
/// nothing. A VM that is arriving somewhere is listed where it runs, and its memory is kept for it where it arrives.
///
/// # Errors
/// A host that cannot be asked fails the survey: a world with a hole would be decided on as if the hole were empty.
pub async fn survey(hosts: &[Surveyed], interval: Duration) -> Result<World> {
    let seen = futures::future::try_join_all(hosts.iter().map(|host| look(host, interval))).await?;
    let mut world = World { format: FORMAT, taken: Some(Timestamp::now()), ..World::default() };
    let mut names = BTreeSet::new();
    for (host, seen) in hosts.iter().zip(&seen) {
        if !names.insert(seen.offer.name.clone()) {
            return Err(Error::Refused(format!(
                "two of the hosts are called {}; name each host once, and give hosts names of their own",
                seen.offer.name
            )));
        }
        world.hosts.push(to_host(host, seen));
    }
    let mut known = BTreeSet::new();
    for is_active in [true, false] {
        for seen in &seen {
            for (vm, machine, job) in seen.vms.iter().filter(|(vm, ..)| vm.state.is_active() == is_active) {
                if !is_arriving(*job) && known.insert(vm.uuid) {
                    world.vms.push(to_vm(seen, vm, machine, *job));
                }
            }
        }
    }
    offer_images(hosts, &mut world).await?;
    bind_to_host(&mut world);
    world.check().map_err(|error| Error::Refused(error.to_string()))?;
    Ok(world)
}

fn is_arriving(job: Option<JobKind>) -> bool {
    matches!(job, Some(JobKind::MigrationIn))
}

async fn look(host: &Surveyed, interval: Duration) -> Result<Seen> {
    let hypervisor = &*host.hypervisor;
    let context = || "look at a host".to_owned();
    let offer = hypervisor.offer().await.map_err(Error::hyper(context()))?;
    let context = || format!("look at host {}", offer.name);
    let stats = async || -> Result<_> {
        let stats = hypervisor.stats().await.map_err(Error::hyper(context()))?;
        Ok((Instant::now(), stats))
    };
    let before = stats().await?;
    tokio::time::sleep(interval).await;
    let after = stats().await?;
    let mut vms = Vec::new();
    for vm in hypervisor.list().await.map_err(Error::hyper(context()))? {
        if !vm.state.is_active() && !host.with_inactive {
            continue;
        }
        // One that ended meanwhile takes nothing any more.
        let Ok(machine) = hypervisor.machine(vm.uuid).await else { continue };
        let job = hypervisor.job(vm.uuid).await.ok().flatten().map(|job| job.kind);
        vms.push((vm, machine, job));
    }
    Ok(Seen { offer, vms, before, after })
}

fn to_host(host: &Surveyed, seen: &Seen) -> Host {
    let offer = &seen.offer;
    let memory = offer.memory_total_bytes;
    let active = || seen.vms.iter().filter(|(vm, ..)| vm.state.is_active());
    let guests: u64 = active().map(|(_, machine, _)| machine.memory_bytes).sum();
    let arriving: u64 =
        active().filter(|(.., job)| is_arriving(*job)).map(|(_, machine, _)| machine.memory_bytes).sum();
    let kept = (memory / HOST_MEMORY_PARTS).max(HOST_MEMORY_MIN).min(memory / 4);
    // What other programs of the host hold is not to be had, either.
    let others = memory.saturating_sub(offer.memory_available_bytes).saturating_sub(guests);
    let kept = kept.max(others) + arriving;
    let capacity = Resources { cpu_milli: u64::from(offer.cpus) * 1000, memory: Bytes(memory), ..Resources::default() };
    let networks = offer.networks.iter().map(|name| format!("network:{name}"));
    let links = offer.links.iter().flatten().map(|name| format!("link:{name}"));
    Host {
        state: if host.closed.is_some() { HostState::Draining } else { HostState::Up },
        why: host.closed.clone(),
        reserved: Resources { memory: Bytes(kept), ..Resources::default() },
        offers: networks.chain(links).collect(),
        ..Host::new(&offer.name, capacity)
    }
}

fn to_vm(seen: &Seen, vm: &virtward_model::Vm, machine: &Machine, job: Option<JobKind>) -> Vm {
    let size = match vm.state.is_active() {
        true => Resources {
            cpu_milli: u64::from(machine.vcpus) * 1000,
            memory: Bytes(machine.memory_bytes),
            ..Resources::default()
        },
        false => Resources::default(),
    };
    let images = vm.disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::File { path } | DiskSource::Block { path } => Some(format!("image:{path}")),
        _ => None,
    });
    // What its own host does not tell of itself, other hosts need not tell either.
    let has_link = |name: &String| seen.offer.links.as_ref().is_some_and(|links| links.contains(name));
    let links = machine.nics.iter().filter_map(|nic| match &nic.link {
        Link::Network(name) => Some(format!("network:{name}")),
        Link::Bridge(name) | Link::Device(name) => has_link(name).then(|| format!("link:{name}")),
        Link::Other(_) => None,
    });
    let stuck = match (machine.ties.first(), job) {
        (Some(tie), _) => Some(Stuck::Device(tie.what.clone())),
        (None, Some(JobKind::Backup)) => Some(Stuck::Backup),
        (None, Some(JobKind::MigrationOut | JobKind::MigrationIn)) => Some(Stuck::Job("a migration".into())),
        (None, Some(JobKind::Other)) => Some(Stuck::Job("libvirt names none".into())),
        (None, None) => None,
    };
    let (demand, dirty_rate) = used(seen, vm.uuid);
    Vm {
        host: Some(HostName(seen.offer.name.clone())),
        demand,
        requires: images.chain(links).collect(),
        stuck,
        dirty_rate,
        ..Vm::new(vm.uuid, vm.name.clone(), size)
    }
}

/// What a VM wanted between the two looks, and its dirty rate. What it waited for a CPU, it wanted too.
fn used(seen: &Seen, vm: Uuid) -> (Resources, u64) {
    let find = |stats: &[DomainStats]| stats.iter().find(|stats| stats.uuid == vm).cloned();
    let (Some(before), Some(after)) = (find(&seen.before.1), find(&seen.after.1)) else {
        return (Resources::default(), 0);
    };
    let passed_ns = seen.after.0.duration_since(seen.before.0).as_nanos().max(1) as u64;
    let rate = |before: u64, after: u64, unit: u64| {
        (u128::from(after.saturating_sub(before)) * u128::from(unit) / u128::from(passed_ns)) as u64
    };
    let cpu = |stats: &DomainStats| stats.cpu_time_ns + stats.cpu_delay_ns.unwrap_or(0);
    let disk = |stats: &DomainStats| stats.disks.iter().map(|disk| disk.read_ops + disk.write_ops).sum::<u64>();
    let net = |stats: &DomainStats| stats.nets.iter().map(|net| net.rx_bytes + net.tx_bytes).sum::<u64>();
    let second = 1_000_000_000;
    let demand = Resources {
        cpu_milli: rate(cpu(&before), cpu(&after), 1000).min(u64::from(after.vcpus) * 1000),
        disk_iops: rate(disk(&before), disk(&after), second),
        network: rate(net(&before), net(&after), second),
        ..Resources::default()
    };
    (demand, after.dirty_rate_bytes_s.unwrap_or(0))
}

/// Asks every host for the images of all VMs.
async fn offer_images(hosts: &[Surveyed], world: &mut World) -> Result<()> {
    let mut images: BTreeMap<String, BTreeSet<HostName>> = BTreeMap::new();
    for vm in &world.vms {
        for image in vm.requires.iter().filter_map(|label| label.strip_prefix("image:")) {
            images.entry(image.to_owned()).or_default().extend(vm.host.clone());
        }
    }
    for (image, holders) in images {
        for (at, host) in hosts.iter().enumerate() {
            let sees = holders.contains(&world.hosts[at].name)
                || host.hypervisor.volume(&image).await.is_ok_and(|volume| volume.is_some());
            if sees {
                world.hosts[at].offers.insert(format!("image:{image}"));
            }
        }
    }
    Ok(())
}

/// Says so of VMs with an image that no other host sees.
fn bind_to_host(world: &mut World) {
    if world.hosts.len() < 2 {
        return;
    }
    for vm in world.vms.iter_mut().filter(|vm| vm.stuck.is_none()) {
        let alone = vm
            .requires
            .iter()
            .filter(|label| label.starts_with("image:"))
            .find(|label| world.hosts.iter().filter(|host| host.offers.contains(*label)).count() < 2);
        if let Some(label) = alone {
            vm.stuck = Some(Stuck::LocalStorage(label.trim_start_matches("image:").to_owned()));
        }
    }
}
