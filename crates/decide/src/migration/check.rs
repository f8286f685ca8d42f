//! What is looked at before a VM moves. Everything is reported at once: nobody wants to learn of three obstacles in three
//! attempts.

use uuid::Uuid;
use virtward_model::{Bytes, CpuFit, Disk, DiskDevice, DiskSource, Fit, HostOffer, Link, Machine, TieKind, VmState};

use super::Finding;

/// Memory that QEMU takes beside the guest's: this, and a fiftieth of the guest's.
const OVERHEAD_BYTES: u64 = 64 << 20;

/// What is known before a move.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The VM's name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its state.
    pub state: VmState,
    /// What it asks of a host.
    pub machine: Machine,
    /// What holds it now, in words (`a backup`), if anything.
    pub busy: Option<String>,
    /// Where it runs.
    pub source: HostOffer,
    /// Where it is to go.
    pub destination: HostOffer,
    /// Who has its name or its UUID there.
    pub namesakes: Vec<Namesake>,
    /// What the destination says of the machine.
    pub fit: Fit,
    /// What the destination sees of each disk that is a file or a block device.
    pub disks: Vec<DiskThere>,
    /// Why it must not run on a host with VMs that are there, in words.
    pub apart: Vec<String>,
    /// Why the destination takes no VMs now (it is being drained), if so.
    pub closed: Option<String>,
}

/// A domain at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namesake {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: Uuid,
    /// Has a process.
    pub active: bool,
}

/// A disk of the VM as the destination sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskThere {
    /// Target name.
    pub target: String,
    /// What is at its path.
    pub seen: Seen,
    /// Virtual size, in bytes; 0 if unknown.
    pub size_bytes: u64,
    /// Free there for a copy, in bytes, if known.
    pub room_bytes: Option<u64>,
}

/// What is at a disk's path at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The same file: what one host makes in its directory, the other one sees.
    Shared,
    /// Nothing.
    Absent,
    /// A file of that name that is another one.
    Differs,
    /// It could not be found out, and why.
    Unknown(String),
}

/// What was asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Copy disks that the destination does not see.
    pub with_storage: bool,
    /// Move it although its disks' cache mode ignores flushes.
    pub unsafe_cache: bool,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Everything that was looked at.
    pub findings: Vec<Finding>,
    /// Disks to copy.
    pub copy: Vec<String>,
    /// All disks are proved to be shared, so that the hypervisor's guess from the kind of file system is not needed.
    pub proved_shared: bool,
}

/// Looks at everything.
pub fn check(s: &Snapshot, wishes: Wishes) -> Checked {
    let mut findings = identity(s);
    let running = s.state.is_active();
    findings.extend(processor(s, running));
    findings.extend(ties(s, running));
    let (disks, copy, proved_shared) = disks(s, wishes, running);
    findings.extend(disks);
    findings.extend(networks(s));
    if running {
        findings.push(memory(s));
    }
    findings.extend(
        s.apart.iter().map(|why| {
            Finding::blocker("anti-affinity", why.clone()).advise("choose another host, or change the rule")
        }),
    );
    Checked { findings, copy, proved_shared }
}

fn identity(s: &Snapshot) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (here, there) = (&s.source, &s.destination);
    if here.uuid == there.uuid && !here.uuid.is_nil() {
        findings.push(Finding::blocker("host", format!("{} runs on {} already", s.vm, there.name)));
    }
    if let Some(why) = &s.closed {
        findings.push(Finding::blocker("host", why.clone()).advise("choose another host, or virtward host resume"));
    }
    match s.state {
        VmState::Running | VmState::Paused | VmState::ShutOff => {}
        VmState::Crashed | VmState::Other => findings.push(
            Finding::blocker("state", format!("{} has crashed or is changing its state", s.vm))
                .advise("wait, or power it off; a VM that is shut off can be moved too"),
        ),
    }
    if let Some(what) = &s.busy {
        let advice = "wait for it to end, or end it: virsh domjobabort";
        findings.push(Finding::blocker("job", format!("{what} holds {}", s.vm)).advise(advice));
    }
    for other in &s.namesakes {
        findings.push(match (other.uuid == s.uuid, other.active) {
            (true, true) => Finding::blocker(
                "identity",
                format!("{} runs on {} as well: two QEMUs on the same disks would ruin them", s.vm, there.name),
            )
            .advise(format!("find out which one is the real one, and end the other: virsh destroy {}", other.name)),
            (true, false) => Finding::warning(
                "identity",
                format!("{} has a definition of {}, which is replaced by the present one", there.name, s.vm),
            ),
            (false, _) => Finding::blocker(
                "identity",
                format!("{} has another VM called {} ({})", there.name, other.name, other.uuid),
            )
            .advise("rename one of them: virsh domrename"),
        });
    }
    findings
}

