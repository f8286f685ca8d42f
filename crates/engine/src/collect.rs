//! From the hypervisor to facts: what a host has, in nouns that decisions can be made from.
//!
//! Everything that comes from a domain's XML is somebody else's text: bounded, never trusted to be well-formed, and a
//! domain whose XML makes no sense is still a VM with a name and disks.
//!
//! Tags and values that policies select by are kept in libvirt's own metadata, so that they move with the VM:
//!
//! ```text
//! virsh metadata web1 --uri https://github.com/virtward/virtward/vm --key virtward --config \
//!     --set '<vm><tag>gold</tag><value key="owner">finance</value></vm>'
//! ```
//!
//! Leaf elements of other tools' metadata are values too, by their local names. Not here: when to look again.

use std::collections::BTreeMap;

use roxmltree::{Document, Node, ParsingOptions};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtward_hypervisor::{Hypervisor, XmlView};
use virtward_model::xml::is_shallow;

/// Namespace of our metadata.
pub const METADATA_URI: &str = "https://github.com/virtward/virtward/vm";
const XML_BYTES_MAX: usize = 4 << 20;
const NODES_MAX: u32 = 100_000;
const VALUES_MAX: usize = 256;
const TEXT_BYTES_MAX: usize = 1024;

/// What a domain's definition says besides its disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// libvirt's title.
    pub title: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Values of the metadata.
    pub metadata: BTreeMap<String, String>,
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Network interfaces.
    pub networks: Vec<Nic>,
    /// It has a channel for the guest agent.
    pub has_agent_channel: bool,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// Bridge or network.
    pub source: Option<String>,
    /// MAC address.
    pub mac: Option<String>,
    /// Model.
    pub model: Option<String>,
}

/// Asks for a domain's definition and reads it; what cannot be read is empty.
pub async fn details(hypervisor: &dyn Hypervisor, vm: Uuid) -> Details {
    match hypervisor.xml(vm, XmlView::Inactive).await {
        Ok(xml) => parse(&xml),
        Err(error) => {
            tracing::debug!(%vm, %error, "no definition to read details from");
            Details::default()
        }
    }
}

fn document(xml: &str) -> Option<Document<'_>> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX };
    (xml.len() <= XML_BYTES_MAX && is_shallow(xml)).then(|| Document::parse_with_options(xml, options))?.ok()
}

/// Reads a domain's XML; what cannot be read is empty.
pub fn parse(xml: &str) -> Details {
    let Some(document) = document(xml) else { return Details::default() };
    let root = document.root_element();
    let mut details = Details {
        title: text(root, "title"),
        vcpus: text(root, "vcpu").and_then(|text| text.parse().ok()),
        memory_bytes: child(root, "memory").and_then(memory),
        ..Details::default()
    };
    for node in child(root, "devices").into_iter().flat_map(|devices| devices.children()) {
        match node.tag_name().name() {
            "interface" => details.networks.push(nic(node)),
            "channel" => details.has_agent_channel |= agent_target(node).is_some(),
            _ => {}
        }
    }
    if let Some(metadata) = child(root, "metadata") {
        values(metadata, &mut details);
    }
    details.tags.sort_unstable();
    details.tags.dedup();
    details
}

/// The end of a channel that belongs to the guest agent.
fn agent_target<'a, 'b>(channel: Node<'a, 'b>) -> Option<Node<'a, 'b>> {
    child(channel, "target").filter(|target| target.attribute("name") == Some("org.qemu.guest_agent.0"))
}

/// Whether the guest's agent is connected, as the XML of a running domain says.
pub fn is_agent_connected(xml: &str) -> Option<bool> {
    let document = document(xml)?;
    let mut channels = child(document.root_element(), "devices")?.children();
    Some(channels.find_map(agent_target)?.attribute("state")? == "connected")
}

