//! The store of one actor: it stops the actor at a chosen operation, or kills it there, and may be sabotaged.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use jiff::Timestamp;
use virtward_repo::{
    Error, Result, Store,
    store::{Listed, ObjectWriter, Put, mem::MemStore},
};

const LIMIT: Duration = Duration::from_secs(60);

/// What is done to a store to see whether it is noticed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sabotage {
    None,
    /// Writers do not see that their lease was ended.
    EndsUnseen,
    /// Collectors do not see the leases of others.
    LeasesUnseen,
    /// Collectors take silent leases for ended without saying so.
    EndsNotPut,
    /// Collectors do not see what is in the trash.
    TrashUnseen,
    /// Collectors believe a clock that is four days ahead, and not the one that stamps objects.
    ClockTrusted,
    /// Collectors grant what was deleted no time.
    NoGrace,
    /// Packs are acknowledged before they are durable; those of a killed actor are lost.
    AcknowledgedEarly,
    /// The same, for copies only.
    CopiesAcknowledgedEarly,
    /// Copies do not see that their lease was ended.
    EndsUnseenByCopies,
}

/// What becomes of an actor, and at which of its operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    Lives,
    Dies(u64),
    Sleeps(u64),
}

#[derive(Clone, Copy, PartialEq)]
pub enum Role {
    Writer,
    Copier,
    Collector,
}

#[derive(Default)]
struct Sleep {
    is_asleep: bool,
    is_over: bool,
}

/// An object that is acknowledged and not durable: where, name and bytes.
type Late = (MemStore, String, Vec<u8>);

/// The store of one actor.
#[derive(Clone)]
pub struct Stage {
    store: MemStore,
    role: Role,
    sabotage: Sabotage,
    fate: Fate,
    operations: Arc<AtomicU64>,
    sleep: Arc<(Mutex<Sleep>, Condvar)>,
    late: Arc<Mutex<Vec<Late>>>,
}

impl Stage {
    pub fn new(store: &MemStore, role: Role, sabotage: Sabotage, fate: Fate) -> Self {
        let store = store.clone();
        Self { store, role, sabotage, fate, operations: Arc::default(), sleep: Arc::default(), late: Arc::default() }
    }

    /// The same actor's way to another store: its operations count together.
    pub fn before(&self, other: &MemStore) -> Self {
        Self { store: other.clone(), ..self.clone() }
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
    pub fn wait_asleep<T>(&self, actor: &JoinHandle<T>) {
        let (sleep, changed) = &*self.sleep;
        let mut state = sleep.lock().unwrap();
        let mut rounds = 0;
        while !state.is_asleep && !actor.is_finished() {
            state = changed.wait_timeout(state, Duration::from_millis(5)).unwrap().0;
            rounds += 1;
            assert!(rounds < 12_000, "the actor neither sleeps nor ends");
        }
    }

    pub fn wake(&self) {
        self.sleep.0.lock().unwrap().is_over = true;
        self.sleep.1.notify_all();
    }

    /// Makes durable what was acknowledged early; only those who live to the end do.
    pub fn flush(&self) {
        for (store, name, bytes) in self.late.lock().unwrap().drain(..) {
            let _ = store.put_if_absent(&name, &bytes).unwrap();
        }
    }

    fn is_unseen(&self, name: &str) -> bool {
        match self.sabotage {
            Sabotage::EndsUnseen => self.role == Role::Writer && name.ends_with(".end"),
            Sabotage::EndsUnseenByCopies => self.role == Role::Copier && name.ends_with(".end"),
            Sabotage::LeasesUnseen => self.role == Role::Collector && name.starts_with("leases/"),
            Sabotage::TrashUnseen => self.role == Role::Collector && name.starts_with("trash/"),
            _ => false,
        }
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        if self.sabotage == Sabotage::EndsNotPut && self.role == Role::Collector && name.ends_with(".end") {
            return Ok(Put::Created);
        }
        let is_early = match self.sabotage {
            Sabotage::AcknowledgedEarly => self.role == Role::Writer,
            Sabotage::CopiesAcknowledgedEarly => self.role == Role::Copier,
            _ => false,
        };
        if is_early && name.starts_with("data/") {
            self.late.lock().unwrap().push((self.store.clone(), name.into(), bytes.to_vec()));
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
        let ahead = self.sabotage == Sabotage::ClockTrusted && self.role == Role::Collector;
        Ok(self.store.now()? + if ahead { Duration::from_secs(4 * 86_400) } else { Duration::ZERO })
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
