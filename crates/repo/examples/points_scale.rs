//! Makes what a repository of many restore points is measured with: small disks of some VMs, each with many states.
//!
//! ```text
//! points_scale image FILE VM STATE               the disk of a VM in one state
//! points_scale states DIRECTORY VM STATES        the same in all states: 0000/disk.raw, 0001/disk.raw …
//! points_scale make DIRECTORY VMS STATES KEY     a repository with all states of VMs 0 … as restore points, and its key file
//! ```
//! A VM's disk has two chunks of 1 MiB, of which 16 KiB each do not compress; from one state to the next one of them
//! changes. The repository is made in memory, with a collection now and then as an operator's timer starts it, and then
//! written out.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;
use virtward_model::{
    BackupKind, DiskRecord, PointId, QuiesceOutcome, QuiesceRecord, QuiesceRequest, RestorePoint, SourceKind,
    TrackingRecord, TrackingState,
};
use virtward_repo::{
    DiskSpec, GcOptions, InitOptions, KdfCost, Repository, Secret, Store, WriterOptions, store::mem::MemStore,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const CHUNK: usize = 1 << 20;
const CHUNKS: u64 = 2;
const NOISE: usize = 16 << 10;
/// Restore points between two collections.
const COLLECT_EVERY: usize = 1000;

/// A chunk of a VM's disk, as the state that changed it last left it.
fn chunk(vm: u64, index: u64, changed: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        format!("/var/lib/vm-{vm:02}/{index} ").into_bytes().into_iter().cycle().take(CHUNK).collect();
    let mut state = (vm << 40 | index << 32 | changed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for eight in bytes[..NOISE].as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *eight = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    bytes
}

/// The state that changed a chunk last.
fn changed(state: u64, index: u64) -> u64 {
    (0..=state).rev().find(|s| s % CHUNKS == index).unwrap_or(0)
}

fn name(vm: u64) -> String {
    format!("vm-{vm:02}")
}

fn image(file: &Path, vm: u64, state: u64) -> Outcome<()> {
    fs::create_dir_all(file.parent().ok_or("a file has a directory")?)?;
    let image: Vec<u8> = (0..CHUNKS).flat_map(|index| chunk(vm, index, changed(state, index))).collect();
    Ok(fs::write(file, image)?)
}

fn point(vm: u64, taken: Timestamp, disk: DiskRecord) -> RestorePoint {
    RestorePoint {
        id: PointId::random(),
        vm: name(vm),
        vm_uuid: Uuid::nil(),
        host: "host1".into(),
        source: SourceKind::Image,
        kind: BackupKind::Full,
        taken,
        started: taken,
        finished: taken,
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

/// Backs up one state; the disk as it was recorded.
fn back_up(repo: &Repository, vm: u64, state: u64, taken: Timestamp, base: Option<DiskRecord>) -> Outcome<DiskRecord> {
    let writer = repo.writer(WriterOptions { threads: 1, ..WriterOptions::default() })?;
    let size_bytes = CHUNKS * CHUNK as u64;
    let is_first = base.is_none();
    let disk = writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK as u32, base })?;
    for index in (0..CHUNKS).filter(|index| is_first || state % CHUNKS == *index) {
        disk.put(index, chunk(vm, index, changed(state, index)))?;
    }
    let result = disk.finish()?;
    let record = DiskRecord {
        target: "disk.raw".into(),
        size_bytes,
        chunk_bytes: CHUNK as u32,
        format: "raw".into(),
        source: format!("/var/lib/libvirt/images/{}/disk.raw", name(vm)),
        root: result.root,
        read_bytes: size_bytes,
        sampled_bytes: 0,
        new_bytes: result.new_bytes,
        stored_bytes: result.stored_bytes,
        data_bytes: result.data_bytes,
        tracking: TrackingRecord { state: TrackingState::Unsupported, reason: None, checkpoint: None },
    };
    writer.publish(point(vm, taken, record.clone()), vec![])?;
    Ok(record)
}

fn make(directory: &Path, vms: u64, states: u64, key_file: &Path) -> Outcome<()> {
    let key: Vec<u8> = (0..32).map(|n| n * 7 + 1).collect();
    fs::write(key_file, &key)?;
    fs::set_permissions(key_file, fs::Permissions::from_mode(0o600))?;
    let store = MemStore::new();
    let options = InitOptions { kdf: KdfCost::default(), label: "bench".into(), sealed: false };
    let repo = Repository::init(Arc::new(store.clone()), &Secret::key_bytes(key)?, &options)?;
    let collect = GcOptions { grace: Duration::ZERO, budget_percent: 100, ..GcOptions::default() };
    let (begin, now) = (Instant::now(), Timestamp::now());
    let mut disks: Vec<Option<DiskRecord>> = vec![None; vms as usize];
    let mut made = 0;
    for state in 0..states {
        let taken = now.checked_sub(SignedDuration::from_hours((states - state) as i64))?;
        for (vm, disk) in (0..).zip(&mut disks) {
            *disk = Some(back_up(&repo, vm, state, taken, disk.take())?);
            made += 1;
            if made % COLLECT_EVERY == 0 {
                repo.collect_garbage(&collect, &())?;
            }
        }
    }
    repo.collect_garbage(&collect, &())?;
    for name in store.names() {
        let path = directory.join(&name);
        fs::create_dir_all(path.parent().ok_or("an object has a directory")?)?;
        fs::write(path, store.get(&name, 1 << 30)?)?;
    }
    println!("{made} restore points in {} objects, {:.1} s", store.names().len(), begin.elapsed().as_secs_f64());
    Ok(())
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["image", file, vm, state] => image(Path::new(file), vm.parse()?, state.parse()?),
        ["states", directory, vm, count] => {
            let (directory, vm) = (Path::new(directory), vm.parse()?);
            (0..count.parse()?).try_for_each(|state| image(&directory.join(format!("{state:04}/disk.raw")), vm, state))
        }
        ["make", directory, vms, count, key] => {
            make(Path::new(directory), vms.parse()?, count.parse()?, Path::new(key))
        }
        _ => {
            Err("points_scale image FILE VM STATE | states DIRECTORY VM STATES | make DIRECTORY VMS STATES KEY".into())
        }
    }
}
