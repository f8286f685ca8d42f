//! Reading domain, checkpoint and capabilities XML into our nouns.
//!
//! Invariants: input larger than [`MAX_BYTES`] or with more than [`MAX_NODES`] nodes is refused; DTDs are refused (so no
//! entity expansion); backing chains are followed [`MAX_CHAIN`] deep. Unknown elements are ignored, unknown disk types
//! are kept as network sources so that nobody mistakes them for absent.

use roxmltree::{Document, Node, ParsingOptions};
use uuid::Uuid;
use virtward_model::{Disk, DiskDevice, DiskSource, xml::is_shallow};

/// Largest XML accepted.
const MAX_BYTES: usize = 16 << 20;
/// Most XML nodes accepted.
const MAX_NODES: u32 = 400_000;
/// Longest backing chain followed; libvirt itself stops at 200.
const MAX_CHAIN: usize = 256;

/// XML that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} XML: {problem}")]
pub(crate) struct XmlError {
    what: &'static str,
    problem: String,
}

/// What we read of a `<domain>`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DomainXml {
    pub(crate) name: String,
    /// Absent in a definition that leaves the choice to the hypervisor.
    pub(crate) uuid: Option<Uuid>,
    pub(crate) disks: Vec<DiskXml>,
    /// Memory in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    /// Whether a guest agent channel is configured.
    pub(crate) agent_channel: bool,
}

/// One `<disk>` and what only a driver needs of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DiskXml {
    pub(crate) disk: Disk,
    /// libvirt's device alias; only in live XML.
    pub(crate) alias: Option<String>,
}

/// What we read of a `<domaincheckpoint>`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CheckpointXml {
    pub(crate) name: String,
    pub(crate) created_unix_s: i64,
    pub(crate) parent: Option<String>,
    /// Targets with a bitmap.
    pub(crate) targets: Vec<String>,
}

fn fail(what: &'static str, problem: impl Into<String>) -> XmlError {
    XmlError { what, problem: problem.into() }
}

pub(super) fn parse<'a>(what: &'static str, root: &str, text: &'a str) -> Result<Document<'a>, XmlError> {
    if text.len() > MAX_BYTES {
        return Err(fail(what, format!("{} bytes are more than the {MAX_BYTES} accepted", text.len())));
    }
    if !is_shallow(text) {
        return Err(fail(what, "its elements are nested too deeply"));
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES };
    let document = Document::parse_with_options(text, options).map_err(|e| fail(what, e.to_string()))?;
    if document.root_element().tag_name().name() != root {
        let found = document.root_element().tag_name().name().to_owned();
        return Err(fail(what, format!("expected <{root}>, found <{found}>")));
    }
    Ok(document)
}

pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|c| c.has_tag_name(name))
}

pub(super) fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name).and_then(|c| c.text()).map(str::trim).filter(|t| !t.is_empty())
}

impl DomainXml {
    /// Reads a `<domain>`.
    pub(crate) fn parse(text: &str) -> Result<DomainXml, XmlError> {
        let document = parse("domain", "domain", text)?;
        let root = document.root_element();
        let name = child_text(root, "name").ok_or_else(|| fail("domain", "<name> is missing"))?.to_owned();
        let uuid = match child_text(root, "uuid") {
            Some(text) => Some(Uuid::try_parse(text).map_err(|e| fail("domain", format!("<uuid> {text:?}: {e}")))?),
            None => None,
        };
        let devices = child(root, "devices");
        let disks = devices
            .into_iter()
            .flat_map(|d| d.children().filter(|c| c.has_tag_name("disk")))
            .map(disk)
            .collect::<Result<Vec<_>, _>>()?;
        let agent_channel = devices.into_iter().flat_map(|d| d.children()).any(|c| {
            c.has_tag_name("channel")
                && child(c, "target").and_then(|t| t.attribute("name")) == Some("org.qemu.guest_agent.0")
        });
        let vcpus = child_text(root, "vcpu").and_then(|t| t.parse().ok()).unwrap_or(1);
        Ok(DomainXml { name, uuid, disks, memory_bytes: memory(root), vcpus, agent_channel })
    }
}

pub(super) fn memory(root: Node<'_, '_>) -> u64 {
    let Some(node) = child(root, "memory") else { return 0 };
    let number: u64 = node.text().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
    let unit: u64 = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => 1 << 10,
    };
    number.saturating_mul(unit)
}

