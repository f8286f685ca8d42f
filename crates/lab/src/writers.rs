//! The proof that never two wrote to one disk: a guest appends a record to a raw disk every 250 ms (`/sbin/writer` in
//! the guest), and this looks at what is there.
//!
//! A record is a line of 512 bytes: `W SEQUENCE INSTANCE`, where an instance is one boot of the guest, numbered on from
//! the one before it (its generation) with a name of its own, and record `SEQUENCE` stands in the slot of that number in
//! a ring. Before each write the guest reads the slot before it: what it finds there and did not write itself, it
//! records as `X SEQUENCE INSTANCE OTHER`. So two writers leave marks whichever of them wins a slot.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::{names::VmName, state::Lab};

/// The serial number by which the guest finds the disk.
pub const SERIAL: &str = "writes";
const SLOT: usize = 512;
/// As in the guest. Half an hour of records.
const SLOTS: usize = 16_384;

/// Where a guest's records are.
pub fn disk(lab: &Lab, vm: &VmName) -> PathBuf {
    lab.shared_dir().join(format!("{vm}-writes.raw"))
}

/// Makes an empty one.
pub fn make(path: &Path) -> Result<()> {
    let made = File::create_new(path).and_then(|file| file.set_len((SLOT * SLOTS) as u64));
    made.with_context(|| format!("cannot make {}", path.display()))
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How many records there are.
    pub records: usize,
    /// The guest's boots, in the order in which they wrote.
    pub instances: Vec<Instance>,
    /// What must not be; nothing when all is well.
    pub faults: Vec<String>,
}

/// One boot of the guest.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its number and name.
    pub name: String,
    /// Its first record that is still there.
    pub first: u64,
    /// Its last one.
    pub last: u64,
}

impl Report {
    /// For a person.
    pub fn text(&self) -> String {
        let mut text = format!("{} records of {} boots\n", self.records, self.instances.len());
        for one in &self.instances {
            text.push_str(&format!("  {:<24}{:>8} to {}\n", one.name, one.first, one.last));
        }
        for fault in &self.faults {
            text.push_str(&format!("  WRONG: {fault}\n"));
        }
        text.push_str(if self.faults.is_empty() {
            "one writer at a time, nothing lost"
        } else {
            "NOT one writer at a time"
        });
        text
    }
}

/// Looks at a disk, which may be in use.
pub fn check(path: &Path) -> Result<Report> {
    let file = File::open(path)
        .with_context(|| format!("cannot read {}; was the guest made with --writer?", path.display()))?;
    let mut bytes = Vec::new();
    file.take((SLOT * SLOTS) as u64).read_to_end(&mut bytes).context("cannot read the records")?;
    if fs::metadata(path).is_ok_and(|meta| meta.len() != (SLOT * SLOTS) as u64) {
        bail!("{} has not the size of a disk of records", path.display());
    }
    Ok(judge(&bytes))
}

fn judge(bytes: &[u8]) -> Report {
    let mut report = Report::default();
    let mut all: Vec<(u64, String)> = Vec::new();
    for (slot, record) in bytes.chunks(SLOT).enumerate() {
        if record.iter().all(|byte| *byte == 0) {
            continue;
        }
        let text = String::from_utf8_lossy(record);
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            ["W", seq, name] if seq.parse().is_ok_and(|seq: u64| seq as usize % SLOTS == slot) => {
                all.push((seq.parse().unwrap_or_default(), name.to_string()));
            }
            ["X", seq, name, other @ ..] => {
                report.faults.push(format!("at {seq}, {name} found what it had not written: {}", other.join(" ")));
            }
            _ => report
                .faults
                .push(format!("slot {slot} holds no record: {:?}", text.trim().chars().take(60).collect::<String>())),
        }
    }
    all.sort();
    report.records = all.len();
    for (before, after) in all.iter().zip(all.iter().skip(1)) {
        if after.0 != before.0 + 1 {
            report.faults.push(format!("records {} to {} are missing", before.0 + 1, after.0 - 1));
        }
    }
    for (seq, name) in all {
        match report.instances.last_mut() {
            Some(last) if last.name == name => last.last = seq,
            _ => {
                if report.instances.iter().any(|one| one.name == name) {
                    report.faults.push(format!("{name} wrote again at {seq}, after another one had written"));
                }
                report.instances.push(Instance { name, first: seq, last: seq });
            }
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(records: &[&str]) -> Vec<u8> {
        let mut bytes = vec![0; SLOT * SLOTS];
        for record in records {
            let seq: usize = record.split(' ').nth(1).unwrap().parse().unwrap();
            let line = format!("{record:<511}\n");
            bytes[seq % SLOTS * SLOT..][..SLOT].copy_from_slice(line.as_bytes());
        }
        bytes
    }

    #[test]
    fn one_after_the_other_is_well() {
        assert_eq!(judge(&disk(&[])), Report::default());
        let report = judge(&disk(&["W 16383 1-a", "W 16384 1-a", "W 16385 2-b", "W 16386 2-b"]));
        assert_eq!((report.records, report.faults.len()), (4, 0), "{report:?}");
        let names: Vec<_> = report.instances.iter().map(|one| (one.name.as_str(), one.first, one.last)).collect();
        assert_eq!(names, [("1-a", 16383, 16384), ("2-b", 16385, 16386)]);
    }

    #[test]
    fn interleaving_loss_and_damage_are_found() {
        for (records, fault) in [
            (&["W 1 1-a", "W 2 2-b", "W 3 1-a"][..], "1-a wrote again at 3"),
            (&["W 1 1-a", "W 3 1-a"], "records 2 to 2 are missing"),
            (&["W 1 1-a", "X 2 1-a W 1 2-b"], "found what it had not written: W 1 2-b"),
            (&["garbage 5"], "slot 5 holds no record"),
        ] {
            let report = judge(&disk(records));
            assert!(report.faults.iter().any(|found| found.contains(fault)), "{records:?}: {report:?}");
        }
    }
}
