//! `repo check`: the structure of the repository, from its description down to the references of every restore point.

use serde::Serialize;

use super::{Damage, DamagedPoint, VerifyMode, VerifyOptions, ciphertext::describe};
use crate::{
    error::{Error, Result},
    format::{config::Config, names},
    index::Segment,
    keys::slot,
    lease::newest_epoch,
    progress::Progress,
    repository::{Repository, read_slots},
};

/// Outcome of [`Repository::check`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct CheckReport {
    /// Key slots that are intact.
    pub keys: u64,
    /// Index segments in use.
    pub segments: u64,
    /// Chunks and pages that the index lists.
    pub chunks: u64,
    /// Packs that the index lists.
    pub packs: u64,
    /// Restore points that can be read.
    pub points: u64,
    /// Leases of runs that go on, or were killed.
    pub leases: u64,
    /// Packs that no index segment lists: being written now, or left by killed runs. Harmless.
    pub unlisted_packs: u64,
    /// Their bytes.
    pub unlisted_bytes: u64,
    /// Everything that is wrong.
    pub damaged: Vec<Damage>,
    /// Restore points that are affected.
    pub damaged_points: Vec<DamagedPoint>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty() && self.damaged_points.is_empty()
    }
    fn bad(&mut self, object: impl Into<String>, what: impl Into<String>) {
        self.damaged.push(Damage { object: object.into(), what: what.into() });
    }
}

impl Repository {
    /// Checks the structure: description, key slots, epochs, index against packs, manifests against the index. Reads no
    /// data; [`Repository::verify`] does.
    pub fn check(&self, progress: &dyn Progress) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        self.check_clear(&mut report)?;
        let light = VerifyOptions { mode: VerifyMode::Light, ..VerifyOptions::default() };
        let verified = self.verify(&light, progress)?;
        report.points = verified.points;
        report.damaged.extend(verified.damaged);
        report.damaged_points = verified.damaged_points;
        self.check_index(&mut report)?;
        self.inner.store.list(names::LEASES, &mut |_| {
            report.leases += 1;
            Ok(())
        })?;
        report.damaged.sort_by(|a, b| (&a.object, &a.what).cmp(&(&b.object, &b.what)));
        report.damaged.dedup();
        Ok(report)
    }

    fn check_clear(&self, report: &mut CheckReport) -> Result<()> {
        let store = &*self.inner.store;
        match store.get(names::CONFIG, 1 << 20).and_then(|bytes| Config::decode(&bytes)) {
            Ok(config) if config == self.inner.config => {}
            Ok(_) => report.bad(names::CONFIG, "it is not that of this repository"),
            Err(e) if e.is_damage() => report.bad(names::CONFIG, describe(&e)),
            Err(e) => return Err(e),
        }
        for (name, bytes) in read_slots(store)? {
            match bytes.and_then(|bytes| slot::describe(&name, &bytes)) {
                Ok((_, config)) if config.repository == self.inner.config.repository => report.keys += 1,
                Ok(_) => report.bad(name, "it is a key slot of another repository"),
                Err(e) => report.bad(name, describe(&e)),
            }
        }
        for (id, hold) in self.holds()? {
            if let Some(error) = hold.damage {
                report.bad(names::hold(id), describe(&error));
            }
        }
        if let Err(e) = newest_epoch(store, &self.inner.ring) {
            report.bad(names::EPOCHS, e.to_string());
        }
        Ok(())
    }

    fn check_index(&self, report: &mut CheckReport) -> Result<()> {
        let (listed, damaged) = self.inner.index.with_snapshot(|state| {
            report.segments = state.segments.len() as u64;
            report.chunks = state.entries() as u64;
            let mut damaged = Vec::new();
            for segment in &state.segments {
                self.check_counts(segment, &mut damaged)?;
            }
            Ok((state.packs(), damaged))
        })?;
        report.damaged.extend(damaged);
        report.packs = listed.len() as u64;
        for prefix in [names::DATA, names::META] {
            self.inner.store.list(prefix, &mut |object| {
                if !names::parse_pack(&object.name).is_some_and(|id| listed.contains_key(&id)) {
                    report.unlisted_packs += 1;
                    report.unlisted_bytes += object.bytes;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Whether a segment lists all records of its packs, so that they are found.
    fn check_counts(&self, segment: &Segment, damaged: &mut Vec<Damage>) -> Result<()> {
        let index = &self.inner.index;
        let mut bad = |what| damaged.push(Damage { object: segment.name.clone(), what });
        let mut counts = vec![0u32; segment.packs.len()];
        let read = index.read_segment(segment, &mut |e| counts[e.pack as usize] += 1);
        match read.and_then(|()| index.check_order(segment)) {
            Err(e @ Error::Damaged { .. }) => bad(describe(&e)),
            other => other?,
        }
        for (pack, listed) in segment.packs.iter().zip(counts) {
            if listed != pack.footer.records {
                bad(format!("it lists {listed} of the {} records of {}", pack.footer.records, pack.name()));
            }
        }
        Ok(())
    }
}
