//! Disk images and their bitmaps, with QEMU's rules for keeping them.

use std::collections::{BTreeMap, BTreeSet};

/// Bytes per bit.
pub(super) const GRANULARITY: u64 = 64 << 10;
/// Size of an image until it is told otherwise.
const SIZE_DEFAULT: u64 = 64 << 20;

/// An image on shared storage.
pub(super) struct Image {
    pub(super) size_bytes: u64,
    /// Bitmaps in the file. While QEMU has the image open they are marked in use, which is what a crash leaves behind.
    stored: BTreeMap<String, Bitmap>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, Default)]
pub(super) struct Bitmap {
    pub(super) inconsistent: bool,
    pub(super) dirty: BTreeSet<u64>,
}

/// The bitmaps of an image that QEMU has open.
pub(super) type LiveBitmaps = BTreeMap<String, Bitmap>;

impl Default for Image {
    fn default() -> Self {
        Image { size_bytes: SIZE_DEFAULT, stored: BTreeMap::new() }
    }
}

impl Image {
    /// QEMU opens the image: it gets the bitmaps as they are, and the file's copies are marked in use.
    pub(super) fn open(&mut self) -> LiveBitmaps {
        let live = self.stored.clone();
        for bitmap in self.stored.values_mut() {
            bitmap.inconsistent = true;
        }
        live
    }

    /// QEMU closes the image in order: what it holds is what the file holds.
    pub(super) fn close(&mut self, live: LiveBitmaps) {
        self.stored = live;
    }

    /// Drops a stored bitmap.
    pub(super) fn forget(&mut self, name: &str) {
        self.stored.remove(name);
    }

    /// Marks a stored bitmap as not saved cleanly; creates it if need be.
    pub(super) fn spoil(&mut self, name: &str) {
        self.stored.entry(name.to_owned()).or_default().inconsistent = true;
    }
}

impl Bitmap {
    /// Notes a write.
    pub(super) fn mark(&mut self, offset: u64, length: u64) {
        if !self.inconsistent && length > 0 {
            let last = offset.saturating_add(length - 1) / GRANULARITY;
            self.dirty.extend(offset / GRANULARITY..=last);
        }
    }

    /// Dirty bytes as QEMU counts them.
    pub(super) fn dirty_bytes(&self) -> u64 {
        self.dirty.len() as u64 * GRANULARITY
    }
}