fn values(metadata: Node<'_, '_>, details: &mut Details) {
    for node in metadata.descendants().filter(Node::is_element) {
        let is_ours = node.tag_name().namespace() == Some(METADATA_URI);
        let Some(value) = node.text().map(str::trim).filter(|value| !value.is_empty()) else { continue };
        if value.len() > TEXT_BYTES_MAX || details.tags.len() + details.metadata.len() >= VALUES_MAX {
            continue;
        }
        let name = node.tag_name().name();
        match (is_ours, name, node.attribute("key")) {
            (true, "tag", _) => details.tags.push(value.to_owned()),
            (true, "value", Some(key)) => {
                details.metadata.insert(key.to_owned(), value.to_owned());
            }
            (true, ..) => {}
            (false, ..) => {
                details.metadata.entry(name.to_owned()).or_insert_with(|| value.to_owned());
            }
        }
    }
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text(node: Node<'_, '_>, name: &str) -> Option<String> {
    let text = child(node, name)?.text()?.trim();
    (!text.is_empty() && text.len() <= TEXT_BYTES_MAX).then(|| text.to_owned())
}

fn memory(node: Node<'_, '_>) -> Option<u64> {
    let number: u64 = node.text()?.trim().parse().ok()?;
    let unit = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KiB" | "K" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

fn nic(node: Node<'_, '_>) -> Nic {
    let attribute = |name: &str, key: &str| child(node, name)?.attribute(key).map(str::to_owned);
    Nic {
        source: attribute("source", "network").or_else(|| attribute("source", "bridge")),
        mac: attribute("mac", "address"),
        model: attribute("model", "type"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_says_what_policies_and_people_ask_for() {
        let xml = format!(
            "<domain type='kvm'><name>web1</name><title>Shop</title><memory unit='MiB'>512</memory><vcpu>2</vcpu>\
             <metadata><v:vm xmlns:v='{METADATA_URI}'><v:tag>gold</v:tag><v:tag>db</v:tag><v:tag>gold</v:tag>\
             <v:value key='owner'>finance</v:value></v:vm>\
             <o:os xmlns:o='http://libosinfo.org/x'><o:id>debian</o:id></o:os></metadata>\
             <devices><interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>\
             <model type='virtio'/></interface>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"
        );
        let details = parse(&xml);
        assert_eq!(details.tags, ["db", "gold"]);
        assert_eq!(details.metadata["owner"], "finance");
        assert_eq!(details.metadata["id"], "debian");
        assert_eq!((details.vcpus, details.memory_bytes), (Some(2), Some(512 << 20)));
        assert_eq!(details.title.as_deref(), Some("Shop"));
        assert_eq!(details.networks[0].source.as_deref(), Some("br0"));
        assert!(details.has_agent_channel);
    }

    #[test]
    fn a_running_domain_says_whether_its_agent_is_there() {
        let with = |state: &str| {
            is_agent_connected(&format!(
                "<domain><devices><channel type='pty'><target type='virtio' name='other' state='connected'/></channel>\
                 <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'{state}/></channel></devices></domain>"
            ))
        };
        assert_eq!(with(" state='connected'"), Some(true));
        assert_eq!(with(" state='disconnected'"), Some(false));
        assert_eq!((with(""), is_agent_connected("<domain/>"), is_agent_connected("<")), (None, None, None));
    }

    #[test]
    fn nonsense_is_no_details_and_no_panic() {
        for xml in ["", "<", "<domain>", "<!DOCTYPE x [<!ENTITY a 'b'>]><domain><title>&a;</title></domain>"] {
            assert_eq!(parse(xml), Details::default(), "{xml}");
        }
        let many: String = (0..1000).map(|n| format!("<v:tag>t{n}</v:tag>")).collect();
        let xml = format!("<domain><metadata><v:vm xmlns:v='{METADATA_URI}'>{many}</v:vm></metadata></domain>");
        assert_eq!(parse(&xml).tags.len(), VALUES_MAX);
    }
}
