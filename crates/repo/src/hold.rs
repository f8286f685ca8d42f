//! Legal hold: a restore point that must not go, and why.
//!
//! A hold is an object of its own beside the restore point, so that nothing that is stored is ever changed. What counts
//! is that it exists: a hold that cannot be read holds all the same.
//!
//! Adding a hold and deleting the point may meet. The hold is put first and the point looked for after that; deleting
//! looks for a hold before, and again after the point is gone, and puts the point back if there is one. Whichever order
//! the steps take, either the hold is reported as failed or the point stays.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use virtward_model::PointId;

use crate::{
    error::{Error, Result},
    format::{Malformed, envelope::Kind, names, sealed},
    repository::Repository,
    store::Put,
    util::{opening_threads, parallel_map},
};

/// Longest reason, in bytes.
const REASON_BYTES_MAX: usize = 1000;

/// A hold on a restore point.
#[derive(Clone, Debug, Serialize)]
pub struct Hold {
    /// The restore point.
    pub point: PointId,
    /// Why it is held, as the operator wrote it.
    pub reason: String,
    /// Since when; unknown if the hold cannot be read.
    pub since: Option<Timestamp>,
    /// Why the hold cannot be read, if so.
    #[serde(skip)]
    pub damage: Option<Error>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Body {
    point: PointId,
    reason: String,
    since: Timestamp,
}

/// For the fuzzer: a body of anything.
pub(crate) fn any_body(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Body>(bytes);
}

impl Repository {
    /// The hold on a restore point, looked up in the store.
    pub fn hold(&self, id: PointId) -> Result<Option<Hold>> {
        let name = names::hold(id);
        let inner = &*self.inner;
        let body = match inner.get_small(&name) {
            Err(Error::Missing { .. }) => return Ok(None),
            Err(e @ Error::Damaged { .. }) => Err(e),
            other => sealed::open::<Body>(&inner.ring, Kind::Hold, &name, &other?),
        };
        let body = body.and_then(|body| match body.point == id {
            true => Ok(body),
            false => Err(Malformed("it holds another restore point than its name says").at(name)),
        });
        Ok(Some(match body {
            Ok(Body { point, reason, since }) => Hold { point, reason, since: Some(since), damage: None },
            Err(e) => Hold { point: id, reason: format!("unknown: {e}"), since: None, damage: Some(e) },
        }))
    }

    /// All holds.
    pub fn holds(&self) -> Result<BTreeMap<PointId, Hold>> {
        let mut ids: Vec<PointId> = Vec::new();
        self.inner.store.list(names::HOLDS, &mut |object| {
            ids.extend(names::leaf(&object.name).parse::<PointId>().ok());
            Ok(())
        })?;
        // One that was removed since the listing is none.
        let threads = opening_threads(&*self.inner.store, ids.len());
        let holds = parallel_map(&ids, threads, |id| Ok(self.hold(*id)?.map(|hold| (*id, hold))))?;
        Ok(holds.into_iter().collect())
    }

    /// Holds a restore point: it can be neither deleted nor pruned until the hold is removed.
    pub fn add_hold(&self, id: PointId, reason: &str) -> Result<Hold> {
        if reason.trim().is_empty() || reason.len() > REASON_BYTES_MAX || reason.chars().any(char::is_control) {
            let what = format!("the reason of a hold is a line of text of at most {REASON_BYTES_MAX} bytes");
            return Err(Error::Misuse { what });
        }
        let (inner, name) = (&*self.inner, names::hold(id));
        let body = Body { point: id, reason: reason.into(), since: Timestamp::now() };
        match inner.store.put_if_absent(&name, &sealed::seal(&inner.ring, Kind::Hold, &name, &body)?)? {
            Put::Created => {}
            Put::Exists => match self.hold(id)? {
                // The same again, or its first acknowledgement was lost.
                Some(hold) if hold.reason == reason => {}
                Some(hold) => return Err(Error::Held { id, reason: hold.reason }),
                None => return self.add_hold(id, reason),
            },
        }
        if inner.store.exists(&names::point(id))? {
            return Ok(Hold { point: id, reason: reason.into(), since: Some(body.since), damage: None });
        }
        // Deleted before, or at this moment by someone who had not seen the hold.
        inner.store.delete(&name)?;
        Err(Error::NoPoint { id })
    }

    /// Ends a hold; false if there was none.
    pub fn remove_hold(&self, id: PointId) -> Result<bool> {
        self.inner.store.delete(&names::hold(id))
    }
}
