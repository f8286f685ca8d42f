//! Measures the index at sizes that nobody has at hand: segments with random ids, without any pack.
//!
//! ```text
//! index_scale make DIRECTORY CHUNKS    a repository with segments as compaction would leave them
//! index_scale measure DIRECTORY        one line of JSON; run it in a new process, with the segments in the page cache
//! index_scale refer DIRECTORY CHUNKS   restore points that refer to all chunks, to a repository that was made so
//! index_scale mark DIRECTORY           one line of JSON: finding garbage, as a collection does; in a new process too
//! ```

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use serde_json::json;
use virtward_repo::{
    InitOptions, KdfCost, ObjectId, Repository, Secret,
    format::ChunkId,
    gc::measure::mark_and_sweep,
    index::{
        Index,
        synthetic::{put_point, put_segment},
    },
    store::fs::FsStore,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Chunks of a small run between two compactions.
const SMALL_CHUNKS: u64 = 20_000;
/// Every how manieth id is looked up.
const SAMPLE: u64 = 509;

fn secret() -> Outcome<Secret> {
    Ok(Secret::key_bytes(vec![1; 32])?)
}

/// Segments as compaction leaves them: at most 32 Mi entries, each at least twice the sum of the smaller ones.
fn sizes(chunks: u64) -> Vec<u64> {
    const FULL: u64 = 32 << 20;
    let full = chunks.saturating_sub(FULL / 2) / FULL;
    let mut sizes = vec![FULL; full as usize];
    let mut left = chunks - full * FULL;
    while left > 60_000 {
        let next = left - left * 3 / 10;
        sizes.push(next);
        left -= next;
    }
    sizes.push(left.max(1));
    sizes
}

fn make(directory: &Path, chunks: u64) -> Outcome<()> {
    let options = InitOptions { kdf: KdfCost::default(), label: "scale".into(), sealed: false };
    let repo = Repository::init(Arc::new(FsStore::new(directory)), &secret()?, &options)?;
    let (begin, sizes) = (Instant::now(), sizes(chunks));
    let mut bytes = 0;
    for (seed, entries) in (0..).zip(&sizes) {
        bytes += put_segment(&repo, seed, *entries)?;
    }
    println!("{}", json!({ "segments": sizes.len(), "bytes": bytes, "seconds": begin.elapsed().as_secs_f64() }));
    Ok(())
}

/// Highest and present memory of this process in bytes.
fn memory() -> Outcome<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
        line.trim().trim_end_matches(" kB").parse::<u64>().map(|kib| kib << 10)
    };
    Ok((field("VmHWM:")?, field("VmRSS:")?))
}

/// Seconds that all threads of this process were at work.
fn cpu_seconds() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields.get(11).unwrap_or(&"0").parse::<u64>()? + fields.get(12).unwrap_or(&"0").parse::<u64>()?;
    Ok(ticks as f64 / 100.0)
}

/// Look-ups per second of all threads together, and how many found something.
fn look_up(index: &Index, ids: &[ChunkId], threads: usize) -> (f64, u64) {
    let (begin, found) = (Instant::now(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for part in ids.chunks(ids.len().div_ceil(threads)) {
            let found = &found;
            scope.spawn(move || {
                let hits = part.iter().filter(|id| index.lookup(id, &|_, _| true).is_ok_and(|place| place.is_some()));
                found.fetch_add(hits.count() as u64, Relaxed);
            });
        }
    });
    (ids.len() as f64 / begin.elapsed().as_secs_f64(), found.into_inner())
}

/// Reproducible numbers without order.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

