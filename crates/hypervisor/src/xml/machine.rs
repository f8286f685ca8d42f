//! What a domain asks of its host, and what hosts say of themselves: `<domain>`, `<domainCapabilities>`, `<pool>`,
//! `<volume>`, `<device>`.

use roxmltree::Node;
use virtward_model::{CpuAsk, DiskUse, Link, Machine, Nic, Pool, Tie, TieKind, Volume};

use super::domain::{self, XmlError, child, child_text, parse};

/// Reads what a `<domain>` asks of its host.
pub(crate) fn machine(text: &str) -> Result<Machine, XmlError> {
    let document = parse("domain", "domain", text)?;
    let root = document.root_element();
    let kind = child(root, "os").and_then(|os| child(os, "type"));
    let attribute = |name: &str| kind.and_then(|t| t.attribute(name)).unwrap_or_default().to_owned();
    let devices: Vec<Node> = child(root, "devices").into_iter().flat_map(|d| d.children()).collect();
    let of = |name: &'static str| devices.iter().copied().filter(move |d| d.has_tag_name(name));
    let mut disks = Vec::new();
    for node in of("disk") {
        let cache = child(node, "driver").and_then(|d| d.attribute("cache")).unwrap_or_default().to_owned();
        disks.push(DiskUse { disk: domain::disk(node)?.disk, cache });
    }
    let cpu = child(root, "cpu").map_or_else(CpuAsk::default, |node| CpuAsk {
        mode: node.attribute("mode").unwrap_or("custom").to_owned(),
        model: child_text(node, "model").map(str::to_owned),
        xml: Some(text[node.range()].to_owned()),
    });
    Ok(Machine {
        arch: attribute("arch"),
        machine: attribute("machine"),
        virt: root.attribute("type").unwrap_or_default().to_owned(),
        emulator: of("emulator").find_map(|e| e.text()).map(|t| t.trim().to_owned()),
        cpu,
        vcpus: child_text(root, "vcpu").and_then(|t| t.parse().ok()).unwrap_or(1),
        memory_bytes: domain::memory(root),
        disks,
        nics: of("interface").map(nic).collect(),
        ties: devices.iter().filter_map(|d| tie(*d)).chain(encryption(root)).collect(),
    })
}

fn nic(node: Node<'_, '_>) -> Nic {
    let source = |name: &str| child(node, "source").and_then(|s| s.attribute(name)).unwrap_or_default().to_owned();
    let link = match node.attribute("type").unwrap_or_default() {
        "network" => Link::Network(source("network")),
        "bridge" => Link::Bridge(source("bridge")),
        "direct" => Link::Device(source("dev")),
        other => Link::Other(other.to_owned()),
    };
    Nic { mac: child(node, "mac").and_then(|m| m.attribute("address")).unwrap_or_default().to_owned(), link }
}

fn encryption(root: Node<'_, '_>) -> Option<Tie> {
    let kind = child(root, "launchSecurity")?.attribute("type").unwrap_or_default();
    matches!(kind, "sev" | "sev-snp" | "tdx" | "s390-pv")
        .then(|| Tie { kind: TieKind::Encryption, what: format!("memory encryption ({kind})") })
}

