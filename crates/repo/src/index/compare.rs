//! Does a segment hold what the segments hold that it replaces? The question before anything of the index is deleted.
//!
//! Written apart from the merge (`stream::merge`) on purpose: a mistake there must not hide here. Reads all segments
//! side by side, id by id, in bounded memory.

use std::{collections::HashMap, collections::HashSet, sync::Arc};

use super::{
    open::{Order, Segment},
    segment::IndexEntry,
    stream::{Stream, too_many},
};
use crate::{
    error::{Error, Result},
    format::{ChunkId, Malformed, ObjectId},
    pack::PackInfo,
    progress::Progress,
    store::Store,
};

/// Ids between two looks at the cancel token.
const STEP: u64 = 1 << 16;

/// How an output differs from its inputs.
#[derive(Debug, PartialEq, Eq)]
pub struct Mismatch(pub String);

/// What is compared.
pub struct Comparison<'a> {
    /// Where the segments are.
    pub store: &'a dyn Store,
    /// The replacement; none if everything was dropped.
    pub output: Option<&'a Segment>,
    /// What it replaces.
    pub inputs: &'a [Arc<Segment>],
    /// Packs that were left out.
    pub drop: &'a HashSet<ObjectId>,
    /// Whether the inputs are all that the output was made of: then it may hold nothing else.
    pub is_exact: bool,
}

/// A segment, and the entry that comes next.
struct Reading<'a> {
    stream: Stream<'a>,
    next: Option<IndexEntry>,
    name: &'a str,
}

impl<'a> Reading<'a> {
    fn new(store: &'a dyn Store, segment: &'a Segment, beside: usize) -> Result<Self> {
        let mut stream = Stream::new(store, segment, beside);
        let next = stream.next()?;
        Ok(Self { stream, next, name: &segment.name })
    }
    fn id(&self) -> Option<ChunkId> {
        self.next.map(|e| e.entry.id)
    }
    /// All entries of an id.
    fn take(&mut self, id: &ChunkId, out: &mut Vec<IndexEntry>) -> Result<()> {
        let begin = out.len();
        while let Some(entry) = self.next.filter(|e| e.entry.id == *id) {
            out.push(entry);
            if out.len() - begin > 1 << 16 {
                return Err(too_many(self.name));
            }
            self.next = self.stream.next()?;
        }
        match self.id() {
            Some(next) if next < *id => Err(Malformed("its entries are not in order").at(self.name)),
            _ => Ok(()),
        }
    }
}

fn sort(entries: &mut Vec<IndexEntry>) {
    entries.sort_unstable_by_key(IndexEntry::key);
    entries.dedup();
}

impl Comparison<'_> {
    /// Compares. The outer error says that something could not be read.
    pub fn run(&self, progress: &dyn Progress) -> Result<Result<(), Mismatch>> {
        let numbers = match self.pack_numbers() {
            Ok(numbers) => numbers,
            Err(mismatch) => return Ok(Err(mismatch)),
        };
        let beside = self.inputs.len() + 1;
        let mut output = self.output.map(|s| Reading::new(self.store, s, beside)).transpose()?;
        let mut order: Option<Order<'_>> = self.output.map(Segment::order);
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for segment in self.inputs {
            inputs.push(Reading::new(self.store, segment, beside)?);
        }
        let (mut has, mut should, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        for count in 1u64.. {
            let ids = output.iter().chain(&inputs).filter_map(Reading::id);
            let Some(id) = ids.min() else { break };
            has.clear();
            should.clear();
            if let (Some(output), Some(order)) = (&mut output, &mut order) {
                output.take(&id, &mut has)?;
                has.iter().try_for_each(|_| order.push(&id))?;
            }
            for (input, numbers) in inputs.iter_mut().zip(&numbers) {
                taken.clear();
                input.take(&id, &mut taken)?;
                let kept = |e: &IndexEntry| numbers[e.pack as usize].map(|pack| IndexEntry { pack, entry: e.entry });
                should.extend(taken.iter().filter_map(kept));
            }
            sort(&mut has);
            sort(&mut should);
            if let Some(mismatch) = self.differs(&id, &has, &should) {
                return Ok(Err(mismatch));
            }
            if count.is_multiple_of(STEP) && progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
        }
        Ok(Ok(()))
    }

    fn differs(&self, id: &ChunkId, has: &[IndexEntry], should: &[IndexEntry]) -> Option<Mismatch> {
        if has == should {
            return None;
        }
        if should.iter().any(|e| !has.contains(e)) {
            return Some(Mismatch(format!("it lacks a place of chunk {id}")));
        }
        self.is_exact.then(|| Mismatch(format!("it has a place of chunk {id} that nobody listed")))
    }

    /// For each input, what number its packs have in the output; none if they are dropped.
    fn pack_numbers(&self) -> Result<Vec<Vec<Option<u32>>>, Mismatch> {
        let packs = self.output.map_or(&[][..], |s| &s.packs);
        let listed: HashMap<ObjectId, u32> = packs.iter().zip(0..).map(|(pack, number)| (pack.id(), number)).collect();
        let mut vouched = vec![false; packs.len()];
        let mut numbers = Vec::with_capacity(self.inputs.len());
        for input in self.inputs {
            let mut of_input = Vec::with_capacity(input.packs.len());
            for pack in &input.packs {
                let number = listed.get(&pack.id()).copied().filter(|_| !self.drop.contains(&pack.id()));
                match number {
                    Some(number) => vouched[number as usize] |= is_same(pack, &packs[number as usize]),
                    None if self.drop.contains(&pack.id()) => {}
                    None => return Err(Mismatch(format!("it does not list {}", pack.name()))),
                }
                of_input.push(number);
            }
            numbers.push(of_input);
        }
        match vouched.iter().position(|vouched| !vouched) {
            Some(number) if self.is_exact => {
                Err(Mismatch(format!("it lists {} otherwise than before", packs[number].name())))
            }
            _ => Ok(numbers),
        }
    }
}

fn is_same(a: &PackInfo, b: &PackInfo) -> bool {
    a.footer == b.footer && a.header.bytes() == b.header.bytes()
}
