//! From the definition in a restore point to the definition of the restored VM. Pure, apart from the random identity
//! that the caller passes in.

use std::collections::HashMap;

use uuid::Uuid;
use virtward_model::xml::is_shallow;
use xmltree::{Element, XMLNode};

use crate::{Error, Result};

/// Where a disk of the restored VM is.
pub(super) struct PlacedDisk {
    pub target: String,
    pub path: String,
    pub format: String,
}

/// What changes in the definition.
pub(super) struct Rewrite<'a> {
    pub name: &'a str,
    pub uuid: Uuid,
    /// A VM beside the original: MAC addresses and whatever else must be unique are made anew, from the UUID.
    pub copy: bool,
    pub disks: &'a [PlacedDisk],
    pub nvram: Option<String>,
    /// Whether a file that the definition mentions exists on this host.
    pub exists: &'a (dyn Fn(&str) -> bool + Sync),
}

/// The new definition and what the operator should know about it.
pub(super) fn rewrite(xml: &str, change: &Rewrite<'_>) -> Result<(String, Vec<String>)> {
    let broken = |error: &dyn std::fmt::Display| {
        Error::Refused(format!(
            "the definition in the restore point cannot be read ({error}); restore its disks one by one with: \
             virtward restore disk"
        ))
    };
    if !is_shallow(xml) {
        return Err(broken(&"its elements are nested too deeply"));
    }
    let mut domain = Element::parse(xml.as_bytes()).map_err(|error| broken(&error))?;
    if domain.name != "domain" {
        return Err(broken(&"it is no domain"));
    }
    let mut warnings = Vec::new();
    domain.attributes.remove("id");
    set_text(&mut domain, "name", change.name);
    set_text(&mut domain, "uuid", &change.uuid.to_string());
    if change.copy {
        new_identity(&mut domain, change.uuid);
    }
    if let (Some(path), Some(os)) = (&change.nvram, domain.get_mut_child("os")) {
        match os.get_mut_child("nvram").and_then(|nvram| nvram.get_mut_child("source")) {
            Some(source) => {
                source.attributes.insert("file".into(), path.clone());
            }
            None => set_text(os, "nvram", path),
        }
    }
    let devices = domain.get_mut_child("devices").ok_or_else(|| broken(&"it has no devices"))?;
    disks(devices, change, &mut warnings);
    for backend in children(devices, "tpm").flat_map(|tpm| children(tpm, "backend")) {
        // Its state is put where libvirt looks unless told otherwise, apart from that of every other VM.
        backend.take_child("source");
    }
    if change.copy {
        interfaces(devices, change.uuid);
        for channel in children(devices, "channel") {
            // Paths that contain the old VM's name; libvirt makes new ones.
            if channel.attributes.get("type").is_some_and(|kind| kind == "unix") {
                channel.take_child("source");
            }
        }
    }
    let mut out = Vec::new();
    let config = xmltree::EmitterConfig::new().perform_indent(true).write_document_declaration(false);
    domain.write_with_config(&mut out, config).map_err(|error| broken(&error))?;
    Ok((String::from_utf8_lossy(&out).into_owned(), warnings))
}

/// Rewrites a definition, whatever it is, in place and as a copy; for fuzzing.
pub(super) fn any(xml: &str) {
    for copy in [false, true] {
        let disks = [PlacedDisk { target: "vda".into(), path: "/a&b".into(), format: "qcow2".into() }];
        let nvram = Some("/n".to_owned());
        let change = Rewrite { name: "a<b", uuid: Uuid::nil(), copy, disks: &disks, nvram, exists: &|_| true };
        if let Ok((written, _)) = rewrite(xml, &change) {
            assert!(Element::parse(written.as_bytes()).is_ok_and(|domain| domain.name == "domain"), "{written}");
        }
    }
}

fn children<'a>(parent: &'a mut Element, name: &'a str) -> impl Iterator<Item = &'a mut Element> {
    parent.children.iter_mut().filter_map(XMLNode::as_mut_element).filter(move |child| child.name == name)
}

