//! Writing the XML that backup, checkpoint and block copy calls take. Everything from outside is escaped.
//!
//! Every disk of the domain is named in each document: libvirt's defaults for disks left out differ between versions
//! and formats.

use std::fmt::{self, Write};

use crate::{BackupServer, BackupSpec, BlockCopySpec, CheckpointSpec};

/// Text that prints escaped, for attribute values in single quotes and for element content.
struct Esc<'a>(&'a str);

impl fmt::Display for Esc<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '\'' => f.write_str("&apos;")?,
                '"' => f.write_str("&quot;")?,
                // An XML reader would turn these into spaces inside an attribute.
                '\n' | '\r' | '\t' => write!(f, "&#{};", c as u32)?,
                // XML 1.0 cannot carry other control characters in any form.
                c if c < ' ' || c == '\u{fffe}' || c == '\u{ffff}' => f.write_char('\u{fffd}')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// A pull-mode `<domainbackup>`; `targets` are all disks of the domain.
pub(crate) fn backup(spec: &BackupSpec, targets: &[&str]) -> String {
    let server = match &spec.server {
        BackupServer::Unix { path } => format!("<server transport='unix' socket='{}'/>", Esc(path)),
        BackupServer::Tcp { address, port, tls } => {
            let tls = if *tls { " tls='yes'" } else { "" };
            format!("<server transport='tcp'{tls} name='{}' port='{port}'/>", Esc(address))
        }
    };
    let mut disks = String::new();
    for disk in &spec.disks {
        let target = Esc(&disk.target);
        let mode = match &disk.incremental {
            Some(checkpoint) => {
                format!("backupmode='incremental' incremental='{}' exportbitmap='backup-{target}'", Esc(checkpoint))
            }
            None => "backupmode='full'".to_owned(),
        };
        disks += &format!(
            "<disk name='{target}' backup='yes' type='file' exportname='{target}' {mode}><driver type='qcow2'/>\
             <scratch file='{}'/></disk>",
            Esc(&disk.scratch)
        );
    }
    for target in targets.iter().filter(|t| !spec.disks.iter().any(|d| d.target == **t)) {
        disks += &format!("<disk name='{}' backup='no'/>", Esc(target));
    }
    format!("<domainbackup mode='pull'>{server}<disks>{disks}</disks></domainbackup>")
}

/// A `<domaincheckpoint>` to create, or to redefine when its time of creation is given.
pub(crate) fn checkpoint(spec: &CheckpointSpec, targets: &[&str], created_unix_s: Option<i64>) -> String {
    let mut disks = String::new();
    for target in &spec.disks {
        disks += &format!("<disk name='{}' checkpoint='bitmap' bitmap='{}'/>", Esc(target), Esc(&spec.name));
    }
    for target in targets.iter().filter(|t| !spec.disks.iter().any(|d| d == **t)) {
        disks += &format!("<disk name='{}' checkpoint='no'/>", Esc(target));
    }
    let created = created_unix_s.map_or(String::new(), |t| format!("<creationTime>{t}</creationTime>"));
    format!(
        "<domaincheckpoint><name>{}</name><description>{}</description>{created}<disks>{disks}</disks></domaincheckpoint>",
        Esc(&spec.name),
        Esc(&spec.description)
    )
}

/// The destination `<disk>` of a block copy.
pub(crate) fn block_copy(spec: &BlockCopySpec) -> String {
    format!("<disk type='file'><source file='{}'/><driver type='{}'/></disk>", Esc(&spec.path), Esc(&spec.format))
}

/// A directory as a pool of its own, for as long as it is needed.
pub(crate) fn open_directory(name: &str, path: &str) -> String {
    format!("<pool type='dir'><name>{}</name><target><path>{}</path></target></pool>", Esc(name), Esc(path))
}

/// An empty image that takes no more room than it must.
pub(crate) fn new_volume(name: &str, format: &str, capacity_bytes: u64) -> String {
    format!(
        "<volume><name>{}</name><capacity unit='bytes'>{capacity_bytes}</capacity><allocation unit='bytes'>0</allocation>\
         <target><format type='{}'/></target></volume>",
        Esc(name),
        Esc(format)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BackupDisk;

    #[test]
    fn what_comes_from_outside_cannot_break_out() {
        let nasty = "/a'b\"<c>&\n\u{1}";
        let spec = BackupSpec {
            server: BackupServer::Unix { path: nasty.into() },
            disks: vec![BackupDisk { target: "vda".into(), incremental: Some(nasty.into()), scratch: nasty.into() }],
            scratch_is_there: false,
        };
        let text = backup(&spec, &["vda", "vdb"]);
        let document = roxmltree::Document::parse(&text).unwrap();
        let expected = "/a'b\"<c>&\n\u{fffd}";
        let find = |name| document.descendants().find(|n| n.has_tag_name(name)).unwrap();
        assert_eq!(find("server").attribute("socket"), Some(expected));
        assert_eq!(find("scratch").attribute("file"), Some(expected));
        assert_eq!(find("disk").attribute("incremental"), Some(expected));
        let modes: Vec<_> =
            document.descendants().filter(|n| n.has_tag_name("disk")).filter_map(|n| n.attribute("backup")).collect();
        assert_eq!(modes, ["yes", "no"]);
    }

    #[test]
    fn a_checkpoint_names_every_disk() {
        let spec = CheckpointSpec { name: "c<1".into(), description: "d&d".into(), disks: vec!["vdb".into()] };
        let text = checkpoint(&spec, &["vda", "vdb"], Some(12));
        let parsed = super::super::CheckpointXml::parse(&text).unwrap();
        assert_eq!((parsed.name.as_str(), parsed.created_unix_s, parsed.targets), ("c<1", 12, vec!["vdb".to_owned()]));
        assert!(text.contains("<disk name='vda' checkpoint='no'/>"));
    }
}
