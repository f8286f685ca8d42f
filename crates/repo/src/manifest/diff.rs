//! What changed between two states of a disk, without reading what they share.

use virtward_model::DiskRecord;

use super::{
    page::{FANOUT, Ref, span},
    tree::{Pages, Tree},
};
use crate::{error::Result, format::ChunkId};

/// An earlier state of a disk with the same chunk size.
#[derive(Clone, Copy, Debug)]
pub struct Since {
    tree: Tree,
    /// The chunk in which the smaller of the two disks ends, if they differ in size. Equal ids do not mean equal bytes
    /// there: one disk cuts the chunk off where the other does not.
    cut: Option<u64>,
}

impl Since {
    /// To tell changes of `disk` against `base`.
    pub fn new(base: &DiskRecord, disk: &DiskRecord) -> Result<Self> {
        let tree = Tree::parse(&base.root, base.size_bytes, base.chunk_bytes)?;
        let differ = base.size_bytes != disk.size_bytes;
        let end = base.size_bytes.min(disk.size_bytes) / u64::from(disk.chunk_bytes.max(1));
        Ok(Self { tree, cut: differ.then_some(end) })
    }
}

/// A tree's share of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Zero,
    Page(ChunkId),
    /// The root is further down, under the first child.
    Above,
}

impl Node {
    fn root(tree: &Tree, level: u8) -> Self {
        match tree.root {
            None => Node::Zero,
            Some(root) if tree.level() == level => Node::Page(root),
            Some(_) => Node::Above,
        }
    }

    fn child(self, pages: &dyn Pages, tree: &Tree, level: u8, place: u64) -> Result<Self> {
        Ok(match self {
            Node::Zero => Node::Zero,
            Node::Page(id) => pages.page(&id, level)?.get(place).map_or(Node::Zero, |r| Node::Page(r.id)),
            Node::Above if place == 0 => Node::root(tree, level - 1),
            Node::Above => Node::Zero,
        })
    }
}

struct Diff<'a> {
    pages: &'a dyn Pages,
    new: &'a Tree,
    since: &'a Since,
    from: u64,
}

/// Number of the first leaf at or after `from` in which chunks may have changed.
pub fn changed_leaf(pages: &dyn Pages, new: &Tree, since: &Since, from: u64) -> Result<Option<u64>> {
    let level = new.level().max(since.tree.level());
    let diff = Diff { pages, new, since, from };
    diff.first(level, 0, Node::root(new, level), Node::root(&since.tree, level))
}

impl Diff<'_> {
    fn first(&self, level: u8, node: u64, new: Node, old: Node) -> Result<Option<u64>> {
        let (begin, end) = (node * span(level), (node + 1) * span(level));
        let has_cut = self.since.cut.is_some_and(|cut| (begin..end).contains(&cut));
        let is_over = end <= self.from * FANOUT || begin >= self.new.chunks;
        let both_zero = new == Node::Zero && old == Node::Zero;
        if is_over || both_zero || (new == old && !matches!(new, Node::Above) && !has_cut) {
            return Ok(None);
        }
        if level == 0 {
            return Ok(Some(node));
        }
        let skipped = (self.from * FANOUT).saturating_sub(begin) / span(level - 1);
        for place in skipped..FANOUT {
            let below = (
                new.child(self.pages, self.new, level, place)?,
                old.child(self.pages, &self.since.tree, level, place)?,
            );
            if let Some(leaf) = self.first(level - 1, node * FANOUT + place, below.0, below.1)? {
                return Ok(Some(leaf));
            }
        }
        Ok(None)
    }
}

/// A place that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Number of the chunk.
    pub index: u64,
    /// What is there now; `None` is zero.
    pub now: Option<Ref>,
    /// How many of its layers were there before, below nothing else.
    pub kept: usize,
}

impl Change {
    fn new(index: u64, now: Option<Ref>, then: Option<Ref>) -> Self {
        let kept = match (&now, &then) {
            (Some(now), Some(then)) if now.layers().zip(then.layers()).all(|(a, b)| a == b) => then.layers().count(),
            _ => 0,
        };
        // Layers that were taken off leave nothing to build on.
        let kept = if now.as_ref().is_some_and(|now| kept < now.layers().count()) { kept } else { 0 };
        Self { index, now, kept }
    }
}

/// The chunks of a leaf that changed.
pub fn leaf_changes(pages: &dyn Pages, new: &Tree, since: &Since, leaf: u64) -> Result<Vec<Change>> {
    let (page, old) = (new.leaf(pages, leaf)?, since_leaf(pages, since, leaf)?);
    let mut changes = Vec::new();
    for place in 0..FANOUT.min(new.chunks.saturating_sub(leaf * FANOUT)) {
        let index = leaf * FANOUT + place;
        let now = page.as_ref().and_then(|page| page.get(place));
        let then = old.as_ref().and_then(|page| page.get(place)).filter(|_| index < since.tree.chunks);
        if now.is_some() && since.cut == Some(index) {
            changes.push(Change { index, now, kept: 0 });
        } else if now != then {
            changes.push(Change::new(index, now, then));
        }
    }
    Ok(changes)
}