fn processor(s: &Snapshot, running: bool) -> Vec<Finding> {
    let (m, there) = (&s.machine, &s.destination);
    let mut findings = Vec::new();
    match &s.fit.machine {
        Some(why) => {
            let text = format!("{} cannot run {} machines of type {}: {why}", there.name, m.virt, m.machine);
            findings.push(
                Finding::blocker("machine", text).advise("upgrade QEMU there, or choose a host with the same version"),
            );
            return findings;
        }
        None => findings.push(Finding::fine("machine", format!("{} is known there", m.machine))),
    }
    if running && there.qemu_version > 0 && there.qemu_version < s.source.qemu_version {
        let (new, old) = (version(s.source.qemu_version), version(there.qemu_version));
        let text = format!("QEMU {old} there is older than {new} here, which nobody tests");
        findings.push(Finding::warning("machine", text).advise("upgrade hosts one by one, and move VMs to newer ones"));
    }
    let passed = matches!(m.cpu.mode.as_str(), "host-passthrough" | "maximum");
    let model = m.cpu.model.as_deref().unwrap_or("the default CPU");
    findings.push(match &s.fit.cpu {
        _ if m.cpu.xml.is_none() => Finding::fine("cpu", "the hypervisor's default, which every host has"),
        CpuFit::Identical => Finding::fine("cpu", "the destination has exactly that CPU"),
        CpuFit::Superset if passed => Finding::warning(
            "cpu",
            "the guest sees the host's own CPU, and the destination's has more: the way back may be barred",
        )
        .advise("give it the CPU that all hosts have: virtward host cpu"),
        CpuFit::Superset => Finding::fine("cpu", format!("the destination has all of {model}")),
        CpuFit::Lacking(what) => {
            let text = format!("{} lacks what the guest's CPU has: {what}", there.name);
            let advice = "virtward host cpu shows the CPU that all hosts have; set it, and restart the guest once";
            match running {
                true => Finding::blocker("cpu", text).advise(advice),
                false => Finding::warning("cpu", text).advise("it will not start there with the CPU that it has"),
            }
        }
        CpuFit::Unknown(why) => {
            Finding::warning("cpu", format!("not known whether {} has that CPU: {why}", there.name))
                .advise("libvirt looks again before anything moves")
        }
    });
    findings
}

/// `10.0.2`.
fn version(v: u64) -> String {
    format!("{}.{}.{}", v / 1_000_000, v / 1000 % 1000, v % 1000)
}

fn ties(s: &Snapshot, running: bool) -> Vec<Finding> {
    let found = s.machine.ties.iter().map(|tie| {
        let (why, advice) = match tie.kind {
            TieKind::Device => (
                "is of this host",
                "detach it (virsh detach-device), or shut the VM down to move it; network devices move when they have \
                 a stand-in (<teaming>)",
            ),
            TieKind::Directory => ("is mounted by the guest", "unmount it in the guest and detach it"),
            TieKind::SharedMemory => ("is shared with a process of this host", "detach it"),
            TieKind::Port => ("is a file or device of this host", "the destination must have it under the same path"),
            TieKind::Encryption => ("belongs to this processor", "shut the VM down to move it"),
        };
        let text = format!("{} {why}", tie.what);
        match tie.kind == TieKind::Port || !running {
            true => Finding::warning("device", text).advise(advice),
            false => Finding::blocker("device", text).advise(advice),
        }
    });
    found.collect()
}

/// Findings, which disks to copy, and whether all are proved to be shared.
fn disks(s: &Snapshot, wishes: Wishes, running: bool) -> (Vec<Finding>, Vec<String>, bool) {
    let (mut findings, mut copy, mut proved) = (Vec::new(), Vec::new(), true);
    for used in &s.machine.disks {
        let disk = &used.disk;
        let check = format!("disk {}", disk.target);
        if disk.transient && running {
            let advice = "shut the VM down to move it";
            findings.push(Finding::blocker(check, "it is transient, which cannot move").advise(advice));
            continue;
        }
        if matches!(disk.source, DiskSource::None) {
            continue;
        }
        let Some(there) = s.disks.iter().find(|d| d.target == disk.target) else {
            findings.push(Finding::fine(check, "reached over the network, from every host alike"));
            continue;
        };
        if used.cache == "unsafe" && !wishes.unsafe_cache && running {
            findings.push(
                Finding::blocker(
                    check.clone(),
                    "cache='unsafe' ignores flushes: what only this host's memory holds would be lost",
                )
                .advise("change the cache mode and restart the guest, or accept it: --unsafe-cache"),
            );
        }
        let finding = seen(s, wishes, disk, there, running);
        proved &= there.seen == Seen::Shared;
        if there.seen == Seen::Absent && copyable(disk) && wishes.with_storage {
            copy.push(disk.target.clone());
        }
        findings.push(Finding { check, ..finding });
    }
    // What is copied is opened by one QEMU only.
    let proved = proved || s.disks.iter().all(|d| d.seen == Seen::Shared || copy.contains(&d.target));
    (findings, copy, proved)
}

