//! Writers, collectors, deletions and crashes in every order that a seed chooses: what was acknowledged restores, bit for
//! bit, after every step.
//!
//! An actor works on a store of its own in front of the common one, which stops it at a chosen operation (and lets others
//! go on meanwhile), or kills it there. A failing seed is printed; `VIRTWARD_SEED=n` runs that one alone, and
//! `VIRTWARD_SEEDS=n` more of them. Sabotaged stores show that the checks would notice what they are there for.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use jiff::Timestamp;
use virtward_model::{DiskRecord, PointId, RestorePoint};
use virtward_repo::{
    DiskSpec, Error, GcOptions, Repository, Result, Store, WriterOptions,
    store::{Listed, ObjectWriter, Put, mem::MemStore},
};

use crate::common::*;

const CHUNKS: usize = 4;
const STEPS: usize = 14;
const LIMIT: Duration = Duration::from_secs(60);
/// Longer than any lease lives.
const LONG: Duration = Duration::from_secs(2 * 3600);
/// Longer than all the time that passes in one world.
const GRACE: Duration = Duration::from_secs(72 * 3600);

/// What is done to a store to see whether it is noticed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sabotage {
    None,
    /// Writers do not see that their lease was ended.
    EndsUnseen,
    /// Collectors do not see the leases of others.
    LeasesUnseen,
    /// Collectors take silent leases for ended without saying so.
    EndsNotPut,
    /// Collectors do not see what is in the trash.
    TrashUnseen,
    /// Packs are acknowledged before they are durable; those of a killed actor are lost.
    AcknowledgedEarly,
}

/// Small random numbers from a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// What becomes of an actor, and at which of its operations.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Lives,
    Dies(u64),
    Sleeps(u64),
}

#[derive(Clone, Copy, PartialEq)]
enum Role {
    Writer,
    Collector,
}

#[derive(Default)]
struct Sleep {
    is_asleep: bool,
    is_over: bool,
}

/// Name and bytes of an object that is acknowledged and not durable.
type Late = (String, Vec<u8>);

/// The store of one actor.
#[derive(Clone)]
struct Stage {
    store: MemStore,
    role: Role,
    sabotage: Sabotage,
    fate: Fate,
    operations: Arc<AtomicU64>,
    sleep: Arc<(Mutex<Sleep>, Condvar)>,
    late: Arc<Mutex<Vec<Late>>>,
}

impl Stage {
    fn new(store: &MemStore, role: Role, sabotage: Sabotage, fate: Fate) -> Self {
        let store = store.clone();
        Self { store, role, sabotage, fate, operations: Arc::default(), sleep: Arc::default(), late: Arc::default() }
    }

    fn step(&self) -> Result<()> {
        let number = self.operations.fetch_add(1, SeqCst);
        match self.fate {
            Fate::Dies(at) if number >= at => {
                return Err(Error::Io {
                    action: "reach",
                    object: "the store".into(),
                    source: Arc::new(std::io::Error::other("killed")),
                });
            }
            Fate::Sleeps(at) if number >= at => {
                let (sleep, changed) = &*self.sleep;
                let mut sleep = sleep.lock().unwrap();
                sleep.is_asleep = true;
                changed.notify_all();
                let (sleep, waited) = changed.wait_timeout_while(sleep, LIMIT, |s| !s.is_over).unwrap();
                assert!(!waited.timed_out(), "nobody woke the sleeper");
                drop(sleep);
            }
            _ => {}
        }
        Ok(())
    }

    /// Waits until the actor sleeps or has ended.
    fn wait_asleep<T>(&self, actor: &JoinHandle<T>) {
        let (sleep, changed) = &*self.sleep;
        let mut state = sleep.lock().unwrap();
        let mut rounds = 0;
        while !state.is_asleep && !actor.is_finished() {
            state = changed.wait_timeout(state, Duration::from_millis(5)).unwrap().0;
            rounds += 1;
            assert!(rounds < 12_000, "the actor neither sleeps nor ends");
        }
    }

    fn wake(&self) {
        self.sleep.0.lock().unwrap().is_over = true;
        self.sleep.1.notify_all();
    }

    /// Makes durable what was acknowledged early; only those who live to the end do.
    fn flush(&self) {
        for (name, bytes) in self.late.lock().unwrap().drain(..) {
            let _ = self.store.put_if_absent(&name, &bytes).unwrap();
        }
    }

