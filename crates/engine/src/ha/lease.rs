//! The lease of a VM, beside its disks: a record of which generation may write to them.
//!
//! It does not replace the cluster's store; it catches what the store cannot: a store that was restored from an older
//! backup, a second cluster that sees the same disks, an administrator who moved a VM by hand.
//!
//! Each host writes a record of its own, and none that another one wrote: a write that was held up, and arrives after its
//! host was declared dead, cannot undo a newer record. A reader looks at all of them; the highest generation counts. A
//! record is written alternately to two blocks, so a torn write leaves the one before it.
//!
//! ```text
//! in a directory:   DIR/.virtward-lease/VM/HOST        two blocks of 4096 bytes
//! on a device:      a region of 64 hosts × two blocks for each VM, from `offset` on
//! block:            magic 8 · version 4 · length 4 · SHA-256 32 · JSON, zeroes
//! ```
//!
//! Storage can hang for ever. Every access runs on a thread of its own with a limit; while one hangs, no further one is
//! begun on the same storage.

mod block;
mod place;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use place::Place;

/// The longest name of a host in a record.
const HOST_BYTES: usize = 255;

/// Who may write to a VM's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VM.
    pub vm: Uuid,
    /// The generation of its claim; rises with every start.
    pub generation: u64,
    /// The owner's epoch.
    pub epoch: u64,
    /// The owner.
    pub host: String,
    /// Rises with every write of this host.
    pub seq: u64,
    /// Whether the owner gave it up in order.
    pub released: bool,
}

/// Why a lease was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A start would be wrong: the disks have seen a newer claim.
    #[error(
        "{} holds generation {} of {}, and {claimed} is claimed: the cluster's state is older than the disk (restored?), or \
         another cluster uses it; nothing was started", .place.display(), .found.generation, .found.host
    )]
    Newer {
        /// Where.
        place: PathBuf,
        /// What was claimed.
        claimed: u64,
        /// What is there.
        found: Record,
    },
    /// Two hosts claim one generation.
    #[error("{} holds generation {} of {} as well, which this host claims: two stores gave it out; nothing was started",
        .place.display(), .found.generation, .found.host)]
    Twice {
        /// Where.
        place: PathBuf,
        /// What is there.
        found: Record,
    },
    /// What is there is no record, so it cannot be known who may write.
    #[error("the lease in {} is damaged ({why}); if the VM runs nowhere, a person may clear it", .place.display())]
    Damaged {
        /// Where.
        place: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The storage does not answer.
    #[error("{}: no answer in {} ms", .place.display(), .limit.as_millis())]
    Hangs {
        /// Where.
        place: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The storage refuses.
    #[error("{}: {source}", .place.display())]
    Io {
        /// Where.
        place: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}

/// What a start claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The VM.
    pub vm: Uuid,
    /// The generation that the store gave out.
    pub generation: u64,
    /// This host's epoch.
    pub epoch: u64,
    /// This host.
    pub host: String,
}

/// The highest record of a VM on one storage.
pub async fn read(place: &Place, vm: Uuid, limit: Duration) -> Result<Option<Record>, Error> {
    place.run(limit, move |place| Ok(newest(place.read_all(vm)?))).await
}

fn newest(records: Vec<Record>) -> Option<Record> {
    records.into_iter().max_by_key(|record| (record.generation, record.seq))
}

/// Takes the lease on every storage that holds a disk of the VM: all are looked at before any is written, and each is
/// read back after. Repeating a claim is harmless. On an error the VM must not be started; what was written says only
/// that this generation was tried.
pub async fn take(places: &[Place], claim: &Claim, limit: Duration) -> Result<(), Error> {
    for place in places {
        let claim = claim.clone();
        place.run(limit, move |place| check(place, &claim)).await?;
    }
    for place in places {
        let claim = claim.clone();
        place
            .run(limit, move |place| {
                write(place, &claim, false)?;
                // Somebody may have been at the same point: whoever reads second sees the other.
                check(place, &claim)
            })
            .await?;
    }
    Ok(())
}

/// Gives the lease up after the VM's process is known to have ended. The generation stays the highest that was seen.
pub async fn release(places: &[Place], claim: &Claim, limit: Duration) -> Result<(), Error> {
    for place in places {
        let claim = claim.clone();
        place.run(limit, move |place| write(place, &claim, true)).await?;
    }
    Ok(())
}

/// Renews the record, which shows that this host reaches the storage, and looks whether anybody claimed a newer one.
pub async fn renew(places: &[Place], claim: &Claim, limit: Duration) -> Result<(), Error> {
    take(places, claim, limit).await
}

/// Removes every record of a VM: when it leaves protection, or when a person says that it runs nowhere.
pub async fn clear(places: &[Place], vm: Uuid, limit: Duration) -> Result<(), Error> {
    for place in places {
        place.run(limit, move |place| place.clear(vm)).await?;
    }
    Ok(())
}

fn check(place: &Place, claim: &Claim) -> Result<(), Error> {
    let records = place.read_all(claim.vm)?;
    let at = || place.path().to_owned();
    let other = |record: &&Record| record.generation == claim.generation && record.host != claim.host;
    if let Some(found) = records.iter().find(other) {
        return Err(Error::Twice { place: at(), found: found.clone() });
    }
    match newest(records) {
        Some(found) if found.generation > claim.generation => {
            Err(Error::Newer { place: at(), claimed: claim.generation, found })
        }
        _ => Ok(()),
    }
}

fn write(place: &Place, claim: &Claim, released: bool) -> Result<(), Error> {
    if claim.host.is_empty()
        || claim.host.len() > HOST_BYTES
        || claim.host.contains(['/', '\0'])
        || claim.host.starts_with('.')
    {
        let why =
            std::io::Error::new(std::io::ErrorKind::InvalidInput, format!("{:?} is no name of a host", claim.host));
        return Err(place.io(why));
    }
    let own = place.read_own(claim.vm, &claim.host)?;
    // A record of ours that is newer than what is to be written: an old order that was held up.
    if let Some(own) = own.as_ref().filter(|own| own.generation > claim.generation) {
        return Err(Error::Newer { place: place.path().to_owned(), claimed: claim.generation, found: own.clone() });
    }
    let seq = own.map_or(1, |own| own.seq + 1);
    let Claim { vm, generation, epoch, ref host } = *claim;
    place.write_own(&Record { vm, generation, epoch, host: host.clone(), seq, released })
}

#[cfg(test)]
mod tests;