fn absent(count: usize) -> Vec<ChunkId> {
    let mut words = noise(0x5ca1e);
    let mut id = || {
        let mut id = [0; 32];
        id.as_chunks_mut::<8>().0.iter_mut().zip(&mut words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
        ChunkId(id)
    };
    (0..count).map(|_| id()).collect()
}

fn shuffle(ids: &mut [ChunkId]) {
    for (at, word) in (1..ids.len()).zip(noise(77)) {
        ids.swap(at, (word % (at as u64 + 1)) as usize);
    }
}

fn measure(directory: &Path) -> Outcome<()> {
    let repo = open(directory)?;
    let index = repo.index();
    let (begin, before) = (Instant::now(), cpu_seconds()?);
    let state = index.state()?;
    let open_s = begin.elapsed().as_secs_f64();
    let (open_cpu_s, (open_peak, open_rss)) = (cpu_seconds()? - before, memory()?);
    let (chunks, segments) = (state.entries(), state.segments.len());

    let begin = Instant::now();
    let (mut seen, mut present) = (0u64, Vec::new());
    for segment in &state.segments {
        index.read_segment(segment, &mut |e| {
            seen += 1;
            if seen.is_multiple_of(SAMPLE) {
                present.push(e.entry.id);
            }
        })?;
    }
    let stream_per_s = seen as f64 / begin.elapsed().as_secs_f64();
    shuffle(&mut present);
    present.truncate(200_000);
    let absent = absent(1_000_000);
    let (hit_1, found) = look_up(index, &present, 1);
    let (hit_2, _) = look_up(index, &present, 2);
    let (miss_1, false_positives) = look_up(index, &absent, 1);
    let (miss_2, _) = look_up(index, &absent, 2);
    if found != present.len() as u64 || false_positives > 0 {
        return Err(format!("{found} of {} found, {false_positives} of none", present.len()).into());
    }
    let passed = absent.iter().flat_map(|id| state.segments.iter().map(move |s| s.may_contain(id)));
    let passed = passed.filter(|passed| *passed).count() as f64 / (absent.len() * segments) as f64;
    drop(state);
    let (peak, _) = memory()?;

    put_segment(&repo, 4242, SMALL_CHUNKS)?;
    let begin = Instant::now();
    let report = index.compact_all((ObjectId([0; 16]), 0), &HashSet::new(), &())?;
    let compact_s = begin.elapsed().as_secs_f64();
    if !report.failed.is_empty() {
        return Err(format!("{:?}", report.failed).into());
    }
    let line = json!({
        "chunks": chunks, "segments": segments, "open_s": open_s, "open_cpu_s": open_cpu_s,
        "open_peak_bytes": open_peak, "open_bytes": open_rss,
        "hit_per_s_1": hit_1, "hit_per_s_2": hit_2, "miss_per_s_1": miss_1, "miss_per_s_2": miss_2,
        "filter_pass_rate": passed, "stream_per_s": stream_per_s, "peak_bytes": peak,
        "compact_s": compact_s, "compact_bytes": report.written_bytes, "compact_removed": report.removed,
        "compact_peak_bytes": memory()?.0,
    });
    println!("{line}");
    Ok(())
}

fn open(directory: &Path) -> Outcome<Repository> {
    Ok(Repository::open(Arc::new(FsStore::new(directory)), &secret()?)?)
}

fn refer(directory: &Path, chunks: u64) -> Outcome<()> {
    let repo = open(directory)?;
    for (seed, entries) in (0..).zip(sizes(chunks)) {
        put_point(&repo, seed, entries)?;
    }
    Ok(())
}

fn mark(directory: &Path) -> Outcome<()> {
    let times = mark_and_sweep(&open(directory)?)?;
    let line = json!({
        "marks": times.marks, "mark_s": times.mark_s, "sweep_s": times.sweep_s, "mark_peak_bytes": memory()?.0,
    });
    println!("{line}");
    Ok(())
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["make", directory, chunks] => make(Path::new(directory), chunks.parse()?),
        ["measure", directory] => measure(Path::new(directory)),
        ["refer", directory, chunks] => refer(Path::new(directory), chunks.parse()?),
        ["mark", directory] => mark(Path::new(directory)),
        _ => {
            Err("index_scale make DIRECTORY CHUNKS | measure DIRECTORY | refer DIRECTORY CHUNKS | mark DIRECTORY"
                .into())
        }
    }
}