fn copyable(disk: &Disk) -> bool {
    !disk.read_only && !disk.shareable && disk.device == DiskDevice::Disk
}

fn seen(s: &Snapshot, wishes: Wishes, disk: &Disk, there: &DiskThere, running: bool) -> Finding {
    let name = &s.destination.name;
    let path = disk.source.path().unwrap_or_default();
    match &there.seen {
        Seen::Shared => Finding::fine("", "both hosts see the same file"),
        Seen::Unknown(why) => Finding::warning("", format!("not known whether {name} sees {path}: {why}"))
            .advise("if it does not, nothing moves and the VM goes on here"),
        Seen::Differs => Finding::blocker("", format!("{name} has another file at {path}"))
            .advise("mount the shared storage there, or move that file out of the way and use --with-storage"),
        Seen::Absent if !copyable(disk) => {
            let advice = match disk.device {
                DiskDevice::Cdrom | DiskDevice::Floppy => "eject it (virsh change-media), or put it on shared storage",
                _ => "put it on shared storage",
            };
            Finding::blocker("", format!("{name} does not see {path}, and what is read-only or shared is not copied"))
                .advise(advice)
        }
        Seen::Absent if !wishes.with_storage => Finding::blocker("", format!("{name} does not see {path}"))
            .advise("mount the shared storage there, or copy the disk along: --with-storage"),
        Seen::Absent if !running => Finding::blocker("", format!("{name} does not see {path}"))
            .advise("disks are copied along with running VMs only: start it, or copy the file by hand"),
        Seen::Absent => match there.room_bytes {
            Some(room) if room < there.size_bytes => Finding::blocker(
                "",
                format!("{} are needed at {name} for its copy, and {} are free", Bytes(there.size_bytes), Bytes(room)),
            )
            .advise("make room there, or move the disk elsewhere first: virtward vm move-disk"),
            _ if !disk.backing.is_empty() => Finding::warning(
                "",
                format!("is copied ({}), and does not depend on other images there", Bytes(there.size_bytes)),
            ),
            _ => Finding::fine("", format!("is copied ({})", Bytes(there.size_bytes))),
        },
    }
}

fn networks(s: &Snapshot) -> Vec<Finding> {
    let there = &s.destination;
    let looked = s.machine.nics.iter().filter_map(|nic| {
        let check = format!("network {}", nic.mac);
        let check = check.trim_end().to_owned();
        let (kind, name, known) = match &nic.link {
            Link::Network(name) => ("network", name, Some(there.networks.contains(name))),
            Link::Bridge(name) => ("bridge", name, has_link(s, name)),
            Link::Device(name) => ("device", name, has_link(s, name)),
            Link::Other(_) => return None,
        };
        Some(match known {
            Some(true) => Finding::fine(check, format!("{kind} {name} is there")),
            Some(false) => {
                Finding::blocker(check, format!("{} has no active {kind} {name}", there.name)).advise(match kind {
                    "network" => format!("define and start it there: virsh net-start {name}"),
                    _ => format!("set up {kind} {name} there, or change the interface"),
                })
            }
            None => Finding::warning(check, format!("not known whether {} has {kind} {name}", there.name))
                .advise("if it has not, nothing moves and the VM goes on here"),
        })
    });
    looked.collect()
}

/// Whether the destination has a network device. A host that does not tell of what a VM is plugged into right now does
/// not tell everything (network namespaces, bridges of other kinds), and so its silence proves nothing.
fn has_link(s: &Snapshot, name: &String) -> Option<bool> {
    let there = s.destination.links.as_ref().is_some_and(|links| links.contains(name));
    let told = s.source.links.as_ref().is_some_and(|links| links.contains(name));
    (there || told && s.destination.links.is_some()).then_some(there)
}