pub(super) fn disk(node: Node<'_, '_>) -> Result<DiskXml, XmlError> {
    let target = child(node, "target")
        .and_then(|t| t.attribute("dev"))
        .ok_or_else(|| fail("domain", "a <disk> has no <target dev='…'>"))?
        .to_owned();
    let device = match node.attribute("device").unwrap_or("disk") {
        "cdrom" => DiskDevice::Cdrom,
        "floppy" => DiskDevice::Floppy,
        "lun" => DiskDevice::Lun,
        _ => DiskDevice::Disk,
    };
    let format = child(node, "driver").and_then(|d| d.attribute("type")).unwrap_or("raw").to_owned();
    let flag = |name| child(node, name).is_some();
    Ok(DiskXml {
        alias: child(node, "alias").and_then(|a| a.attribute("name")).map(str::to_owned),
        disk: Disk {
            source: source(node),
            read_only: flag("readonly"),
            shareable: flag("shareable"),
            transient: flag("transient"),
            backing: backing(node),
            target,
            device,
            format,
        },
    })
}

/// The source of a `<disk>` or a `<backingStore>`.
fn source(node: Node<'_, '_>) -> DiskSource {
    let Some(source) = child(node, "source") else { return DiskSource::None };
    let attribute = |name: &str| source.attribute(name).map(str::to_owned);
    match node.attribute("type").unwrap_or("file") {
        "file" => attribute("file").map_or(DiskSource::None, |path| DiskSource::File { path }),
        "block" => attribute("dev").map_or(DiskSource::None, |path| DiskSource::Block { path }),
        "volume" => match (attribute("pool"), attribute("volume")) {
            (Some(pool), Some(volume)) => DiskSource::Volume { pool, volume },
            _ => DiskSource::None,
        },
        "network" => DiskSource::Network {
            protocol: attribute("protocol").unwrap_or_default(),
            name: attribute("name").unwrap_or_default(),
        },
        // nvme, vhostuser, vhostvdpa, dir: reached by QEMU in its own way, so not by path.
        other => DiskSource::Network {
            protocol: other.to_owned(),
            name: attribute("path").or_else(|| attribute("dir")).or_else(|| attribute("dev")).unwrap_or_default(),
        },
    }
}

fn backing(disk: Node<'_, '_>) -> Vec<String> {
    let mut chain = Vec::new();
    let mut next = child(disk, "backingStore");
    while let Some(node) = next {
        match source(node) {
            DiskSource::None => break,
            DiskSource::File { path } | DiskSource::Block { path } => chain.push(path),
            DiskSource::Network { protocol, name } => chain.push(format!("{protocol}:{name}")),
            DiskSource::Volume { pool, volume } => chain.push(format!("{pool}/{volume}")),
        }
        if chain.len() >= MAX_CHAIN {
            break;
        }
        next = child(node, "backingStore");
    }
    chain
}

impl CheckpointXml {
    /// Reads a `<domaincheckpoint>`.
    pub(crate) fn parse(text: &str) -> Result<CheckpointXml, XmlError> {
        let document = parse("checkpoint", "domaincheckpoint", text)?;
        let root = document.root_element();
        let name = child_text(root, "name").ok_or_else(|| fail("checkpoint", "<name> is missing"))?.to_owned();
        let created = child_text(root, "creationTime").unwrap_or("0");
        let targets = child(root, "disks")
            .into_iter()
            .flat_map(|d| d.children().filter(|c| c.has_tag_name("disk")))
            .filter(|d| d.attribute("checkpoint") == Some("bitmap"))
            .filter_map(|d| d.attribute("name").map(str::to_owned))
            .collect();
        Ok(CheckpointXml {
            created_unix_s: created.parse().map_err(|_| fail("checkpoint", format!("<creationTime> {created:?}")))?,
            parent: child(root, "parent").and_then(|p| child_text(p, "name")).map(str::to_owned),
            name,
            targets,
        })
    }
}

