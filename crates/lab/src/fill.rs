//! The content of a guest's disks: realistic, reproducible, partly compressible.
//!
//! A mix as on an ordinary server: logs and text (compress well), tables and binaries (compress some), media and
//! archives (do not), many small files and few large ones, some of them twice. The same seed and size always give the
//! same bytes; nothing depends on time, order of work, or the number of processors.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// The name of the file that lists the checksums of all others, in the format of sha256sum.
pub const CHECKSUMS: &str = "SHA256SUMS";

const MAX_FILE_BYTES: u64 = 8 << 20;
const BLOCK_BYTES: usize = 64 << 10;

/// A small, quick generator (splitmix64). Statistical quality is plenty for test data; it keeps no secrets.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Log,
    Table,
    Media,
}

#[derive(Clone, Debug)]
struct FileSpec {
    path: String,
    kind: Kind,
    bytes: u64,
    seed: u64,
}

/// What to write: the files of `bytes` bytes in all, for this seed.
fn plan(seed: &str, bytes: u64) -> Vec<FileSpec> {
    let digest = Sha256::digest(seed.as_bytes());
    let mut random = Random(u64::from_le_bytes(digest[..8].try_into().unwrap_or_default()));
    let mut files: Vec<FileSpec> = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let number = files.len();
        // Sizes spread evenly over the powers of two from 1 KiB to 8 MiB: most files small, most bytes in large ones.
        let scale = 10 + random.below(13);
        let size = ((1 << scale) + random.below(1 << scale)).min(MAX_FILE_BYTES).min(left);
        let (kind, dir, suffix) = match random.below(100) {
            0..40 => (Kind::Log, "log", "log"),
            40..75 => (Kind::Table, "db", "tbl"),
            _ => (Kind::Media, "media", "bin"),
        };
        let path = format!("{dir}/{:02}/{number:05}.{suffix}", number % 16);
        // One file in twenty is a copy of an earlier one, as backups and package caches on servers are.
        let twin = (number > 0 && random.below(20) == 0).then(|| files[random.below(number as u64) as usize].clone());
        let file = match twin {
            Some(twin) if twin.bytes <= left => FileSpec { path: format!("copies/{number:05}"), ..twin },
            _ => FileSpec { path, kind, bytes: size, seed: random.next() },
        };
        left -= file.bytes;
        files.push(file);
    }
    files
}

/// Writes the files into `dir`, with their checksums; `bytes` of content in all. There is always at least one file,
/// so that checking the checksums means something.
pub fn write_tree(dir: &Path, seed: &str, bytes: u64) -> Result<()> {
    let files = plan(seed, bytes);
    for file in &files {
        let parent = dir.join(&file.path);
        let parent = parent.parent().unwrap_or(dir);
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    let mut lines = write_parallel(dir, &files)?;
    let about = format!("Data of a lab guest: seed {seed:?}, {bytes} bytes in {} files.\n", files.len());
    fs::write(dir.join("about.txt"), &about).context("cannot write about.txt")?;
    lines.push(checksum_line(Sha256::digest(about.as_bytes()).as_slice(), "about.txt"));
    lines.sort_by(|a, b| a[64..].cmp(&b[64..]));
    fs::write(dir.join(CHECKSUMS), lines.concat()).context("cannot write the checksums")
}

fn write_parallel(dir: &Path, files: &[FileSpec]) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<String>> {
        let mut lines = Vec::new();
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = dir.join(&file.path);
            let digest = write_file(&path, file).with_context(|| format!("cannot write {}", path.display()))?;
            lines.push(checksum_line(&digest, &file.path));
        }
        Ok(lines)
    };
    let threads = thread::available_parallelism().map_or(2, usize::from).min(8);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut lines = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(part) => lines.extend(part?),
                Err(_) => bail!("writing the data failed"),
            }
        }
        Ok(lines)
    })
}

fn checksum_line(digest: &[u8], path: &str) -> String {
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!("{hex}  {path}\n")
}

fn write_file(path: &Path, file: &FileSpec) -> std::io::Result<Vec<u8>> {
    let mut out = BufWriter::with_capacity(BLOCK_BYTES, File::create(path)?);
    let mut hash = Sha256::new();
    let mut random = Random(file.seed);
    let mut block = Vec::with_capacity(BLOCK_BYTES + 512);
    let mut left = file.bytes;
    while left > 0 {
        block.clear();
        match file.kind {
            Kind::Log => log_block(&mut random, &mut block),
            Kind::Table => table_block(&mut random, &mut block),
            Kind::Media => media_block(&mut random, &mut block),
        }
        let n = left.min(block.len() as u64);
        let part = &block[..n as usize];
        hash.update(part);
        out.write_all(part)?;
        left -= n;
    }
    out.flush()?;
    Ok(hash.finalize().to_vec())
}

