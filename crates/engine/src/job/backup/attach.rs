//! What belongs to a VM besides its disks: definition, NVRAM, TPM state.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use virtward_hypervisor::XmlView;
use virtward_model::{Vm, xml::is_shallow};
use virtward_repo::Attachment;

use crate::{Env, Error, Result};

/// The definition that the next start would use.
pub(crate) const DOMAIN_XML: &str = "domain.xml";
/// The definition of the running instance, where it differs.
pub(crate) const LIVE_XML: &str = "domain-live.xml";
/// UEFI variables.
pub(crate) const NVRAM: &str = "nvram";
/// Prefix of the files of an emulated TPM.
pub(crate) const TPM: &str = "tpm/";
/// No NVRAM or TPM file is anywhere near this large; more is not read.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Where libvirt keeps the state of an emulated TPM.
pub(crate) fn tpm_dir(vm: Uuid) -> PathBuf {
    Path::new("/var/lib/libvirt/swtpm").join(vm.to_string())
}

fn document(xml: &str) -> Option<roxmltree::Document<'_>> {
    is_shallow(xml).then(|| roxmltree::Document::parse(xml).ok())?
}

/// Path of the NVRAM file that a definition names.
pub(crate) fn nvram_path(xml: &str) -> Option<String> {
    let document = document(xml)?;
    let os = document.root_element().children().find(|node| node.has_tag_name("os"))?;
    let nvram = os.children().find(|node| node.has_tag_name("nvram"))?;
    // <nvram>PATH</nvram>, or <nvram type='file'><source file='PATH'/></nvram>.
    let source = nvram.children().find(|node| node.has_tag_name("source")).and_then(|node| node.attribute("file"));
    source.or(nvram.text()).map(str::trim).filter(|path| path.starts_with('/')).map(str::to_owned)
}

/// An emulated TPM, by the definition of its VM.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TpmState {
    /// The directory of its state, where that is not libvirt's own.
    pub dir: Option<String>,
    /// Why its state does not suffice to bring it back.
    pub lacks: Option<String>,
}

impl TpmState {
    /// None where the VM has no emulated TPM.
    pub(crate) fn of(xml: &str) -> Option<Self> {
        let document = document(xml)?;
        let devices = document.root_element().children().find(|node| node.has_tag_name("devices"))?;
        let backend = devices
            .children()
            .filter(|node| node.has_tag_name("tpm"))
            .flat_map(|tpm| tpm.children())
            .find(|node| node.has_tag_name("backend") && node.attribute("type") == Some("emulator"))?;
        let child = |name: &str| backend.children().find(|node| node.has_tag_name(name));
        let mut state = Self::default();
        if let Some(path) = child("source").and_then(|source| source.attribute("path")) {
            match child("source").and_then(|source| source.attribute("type")) {
                Some("dir") => state.dir = Some(path.to_owned()),
                _ => state.lacks = Some(format!("the TPM's state is in {path}, which is not read; copy it yourself")),
            }
        }
        if let Some(secret) = child("encryption").and_then(|encryption| encryption.attribute("secret")) {
            state.lacks = Some(format!(
                "the TPM's state is encrypted with libvirt's secret {secret}, which no backup holds; keep it elsewhere \
                 (virsh secret-get-value {secret})"
            ));
        }
        Some(state)
    }
}

/// User and group that QEMU runs as, from the label that libvirt gave the running domain.
pub(crate) fn qemu_owner(live_xml: &str) -> Option<(u32, u32)> {
    let document = document(live_xml)?;
    let dac = document
        .root_element()
        .children()
        .find(|node| node.has_tag_name("seclabel") && node.attribute("model") == Some("dac"))?;
    let label = dac.children().find(|node| node.has_tag_name("label"))?.text()?;
    let (user, group) = label.split_once(':')?;
    Some((user.trim_start_matches('+').parse().ok()?, group.trim_start_matches('+').parse().ok()?))
}

