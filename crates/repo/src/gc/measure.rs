//! How long it takes to find out what is garbage: for measurements at sizes that nobody has at hand.

use std::time::Instant;

use super::{live::LiveSet, mark::Marker, sweep::sweep};
use crate::{error::Result, repository::Repository};

/// What finding garbage took.
#[derive(Clone, Copy, Debug)]
pub struct MarkTimes {
    /// References that were followed.
    pub marks: u64,
    /// Seconds to follow them, from the restore points on.
    pub mark_s: f64,
    /// Seconds to compare the whole index with them.
    pub sweep_s: f64,
    /// Packs that nothing refers to.
    pub dead_packs: u64,
}

/// Marks and sweeps as a collection does, and changes nothing.
pub fn mark_and_sweep(repository: &Repository) -> Result<MarkTimes> {
    let state = repository.inner.index.state()?;
    let begin = Instant::now();
    let points = repository.points()?.points;
    let records = points.iter().map(|point| repository.record(point.id)).collect::<Result<Vec<_>>>()?;
    let live = LiveSet::new(state.entries() as u64);
    let mut marker = Marker::new(repository, &live, 0, &());
    for record in marker.mark_together(records.iter().map(|record| &**record))? {
        marker.mark(record)?;
    }
    let (marks, mark_s) = (marker.marks, begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    let uses = sweep(&repository.inner.index, &live, 0, &())?;
    let dead_packs = uses.values().filter(|pack| pack.live_bytes == 0).count() as u64;
    Ok(MarkTimes { marks, mark_s, sweep_s: begin.elapsed().as_secs_f64(), dead_packs })
}