fn set_text(parent: &mut Element, name: &str, text: &str) {
    if parent.get_child(name).is_none() {
        parent.children.push(XMLNode::Element(Element::new(name)));
    }
    if let Some(child) = parent.get_mut_child(name) {
        child.children = vec![XMLNode::Text(text.to_owned())];
    }
}

fn new_identity(domain: &mut Element, uuid: Uuid) {
    if domain.get_child("genid").is_some() {
        // The guest must notice that it is a copy.
        set_text(domain, "genid", &Uuid::new_v5(&uuid, b"genid").to_string());
    }
    for sysinfo in children(domain, "sysinfo") {
        for system in children(sysinfo, "system") {
            for entry in children(system, "entry")
                .filter(|entry| entry.attributes.get("name").is_some_and(|name| name == "uuid"))
            {
                entry.children = vec![XMLNode::Text(uuid.to_string())];
            }
        }
    }
}

fn interfaces(devices: &mut Element, uuid: Uuid) {
    for (index, interface) in children(devices, "interface").enumerate() {
        let Some(mac) = interface.get_mut_child("mac") else { continue };
        let bytes = Uuid::new_v5(&uuid, format!("mac{index}").as_bytes());
        let [a, b, c, ..] = *bytes.as_bytes();
        mac.attributes.insert("address".into(), format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"));
    }
}

fn disks(devices: &mut Element, change: &Rewrite<'_>, warnings: &mut Vec<String>) {
    let placed: HashMap<&str, &PlacedDisk> = change.disks.iter().map(|disk| (disk.target.as_str(), disk)).collect();
    let mut found = Vec::new();
    devices.children.retain_mut(|node| {
        let Some(disk) = node.as_mut_element().filter(|element| element.name == "disk") else { return true };
        let target =
            disk.get_child("target").and_then(|target| target.attributes.get("dev").cloned()).unwrap_or_default();
        match placed.get(target.as_str()) {
            Some(place) => {
                found.push(target);
                place_disk(disk, place, warnings);
                true
            }
            None => keep_other(disk, &target, change, warnings),
        }
    });
    for disk in change.disks.iter().filter(|disk| !found.contains(&disk.target)) {
        warnings.push(format!(
            "disk {} was attached to the running VM only; it was restored to {} and is not in the definition",
            disk.target, disk.path
        ));
    }
}

fn place_disk(disk: &mut Element, place: &PlacedDisk, warnings: &mut Vec<String>) {
    disk.attributes.insert("type".into(), "file".into());
    for gone in ["backingStore", "mirror", "auth"] {
        while disk.take_child(gone).is_some() {}
    }
    let encrypted = disk.take_child("encryption").is_some()
        || disk.get_child("source").is_some_and(|source| source.get_child("encryption").is_some());
    if encrypted {
        warnings.push(format!("disk {} was encrypted at the source; the restored file is not", place.target));
    }
    disk.take_child("source");
    let mut source = Element::new("source");
    source.attributes.insert("file".into(), place.path.clone());
    disk.children.push(XMLNode::Element(source));
    match disk.get_mut_child("driver") {
        Some(driver) => {
            driver.attributes.insert("type".into(), place.format.clone());
        }
        None => {
            let mut driver = Element::new("driver");
            driver.attributes.insert("name".into(), "qemu".into());
            driver.attributes.insert("type".into(), place.format.clone());
            disk.children.push(XMLNode::Element(driver));
        }
    }
}

/// A disk that is not in the restore point. Removable media stay, emptied where the medium is not here; a writable disk
/// must never be shared with the VM that it still belongs to.
fn keep_other(disk: &mut Element, target: &str, change: &Rewrite<'_>, warnings: &mut Vec<String>) -> bool {
    let path = disk
        .get_child("source")
        .and_then(|source| source.attributes.get("file").or_else(|| source.attributes.get("dev")).cloned());
    let here = path.as_deref().is_none_or(|path| (change.exists)(path));
    let removable = disk.attributes.get("device").is_some_and(|device| device == "cdrom" || device == "floppy");
    if removable {
        if !here {
            disk.take_child("source");
            disk.attributes.insert("type".into(), "file".into());
            warnings.push(format!("drive {target} is empty: its medium is not on this host"));
        }
        return true;
    }
    let read_only = disk.get_child("readonly").is_some();
    let keep = here && (read_only || !change.copy);
    if !keep {
        warnings.push(format!("disk {target} is not in the restore point and was left out of the definition"));
    }
    keep
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
        <name>web1</name><uuid>11111111-2222-3333-4444-555555555555</uuid><genid>a</genid>\
        <metadata><v:tags xmlns:v='urn:v'>gold</v:tags></metadata>\
        <sysinfo type='smbios'><system><entry name='uuid'>old</entry></system></sysinfo>\
        <os><nvram>/nvram/web1_VARS.fd</nvram></os><devices>\
        <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='/dev/vg/web1'/>\
        <backingStore/><target dev='vda' bus='virtio'/><serial>s1</serial></disk>\
        <disk type='file' device='disk'><source file='/images/data'/><target dev='vdb'/></disk>\
        <disk type='file' device='cdrom'><source file='/iso/gone.iso'/><target dev='sda'/><readonly/></disk>\
        <interface type='network'><mac address='52:54:00:00:00:01'/></interface>\
        <interface type='network'><mac address='52:54:00:00:00:02'/></interface>\
        </devices><qemu:commandline><qemu:arg value='-foo'/></qemu:commandline></domain>";

    fn placed() -> Vec<PlacedDisk> {
        vec![PlacedDisk { target: "vda".into(), path: "/new/a&b.qcow2".into(), format: "qcow2".into() }]
    }

    fn run(name: &str, identity: Option<Uuid>) -> (String, Vec<String>) {
        let disks = placed();
        let change = Rewrite {
            name,
            uuid: identity.unwrap_or_else(|| "11111111-2222-3333-4444-555555555555".parse().unwrap()),
            copy: identity.is_some(),
            disks: &disks,
            nvram: identity.map(|_| "/n".into()),
            exists: &|p| p == "/images/data",
        };
        rewrite(XML, &change).unwrap()
    }

    #[test]
    fn a_copy_gets_its_own_identity_and_never_shares_a_disk() {
        let uuid = Uuid::from_u128(42);
        let (xml, warnings) = run("web1-copy", Some(uuid));
        for part in [
            "<name>web1-copy</name>",
            &format!("<uuid>{uuid}</uuid>"),
            "file=\"/new/a&amp;b.qcow2\"",
            "type=\"qcow2\"",
            "cache=\"none\"",
            "<serial>s1</serial>",
            "<nvram>/n</nvram>",
            "gold",
            "qemu:arg",
        ] {
            assert!(xml.contains(part), "{part} not in {xml}");
        }
        for part in
            ["id=\"7\"", "/dev/vg/web1", "backingStore", "00:00:01", "00:00:02", "/images/data", "gone.iso", ">old<"]
        {
            assert!(!xml.contains(part), "{part} in {xml}");
        }
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        let address = |xml: &str| xml[xml.find("52:54:00").unwrap()..][..17].to_owned();
        let again = run("web1-copy", Some(uuid)).0;
        assert_eq!(address(&again), address(&xml), "the same identity gives the same addresses");
    }

    #[test]
    fn a_restore_in_place_keeps_the_identity() {
        let (xml, _) = run("web1", None);
        for part in ["11111111-2222-3333-4444-555555555555", "52:54:00:00:00:01", "/images/data", "/nvram/web1_VARS.fd"]
        {
            assert!(xml.contains(part), "{part}");
        }
    }

    #[test]
    fn damaged_definitions_are_refused_with_a_way_out() {
        let change = Rewrite { name: "x", uuid: Uuid::nil(), copy: false, disks: &[], nvram: None, exists: &|_| true };
        for xml in ["", "<domain>", "<pool/>", "<domain/>"] {
            let error = rewrite(xml, &change).err().unwrap().to_string();
            assert!(error.contains("restore disk"), "{error}");
        }
    }
}