/// The host's UUID in capabilities XML; nil where the driver gives none.
pub(crate) fn host_uuid(capabilities: &str) -> Result<Uuid, XmlError> {
    let document = parse("capabilities", "capabilities", capabilities)?;
    let uuid = child(document.root_element(), "host").and_then(|h| child_text(h, "uuid"));
    Ok(uuid.and_then(|t| Uuid::try_parse(t).ok()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = r"<domain type='qemu' id='3' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>a &amp; b</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
      <memory unit='MiB'>192</memory><vcpu placement='static'>2</vcpu>
      <devices>
        <disk type='file' device='disk'>
          <driver name='qemu' type='qcow2'/><source file='/i/top.qcow2' index='1'/>
          <backingStore type='file' index='2'><format type='qcow2'/><source file='/i/mid.qcow2'/>
            <backingStore type='block'><source dev='/dev/vg/base'/><backingStore/></backingStore></backingStore>
          <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
        <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/><shareable/></disk>
        <disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='p/i'/><target dev='vdb'/></disk>
        <disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdc'/><transient/></disk>
        <disk type='file' device='cdrom'><target dev='hda'/><readonly/></disk>
        <disk type='vhostuser' device='disk'><source type='unix' path='/s.sock'/><target dev='vdd'/></disk>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
      </devices></domain>";

    #[test]
    fn a_domain_with_every_kind_of_disk() {
        let domain = DomainXml::parse(DOMAIN).unwrap();
        assert_eq!(domain.name, "a & b");
        assert_eq!((domain.memory_bytes, domain.vcpus, domain.agent_channel), (192 << 20, 2, true));
        let disks: Vec<_> = domain.disks.iter().map(|d| &d.disk).collect();
        assert_eq!(disks[0].backing, ["/i/mid.qcow2", "/dev/vg/base"]);
        assert_eq!(disks[0].source.path(), Some("/i/top.qcow2"));
        assert_eq!(domain.disks[0].alias.as_deref(), Some("virtio-disk0"));
        assert_eq!((disks[1].device, disks[1].shareable), (DiskDevice::Lun, true));
        assert_eq!(disks[2].source, DiskSource::Network { protocol: "rbd".into(), name: "p/i".into() });
        assert_eq!(disks[3].source, DiskSource::Volume { pool: "p".into(), volume: "v".into() });
        assert!(disks[3].transient);
        assert_eq!(
            (disks[4].device, disks[4].read_only, &disks[4].source),
            (DiskDevice::Cdrom, true, &DiskSource::None)
        );
        assert_eq!(disks[5].source, DiskSource::Network { protocol: "vhostuser".into(), name: "/s.sock".into() });
    }

    #[test]
    fn bad_domains_are_errors_that_say_what_is_wrong() {
        for (text, part) in [
            ("", "XML"),
            ("<domain>", "XML"),
            ("<network><name>x</name></network>", "expected <domain>"),
            ("<domain/>", "<name> is missing"),
            ("<domain><name>x</name><uuid>zz</uuid></domain>", "<uuid>"),
            ("<domain><name>x</name><devices><disk/></devices></domain>", "<target"),
            ("<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>", "XML"),
        ] {
            let error = DomainXml::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(DomainXml::parse(&format!("<domain>{}</domain>", "<a/>".repeat(MAX_NODES as usize))).is_err());
    }

    #[test]
    fn a_deep_backing_chain_is_cut_not_followed_forever() {
        let layers = |count: usize| {
            let open = "<backingStore type='file'><source file='/b'/>".repeat(count);
            let close = "</backingStore>".repeat(count);
            format!(
                "<domain><name>x</name><devices><disk type='file'><source file='/t'/><target dev='vda'/>{open}{close}</disk>\
                 </devices></domain>"
            )
        };
        assert_eq!(DomainXml::parse(&layers(300)).unwrap().disks[0].disk.backing.len(), MAX_CHAIN);
        assert!(DomainXml::parse(&layers(600)).unwrap_err().to_string().contains("nested too deeply"));
    }

    #[test]
    fn a_checkpoint() {
        let text = "<domaincheckpoint><name>c2</name><parent><name>c1</name></parent><creationTime>17</creationTime>
            <disks><disk name='vda' checkpoint='bitmap' bitmap='c2'/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
        let checkpoint = CheckpointXml::parse(text).unwrap();
        assert_eq!((checkpoint.name.as_str(), checkpoint.created_unix_s), ("c2", 17));
        assert_eq!((checkpoint.parent.as_deref(), checkpoint.targets), (Some("c1"), vec!["vda".to_owned()]));
    }
}
