//! QMP through libvirt, and the dirty bitmaps of a domain's disks.
//!
//! libvirt does not tell which node of QEMU's block graph belongs to a disk. `query-block` gives each guest device with
//! its QOM path, whose components include libvirt's device alias, and the node on top. While a job runs that top node
//! can be a filter (copy-before-write, mirror), which reports the file name of what is below it; the disk's own node is
//! then the one of `query-named-block-nodes` with that file name and the disk's format.

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Fault;
use super::ffi::Domain;
use crate::xml::{DiskXml, DomainXml};
use crate::{DiskBitmap, ErrorKind};

/// A guest device in `query-block`.
#[derive(Deserialize)]
struct BlockDevice {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<Node>,
}

/// A node of the block graph.
#[derive(Clone, Deserialize)]
struct Node {
    #[serde(rename = "node-name", default)]
    name: String,
    #[serde(default)]
    drv: String,
    #[serde(default)]
    file: String,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<Bitmap>,
    image: Option<Image>,
}

#[derive(Clone, Deserialize)]
struct Image {
    #[serde(rename = "virtual-size")]
    bytes: u64,
}

#[derive(Clone, Deserialize)]
struct Bitmap {
    name: Option<String>,
    #[serde(default)]
    granularity: u64,
    #[serde(default)]
    count: u64,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    inconsistent: bool,
    #[serde(default)]
    busy: bool,
}

/// Drivers that sit on top of a disk's own node without being it.
const FILTERS: [&str; 7] =
    ["copy-before-write", "mirror_top", "commit_top", "backup-top", "throttle", "copy-on-read", "preallocate"];

/// Sends one command and returns QEMU's `return` value.
pub(super) fn command(domain: &Domain, command: &Value) -> Result<Value, Fault> {
    value(&domain.monitor(&command.to_string())?)
}

/// The `return` value of an answer.
fn value(answer: &str) -> Result<Value, Fault> {
    let mut answer: Value = serde_json::from_str(answer)
        .map_err(|e| Fault::new(ErrorKind::Other, format!("QEMU's answer is no JSON: {e}")))?;
    if let Some(error) = answer.get("error") {
        let class = error.get("class").and_then(Value::as_str).unwrap_or_default();
        let text = error.get("desc").and_then(Value::as_str).unwrap_or("QEMU refused the command");
        let kind = match class {
            "CommandNotFound" => ErrorKind::Unsupported,
            _ if text.contains("is currently in use") || text.contains("is in use by") => ErrorKind::Busy,
            _ => ErrorKind::Invalid,
        };
        return Err(Fault::new(kind, text));
    }
    Ok(answer.get_mut("return").map_or(Value::Null, Value::take))
}

fn query<T: for<'de> Deserialize<'de>>(domain: &Domain, name: &str, arguments: Option<Value>) -> Result<T, Fault> {
    let mut request = json!({ "execute": name });
    if let Some(arguments) = arguments {
        request["arguments"] = arguments;
    }
    serde_json::from_value(command(domain, &request)?)
        .map_err(|e| Fault::new(ErrorKind::Other, format!("{name}: unexpected answer from QEMU: {e}")))
}

/// Every named bitmap of every disk.
pub(super) fn bitmaps(domain: &Domain) -> Result<Vec<DiskBitmap>, Fault> {
    let mut all = Vec::new();
    for (target, node) in disk_nodes(domain)? {
        all.extend(node.bitmaps.into_iter().filter_map(|b| {
            Some(DiskBitmap {
                target: target.clone(),
                name: b.name?,
                granularity_bytes: b.granularity,
                persistent: b.persistent,
                recording: b.recording,
                inconsistent: b.inconsistent,
                busy: b.busy,
                dirty_bytes: b.count,
            })
        }));
    }
    Ok(all)
}

/// Every disk's size in bytes.
pub(super) fn sizes(domain: &Domain) -> Result<Vec<(String, u64)>, Fault> {
    let nodes = disk_nodes(domain)?.into_iter();
    Ok(nodes.filter_map(|(target, node)| Some((target, node.image?.bytes))).collect())
}

/// Removes one bitmap of one disk.
pub(super) fn bitmap_remove(domain: &Domain, target: &str, bitmap: &str) -> Result<(), Fault> {
    let node = disk_nodes(domain)?
        .into_iter()
        .find_map(|(t, node)| (t == target).then_some(node))
        .ok_or_else(|| Fault::new(ErrorKind::Invalid, format!("no disk {target}")))?;
    let arguments = json!({ "node": node.name, "name": bitmap });
    command(domain, &json!({ "execute": "block-dirty-bitmap-remove", "arguments": arguments })).map(drop)
}

