//! Moving records to new packs, as a writer like any other: its lease is of an epoch that condemns where they come from.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    format::{ObjectId, names},
    index::segment::{self, IndexEntry},
    lease,
    pack::{Entry, PackInfo, read::decode_record},
    progress::Progress,
    repository::Repository,
    store::put_new,
    writer::WriterOptions,
};

/// What was moved.
#[derive(Default)]
pub struct Moved {
    /// Packs that records were moved from.
    pub packs: u64,
    /// Bytes of the records.
    pub bytes: u64,
    /// Records that could not be read, for people.
    pub lost: Vec<String>,
}

/// Stores records anew, durably, as they are: decrypted, checked and encrypted again, not compressed again.
pub fn run(
    repo: &Repository,
    wanted: &[(Arc<PackInfo>, Vec<Entry>)],
    options: &WriterOptions,
    progress: &dyn Progress,
) -> Result<Moved> {
    let writer = repo.writer(options.clone())?;
    let mut moved = Moved::default();
    progress.total(wanted.iter().flat_map(|(_, entries)| entries).map(|e| u64::from(e.stored)).sum());
    let mut plain = Vec::new();
    for (pack, entries) in wanted {
        let name = pack.name();
        let mut damaged = 0;
        for entry in entries {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let outcome = read_encoded(repo, pack, entry, &mut plain);
            match outcome {
                Ok(encoded) => moved.bytes += writer.adopt(pack.header.class, *entry, encoded)?,
                Err(e) if e.is_damage() => damaged += 1,
                Err(e) => return Err(e),
            }
            progress.advance(u64::from(entry.stored));
        }
        moved.packs += 1;
        if damaged > 0 {
            moved.lost.push(format!(
                "{name} stays: {damaged} records that are needed cannot be read; run `virtward repo check`"
            ));
        }
    }
    writer.settle()?;
    Ok(moved)
}

/// The compressed bytes of a record that was found to be what its id says.
fn read_encoded(repo: &Repository, pack: &PackInfo, entry: &Entry, plain: &mut Vec<u8>) -> Result<Vec<u8>> {
    let inner = &*repo.inner;
    let name = pack.name();
    let mut record = inner.store.get_range(&name, entry.offset.into(), entry.stored as usize)?;
    decode_record(&inner.ring, &pack.header, &*inner.sealer(pack)?, entry, &mut record, plain)
        .map_err(|e| e.at(&*name))?;
    // Opened in place: what is in front of the tag is clear now.
    record.truncate(record.len() - crate::crypto::TAG_BYTES);
    Ok(record)
}

impl Repository {
    /// Lists a pack in a segment of its own.
    pub(crate) fn list_pack(&self, pack: PackInfo, entries: Vec<Entry>) -> Result<()> {
        let inner = &*self.inner;
        let epoch = lease::newest_epoch(&*inner.store, &inner.ring)?.epoch;
        let entries = entries.into_iter().map(|entry| IndexEntry { pack: 0, entry }).collect();
        let (id, bytes) = segment::encode(&inner.ring, (ObjectId::random(), epoch), &[pack], &[], entries)?;
        put_new(&*inner.store, &names::segment(&id), &bytes)
    }
}
