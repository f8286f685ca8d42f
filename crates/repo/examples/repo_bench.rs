//! Measures the repository alone on synthetic data: `repo_bench [MiB] [directory]`.
//!
//! Half of each chunk compresses about four to one, half not at all; a tenth of the chunks are zero. Prints GB/s of disk
//! (not of stored) bytes per stage, and the peak memory of the process.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use virtward_model::DiskRecord;
use virtward_repo::{
    DiskSpec, InitOptions, KdfCost, Repository, RestoreOptions, Secret, VerifyMode, VerifyOptions, WriterOptions,
    store::fs::FsStore, verify_ciphertext,
};

const CHUNK: usize = 1 << 20;
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A chunk like those of a file system: text-like and binary halves.
fn fill(seed: u64, chunk: &mut [u8]) {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let words: Vec<[u8; 8]> = (0..256).map(|_| (noise.next() | 0x2020_2020_2020_2020).to_le_bytes()).collect();
    let (text, binary) = chunk.split_at_mut(CHUNK / 2);
    for eight in text.chunks_mut(8) {
        let word = noise.next();
        eight.copy_from_slice(&words[(word % 256) as usize][..eight.len()]);
    }
    for eight in binary.chunks_mut(8) {
        eight.copy_from_slice(&noise.next().to_le_bytes()[..eight.len()]);
    }
}

fn line(stage: &str, bytes: u64, begin: Instant) {
    let seconds = begin.elapsed().as_secs_f64();
    println!("{stage:<34} {seconds:8.3} s {:8.2} GB/s", bytes as f64 / 1e9 / seconds);
}

fn back_up(repo: &Repository, image: &[u8], base: Option<DiskRecord>, step: usize) -> Outcome<DiskRecord> {
    let writer = repo.writer(WriterOptions::default())?;
    let spec = DiskSpec { size_bytes: image.len() as u64, chunk_bytes: CHUNK as u32, base };
    let disk = writer.disk(spec)?;
    for (index, chunk) in image.chunks(CHUNK).enumerate().step_by(step) {
        let mut buffer = disk.buffer(index as u64);
        buffer.copy_from_slice(chunk);
        disk.put(index as u64, buffer)?;
    }
    let result = disk.finish()?;
    let json = serde_json::json!({
        "target": "vda", "size_bytes": image.len(), "chunk_bytes": CHUNK, "format": "raw", "source": "synthetic",
        "root": result.root, "read_bytes": 0, "new_bytes": result.new_bytes, "stored_bytes": result.stored_bytes,
        "data_bytes": result.data_bytes, "tracking": { "state": "first" },
    });
    let record: DiskRecord = serde_json::from_value(json)?;
    let now = jiff::Timestamp::now();
    let point = serde_json::json!({
        "id": virtward_model::PointId::random(), "vm": "bench", "vm_uuid": uuid::Uuid::nil(), "host": "bench",
        "source": "image", "kind": "full", "taken": now, "started": now, "finished": now,
        "quiesce": { "requested": "off", "outcome": "not-needed" }, "disks": [record.clone()],
    });
    writer.publish(serde_json::from_value(point)?, vec![])?;
    Ok(record)
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let mib: usize = args.next().map_or(Ok(1024), |a| a.parse())?;
    let parent = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let root = parent.join(format!("repo-bench-{}", std::process::id()));
    let outcome = run(mib, &root);
    let _ = fs::remove_dir_all(&root);
    outcome
}

fn run(mib: usize, root: &std::path::Path) -> Outcome<()> {
    let mut image = vec![0; mib * CHUNK];
    for (index, chunk) in image.chunks_mut(CHUNK).enumerate().filter(|(index, _)| index % 10 != 0) {
        fill(index as u64 + 1, chunk);
    }
    let (bytes, store) = (image.len() as u64, Arc::new(FsStore::new(root)));
    let secret = Secret::password("bench");
    let begin = Instant::now();
    drop(Repository::init(store.clone(), &secret, &InitOptions::default())?);
    println!("init, with argon2id                {:8.3} s", begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    let repo = Repository::open(store.clone(), &secret)?;
    println!("open, with argon2id                {:8.3} s", begin.elapsed().as_secs_f64());

    let begin = Instant::now();
    let full = back_up(&repo, &image, None, 1)?;
    line("full backup", bytes, begin);
    println!("  stored {:.2} of {:.2} GB", full.stored_bytes as f64 / 1e9, bytes as f64 / 1e9);
    let begin = Instant::now();
    back_up(&repo, &image, None, 1)?;
    line("full backup, nothing new", bytes, begin);
    for (index, chunk) in image.chunks_mut(CHUNK).enumerate().step_by(32) {
        fill(1 << 40 | index as u64, chunk);
    }
    let begin = Instant::now();
    let next = back_up(&repo, &image, Some(full), 32)?;
    line("increment of 1/32", bytes, begin);

    let key = Secret::key_bytes(vec![1; 32])?;
    repo.add_key(&key, "", KdfCost::weak_for_tests())?;
    let begin = Instant::now();
    let repo = Repository::open(store.clone(), &key)?;
    let points = repo.points()?.points.len();
    println!("open and list {points} points by key file {:6.3} s", begin.elapsed().as_secs_f64());
    for in_flight in [2, 16] {
        let sums = |_: u64, bytes: &[u8]| -> io::Result<()> {
            std::hint::black_box(bytes);
            Ok(())
        };
        let begin = Instant::now();
        repo.disk(&next)?.copy_to(&sums, &RestoreOptions { in_flight, ..RestoreOptions::default() })?;
        line(&format!("restore to nowhere, {in_flight} in flight"), bytes, begin);
    }
    let file = fs::File::create(root.join("restored"))?;
    let begin = Instant::now();
    let sink = |offset: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset);
    repo.disk(&next)?.copy_to(&sink, &RestoreOptions::default())?;
    line("restore to a file", bytes, begin);
    drop(file);
    fs::remove_file(root.join("restored"))?;
    for mode in [VerifyMode::Light, VerifyMode::Ciphertext, VerifyMode::Full] {
        let begin = Instant::now();
        let report = repo.verify(&VerifyOptions { mode, ..VerifyOptions::default() }, &())?;
        assert!(report.is_ok(), "{report:?}");
        line(&format!("verify {mode:?}"), bytes, begin);
    }
    let begin = Instant::now();
    assert!(verify_ciphertext(&*store, 0, &())?.is_ok());
    line("verify without keys", bytes, begin);
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or("VmHWM: ?");
    writeln!(
        io::stdout(),
        "peak memory {} (the image takes {mib} MiB of it)",
        peak.trim_start_matches("VmHWM:").trim()
    )?;
    Ok(())
}