fn memory(s: &Snapshot) -> Finding {
    let there = &s.destination;
    let needed = needed_memory(s.machine.memory_bytes);
    let text = format!("{} needed, {} free on {}", Bytes(needed), Bytes(there.memory_available_bytes), there.name);
    match there.memory_available_bytes {
        0 => Finding::warning("memory", format!("not known how much is free on {}", there.name)),
        free if free < needed => {
            Finding::blocker("memory", text).advise("move other VMs away first, or choose another host")
        }
        free if free - needed < there.memory_total_bytes / 20 => {
            Finding::warning("memory", format!("{text}: little is left for anything else"))
        }
        _ => Finding::fine("memory", text),
    }
}

/// Memory that a VM of this size takes of its host, in bytes.
pub fn needed_memory(guest_bytes: u64) -> u64 {
    guest_bytes.saturating_add(guest_bytes / 50).saturating_add(OVERHEAD_BYTES)
}

#[cfg(test)]
mod tests {
    use virtward_model::{CpuAsk, DiskUse, Nic, Tie};

    use super::*;
    use crate::migration::{Level, blockers};

    fn disk(target: &str) -> DiskUse {
        DiskUse {
            disk: Disk {
                target: target.into(),
                device: DiskDevice::Disk,
                format: "qcow2".into(),
                source: DiskSource::File { path: format!("/i/{target}") },
                read_only: false,
                shareable: false,
                transient: false,
                backing: Vec::new(),
            },
            cache: "none".into(),
        }
    }

    fn good() -> Snapshot {
        let host = |name: &str, n: u128| HostOffer {
            name: name.into(),
            uuid: Uuid::from_u128(n),
            libvirt_version: 11_003_000,
            qemu_version: 10_000_002,
            cpus: 4,
            memory_total_bytes: 64 << 30,
            memory_available_bytes: 32 << 30,
            networks: vec!["lan".into()],
            links: Some(vec!["br0".into()]),
        };
        let cpu = CpuAsk { mode: "custom".into(), model: Some("EPYC".into()), xml: Some("<cpu/>".into()) };
        Snapshot {
            vm: "web1".into(),
            uuid: Uuid::from_u128(7),
            state: VmState::Running,
            machine: Machine {
                machine: "pc-q35-10.0".into(),
                virt: "kvm".into(),
                cpu,
                memory_bytes: 4 << 30,
                disks: vec![disk("vda")],
                nics: vec![Nic { mac: "52:54:00:00:00:01".into(), link: Link::Network("lan".into()) }],
                ..Machine::default()
            },
            busy: None,
            source: host("h1", 1),
            destination: host("h2", 2),
            namesakes: Vec::new(),
            fit: Fit { machine: None, cpu: CpuFit::Superset },
            disks: vec![DiskThere {
                target: "vda".into(),
                seen: Seen::Shared,
                size_bytes: 10 << 30,
                room_bytes: Some(20 << 30),
            }],
            apart: Vec::new(),
            closed: None,
        }
    }

    /// The text of the only blocker.
    fn barred(s: &Snapshot, wishes: Wishes) -> String {
        let checked = check(s, wishes);
        let found: Vec<&Finding> = blockers(&checked.findings).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        format!("{}: {}; {}", found[0].check, found[0].text, found[0].advice.as_deref().unwrap_or_default())
    }

    #[test]
    fn a_vm_that_fits_moves_and_every_check_is_told() {
        let checked = check(&good(), Wishes::default());
        assert!(checked.findings.iter().all(|f| f.level == Level::Fine), "{:?}", checked.findings);
        let names: Vec<&str> = checked.findings.iter().map(|f| f.check.as_str()).collect();
        assert_eq!(names, ["machine", "cpu", "disk vda", "network 52:54:00:00:00:01", "memory"]);
        assert!(checked.proved_shared && checked.copy.is_empty());
    }

