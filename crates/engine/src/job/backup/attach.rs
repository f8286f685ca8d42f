//! What belongs to a VM besides its disks: definition, NVRAM, TPM state.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use virtward_hypervisor::XmlView;
use virtward_model::Vm;
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

/// Path of the NVRAM file that a definition names.
pub(crate) fn nvram_path(xml: &str) -> Option<String> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let os = document.root_element().children().find(|node| node.has_tag_name("os"))?;
    let nvram = os.children().find(|node| node.has_tag_name("nvram"))?;
    // <nvram>PATH</nvram>, or <nvram type='file'><source file='PATH'/></nvram>.
    let source = nvram.children().find(|node| node.has_tag_name("source")).and_then(|node| node.attribute("file"));
    source.or(nvram.text()).map(str::trim).filter(|path| path.starts_with('/')).map(str::to_owned)
}

/// User and group that QEMU runs as, from the label that libvirt gave the running domain.
pub(super) fn qemu_owner(live_xml: &str) -> Option<(u32, u32)> {
    let document = roxmltree::Document::parse(live_xml).ok()?;
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
    if let Err(error) = tpm_files(&tpm_dir(vm.uuid), &mut attachments) {
        warnings.push(format!("the TPM state is not in this restore point: {error}"));
    }
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
}