fn since_leaf(pages: &dyn Pages, since: &Since, leaf: u64) -> Result<Option<std::sync::Arc<super::Page>>> {
    match leaf * FANOUT < since.tree.chunks {
        true => since.tree.leaf(pages, leaf),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, HashMap},
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::manifest::{
        Page, Ref,
        edit::{Edit, LeafChange},
    };

    #[derive(Default)]
    struct Kept(Mutex<HashMap<ChunkId, Arc<Page>>>, Mutex<u64>);

    impl Pages for Kept {
        fn page(&self, id: &ChunkId, _: u8) -> Result<Arc<Page>> {
            *self.1.lock().unwrap() += 1;
            Ok(self.0.lock().unwrap()[id].clone())
        }
    }

    impl Kept {
        fn write(&self, page: &Page) -> Ref {
            let id = ChunkId(*blake3::hash(&page.encode()).as_bytes());
            self.0.lock().unwrap().insert(id, Arc::new(page.clone()));
            Ref::page(id, page.chunks())
        }

        /// A tree with these chunks set; the number is the content.
        fn tree(&self, chunks: u64, set: &BTreeMap<u64, u8>) -> Tree {
            let mut leaves: BTreeMap<u64, Vec<Option<Ref>>> = BTreeMap::new();
            for (index, byte) in set.range(..chunks) {
                let refs = leaves.entry(index / FANOUT).or_insert_with(|| vec![None; FANOUT as usize]);
                refs[(index % FANOUT) as usize] = Some(Ref::chunk(ChunkId([*byte; 32])));
            }
            let whole = |refs| Page::new(0, refs).map(|page| self.write(&page));
            let changes = leaves.into_iter().map(|(leaf, refs)| (leaf, LeafChange::Whole(whole(refs)))).collect();
            let write = |page: &Page| Ok(self.write(page));
            let edit = Edit { pages: self, write: &write, changes: &changes, base: None, chunks };
            Tree { root: edit.run().unwrap().map(|r| r.id), chunks }
        }

        fn diff(&self, new: &Tree, old: &Tree, cut: Option<u64>) -> Vec<(u64, Option<u8>)> {
            let since = Since { tree: *old, cut };
            let (mut from, mut found) = (0, Vec::new());
            while let Some(leaf) = changed_leaf(self, new, &since, from).unwrap() {
                let changes = leaf_changes(self, new, &since, leaf).unwrap();
                found.extend(changes.into_iter().map(|change| (change.index, change.now.map(|r| r.id.0[0]))));
                from = leaf + 1;
            }
            found
        }
    }

    fn expected(new: &BTreeMap<u64, u8>, old: &BTreeMap<u64, u8>, chunks: u64, before: u64) -> Vec<(u64, Option<u8>)> {
        let at = |set: &BTreeMap<u64, u8>, end, index| set.get(&index).copied().filter(|_| index < end);
        let keys: std::collections::BTreeSet<u64> = new.keys().chain(old.keys()).copied().collect();
        let changed = |index: &u64| at(new, chunks, *index) != at(old, before, *index);
        keys.into_iter().filter(|i| *i < chunks).filter(changed).map(|i| (i, at(new, chunks, i))).collect()
    }

    #[test]
    fn changes_are_found_at_every_size_and_shared_parts_are_not_read() {
        let kept = Kept::default();
        let sizes = [1, 255, 256, 257, 700, 65_536, 65_537, 200_000];
        for before in sizes {
            for chunks in sizes {
                let old: BTreeMap<u64, u8> = (0..before).step_by(97).map(|n| (n, (n % 251) as u8 + 1)).collect();
                let mut new = old.clone();
                new.retain(|index, _| index % (97 * 5) != 0);
                new.insert(chunks - 1, 200);
                new.insert(chunks / 2, 201);
                let (tree, earlier) = (kept.tree(chunks, &new), kept.tree(before, &old));
                let found = kept.diff(&tree, &earlier, None);
                assert_eq!(found, expected(&new, &old, chunks, before), "{before} to {chunks}");
            }
        }
        let old: BTreeMap<u64, u8> = (0..200_000).step_by(3).map(|n| (n, 7)).collect();
        let mut new = old.clone();
        new.insert(150_000, 9);
        let (tree, earlier) = (kept.tree(200_000, &new), kept.tree(200_000, &old));
        *kept.1.lock().unwrap() = 0;
        assert_eq!(kept.diff(&tree, &earlier, None), [(150_000, Some(9))]);
        assert!(*kept.1.lock().unwrap() < 5_000, "{} pages were looked at", kept.1.lock().unwrap());
    }

    #[test]
    fn the_chunk_in_which_a_resized_disk_was_cut_counts_as_changed() {
        let kept = Kept::default();
        let set: BTreeMap<u64, u8> = (0..300).map(|n| (n, 1)).collect();
        let tree = kept.tree(300, &set);
        assert_eq!(kept.diff(&tree, &tree, None), []);
        assert_eq!(kept.diff(&tree, &tree, Some(270)), [(270, Some(1))]);
    }
}