/// Each disk's target with the node of its active layer.
fn disk_nodes(domain: &Domain) -> Result<Vec<(String, Node)>, Fault> {
    let xml = DomainXml::parse(&domain.xml(0)?)?;
    let devices: Vec<BlockDevice> = query(domain, "query-block", None)?;
    let named: Vec<Node> = query(domain, "query-named-block-nodes", Some(json!({ "flat": true })))?;
    Ok(match_nodes(&xml.disks, &devices, &named))
}

fn match_nodes(disks: &[DiskXml], devices: &[BlockDevice], named: &[Node]) -> Vec<(String, Node)> {
    disks
        .iter()
        .filter_map(|disk| {
            let alias = disk.alias.as_deref()?;
            let top = devices.iter().find(|d| belongs(d, alias))?.inserted.as_ref()?;
            let own = match FILTERS.contains(&top.drv.as_str()) {
                false => named.iter().find(|n| n.name == top.name).unwrap_or(top),
                true => named.iter().find(|n| n.file == top.file && n.drv == disk.disk.format)?,
            };
            Some((disk.disk.target.clone(), own.clone()))
        })
        .collect()
}

/// Reads an answer, whatever it is, in every way in which answers are read.
pub(super) fn any(answer: &str) {
    let Ok(value) = value(answer) else { return };
    let named: Vec<Node> = serde_json::from_value(value.clone()).unwrap_or_default();
    if let Ok(devices) = serde_json::from_value::<Vec<BlockDevice>>(value) {
        let xml = "<domain><name>x</name><devices><disk><driver type='qcow2'/><target dev='vda'/><alias name='scsi0'/></disk>\
                   </devices></domain>";
        let disks = DomainXml::parse(xml).map(|domain| domain.disks).unwrap_or_default();
        assert!(match_nodes(&disks, &devices, &named).len() <= disks.len());
    }
}

/// Whether a guest device is the one with this alias: a component of its QOM path, or its drive's name before -blockdev.
fn belongs(device: &BlockDevice, alias: &str) -> bool {
    device.qdev.as_deref().is_some_and(|q| q.split('/').any(|part| part == alias))
        || device.device.strip_prefix("drive-") == Some(alias)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> Vec<DiskXml> {
        let text = "<domain><name>x</name><devices>
            <disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/><alias name='virtio-disk1'/></disk>
            <disk type='file'><driver type='qcow2'/><source file='/b'/><target dev='vdb'/><alias name='virtio-disk10'/></disk>
            <disk type='file'><driver type='raw'/><source file='/c'/><target dev='sda'/><alias name='scsi0-0-0-0'/></disk>
            <disk type='file' device='cdrom'><target dev='hda'/><alias name='ide0-0-0'/></disk></devices></domain>";
        DomainXml::parse(text).unwrap().disks
    }

    #[test]
    fn disks_find_their_own_node_below_filters_and_beside_similar_aliases() {
        let devices = json!([
            {"device": "", "qdev": "/machine/peripheral/virtio-disk10/virtio-backend",
             "inserted": {"node-name": "libvirt-2-format", "drv": "qcow2", "file": "/b"}},
            {"device": "", "qdev": "/machine/peripheral/virtio-disk1/virtio-backend",
             "inserted": {"node-name": "#block123", "drv": "copy-before-write", "file": "/a"}},
            {"device": "", "qdev": "scsi0-0-0-0",
             "inserted": {"node-name": "libvirt-3-storage", "drv": "file", "file": "/c"}},
            {"device": "", "qdev": "ide0-0-0"}
        ]);
        let named = json!([
            {"node-name": "scratch", "drv": "qcow2", "file": "/s"},
            {"node-name": "libvirt-1-storage", "drv": "file", "file": "/a"},
            {"node-name": "#block123", "drv": "copy-before-write", "file": "/a"},
            {"node-name": "libvirt-1-format", "drv": "qcow2", "file": "/a",
             "dirty-bitmaps": [{"name": "c1", "granularity": 65536, "count": 7, "persistent": true, "recording": true}]},
            {"node-name": "libvirt-2-format", "drv": "qcow2", "file": "/b"},
            {"node-name": "libvirt-3-storage", "drv": "file", "file": "/c"}
        ]);
        let devices: Vec<BlockDevice> = serde_json::from_value(devices).unwrap();
        let named: Vec<Node> = serde_json::from_value(named).unwrap();
        let found = match_nodes(&disks(), &devices, &named);
        let found: Vec<_> = found.iter().map(|(t, n)| (t.as_str(), n.name.as_str(), n.bitmaps.len())).collect();
        assert_eq!(
            found,
            [("vda", "libvirt-1-format", 1), ("vdb", "libvirt-2-format", 0), ("sda", "libvirt-3-storage", 0)]
        );
    }
}
