//! Verification without keys, for the machine that stores: every object carries a checksum of its ciphertext.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::Serialize;

use super::Damage;
use crate::{
    error::{Error, Result},
    format::{
        ObjectId,
        envelope::{self, ENVELOPE_BYTES_MAX, Kind},
        names,
    },
    index::segment::{self, Clear, SUM_BYTES},
    pack::{
        Header, PackInfo,
        layout::{HEADER_BYTES, TAIL_BYTES},
        read::read_tail,
    },
    progress::Progress,
    store::{Listed, Store},
    util::{lock, parallel, reading_threads},
};

/// Bytes read at once.
const READ_BYTES: usize = 4 << 20;

/// Outcome of [`verify_ciphertext`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct CiphertextReport {
    /// Objects looked at.
    pub objects: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Objects that are damaged or missing.
    pub damaged: Vec<Damage>,
    /// Packs that no index segment lists: left by killed runs, or their segment is lost.
    pub unlisted_packs: u64,
}

impl CiphertextReport {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// Checks every object of a store by its own checksum, and that no pack of any index segment is missing.
pub fn verify_ciphertext(store: &dyn Store, threads: usize, progress: &dyn Progress) -> Result<CiphertextReport> {
    store.forget();
    let threads = reading_threads(store, threads);
    let mut objects = Vec::new();
    store.list("", &mut |object| {
        objects.push(object);
        Ok(())
    })?;
    progress.total(objects.iter().map(|o| o.bytes).sum());
    let run = Run { store, progress, read: AtomicU64::new(0), damaged: Mutex::default(), clear: Mutex::default() };
    parallel(&objects, threads, |object| run.object(object))?;
    let Run { read, damaged, clear, .. } = run;
    let mut damaged = damaged.into_inner().unwrap_or_else(|e| e.into_inner());
    let mut clear = clear.into_inner().unwrap_or_else(|e| e.into_inner());
    let replaced: HashSet<ObjectId> = clear.iter().flat_map(|c| c.replaces.iter().copied()).collect();
    clear.retain(|c| !replaced.contains(&c.header.segment));
    let listed: HashMap<String, &PackInfo> = clear.iter().flat_map(|c| &c.packs).map(|p| (p.name(), &**p)).collect();
    let present: HashMap<&str, u64> = objects.iter().map(|o| (&*o.name, o.bytes)).collect();
    for (name, pack) in &listed {
        match present.get(&**name) {
            None => damaged.push(Damage { object: name.clone(), what: "it is missing".into() }),
            Some(bytes) if *bytes != pack.bytes() => {
                let what = format!("it has {bytes} bytes, the index says {}", pack.bytes());
                damaged.push(Damage { object: name.clone(), what });
            }
            Some(_) => {}
        }
    }
    if !present.contains_key(names::CONFIG) {
        damaged.push(Damage { object: names::CONFIG.into(), what: "it is missing".into() });
    }
    damaged.sort_by(|a, b| (&a.object, &a.what).cmp(&(&b.object, &b.what)));
    damaged.dedup_by(|a, b| a.object == b.object);
    let is_pack = |name: &str| name.starts_with(names::DATA) || name.starts_with(names::META);
    let unlisted = objects.iter().filter(|o| is_pack(&o.name) && !listed.contains_key(&o.name)).count();
    let objects = objects.len() as u64;
    Ok(CiphertextReport { objects, bytes_read: read.into_inner(), damaged, unlisted_packs: unlisted as u64 })
}

struct Run<'a> {
    store: &'a dyn Store,
    progress: &'a dyn Progress,
    read: AtomicU64,
    damaged: Mutex<Vec<Damage>>,
    clear: Mutex<Vec<Clear>>,
}

