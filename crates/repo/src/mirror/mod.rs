//! Two repositories that hold the same restore points: copying points from one to the other ([`send`]), and mending one
//! with what the other still has ([`heal`]).
//!
//! A restore point keeps its id wherever it is copied to, and a copy names the repository that the point was made in, so
//! that copies of one point find each other whichever way they came. Chunk ids differ, because each repository has keys
//! of its own: content is read, checked and hashed again, never passed on as it is stored.
//! Not here: which points to copy, and how often.

pub mod heal;
pub mod send;

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use virtward_model::{CopiedFrom, RestorePoint};

use crate::{
    error::{Error, Result},
    progress::Progress,
    repository::Repository,
};

/// Where a point was made: the same for all copies of it.
fn origin(repo: &Repository, point: &RestorePoint) -> CopiedFrom {
    let here = || CopiedFrom { repository: repo.id(), point: point.id };
    point.copied_from.clone().unwrap_or_else(here)
}

/// The points of a repository by where they were made.
fn by_origin(repo: &Repository) -> Result<HashMap<CopiedFrom, RestorePoint>> {
    Ok(repo.points()?.points.into_iter().map(|point| (origin(repo, &point), point)).collect())
}

/// Two repositories, not one with itself; the second can be read.
fn check_pair(one: &Repository, other: &Repository, reads: &Repository) -> Result<()> {
    if one.id() == other.id() {
        let what = format!(
            "{} and {} are the same repository; name another one",
            one.store().location(),
            other.store().location()
        );
        return Err(Error::Unsupported { what });
    }
    match reads.can_restore() {
        true => Ok(()),
        false => Err(Error::KeyNotHeld { class: "data" }),
    }
}

/// Adds up what several calls announce, for a caller that watches all of them together.
struct Meter<'a> {
    progress: &'a dyn Progress,
    total: AtomicU64,
    done: AtomicU64,
}

impl<'a> Meter<'a> {
    fn new(progress: &'a dyn Progress) -> Self {
        Self { progress, total: AtomicU64::new(0), done: AtomicU64::new(0) }
    }
    fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }
    fn status(&self) -> Result<()> {
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

impl Progress for Meter<'_> {
    fn total(&self, bytes: u64) {
        self.progress.total(self.total.fetch_add(bytes, Relaxed) + bytes);
    }
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Relaxed);
        self.progress.advance(bytes);
    }
    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
}
