//! Disk files with a file system and data on them, made without mounting anything.
//!
//! mke2fs, mkfs.xfs and mkfs.btrfs can each fill a new file system from a directory, so no loop device is needed and a
//! crash leaves files only, inside the lab's directory.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::fs::{OFlags, SeekFrom, copy_file_range, seek};
use virtward_model::Bytes;

use crate::{
    cli::{Format, Fs},
    fill,
    run::{output_of, run_with_input},
};

/// Filling a large disk takes longer than other tools do.
const MKFS_TIMEOUT: Duration = Duration::from_secs(1800);
/// Where the first partition begins, and what the backup of the partition table needs at the end.
const PARTITION_ALIGN: u64 = 1 << 20;

/// A disk to make.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its size as the guest sees it.
    pub size: Bytes,
    /// The file system on it.
    pub fs: Fs,
    /// How much data to put on it.
    pub fill: Bytes,
    /// Whether it gets a partition table and two partitions.
    pub partitioned: bool,
    /// The label of the file system, which is also the name of its mount point.
    pub label: String,
    /// What the data depend on.
    pub seed: String,
}

impl Spec {
    /// Refuses what cannot work before anything is written.
    pub fn check(&self) -> Result<()> {
        let sizes = self.volumes();
        for (label, size, fill) in &sizes {
            let (least, overhead) = match self.fs {
                Fs::Ext4 => (Bytes::mib(16), Bytes::mib(8)),
                Fs::Xfs => (Bytes::mib(304), Bytes::mib(80)),
                Fs::Btrfs => (Bytes::mib(256), Bytes::mib(128)),
            };
            if *size < least.get() {
                bail!("{label}: {:?} needs at least {least}; this one would have {}", self.fs, Bytes(*size));
            }
            let room = (size / 100 * 88).saturating_sub(overhead.get());
            if *fill > room {
                bail!("{label}: {} of data do not fit on {}; at most {} do", Bytes(*fill), Bytes(*size), Bytes(room));
            }
        }
        if !self.size.get().is_multiple_of(512) {
            bail!("{}: {} bytes are not a whole number of 512-byte sectors", self.label, self.size.get());
        }
        Ok(())
    }

    /// The file systems of the disk: label, size, fill.
    fn volumes(&self) -> Vec<(String, u64, u64)> {
        if !self.partitioned {
            return vec![(self.label.clone(), self.size.get(), self.fill.get())];
        }
        let room = self.size.get().saturating_sub(2 * PARTITION_ALIGN);
        let second = room / 4 / PARTITION_ALIGN * PARTITION_ALIGN;
        let first = (room - second) / PARTITION_ALIGN * PARTITION_ALIGN;
        let fill = self.fill.get();
        vec![(self.label.clone(), first, fill - fill / 4), (format!("{}-p2", self.label), second, fill / 4)]
    }

    /// Makes the disk file. `scratch` is a directory on the same file system, emptied by the caller.
    pub fn make(&self, scratch: &Path) -> Result<()> {
        let raw = scratch.join(format!("{}.raw", self.label));
        create_sparse(&raw, self.size.get())?;
        let volumes = self.volumes();
        if self.partitioned {
            self.write_partition_table(&raw, &volumes)?;
            let mut offset = PARTITION_ALIGN;
            for (label, size, fill) in &volumes {
                let part = scratch.join(format!("{label}.part"));
                create_sparse(&part, *size)?;
                self.make_fs(&part, label, *fill, scratch)?;
                copy_sparse(&part, &raw, offset)?;
                fs::remove_file(&part).context("cannot remove a scratch file")?;
                offset += size;
            }
        } else {
            self.make_fs(&raw, &self.label, self.fill.get(), scratch)?;
        }
        self.finish(&raw)
    }

    fn write_partition_table(&self, raw: &Path, volumes: &[(String, u64, u64)]) -> Result<()> {
        let mut script = String::from("label: gpt\nunit: sectors\n");
        let mut start = PARTITION_ALIGN / 512;
        for (label, size, _) in volumes {
            script.push_str(&format!("start={start}, size={}, type=linux, name={label}\n", size / 512));
            start += size / 512;
        }
        run_with_input("sfdisk", &["-q", &raw.to_string_lossy()], &script).map(drop)
    }

