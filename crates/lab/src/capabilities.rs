//! libvirt's knowledge of the machine's emulators, shared between hosts.
//!
//! Probing the emulators takes seconds for each new host, and the answer is the same for all hosts of one machine. So a
//! new host starts with what an earlier one found. libvirt itself decides whether that is still true (it compares the
//! emulator's and its own build, the kernel and the processor) and probes again when not: a stale copy costs time only.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::state::write_atomically;

const KEPT: &str = "/var/cache/virtward-lab/capabilities";

/// Puts what is known into a new host's cache. Failing only costs the time of a probe. `root`: the system that the host's
/// emulators come from, unless they are the machine's.
pub fn seed(host_cache: &Path, root: Option<&Path>) {
    let _ = copy_newer(&kept(root), &inside(host_cache));
}

/// Keeps what a host has found, for those to come.
pub fn keep(host_cache: &Path, root: Option<&Path>) {
    let _ = copy_newer(&inside(host_cache), &kept(root));
}

fn kept(root: Option<&Path>) -> PathBuf {
    let of = root.map(|root| root.to_string_lossy().replace('/', "-"));
    PathBuf::from(format!("{KEPT}{}", of.unwrap_or_default()))
}

fn inside(host_cache: &Path) -> PathBuf {
    host_cache.join("qemu/capabilities")
}

fn copy_newer(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "xml") {
            let (content, target) = (fs::read(&path)?, to.join(path.file_name().unwrap_or_default()));
            if fs::read(&target).ok().as_ref() != Some(&content) {
                write_atomically(&target, &content).map_err(io::Error::other)?;
            }
        }
    }
    Ok(())
}