/// What of a device cannot go along, if anything.
fn tie(node: Node<'_, '_>) -> Option<Tie> {
    let tied = |kind, what: String| Some(Tie { kind, what });
    let kind = node.attribute("type").unwrap_or_default();
    let source = child(node, "source");
    let path = |name: &str| source.and_then(|s| s.attribute(name)).unwrap_or_default().to_owned();
    match node.tag_name().name() {
        // A network device with a stand-in is unplugged for the journey and plugged in again.
        "hostdev" | "interface" if child(node, "teaming").is_some() => None,
        "hostdev" => tied(TieKind::Device, hostdev(node, kind)),
        "interface" if matches!(kind, "hostdev" | "vdpa") => {
            tied(TieKind::Device, format!("network device {}", address(node)))
        }
        "disk" if matches!(kind, "nvme" | "vhostuser" | "vhostvdpa") => tied(TieKind::Device, format!("{kind} disk")),
        "filesystem" => tied(TieKind::Directory, format!("shared directory {}", path("dir"))),
        "shmem" => tied(TieKind::SharedMemory, format!("shared memory {}", node.attribute("name").unwrap_or_default())),
        "serial" | "parallel" | "channel" | "console" if matches!(kind, "dev" | "file" | "pipe") => {
            // A console that repeats a serial port is that port.
            let repeats = node.tag_name().name() == "console"
                && child(node, "target").and_then(|t| t.attribute("type")) == Some("serial");
            (!repeats)
                .then(|| Tie { kind: TieKind::Port, what: format!("{} to {}", node.tag_name().name(), path("path")) })
        }
        "tpm" if child(node, "backend").and_then(|b| b.attribute("type")) == Some("passthrough") => {
            tied(TieKind::Device, "the host's TPM".to_owned())
        }
        "input" if kind == "passthrough" => tied(TieKind::Device, "an input device of the host".to_owned()),
        _ => None,
    }
}

fn hostdev(node: Node<'_, '_>, kind: &str) -> String {
    let name = match kind {
        "pci" => "PCI device",
        "usb" => "USB device",
        "scsi" | "scsi_host" => "SCSI device",
        "mdev" => "mediated device",
        _ => "device",
    };
    format!("{name} {}", address(node)).trim_end().to_owned()
}

/// The host's address of a device, as people know it.
fn address(node: Node<'_, '_>) -> String {
    let Some(source) = child(node, "source") else { return String::new() };
    let hex = |of: Node<'_, '_>, name: &str| of.attribute(name).unwrap_or("0").trim_start_matches("0x").to_owned();
    if let Some(a) = child(source, "address") {
        if let Some(uuid) = a.attribute("uuid") {
            return uuid.to_owned();
        }
        if a.attribute("slot").is_some() {
            let (domain, bus, slot, function) = (hex(a, "domain"), hex(a, "bus"), hex(a, "slot"), hex(a, "function"));
            return format!("{domain:0>4}:{bus:0>2}:{slot:0>2}.{function}");
        }
        return format!("{}:{}", hex(a, "bus"), hex(a, "device"));
    }
    match (child(source, "vendor"), child(source, "product")) {
        (Some(vendor), Some(product)) => format!("{}:{}", hex(vendor, "id"), hex(product, "id")),
        _ => source.attribute("dev").unwrap_or_default().to_owned(),
    }
}

/// The CPU that `host-model` stands for on a host, as a `<cpu>` that any host can judge; none if it has none.
pub(crate) fn host_model(capabilities: &str) -> Result<Option<String>, XmlError> {
    let document = parse("domain capabilities", "domainCapabilities", capabilities)?;
    let modes = child(document.root_element(), "cpu").into_iter().flat_map(|c| c.children());
    let Some(mode) = modes.into_iter().find(|m| m.has_tag_name("mode") && m.attribute("name") == Some("host-model"))
    else {
        return Ok(None);
    };
    if mode.attribute("supported") == Some("no") {
        return Ok(None);
    }
    let parts: String = mode.children().filter(Node::is_element).map(|part| &capabilities[part.range()]).collect();
    Ok(Some(format!("<cpu mode='custom' match='exact'>{parts}</cpu>")))
}

/// The path of a `<pool>`'s volumes.
pub(crate) fn pool(text: &str) -> Result<Pool, XmlError> {
    let document = parse("pool", "pool", text)?;
    let root = document.root_element();
    Ok(Pool {
        name: child_text(root, "name").unwrap_or_default().to_owned(),
        kind: root.attribute("type").unwrap_or_default().to_owned(),
        path: child(root, "target").and_then(|t| child_text(t, "path")).map(str::to_owned),
        active: false,
        capacity_bytes: 0,
        available_bytes: 0,
    })
}

