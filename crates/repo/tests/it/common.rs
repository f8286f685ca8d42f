//! Helpers of the integration tests.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use uuid::Uuid;
use virtward_model::{
    BackupKind, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind,
    TrackingRecord, TrackingState,
};
use virtward_repo::{
    Attachment, DiskResult, DiskSpec, InitOptions, KdfCost, Repository, RestoreOptions, Result, Secret, Store,
    WriterOptions, store::mem::MemStore,
};

pub const CHUNK: u32 = 256 << 10;

pub fn secret() -> Secret {
    Secret::password("correct horse")
}

pub fn init_options() -> InitOptions {
    InitOptions { kdf: KdfCost::weak_for_tests(), label: "test".into(), sealed: false }
}

pub fn init(store: Arc<dyn Store>) -> Repository {
    Repository::init(store, &secret(), &init_options()).unwrap()
}

pub fn mem_repo() -> (MemStore, Repository) {
    let store = MemStore::new();
    (store.clone(), init(Arc::new(store)))
}

/// Small packs, so that even small tests have several.
pub fn small() -> WriterOptions {
    WriterOptions { threads: 2, pack_bytes: Some(1 << 20), ..WriterOptions::default() }
}

pub fn disk_record(target: &str, size_bytes: u64, chunk_bytes: u32, result: &DiskResult) -> DiskRecord {
    DiskRecord {
        target: target.into(),
        size_bytes,
        chunk_bytes,
        format: "qcow2".into(),
        source: "/images/secret-name.qcow2".into(),
        root: result.root.clone(),
        read_bytes: 0,
        sampled_bytes: 0,
        new_bytes: result.new_bytes,
        stored_bytes: result.stored_bytes,
        data_bytes: result.data_bytes,
        tracking: TrackingRecord { state: TrackingState::First, reason: None, checkpoint: None },
    }
}

pub fn point(vm: &str, disks: Vec<DiskRecord>) -> RestorePoint {
    let now = Timestamp::now();
    RestorePoint {
        id: PointId::random(),
        vm: vm.into(),
        vm_uuid: Uuid::nil(),
        host: "host-secret-name".into(),
        source: SourceKind::Hot,
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
        disks,
        skipped: vec![],
        tags: vec![],
        warnings: vec![],
        copied_from: None,
    }
}

pub fn attachments() -> Vec<Attachment> {
    vec![
        Attachment { name: "domain.xml".into(), bytes: b"<domain/>".to_vec() },
        Attachment { name: "nvram".into(), bytes: noise(7, 600_000) },
    ]
}

/// Reproducible bytes, half of them compressible.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
        out.extend_from_slice(b"compress");
    }
    out.truncate(len);
    out
}

/// Backs a whole image up, as a full backup does.
pub fn back_up(repo: &Repository, vm: &str, image: &[u8]) -> Result<RestorePoint> {
    back_up_on(repo, vm, image, None, &|_| true)
}

/// Backs up the chunks that `dirty` names, over a base.
pub fn back_up_on(
    repo: &Repository,
    vm: &str,
    image: &[u8],
    base: Option<&DiskRecord>,
    dirty: &dyn Fn(u64) -> bool,
) -> Result<RestorePoint> {
    let writer = repo.writer(small())?;
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: base.cloned() })?;
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        if dirty(index as u64) {
            disk.put(index as u64, chunk.to_vec())?;
        }
    }
    let result = disk.finish()?;
    let point = point(vm, vec![disk_record("vda", size_bytes, CHUNK, &result)]);
    writer.publish(point.clone(), attachments())?;
    Ok(point)
}

/// Restores a disk in parallel.
pub fn restore(repo: &Repository, disk: &DiskRecord) -> Result<Vec<u8>> {
    let image = Mutex::new(vec![0; disk.size_bytes as usize]);
    let sink = |offset: u64, bytes: &[u8]| {
        image.lock().unwrap()[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    };
    repo.disk(disk)?.copy_to(&sink, &RestoreOptions::default())?;
    Ok(image.into_inner().unwrap())
}

/// Restores with random access.
pub fn restore_slowly(repo: &Repository, disk: &DiskRecord) -> Result<Vec<u8>> {
    let mut image = vec![0xaa; disk.size_bytes as usize];
    let reader = repo.disk(disk)?;
    for (number, part) in image.chunks_mut(100_003).enumerate() {
        reader.read_at(number as u64 * 100_003, part)?;
    }
    Ok(image)
}

/// Backs up what changed since `before`, in blocks of 4 KiB, as an increment of a tracked disk does; how many chunks were
/// put in parts.
pub fn back_up_parts(
    repo: &Repository,
    vm: &str,
    image: &[u8],
    base: &DiskRecord,
    before: &[u8],
) -> Result<(RestorePoint, usize)> {
    let writer = repo.writer(small())?;
    let size_bytes = image.len() as u64;
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: Some(base.clone()) })?;
    let mut in_parts = 0;
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        let start = index * CHUNK as usize;
        let same = |at: usize, bytes: &[u8]| before.get(start + at..start + at + bytes.len()) == Some(bytes);
        let blocks = chunk.chunks(4096).enumerate().map(|(number, block)| (number * 4096, block));
        let parts: Vec<_> = blocks
            .filter(|(at, block)| !same(*at, block))
            .map(|(at, block)| at as u32..(at + block.len()) as u32)
            .collect();
        if parts.is_empty() {
            continue;
        }
        if disk.takes_parts(index as u64, &parts)? {
            // What is not in the parts must not matter.
            let mut bytes = vec![0x5a; chunk.len()];
            for part in &parts {
                let part = part.start as usize..part.end as usize;
                bytes[part.clone()].copy_from_slice(&chunk[part]);
            }
            disk.put_parts(index as u64, bytes, &parts)?;
            in_parts += 1;
        } else {
            disk.put(index as u64, chunk.to_vec())?;
        }
    }
    let result = disk.finish()?;
    let point = point(vm, vec![disk_record("vda", size_bytes, CHUNK, &result)]);
    writer.publish(point.clone(), attachments())?;
    Ok((point, in_parts))
}
