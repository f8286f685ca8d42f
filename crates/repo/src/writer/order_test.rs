//! Deaths at every operation of a backup, in the right order of steps and in a wrong one.

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::{
    BackupKind, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind,
    TrackingRecord, TrackingState,
};

use super::{DiskSpec, WriterOptions};
use crate::{
    Attachment, InitOptions, KdfCost, Repository, Result, Secret,
    disorder::{Disorder, testing},
    store::{
        faulty::{Faults, FaultyStore},
        mem::MemStore,
    },
};

const CHUNK: u32 = 256 << 10;
const CHUNKS: u64 = 6;

fn secret() -> Secret {
    Secret::password("correct horse")
}

fn image() -> Vec<u8> {
    let mut state = 1_u64;
    let mut step = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..CHUNKS * u64::from(CHUNK)).map(|_| step()).collect()
}

fn back_up(repo: &Repository, image: &[u8]) -> Result<PointId> {
    let options = WriterOptions { threads: 1, pack_bytes: Some(512 << 10), ..WriterOptions::default() };
    let writer = repo.writer(options)?;
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None })?;
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        disk.put(index as u64, chunk.to_vec())?;
    }
    let result = disk.finish()?;
    let disk = DiskRecord {
        target: "vda".into(),
        size_bytes,
        chunk_bytes: CHUNK,
        format: "raw".into(),
        source: "/images/a".into(),
        root: result.root,
        read_bytes: 0,
        sampled_bytes: 0,
        new_bytes: result.new_bytes,
        stored_bytes: result.stored_bytes,
        data_bytes: result.data_bytes,
        tracking: TrackingRecord { state: TrackingState::First, reason: None, checkpoint: None },
    };
    let point = point(disk);
    let id = point.id;
    writer.publish(point, vec![Attachment { name: "domain.xml".into(), bytes: b"<domain/>".to_vec() }])?;
    Ok(id)
}

fn point(disk: DiskRecord) -> RestorePoint {
    let now = Timestamp::now();
    RestorePoint {
        id: PointId::random(),
        vm: "vm".into(),
        vm_uuid: Uuid::nil(),
        host: "host".into(),
        source: SourceKind::Cold,
        kind: BackupKind::Full,
        taken: now,
        started: now,
        finished: now,
        parent: None,
        quiesce: QuiesceRecord {
            requested: QuiesceRequest::Auto,
            outcome: QuiesceOutcome::NotNeeded,
            frozen_ms: None,
            reason: None,
        },
        disks: vec![disk],
        skipped: vec![],
        tags: vec![],
        warnings: vec![],
        copied_from: None,
    }
}

/// Deaths after which a restore point is listed that does not restore, of all deaths.
fn unsound(disorder: Option<Disorder>) -> (u32, u32) {
    let origin = MemStore::new();
    let init = InitOptions { kdf: KdfCost::weak_for_tests(), ..InitOptions::default() };
    Repository::init(Arc::new(origin.clone()), &secret(), &init).unwrap();
    let image = image();
    let attempt = |store: &MemStore, faults: Faults| {
        let faulty = FaultyStore::new(Arc::new(store.clone()), faults);
        let outcome = testing::with(disorder, || {
            Repository::open(Arc::new(faulty.clone()), &secret()).and_then(|repo| back_up(&repo, &image))
        });
        (outcome, faulty.operations())
    };
    let (outcome, operations) = attempt(&origin.fork(), Faults::default());
    outcome.unwrap();
    let (mut deaths, mut unsound) = (0, 0);
    for at in 0..operations {
        for die_after_effect in [false, true] {
            let store = origin.fork();
            let (outcome, _) = attempt(&store, Faults { die_at: Some(at), die_after_effect, ..Faults::default() });
            deaths += u32::from(outcome.is_err());
            let repo = Repository::open(Arc::new(store), &secret()).unwrap();
            let listed = repo.points().unwrap().points;
            if let Ok(id) = outcome {
                assert!(listed.iter().any(|point| point.id == id), "acknowledged and not listed");
            }
            let whole = listed.iter().all(|point| {
                let mut back = vec![0; image.len()];
                let read = repo.disk(&point.disks[0]).and_then(|disk| disk.read_at(0, &mut back));
                read.is_ok() && back == image && repo.attachments(point.id).is_ok()
            });
            unsound += u32::from(!whole);
        }
    }
    (unsound, deaths)
}

#[test]
fn a_restore_point_appears_only_after_what_it_needs() {
    let (unsound_points, deaths) = unsound(None);
    assert_eq!(unsound_points, 0);
    assert!(deaths > 20, "{deaths} deaths prove little");
    assert!(unsound(Some(Disorder::PointFirst)).0 > 0, "another order of steps would go unnoticed");
}