    fn is_unseen(&self, name: &str) -> bool {
        match self.sabotage {
            Sabotage::EndsUnseen => self.role == Role::Writer && name.ends_with(".end"),
            Sabotage::LeasesUnseen => self.role == Role::Collector && name.starts_with("leases/"),
            Sabotage::TrashUnseen => self.role == Role::Collector && name.starts_with("trash/"),
            _ => false,
        }
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        if self.sabotage == Sabotage::EndsNotPut && self.role == Role::Collector && name.ends_with(".end") {
            return Ok(Put::Created);
        }
        if self.sabotage == Sabotage::AcknowledgedEarly && name.starts_with("data/") {
            self.late.lock().unwrap().push((name.into(), bytes.to_vec()));
            return Ok(Put::Created);
        }
        self.store.put_if_absent(name, bytes)
    }
}

impl Store for Stage {
    fn location(&self) -> String {
        self.store.location()
    }
    fn read_range(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.step()?;
        self.store.read_range(name, offset, buf)
    }
    fn size(&self, name: &str) -> Result<u64> {
        self.step()?;
        match self.is_unseen(name) {
            true => Err(Error::Missing { object: name.into() }),
            false => self.store.size(name),
        }
    }
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        self.step()?;
        self.put(name, bytes)
    }
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.step()?;
        Ok(Box::new(StageWriter { stage: self.clone(), name: name.into(), bytes: Vec::new() }))
    }
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.step()?;
        self.store.list(prefix, &mut |object| if self.is_unseen(&object.name) { Ok(()) } else { each(object) })
    }
    fn now(&self) -> Result<Timestamp> {
        self.step()?;
        self.store.now()
    }
    fn delete(&self, name: &str) -> Result<bool> {
        self.step()?;
        self.store.delete(name)
    }
}

struct StageWriter {
    stage: Stage,
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for StageWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<Put> {
        self.stage.step()?;
        self.stage.put(&self.name, &self.bytes)
    }
}

/// What an actor did, as it saw it.
enum Done {
    Backup(Result<Box<RestorePoint>>, Vec<u8>),
    Collected(Result<()>),
}

struct Sleeper {
    stage: Stage,
    actor: JoinHandle<Done>,
}

struct World {
    store: MemStore,
    sabotage: Sabotage,
    dice: Dice,
    /// Acknowledged and not deleted.
    points: BTreeMap<PointId, (RestorePoint, Vec<u8>)>,
    /// Deleted within the grace period.
    deleted: BTreeMap<PointId, (RestorePoint, Vec<u8>)>,
    sleepers: Vec<Sleeper>,
    log: Vec<String>,
}

/// Few different contents, so that runs share chunks.
fn content(dice: &mut Dice) -> Vec<u8> {
    let mut image = vec![0; CHUNKS * CHUNK as usize];
    for chunk in image.chunks_mut(CHUNK as usize) {
        let kind = dice.roll(12);
        if kind > 0 {
            chunk[..24].copy_from_slice(&noise(kind, 24));
        }
    }
    image
}

fn options() -> WriterOptions {
    // A pack holds about two of these chunks.
    WriterOptions { threads: 1, pack_bytes: Some(1 << 12), ..WriterOptions::default() }
}

fn back_up_over(repo: &Repository, image: &[u8], base: Option<(DiskRecord, Vec<u8>)>) -> Result<RestorePoint> {
    let writer = repo.writer(options())?;
    let size_bytes = image.len() as u64;
    let spec = DiskSpec { size_bytes, chunk_bytes: CHUNK, base: base.as_ref().map(|(disk, _)| disk.clone()) };
    let (disk, base) = match writer.disk(spec) {
        Ok(disk) => (disk, base),
        Err(Error::BadBase { .. }) => (writer.disk(DiskSpec { size_bytes, chunk_bytes: CHUNK, base: None })?, None),
        Err(e) => return Err(e),
    };
    for (index, chunk) in image.chunks(CHUNK as usize).enumerate() {
        let range = index * CHUNK as usize..(index + 1) * CHUNK as usize;
        if base.as_ref().is_none_or(|(_, before)| before[range] != *chunk) {
            disk.put(index as u64, chunk.to_vec())?;
        }
    }
    let result = disk.finish()?;
    let point = point("vm", vec![disk_record("vda", size_bytes, CHUNK, &result)]);
    writer.publish(point.clone(), attachments())?;
    Ok(point)
}

