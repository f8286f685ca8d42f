//! Entry points that feed arbitrary bytes to the parsers, for the fuzz targets and for tests alike.

use crate::{
    libvirt,
    xml::{CheckpointXml, DomainXml, host_uuid},
};

/// Definitions, checkpoints and capabilities as libvirt gives them.
pub fn definitions(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(domain) = DomainXml::parse(text) {
        assert!(domain.disks.iter().all(|disk| text.len() >= disk.disk.target.len()));
    }
    let _ = CheckpointXml::parse(text);
    let _ = host_uuid(text);
}

/// What QEMU's monitor and a guest's agent answer.
pub fn answers(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    libvirt::any_answer(text);
}

#[cfg(test)]
mod tests {
    const DOMAIN: &str = "<domain type='kvm' id='3'><name>a&amp;b</name><uuid>5d1e6a52-7f0c-4a6e-9d3b-2f4b8c1d0e9f</uuid>\
        <memory unit='MiB'>64</memory><vcpu>2</vcpu><devices><disk type='network' device='lun'><driver type='raw'/>\
        <source protocol='rbd' name='p/i'><host name='h' port='1'/></source><target dev='sda' bus='scsi'/>\
        <alias name='scsi0'/><backingStore type='file'><format type='qcow2'/><source file='/b'/></backingStore></disk>\
        </devices></domain>";
    const ANSWERS: [&str; 3] = [
        r#"{"return":2}"#,
        r#"{"error":{"class":"GenericError","desc":"is in use by"}}"#,
        r#"{"return":[{"device":"","qdev":"/machine/scsi0","inserted":{"node-name":"n","drv":"mirror_top","file":"/a",
           "dirty-bitmaps":[{"name":"b","granularity":65536,"count":7}]}}]}"#,
    ];

    /// Cut at every place, and with every byte replaced by some others.
    fn spoilt(text: &str, mut each: impl FnMut(&[u8])) {
        for at in 0..text.len() {
            each(&text.as_bytes()[..at]);
            for with in *b"<>&'\"/{}[]0-\xff" {
                let mut bytes = text.as_bytes().to_vec();
                bytes[at] = with;
                each(&bytes);
            }
        }
    }

    #[test]
    fn nothing_that_libvirt_qemu_or_an_agent_says_makes_the_driver_panic() {
        spoilt(DOMAIN, super::definitions);
        ANSWERS.iter().for_each(|answer| spoilt(answer, super::answers));
        super::definitions("<a>".repeat(200_000).as_bytes());
        super::answers("[".repeat(200_000).as_bytes());
    }
}