    fn make_fs(&self, image: &Path, label: &str, fill: u64, scratch: &Path) -> Result<()> {
        let tree = scratch.join(format!("{label}.tree"));
        fs::create_dir(&tree).with_context(|| format!("cannot create {}", tree.display()))?;
        fill::write_tree(&tree, &format!("{}/{label}", self.seed), fill)?;
        let mut command = match self.fs {
            Fs::Ext4 => {
                let mut c = Command::new("mke2fs");
                // Tables are written now, or the guest's kernel would go on writing them for a while after the mount.
                c.args(["-q", "-F", "-t", "ext4", "-m", "1", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
                c.args(["-L", label, "-d"]).arg(&tree).arg(image);
                c
            }
            Fs::Xfs => {
                let proto = scratch.join(format!("{label}.proto"));
                fs::write(&proto, xfs_prototype(&tree)?).context("cannot write the XFS prototype")?;
                let mut c = Command::new("mkfs.xfs");
                c.args(["-q", "-f", "-L", label, "-p"]).arg(&proto).arg(image);
                c
            }
            Fs::Btrfs => {
                let mut c = Command::new("mkfs.btrfs");
                c.args(["-q", "-f", "-L", label, "--rootdir"]).arg(&tree).arg(image);
                c
            }
        };
        output_of(&mut command, None, MKFS_TIMEOUT)?;
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
    }

    fn finish(&self, raw: &Path) -> Result<()> {
        if self.path.exists() {
            bail!("{} exists already", self.path.display());
        }
        match self.format {
            Format::Raw => {
                fs::rename(raw, &self.path).with_context(|| format!("cannot create {}", self.path.display()))
            }
            Format::Qcow2 => {
                let mut command = Command::new("qemu-img");
                command.args(["convert", "-q", "-W", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(&self.path);
                let converted = output_of(&mut command, None, MKFS_TIMEOUT).map(drop);
                if converted.is_err() {
                    let _ = fs::remove_file(&self.path);
                }
                let _ = fs::remove_file(raw);
                converted
            }
        }
    }
}

/// The prototype file that mkfs.xfs fills a file system from: a tree of names, modes, owners and source files.
fn xfs_prototype(tree: &Path) -> Result<String> {
    fn directory(dir: &Path, out: &mut String) -> Result<()> {
        let read = || -> std::io::Result<Vec<fs::DirEntry>> { fs::read_dir(dir)?.collect() };
        let mut entries = read().with_context(|| format!("cannot read {}", dir.display()))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.to_string_lossy();
            if path.is_dir() {
                out.push_str(&format!("{name} d--755 0 0\n"));
                directory(&path, out)?;
            } else {
                out.push_str(&format!("{name} ---644 0 0 {}\n", path.display()));
            }
        }
        out.push_str("$\n");
        Ok(())
    }
    let mut out = String::from("/\n0 0\nd--755 0 0\n");
    directory(tree, &mut out)?;
    Ok(out)
}

fn create_sparse(path: &Path, bytes: u64) -> Result<()> {
    let create = || File::create_new(path)?.set_len(bytes);
    create().with_context(|| format!("cannot create {} with {} bytes", path.display(), bytes))
}

/// Copies a file into another one at an offset, holes left out.
fn copy_sparse(from: &Path, to: &Path, offset: u64) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        let source = File::open(from)?;
        let mut target = OpenOptions::new().write(true).open(to)?;
        let end = source.metadata()?.len();
        let mut at = 0;
        while at < end {
            let Ok(data) = seek(&source, SeekFrom::Data(at)) else { break };
            let hole = seek(&source, SeekFrom::Hole(data))?;
            let (mut read_at, mut write_at) = (data, offset + data);
            while read_at < hole {
                let left = (hole - read_at) as usize;
                let n = copy_file_range(&source, Some(&mut read_at), &target, Some(&mut write_at), left)?;
                if n == 0 {
                    break;
                }
            }
            at = hole;
        }
        target.flush()
    };
    attempt().with_context(|| format!("cannot copy {} into {}", from.display(), to.display()))
}

/// Whether files in this directory can be opened past the page cache, as cache='none' needs.
pub fn permits_direct_io(dir: &Path) -> bool {
    let probe = dir.join(format!(".direct-{}", std::process::id()));
    let flags = OFlags::DIRECT.bits() as i32;
    let works = OpenOptions::new().create(true).truncate(true).write(true).custom_flags(flags).open(&probe).is_ok();
    let _ = fs::remove_file(&probe);
    works
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(fs: Fs, size: Bytes, fill: Bytes, partitioned: bool) -> Spec {
        Spec {
            path: "/nonexistent/x.qcow2".into(),
            format: Format::Qcow2,
            size,
            fs,
            fill,
            partitioned,
            label: "data".into(),
            seed: "x".into(),
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_is_tried() {
        for (fs, size, fill, partitioned, fits) in [
            (Fs::Ext4, Bytes::gib(2), Bytes::mib(600), false, true),
            (Fs::Ext4, Bytes::mib(512), Bytes::mib(600), false, false),
            (Fs::Xfs, Bytes::mib(200), Bytes(0), false, false),
            (Fs::Xfs, Bytes::gib(1), Bytes::mib(100), true, false),
            (Fs::Xfs, Bytes::gib(2), Bytes::mib(100), true, true),
            (Fs::Btrfs, Bytes::mib(100), Bytes(0), false, false),
            (Fs::Ext4, Bytes(0), Bytes(0), true, false),
            (Fs::Ext4, Bytes((1 << 30) + 1), Bytes(0), false, false),
        ] {
            assert_eq!(spec(fs, size, fill, partitioned).check().is_ok(), fits, "{fs:?} {size} {fill} {partitioned}");
        }
    }

    #[test]
    fn partitions_lie_inside_the_disk_and_share_the_fill() {
        let spec = spec(Fs::Ext4, Bytes::gib(1), Bytes::mib(100), true);
        let volumes = spec.volumes();
        assert_eq!(volumes.iter().map(|v| v.2).sum::<u64>(), 100 << 20);
        assert!(volumes.iter().map(|v| v.1).sum::<u64>() + 2 * PARTITION_ALIGN <= 1 << 30);
        assert!(volumes.iter().all(|v| v.1.is_multiple_of(PARTITION_ALIGN)));
        assert_eq!(volumes[1].0, "data-p2");
    }
}