/// A `<volume>`.
pub(crate) fn volume(text: &str) -> Result<Volume, XmlError> {
    let document = parse("volume", "volume", text)?;
    let root = document.root_element();
    let target = child(root, "target");
    let number = |name| child_text(root, name).and_then(|t| t.parse().ok()).unwrap_or(0);
    let format = target.and_then(|t| child(t, "format")).and_then(|f| f.attribute("type"));
    Ok(Volume {
        path: target.and_then(|t| child_text(t, "path")).unwrap_or_default().to_owned(),
        format: format.unwrap_or("raw").to_owned(),
        capacity_bytes: number("capacity"),
        allocation_bytes: number("allocation"),
    })
}

/// The network device that a `<device>` of a host is.
pub(crate) fn net_device(text: &str) -> Result<Option<String>, XmlError> {
    let document = parse("device", "device", text)?;
    let capability = child(document.root_element(), "capability");
    Ok(capability.and_then(|c| child_text(c, "interface")).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_everything_that_ties_it() {
        let text = "<domain type='kvm'><name>x</name><memory unit='GiB'>2</memory><vcpu>4</vcpu>
          <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
          <cpu mode='custom' match='exact'><model>Skylake</model></cpu><launchSecurity type='sev'/>
          <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
          <disk type='file'><driver type='qcow2' cache='none'/><source file='/a'/><target dev='vda'/></disk>
          <interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/></interface>
          <interface type='bridge'><source bridge='br0'/></interface>
          <interface type='user'/>
          <interface type='hostdev'><teaming type='transient' persistent='ua'/></interface>
          <hostdev type='pci'><source><address domain='0x0000' bus='0x65' slot='0x00' function='0x1'/></source></hostdev>
          <hostdev type='usb'><source><vendor id='0x1050'/><product id='0x0407'/></source></hostdev>
          <filesystem><source dir='/srv'/></filesystem>
          <serial type='file'><source path='/log'/></serial><console type='file'><source path='/log'/><target type='serial'/></console>
          <serial type='pty'/></devices></domain>";
        let machine = machine(text).unwrap();
        assert_eq!((machine.arch.as_str(), machine.machine.as_str()), ("x86_64", "pc-q35-10.0"));
        assert_eq!((machine.virt.as_str(), machine.vcpus, machine.memory_bytes), ("kvm", 4, 2 << 30));
        assert_eq!(machine.cpu.xml.as_deref(), Some("<cpu mode='custom' match='exact'><model>Skylake</model></cpu>"));
        assert_eq!((machine.disks[0].disk.target.as_str(), machine.disks[0].cache.as_str()), ("vda", "none"));
        let links: Vec<_> = machine.nics.iter().map(|n| n.link.clone()).collect();
        assert_eq!(links[..2], [Link::Network("lan".into()), Link::Bridge("br0".into())]);
        let ties: Vec<_> = machine.ties.iter().map(|t| t.what.as_str()).collect();
        assert_eq!(
            ties,
            [
                "PCI device 0000:65:00.1",
                "USB device 1050:0407",
                "shared directory /srv",
                "serial to /log",
                "memory encryption (sev)"
            ]
        );
    }

    #[test]
    fn the_cpu_that_host_model_stands_for() {
        let text = "<domainCapabilities><cpu><mode name='host-passthrough' supported='yes'/>
            <mode name='host-model' supported='yes'><model fallback='forbid'>EPYC</model><feature policy='require' name='x2apic'/></mode>
            </cpu></domainCapabilities>";
        let cpu = host_model(text).unwrap().unwrap();
        assert_eq!(
            cpu,
            "<cpu mode='custom' match='exact'><model fallback='forbid'>EPYC</model><feature policy='require' name='x2apic'/></cpu>"
        );
        assert_eq!(host_model("<domainCapabilities/>").unwrap(), None);
    }
}
