//! Making the next tree out of a base and changes, writing only the pages on the way to what changed.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    page::{FANOUT, Page, Ref, root_level},
    tree::{Pages, Tree},
};
use crate::error::Result;

/// What happened to one leaf.
#[derive(Debug)]
pub enum LeafChange {
    /// Some of its chunks are set; the others are the base's.
    Patch(Box<Patch>),
    /// A thread is writing its page.
    Sealing,
    /// All of it is set, and its page is written.
    Whole(Option<Ref>),
}

/// Chunks of a leaf that are set.
#[derive(Debug)]
pub struct Patch {
    set: [bool; FANOUT as usize],
    count: u64,
    refs: Vec<Option<Ref>>,
}

impl Default for Patch {
    fn default() -> Self {
        Self { set: [false; FANOUT as usize], count: 0, refs: vec![None; FANOUT as usize] }
    }
}

impl Patch {
    /// Sets a chunk; false if it was set before.
    pub fn set(&mut self, place: u64, chunk: Option<Ref>) -> bool {
        let place = place as usize;
        if std::mem::replace(&mut self.set[place], true) {
            return false;
        }
        self.count += 1;
        self.refs[place] = chunk;
        true
    }
    /// How many are set.
    pub fn count(&self) -> u64 {
        self.count
    }
    /// All references, as if the others were zero.
    pub fn into_refs(self) -> Vec<Option<Ref>> {
        self.refs
    }
}

/// What is needed to make a tree.
pub struct Edit<'a> {
    /// Reads pages of the base.
    pub pages: &'a dyn Pages,
    /// Writes a page and gives its reference.
    pub write: &'a dyn Fn(&Page) -> Result<Ref>,
    /// Changed leaves by number.
    pub changes: &'a BTreeMap<u64, LeafChange>,
    /// The earlier state.
    pub base: Option<Tree>,
    /// Chunks of the new disk.
    pub chunks: u64,
}

/// The base's share of a node.
#[derive(Clone)]
enum Base {
    Zero,
    Node(Ref),
    /// The base's root is further down, under the first child.
    Above,
}

impl Edit<'_> {
    /// Root of the new tree.
    pub fn run(&self) -> Result<Option<Ref>> {
        let level = root_level(self.chunks);
        let base = self.base_at_root(level)?;
        self.node(level, 0, base)
    }

    fn base_at_root(&self, level: u8) -> Result<Base> {
        let Some(Tree { root: Some(root), .. }) = self.base else { return Ok(Base::Zero) };
        let mut base_level = self.base_level();
        if base_level < level {
            return Ok(Base::Above);
        }
        let mut id = root;
        loop {
            let page = self.pages.page(&id, base_level)?;
            if base_level == level {
                return Ok(Base::Node(Ref::page(id, page.chunks())));
            }
            // The disk shrank below a level: what remains is under the first child.
            let Some(child) = page.get(0) else { return Ok(Base::Zero) };
            id = child.id;
            base_level -= 1;
        }
    }

    fn base_level(&self) -> u8 {
        self.base.map_or(0, |b| b.level())
    }

    fn node(&self, level: u8, node: u64, base: Base) -> Result<Option<Ref>> {
        if !self.must_visit(level, node) {
            match base {
                Base::Zero => return Ok(None),
                Base::Node(r) => return Ok(Some(r)),
                Base::Above => {}
            }
        }
        let old = match &base {
            Base::Node(r) => Some(self.pages.page(&r.id, level)?),
            _ => None,
        };
        let refs =
            if level == 0 { self.leaf_refs(node, old.as_deref()) } else { self.children(level, node, &base, old)? };
        match refs {
            Refs::Page(refs) => Page::new(level, refs).map(|page| (self.write)(&page)).transpose(),
            Refs::Written(r) => Ok(r),
        }
    }

    fn children(&self, level: u8, node: u64, base: &Base, old: Option<Arc<Page>>) -> Result<Refs> {
        // Nodes of the level below that the disk has.
        let end = self.chunks.div_ceil(FANOUT.pow(u32::from(level)));
        let mut refs = Vec::with_capacity(FANOUT as usize);
        for place in 0..FANOUT.min(end.saturating_sub(node * FANOUT)) {
            let child_base = match (base, &old) {
                (Base::Node(_), Some(page)) => page.get(place).map_or(Base::Zero, Base::Node),
                (Base::Above, _) if place == 0 => self.base_below(level - 1)?,
                _ => Base::Zero,
            };
            refs.push(self.node(level - 1, node * FANOUT + place, child_base)?);
        }
        Ok(Refs::Page(refs))
    }

    fn base_below(&self, level: u8) -> Result<Base> {
        match self.base {
            Some(Tree { root: Some(id), .. }) if self.base_level() == level => {
                Ok(Base::Node(Ref::page(id, self.pages.page(&id, level)?.chunks())))
            }
            Some(_) => Ok(Base::Above),
            None => Ok(Base::Zero),
        }
    }

    fn leaf_refs(&self, leaf: u64, old: Option<&Page>) -> Refs {
        let patch = match self.changes.get(&leaf) {
            Some(LeafChange::Whole(r)) => return Refs::Written(r.clone()),
            Some(LeafChange::Patch(patch)) => Some(patch),
            Some(LeafChange::Sealing) | None => None,
        };
        let count = FANOUT.min(self.chunks - leaf * FANOUT);
        let old_at = |place| old.and_then(|page| page.get(place));
        let at = |place: u64| match patch {
            Some(patch) if patch.set[place as usize] => patch.refs[place as usize].clone(),
            _ => old_at(place),
        };
        Refs::Page((0..count).map(at).collect())
    }

    /// Whether anything below a node differs from the base.
    fn must_visit(&self, level: u8, node: u64) -> bool {
        let leaves = FANOUT.pow(u32::from(level));
        let (first, end) = (node * leaves, (node + 1) * leaves);
        let shrank = self.base.is_some_and(|b| b.chunks > self.chunks) && self.chunks < end * FANOUT;
        shrank || self.changes.range(first..end).next().is_some()
    }
}

enum Refs {
    Page(Vec<Option<Ref>>),
    Written(Option<Ref>),
}