const WORDS: [&str; 48] = [
    "accepted",
    "address",
    "after",
    "applied",
    "backend",
    "backlog",
    "balance",
    "batch",
    "cache",
    "client",
    "closed",
    "commit",
    "connection",
    "customer",
    "delayed",
    "delivered",
    "denied",
    "entry",
    "error",
    "expired",
    "failed",
    "from",
    "handler",
    "index",
    "invoice",
    "journal",
    "limit",
    "lookup",
    "message",
    "moved",
    "order",
    "payment",
    "queue",
    "refused",
    "release",
    "request",
    "response",
    "retry",
    "session",
    "shard",
    "started",
    "stopped",
    "table",
    "timeout",
    "token",
    "update",
    "user",
    "worker",
];

/// Log lines: stamps that grow, words from a small vocabulary, some numbers.
fn log_block(random: &mut Random, block: &mut Vec<u8>) {
    let mut stamp = 1_700_000_000 + random.below(50_000_000);
    while block.len() < BLOCK_BYTES {
        let mut bits = random.next();
        stamp += bits & 7;
        let level = ["INFO", "INFO", "INFO", "WARN"][(bits >> 3 & 3) as usize];
        // Writing to a vector cannot fail.
        let _ = write!(block, "{stamp}.{:03} {level} worker-{}: ", bits >> 5 & 511, bits >> 14 & 15);
        bits = random.next();
        for _ in 0..5 + (bits & 3) {
            bits >>= 6;
            // Low numbers are more frequent, as words are.
            let word = (bits & 63).min(random.next() & 63) as usize % WORDS.len();
            block.extend_from_slice(WORDS[word].as_bytes());
            block.push(b' ');
        }
        let _ = writeln!(block, "id={:08x}", bits as u32);
    }
}

/// Records of a fixed shape: counters, flags, small numbers, an opaque key, padding.
fn table_block(random: &mut Random, block: &mut Vec<u8>) {
    let mut row = random.below(1 << 40);
    while block.len() < BLOCK_BYTES {
        let bits = random.next();
        row += 1 + (bits & 3);
        block.extend_from_slice(&row.to_le_bytes());
        block.extend_from_slice(&((bits >> 8 & 0x3ff) as u32).to_le_bytes());
        block.extend_from_slice(&((bits >> 20 & 0xf) as u32).to_le_bytes());
        block.extend_from_slice(&bits.to_le_bytes());
        block.extend_from_slice(WORDS[(bits >> 58) as usize % WORDS.len()].as_bytes());
        block.resize(block.len().next_multiple_of(64), 0);
    }
}

/// Bytes that do not compress.
fn media_block(random: &mut Random, block: &mut Vec<u8>) {
    for _ in 0..BLOCK_BYTES / 8 {
        block.extend_from_slice(&random.next().to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::run;

    #[test]
    fn the_data_depend_on_seed_and_size_only() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (dir, seed) in dirs.iter().zip(["web1", "web1", "web2"]) {
            write_tree(dir.path(), seed, 20 << 20).unwrap();
        }
        let sums: Vec<String> = dirs.iter().map(|d| fs::read_to_string(d.path().join(CHECKSUMS)).unwrap()).collect();
        assert_eq!(sums[0], sums[1]);
        assert_ne!(sums[0], sums[2]);
    }

    #[test]
    fn the_checksums_hold_and_the_size_is_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        write_tree(dir.path(), "web1", 12 << 20).unwrap();
        run("sh", &["-c", &format!("cd {} && sha256sum --quiet -c {CHECKSUMS}", dir.path().display())]).unwrap();
        let total: u64 = plan("web1", 12 << 20).iter().map(|f| f.bytes).sum();
        assert_eq!(total, 12 << 20);
    }

    #[test]
    fn the_data_compress_partly_and_hold_duplicates() {
        let files = plan("web1", 300 << 20);
        assert!(files.len() > 100, "{} files", files.len());
        assert!(files.iter().any(|f| f.path.starts_with("copies/")));
        for kind in [Kind::Log, Kind::Table, Kind::Media] {
            let share = files.iter().filter(|f| f.kind == kind).map(|f| f.bytes).sum::<u64>() / (3 << 20);
            assert!((10..70).contains(&share), "{kind:?} is {share} %");
        }
    }

    #[test]
    fn an_empty_disk_still_has_something_to_check() {
        let dir = tempfile::tempdir().unwrap();
        write_tree(dir.path(), "web1", 0).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(CHECKSUMS)).unwrap().lines().count(), 1);
    }
}