/// Restores with one thread: this happens a hundred thousand times.
fn restore_alone(repo: &Repository, disk: &DiskRecord) -> Result<Vec<u8>> {
    let mut image = vec![0; disk.size_bytes as usize];
    repo.disk(disk)?.read_at(0, &mut image)?;
    Ok(image)
}

fn attachments() -> Vec<virtward_repo::Attachment> {
    vec![virtward_repo::Attachment { name: "domain.xml".into(), bytes: b"<domain/>".to_vec() }]
}

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let (store, _) = mem_repo();
        Self {
            store,
            sabotage,
            dice: Dice(seed),
            points: BTreeMap::new(),
            deleted: BTreeMap::new(),
            sleepers: Vec::new(),
            log: Vec::new(),
        }
    }

    fn stage(&self, role: Role, fate: Fate) -> Stage {
        Stage::new(&self.store, role, self.sabotage, fate)
    }

    fn fate(&mut self) -> Fate {
        match self.dice.roll(5) {
            0 => Fate::Dies(8 + self.dice.roll(60)),
            1 | 2 if self.sleepers.len() < 2 => Fate::Sleeps(8 + self.dice.roll(60)),
            _ => Fate::Lives,
        }
    }

    fn start(&mut self, role: Role, act: impl FnOnce(Arc<dyn Store>) -> Done + Send + 'static) {
        let fate = self.fate();
        self.log.push(format!("  {fate:?}"));
        let stage = self.stage(role, fate);
        let store: Arc<dyn Store> = Arc::new(stage.clone());
        let actor = std::thread::spawn(move || act(store));
        let sleeper = Sleeper { stage, actor };
        if let Fate::Sleeps(_) = fate {
            sleeper.stage.wait_asleep(&sleeper.actor);
            self.sleepers.push(sleeper);
        } else {
            self.end(sleeper);
        }
    }

    fn end(&mut self, sleeper: Sleeper) {
        let Sleeper { stage, actor } = sleeper;
        stage.wake();
        match actor.join().expect("an actor does not panic") {
            Done::Backup(Ok(point), image) => {
                // A power cut takes what is not durable.
                if self.dice.roll(4) > 0 {
                    stage.flush();
                }
                self.log.push(format!("  acknowledged {}", point.id));
                self.points.insert(point.id, (*point, image));
            }
            Done::Backup(Err(e), _) | Done::Collected(Err(e)) => self.log.push(format!("  failed: {e}")),
            Done::Collected(Ok(())) => stage.flush(),
        }
    }

    fn step(&mut self) {
        let what = self.dice.roll(10);
        match what {
            0..=3 => {
                let image = content(&mut self.dice);
                let nth = self.dice.roll(self.points.len() as u64 + 1) as usize;
                let base = self.points.values().nth(nth).map(|(p, image)| (p.disks[0].clone(), image.clone()));
                self.log.push(format!("backup, based on {nth} of {}", self.points.len()));
                self.start(Role::Writer, move |store| {
                    let done = Repository::open(store, &secret()).and_then(|repo| back_up_over(&repo, &image, base));
                    Done::Backup(done.map(Box::new), image)
                });
            }
            4..=6 => {
                self.log.push("collection".into());
                let writer = options();
                let options = GcOptions { grace: GRACE, budget_percent: 100, writer, ..GcOptions::default() };
                self.start(Role::Collector, move |store| {
                    let repo = Repository::open(store, &secret());
                    Done::Collected(repo.and_then(|repo| repo.collect_garbage(&options, &())).map(drop))
                });
            }
            7 => {
                let nth = self.dice.roll(self.points.len().max(1) as u64) as usize;
                if let Some(id) = self.points.keys().nth(nth).copied() {
                    self.log.push(format!("deletion of {id}"));
                    self.open().delete_point(id).unwrap();
                    let point = self.points.remove(&id).unwrap();
                    self.deleted.insert(id, point);
                }
            }
            8 => {
                self.log.push("time passes".into());
                self.store.advance(LONG);
            }
            _ => {
                if !self.sleepers.is_empty() {
                    let nth = self.dice.roll(self.sleepers.len() as u64) as usize;
                    self.log.push(format!("sleeper {nth} goes on"));
                    let sleeper = self.sleepers.remove(nth);
                    self.end(sleeper);
                }
            }
        }
    }

    fn open(&self) -> Repository {
        Repository::open(Arc::new(self.store.clone()), &secret()).unwrap()
    }

    /// Whether all that was acknowledged is there.
    fn check(&self) -> std::result::Result<(), String> {
        let repo = self.open();
        for (point, image) in self.points.values() {
            let listed = repo.point(point.id).map_err(|e| format!("{} is not listed: {e}", point.id))?;
            let disk =
                restore_alone(&repo, &listed.disks[0]).map_err(|e| format!("{} does not restore: {e}", point.id))?;
            if disk != *image {
                return Err(format!("{} restores something else", point.id));
            }
            repo.attachments(point.id).map_err(|e| format!("attachments of {}: {e}", point.id))?;
        }
        for (point, image) in self.deleted.values() {
            match restore_alone(&repo, &point.disks[0]) {
                Ok(disk) if disk == *image => {}
                Ok(_) => return Err(format!("{} restores something else from the trash", point.id)),
                Err(e) => return Err(format!("{} cannot be recovered within the grace period: {e}", point.id)),
            }
        }
        Ok(())
    }

    fn run(&mut self) -> std::result::Result<(), String> {
        for _ in 0..STEPS {
            self.step();
            self.check()?;
        }
        while let Some(sleeper) = self.sleepers.pop() {
            self.log.push("the last sleepers go on".into());
            self.end(sleeper);
            self.check()?;
        }
        self.end_clean()
    }

    /// Whoever collects last finds all garbage, and nothing is damaged then.
    fn end_clean(&mut self) -> std::result::Result<(), String> {
        if self.sabotage != Sabotage::None {
            return Ok(());
        }
        self.store.advance(GRACE + LONG);
        self.deleted.clear();
        let writer = options();
        let options = GcOptions { grace: GRACE, budget_percent: 100, writer, ..GcOptions::default() };
        let repo = self.open();
        let mut report = None;
        for _ in 0..2 {
            report = Some(repo.collect_garbage(&options, &()).map_err(|e| format!("the last collection: {e}"))?);
        }
        self.check()?;
        let report = report.expect("collected");
        if report.pending_packs > 0 || !report.notes.is_empty() {
            return Err(format!("garbage is left: {report:?}"));
        }
        let check = self.open().check(&()).map_err(|e| format!("check: {e}"))?;
        if !check.is_ok() {
            return Err(format!("check: {:?} {:?}", check.damaged, check.damaged_points));
        }
        Ok(())
    }
}