impl Run<'_> {
    fn object(&self, object: &Listed) -> Result<()> {
        let outcome = match object.name.split('/').next().unwrap_or_default() {
            "data" | "meta" => check_pack(self.store, &object.name, object.bytes, self.progress).map(drop),
            "index" => self.segment(object),
            "config" => self.envelope(object, Kind::Config),
            "keys" => self.envelope(object, Kind::KeySlot),
            "points" | "trash" => self.envelope(object, Kind::Point),
            "holds" => self.envelope(object, Kind::Hold),
            "epochs" => self.envelope(object, Kind::Epoch),
            "leases" if object.name.ends_with(".end") => Ok(()),
            "leases" => self.envelope(object, Kind::Lease),
            _ => return Ok(()), // Not of this format; nothing refers to it.
        };
        self.read.fetch_add(object.bytes, Relaxed);
        match outcome {
            Ok(()) => Ok(()),
            // Deleted since the listing; a pack that should be there is found missing by its segment.
            Err(Error::Missing { .. }) => Ok(()),
            Err(e) if e.is_damage() => {
                lock(&self.damaged).push(Damage { object: object.name.clone(), what: describe(&e) });
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    fn envelope(&self, object: &Listed, kind: Kind) -> Result<()> {
        let bytes = self.store.get(&object.name, ENVELOPE_BYTES_MAX)?;
        envelope::parse(&bytes, kind).map_err(|e| e.at(&*object.name))?;
        self.progress.advance(object.bytes);
        Ok(())
    }

    fn segment(&self, object: &Listed) -> Result<()> {
        let clear = check_segment(self.store, object, self.progress)?;
        lock(&self.clear).push(clear);
        Ok(())
    }
}

/// Checks an index segment by its checksum and takes its clear part apart.
pub(super) fn check_segment(store: &dyn Store, object: &Listed, progress: &dyn Progress) -> Result<Clear> {
    let name = &*object.name;
    if object.bytes < (segment::HEADER_BYTES + SUM_BYTES) as u64 {
        return Err(Error::damaged(name, "it is too short"));
    }
    let head = store.get_range(name, 0, segment::HEADER_BYTES)?;
    let header = segment::Header::decode(&head).map_err(|e| e.at(name))?;
    if header.segment_bytes() != object.bytes || names::segment(&header.segment) != name {
        return Err(Error::damaged(name, "its length or name does not match its header"));
    }
    let clear = Clear::decode(&store.get_range(name, 0, header.clear_bytes())?).map_err(|e| e.at(name))?;
    let mut hasher = Summed::default();
    hasher.read(store, name, object.bytes - SUM_BYTES as u64, progress)?;
    let sum = store.get_range(name, object.bytes - SUM_BYTES as u64, SUM_BYTES)?;
    if hasher.0.finalize().as_bytes() != &*sum {
        return Err(Error::damaged(name, "its checksum does not match"));
    }
    Ok(clear)
}

/// What an error says about an object whose name stands next to it.
pub(crate) fn describe(error: &Error) -> String {
    match error {
        Error::Damaged { what, .. } => what.clone(),
        Error::Missing { .. } => "it is missing".into(),
        other => other.to_string(),
    }
}

#[derive(Default)]
struct Summed(blake3::Hasher);

impl Summed {
    fn read(&mut self, store: &dyn Store, name: &str, end: u64, progress: &dyn Progress) -> Result<()> {
        let mut buffer = vec![0; READ_BYTES.min(end as usize)];
        let mut at = 0;
        while at < end {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let part = (end - at).min(READ_BYTES as u64) as usize;
            store.read_range(name, at, &mut buffer[..part])?;
            self.0.update(&buffer[..part]);
            progress.advance(part as u64);
            at += part as u64;
        }
        Ok(())
    }
}

/// Reads a pack in sequence and compares it with the checksum in its tail.
pub(super) fn check_pack(store: &dyn Store, name: &str, bytes: u64, progress: &dyn Progress) -> Result<PackInfo> {
    let info = read_tail(store, name, bytes)?;
    let mut hasher = Summed::default();
    hasher.read(store, name, bytes - TAIL_BYTES as u64, progress)?;
    if hasher.0.finalize().as_bytes() != &info.footer.sum {
        return Err(Error::damaged(name, "its bytes are not those that were written (checksum mismatch)"));
    }
    Ok(info)
}

/// Reads the header and tail copies of a pack and compares them.
pub(super) fn check_frame(store: &dyn Store, pack: &PackInfo) -> Result<()> {
    let name = pack.name();
    let found = read_tail(store, &name, store.size(&name)?)?;
    if found.footer != pack.footer || found.header.bytes() != pack.header.bytes() {
        return Err(Error::damaged(name, "its tail is not the one that the index lists"));
    }
    let mut head = [0; HEADER_BYTES];
    store.read_range(&name, 0, &mut head)?;
    Header::decode(&head).map_err(|e| e.at(&*name))?;
    if &head != pack.header.bytes() {
        return Err(Error::damaged(name, "its header is not the one that the index lists"));
    }
    Ok(())
}
