//! Entry points that feed arbitrary bytes to the parsers, for the fuzz targets and for tests alike.

use std::{fs, path::Path};

use crate::{
    image::chain::{Chain, magic},
    job,
};

const FORMATS: [&str; 6] = ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"];

/// A disk image of every format, that may name the files beside it. `dir` is the caller's own, and is written to.
pub fn image(dir: &Path, bytes: &[u8]) {
    let path = dir.join("a");
    fs::write(&path, bytes).expect("a file");
    let found = magic(&path).expect("a file that can be read");
    assert!(FORMATS.contains(&found));
    for format in FORMATS {
        let Ok(chain) = Chain::inspect(&path, format) else { continue };
        chain.unchanged().expect("nobody writes to it");
        let _ = chain.node(false).map(|node| assert_eq!(node["driver"], format));
        let _ = chain.checkable();
        assert!(chain.backing().all(|file| file.is_absolute()));
    }
}

/// The definition of a VM in a restore point, as a backup reads it and a restore rewrites it.
pub fn definition(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        job::any_definition(text);
    }
}

#[cfg(test)]
mod tests {
    const DEFINITION: &str = "<domain type='kvm' id='7' xmlns:q='urn:q'><name>web1</name><genid>a</genid>\
        <os><nvram>/nvram/web1_VARS.fd</nvram></os><devices><disk type='block'><driver name='qemu' type='raw'/>\
        <source dev='/dev/vg/web1'/><target dev='vda'/></disk><disk type='file' device='cdrom'><target dev='sda'/>\
        </disk><interface type='network'><mac address='52:54:00:00:00:01'/></interface><tpm model='tpm-crb'>\
        <backend type='emulator' version='2.0'><source type='dir' path='/tpm'/></backend></tpm></devices>\
        <seclabel model='dac'><label>+1:+2</label></seclabel></domain>";
    const DESCRIPTOR: &str = "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"b\" 0\n";

    #[test]
    fn no_definition_and_no_header_makes_a_job_panic() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b"), [0; 4096]).unwrap();
        for at in 0..DEFINITION.len() {
            for with in *b"<>&'\"/ \xff" {
                let mut bytes = DEFINITION.as_bytes().to_vec();
                bytes[at] = with;
                super::definition(&bytes);
            }
        }
        super::definition("<domain>".repeat(100_000).as_bytes());
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        let mut sparse = b"KDMV".to_vec();
        sparse.resize(1024, 0);
        for head in [DESCRIPTOR.as_bytes(), &b"QFI\xfb\0\0\0\x02"[..], b"conectix", b"vhdxfile", &vdi, &sparse] {
            for at in 0..head.len() {
                let mut bytes = head.to_vec();
                bytes[at] = 0xff;
                super::image(dir.path(), &bytes);
                super::image(dir.path(), &bytes[..at]);
            }
        }
    }
}