/// Runs seeds on a few threads; the failures.
fn run(seeds: impl Iterator<Item = u64> + Send, sabotage: Sabotage, enough: usize) -> Vec<(u64, String)> {
    let seeds = Mutex::new(seeds);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while failures.lock().unwrap().len() < enough {
                    let Some(seed) = seeds.lock().unwrap().next() else { break };
                    let mut world = World::new(seed, sabotage);
                    if let Err(why) = world.run() {
                        let story = format!("{why}\n{}", world.log.join("\n"));
                        failures.lock().unwrap().push((seed, story));
                    }
                }
            });
        }
    });
    failures.into_inner().unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{variable} must be a number")))
}

#[test]
fn nothing_acknowledged_is_lost_whatever_the_order() {
    let failures = match number("VIRTWARD_SEED") {
        Some(seed) => run(seed..=seed, Sabotage::None, 1),
        None => run(0..=number("VIRTWARD_SEEDS").unwrap_or(1000), Sabotage::None, 1),
    };
    if let Some((seed, story)) = failures.first() {
        panic!("seed {seed} (run it alone with VIRTWARD_SEED={seed}): {story}");
    }
}

#[test]
fn every_safeguard_is_needed() {
    let mut unnoticed = Vec::new();
    for sabotage in [
        Sabotage::EndsUnseen,
        Sabotage::LeasesUnseen,
        Sabotage::EndsNotPut,
        Sabotage::TrashUnseen,
        Sabotage::AcknowledgedEarly,
    ] {
        if run(0..500, sabotage, 1).is_empty() {
            unnoticed.push(sabotage);
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}