    #[test]
    fn each_obstacle_is_found_alone_and_says_what_to_do() {
        type Change = fn(&mut Snapshot);
        let cases: [(&str, Change); 15] = [
            ("host: web1 runs on h1 already", |s| s.destination = s.source.clone()),
            ("host: h2 is being drained", |s| s.closed = Some("h2 is being drained".into())),
            ("state:", |s| s.state = VmState::Crashed),
            ("job: a backup holds web1", |s| s.busy = Some("a backup".into())),
            ("identity: web1 runs on h2 as well", |s| {
                s.namesakes = vec![Namesake { name: "web1".into(), uuid: s.uuid, active: true }];
            }),
            ("identity: h2 has another VM", |s| {
                s.namesakes = vec![Namesake { name: "web1".into(), uuid: Uuid::from_u128(8), active: false }];
            }),
            ("machine: h2 cannot run kvm", |s| s.fit.machine = Some("unsupported machine type".into())),
            ("cpu: h2 lacks", |s| s.fit.cpu = CpuFit::Lacking("avx512f".into())),
            ("device: PCI device 0000:65:00.0 is of this host", |s| {
                s.machine.ties = vec![Tie { kind: TieKind::Device, what: "PCI device 0000:65:00.0".into() }];
            }),
            ("disk vda: h2 does not see /i/vda; mount the shared storage there, or copy", |s| {
                s.disks[0].seen = Seen::Absent
            }),
            ("disk vda: h2 has another file", |s| s.disks[0].seen = Seen::Differs),
            ("disk vda: cache='unsafe'", |s| s.machine.disks[0].cache = "unsafe".into()),
            ("disk vda: it is transient", |s| s.machine.disks[0].disk.transient = true),
            ("network 52:54:00:00:00:01: h2 has no active network lan; define and start", |s| {
                s.destination.networks.clear()
            }),
            ("memory: 4.1 GiB needed, 4.0 GiB free on h2", |s| s.destination.memory_available_bytes = 4 << 30),
        ];
        for (expected, change) in cases {
            let mut s = good();
            change(&mut s);
            let found = barred(&s, Wishes::default());
            assert!(found.starts_with(expected), "{found}");
        }
        let mut s = good();
        s.apart = vec!["web1 and web2 must not share a host".into()];
        assert!(barred(&s, Wishes::default()).starts_with("anti-affinity:"));
    }

    #[test]
    fn disks_that_are_not_there_are_copied_if_asked_for_and_if_there_is_room() {
        let with_storage = Wishes { with_storage: true, ..Wishes::default() };
        let mut s = good();
        s.disks[0].seen = Seen::Absent;
        let checked = check(&s, with_storage);
        assert_eq!(blockers(&checked.findings).count(), 0);
        assert_eq!((checked.copy.as_slice(), checked.proved_shared), (&["vda".to_owned()][..], true));
        s.disks[0].room_bytes = Some(9 << 30);
        assert!(barred(&s, with_storage).contains("10.0 GiB are needed at h2 for its copy, and 9.0 GiB are free"));
        s.machine.disks[0].disk.device = DiskDevice::Cdrom;
        assert!(barred(&s, with_storage).contains("eject it"));
        let mut s = good();
        s.disks[0].seen = Seen::Differs;
        assert!(barred(&s, with_storage).contains("another file"), "nothing is overwritten");
        let mut s = good();
        s.disks[0].seen = Seen::Unknown("no pool can be opened".into());
        let checked = check(&s, with_storage);
        assert_eq!((blockers(&checked.findings).count(), checked.proved_shared), (0, false));
    }

    #[test]
    fn a_bridge_counts_as_missing_only_where_hosts_tell_of_bridges() {
        let mut s = good();
        s.machine.nics[0].link = Link::Bridge("br0".into());
        assert_eq!(blockers(&check(&s, Wishes::default()).findings).count(), 0);
        s.destination.links = Some(vec!["eth0".into()]);
        assert!(barred(&s, Wishes::default()).contains("has no active bridge br0; set up bridge br0 there"));
        s.source.links = Some(vec!["eth0".into()]);
        let checked = check(&s, Wishes::default());
        assert!(checked.findings.iter().any(|f| f.level == Level::Warning && f.text.contains("not known whether h2")));
    }

    #[test]
    fn a_vm_that_is_off_needs_less() {
        let mut s = good();
        s.state = VmState::ShutOff;
        s.destination.memory_available_bytes = 1;
        s.machine.ties = vec![Tie { kind: TieKind::Device, what: "USB device".into() }];
        s.fit.cpu = CpuFit::Lacking("avx".into());
        assert_eq!(blockers(&check(&s, Wishes::default()).findings).count(), 0);
    }

    #[test]
    fn the_hosts_own_cpu_may_go_to_a_bigger_one_with_a_warning() {
        let mut s = good();
        s.machine.cpu.mode = "host-passthrough".into();
        let checked = check(&s, Wishes::default());
        let cpu = checked.findings.iter().find(|f| f.check == "cpu").unwrap();
        assert_eq!(cpu.level, Level::Warning);
        s.fit.cpu = CpuFit::Identical;
        assert!(check(&s, Wishes::default()).findings.iter().all(|f| f.level == Level::Fine));
    }
}