/// Reads everything that belongs to the VM. What cannot be read, but exists, is a warning: disks without their NVRAM
/// are worth more than no backup.
pub(super) async fn gather(env: &Env, vm: &Vm, warnings: &mut Vec<String>) -> Result<Vec<Attachment>> {
    let context = || format!("read the definition of {}", vm.name);
    let live = async {
        match vm.state.is_active() {
            true => env.hypervisor.xml(vm.uuid, XmlView::Live).await.map(Some),
            false => Ok(None),
        }
    };
    let (xml, live) =
        futures::try_join!(env.hypervisor.xml(vm.uuid, XmlView::Inactive), live).map_err(Error::hyper(context()))?;
    let mut attachments = Vec::new();
    attachments.extend(live.map(|live| attachment(LIVE_XML, live.into_bytes())));
    if let Some(path) = nvram_path(&xml) {
        match read_bounded(Path::new(&path)) {
            Ok(bytes) => attachments.push(attachment(NVRAM, bytes)),
            // A VM that never ran has none yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !vm.state.is_active() => {}
            Err(error) => warnings.push(format!("NVRAM {path} is not in this restore point: {error}")),
        }
    }
    tpm(vm, &xml, &mut attachments, warnings);
    attachments.insert(0, attachment(DOMAIN_XML, xml.into_bytes()));
    Ok(attachments)
}

fn attachment(name: &str, bytes: Vec<u8>) -> Attachment {
    Attachment { name: name.to_owned(), bytes }
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let length = std::fs::metadata(path)?.len();
    if length > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("{length} bytes is too large to be what it claims")));
    }
    std::fs::read(path)
}

fn tpm(vm: &Vm, xml: &str, attachments: &mut Vec<Attachment>, warnings: &mut Vec<String>) {
    let state = TpmState::of(xml);
    let dir = state.as_ref().and_then(|tpm| tpm.dir.as_ref()).map_or_else(|| tpm_dir(vm.uuid), PathBuf::from);
    let before = attachments.len();
    if let Err(error) = tpm_files(&dir, attachments) {
        warnings.push(format!("the TPM state is not in this restore point: {error}"));
    }
    let Some(TpmState { lacks, .. }) = state else { return };
    // A VM that never ran has none yet.
    match lacks {
        Some(lacks) => warnings.push(lacks),
        None if attachments.len() == before && vm.state.is_active() => warnings.push(format!(
            "the TPM state is not in this restore point: there is none in {}; back the VM up on its own host",
            dir.display()
        )),
        None => {}
    }
}

fn tpm_files(dir: &Path, attachments: &mut Vec<Attachment>) -> std::io::Result<()> {
    // Layout: <uuid>/tpm1.2/tpm-00.permall or <uuid>/tpm2/tpm2-00.permall; one level of directories.
    let Ok(versions) = std::fs::read_dir(dir) else { return Ok(()) };
    for version in versions {
        let version = version?;
        if !version.file_type()?.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(version.path())? {
            let file = file?;
            let (Some(folder), Some(name)) =
                (version.file_name().to_str().map(str::to_owned), file.file_name().to_str().map(str::to_owned))
            else {
                continue;
            };
            if file.file_type()?.is_file() && !name.starts_with('.') {
                let bytes = read_bounded(&file.path())?;
                attachments.push(Attachment { name: format!("{TPM}{folder}/{name}"), bytes });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_owners_come_out_of_the_definition() {
        let xml = "<domain><os><nvram template='/x'>/var/lib/libvirt/qemu/nvram/a_VARS.fd</nvram></os>\
                   <seclabel type='dynamic' model='apparmor'><label>libvirt-1</label></seclabel>\
                   <seclabel type='dynamic' model='dac'><label>+64055:+994</label></seclabel></domain>";
        assert_eq!(nvram_path(xml).as_deref(), Some("/var/lib/libvirt/qemu/nvram/a_VARS.fd"));
        assert_eq!(qemu_owner(xml), Some((64055, 994)));
        assert_eq!(nvram_path("<domain><os/></domain>"), None);
        assert_eq!(qemu_owner("not xml"), None);
    }

    #[test]
    fn what_an_emulated_tpm_needs_is_known() {
        let of = |backend: &str| TpmState::of(&format!("<domain><devices><tpm>{backend}</tpm></devices></domain>"));
        assert_eq!(of("<backend type='passthrough'/>"), None);
        assert_eq!(of("<backend type='emulator' version='2.0'/>"), Some(TpmState::default()));
        let elsewhere = of("<backend type='emulator'><source type='dir' path='/tpm'/></backend>").unwrap();
        assert_eq!(elsewhere, TpmState { dir: Some("/tpm".into()), lacks: None });
        let lacks = |backend: &str| of(backend).unwrap().lacks.unwrap();
        assert!(lacks("<backend type='emulator'><source type='file' path='/tpm'/></backend>").contains("/tpm"));
        assert!(lacks("<backend type='emulator'><encryption secret='s-1'/></backend>").contains("s-1"));
    }
}
