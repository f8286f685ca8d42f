//! An open repository: creation, opening, keys, and the caches that readers and writers share.
//!
//! Cheap to clone. Nothing here takes a lock on the store; any number of processes may work at once.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use virtward_model::PointId;

use crate::{
    crypto::Sealer,
    error::{Error, Result},
    format::{ChunkId, Malformed, ObjectId, config::Config, envelope::ENVELOPE_BYTES_MAX, names},
    index::{Index, Location},
    keys::{KdfCost, KeyInfo, KeyRing, Secret, slot},
    manifest::{
        Ref, overlay,
        page::{PAGE_BYTES_MAX, Page},
        point::PointRecord,
        tree::Pages,
    },
    pack::{Entry, PackInfo, read::decode_record},
    store::{Put, Store, put_new},
    util::{Cache, lock, parallel_map},
};

/// Longest key slot.
const SLOT_BYTES_MAX: u64 = 1 << 20;
/// Pages kept, per generation: about 12 MiB each.
const CACHED_PAGES: usize = 1024;
/// Ciphers of packs kept, per generation.
const CACHED_SEALERS: usize = 4096;

/// How to create a repository.
#[derive(Clone, Debug, Default)]
pub struct InitOptions {
    /// Cost of the password.
    pub kdf: KdfCost,
    /// Label of the first key slot.
    pub label: String,
    /// Seal data to a public key, so that write-only keys can be made: see [`Repository::add_write_only_key`].
    pub sealed: bool,
}

/// An open repository.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    pub(crate) ring: Arc<KeyRing>,
    pub(crate) index: Index,
    pub(crate) points: Mutex<HashMap<PointId, Arc<PointRecord>>>,
    sealers: Mutex<Cache<ObjectId, Arc<Sealer>>>,
    pages: Mutex<Cache<ChunkId, Arc<Page>>>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Repository({} at {})", self.id(), self.inner.store.location())
    }
}

/// A key slot as found: its name and bytes, or why it cannot be read.
type Slot = (String, Result<Vec<u8>>);

pub(crate) fn read_slots(store: &dyn Store) -> Result<Vec<Slot>> {
    let mut slots = Vec::new();
    store.list(names::KEYS, &mut |object| {
        slots.push(object.name);
        Ok(())
    })?;
    let mut slots = parallel_map(&slots, store.fetches_in_flight(), |name| {
        Ok(Some((name.clone(), store.get(name, SLOT_BYTES_MAX))))
    })?;
    slots.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(slots)
}

/// Key slots and clear description; at once where answers take long to come.
fn read_slots_and_config(store: &dyn Store) -> Result<(Vec<Slot>, Config)> {
    let read = || store.get(names::CONFIG, SLOT_BYTES_MAX);
    let (slots, bytes) = match store.fetches_in_flight() > 1 {
        true => std::thread::scope(|scope| {
            let bytes = scope.spawn(read);
            let slots = read_slots(store);
            (slots, bytes.join().unwrap_or_else(|_| read()))
        }),
        false => (read_slots(store), read()),
    };
    let slots = slots?;
    let config = read_config(store, bytes, &slots)?;
    Ok((slots, config))
}

/// The clear description, from what was read of `config` or, if that is lost, from any key slot.
fn read_config(store: &dyn Store, bytes: Result<Vec<u8>>, slots: &[Slot]) -> Result<Config> {
    let lost = match bytes.and_then(|bytes| Config::decode(&bytes)) {
        Ok(config) => return Ok(config),
        Err(e @ (Error::Missing { .. } | Error::Damaged { .. })) => e,
        Err(e) => return Err(e),
    };
    let copy = slots.iter().find_map(|(name, bytes)| slot::describe(name, bytes.as_ref().ok()?).ok());
    match (copy, lost) {
        (Some((_, config)), error) => {
            tracing::warn!(%error, "the repository's description was taken from a key slot instead");
            Ok(config)
        }
        (None, Error::Missing { .. }) => Err(Error::NotARepository { location: store.location() }),
        (None, e) => Err(e),
    }
}

impl Repository {
    /// Creates a repository in an empty store and opens it.
    pub fn init(store: Arc<dyn Store>, secret: &Secret, options: &InitOptions) -> Result<Self> {
        let exists = |what: &str| Error::AlreadyExists { location: store.location(), what: what.into() };
        if store.exists(names::CONFIG)? {
            return Err(exists("is a Virtward repository already"));
        }
        let mut leftovers = Vec::new();
        store.list("", &mut |object| {
            // A key slot without anything else is what an interrupted creation leaves.
            if !object.name.starts_with(names::KEYS) {
                return Err(exists("is not empty"));
            }
            leftovers.push(object.name);
            Ok(())
        })?;
        let config = Config::new();
        let ring = match options.sealed {
            true => KeyRing::generate_sealing(config.repository),
            false => KeyRing::generate(config.repository),
        };
        let (info, bytes) = slot::create(ObjectId::random(), &config, &ring, secret, &options.label, options.kdf)?;
        put_new(&*store, &names::key(&info.id), &bytes)?;
        let encoded = config.encode();
        match store.put_if_absent(names::CONFIG, &encoded)? {
            Put::Created => {}
            Put::Exists => {
                let _ = store.delete(&names::key(&info.id));
                return Err(exists("was made a Virtward repository by someone else at this moment"));
            }
        }
        for name in leftovers {
            store.delete(&name)?;
        }
        Ok(Self::assemble(store, config, ring))
    }

    /// Opens a repository. Reads little more than the key slots; the index follows when it is needed.
    pub fn open(store: Arc<dyn Store>, secret: &Secret) -> Result<Self> {
        let (mut slots, config) = read_slots_and_config(&*store)?;
        // A rotation that was interrupted leaves two slots for one secret: the newer one opens more.
        slots.sort_by_cached_key(|(name, bytes)| {
            let info = bytes.as_ref().ok().and_then(|bytes| slot::describe(name, bytes).ok());
            std::cmp::Reverse(info.map_or(0, |(info, _)| info.generation))
        });
        let mut failed = None;
        let mut tried = 0;
        for (name, bytes) in slots {
            match bytes.and_then(|bytes| slot::open(&name, &bytes, &config, secret)) {
                Ok(Some(ring)) => return Ok(Self::assemble(store, config, ring)),
                Ok(None) => tried += 1,
                Err(e) => failed = Some(e),
            }
        }
        match failed {
            // With an unreadable slot nobody can say that the secret is wrong.
            Some(e) => Err(e),
            None => Err(Error::WrongSecret { location: store.location(), slots: tried }),
        }
    }

    pub(crate) fn assemble(store: Arc<dyn Store>, config: Config, ring: KeyRing) -> Self {
        let ring = Arc::new(ring);
        Self {
            inner: Arc::new(Inner {
                index: Index::new(store.clone(), ring.clone()),
                store,
                config,
                ring,
                points: Mutex::default(),
                sealers: Mutex::new(Cache::new(CACHED_SEALERS)),
                pages: Mutex::new(Cache::new(CACHED_PAGES)),
            }),
        }
    }

    /// Fails if the repository was deleted or replaced since it was opened: a store makes the directories that it needs,
    /// so a run would end well in a place where nobody can open anything.
    pub(crate) fn check_in_place(&self) -> Result<()> {
        let store = &*self.inner.store;
        let found = match store.get(names::CONFIG, SLOT_BYTES_MAX).and_then(|bytes| Config::decode(&bytes)) {
            Ok(config) => config,
            Err(_) => read_slots_and_config(store)?.1,
        };
        match found.repository == self.inner.config.repository {
            true => Ok(()),
            false => Err(Error::Replaced { location: store.location() }),
        }
    }

    /// Reads the index meanwhile, for those who will need it in a moment, where the store's answers take long to come.
    pub fn look_ahead(&self) {
        if self.inner.store.fetches_in_flight() > 1 {
            let repo = self.clone();
            // What fails here fails again, and is told, where the index is needed.
            std::thread::spawn(move || drop(repo.inner.index.state()));
        }
    }

    /// Identity: 32 hex digits.
    pub fn id(&self) -> String {
        self.inner.config.repository.to_string()
    }
    /// Where chunks are: for measurements and for those who compact.
    #[doc(hidden)]
    pub fn index(&self) -> &Index {
        &self.inner.index
    }
    /// The store behind it.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.inner.store
    }
    /// Whether the keys at hand open data, or only write it.
    pub fn can_restore(&self) -> bool {
        self.inner.ring.can_read_data()
    }

    /// Adds a key slot with all keys that this one holds.
    pub fn add_key(&self, secret: &Secret, label: &str, cost: KdfCost) -> Result<KeyInfo> {
        self.add_slot(&self.inner.ring, secret, label, cost)
    }

    /// Adds a key slot that opens everything but the data: its holder can back up, list and verify ciphertext, and cannot
    /// read a disk. Only for a repository that was created `sealed`, or whose keys were rotated so.
    pub fn add_write_only_key(&self, secret: &Secret, label: &str, cost: KdfCost) -> Result<KeyInfo> {
        let ring = self.inner.ring.write_only();
        if !ring.can_write_data() {
            return Err(Error::Unsupported {
                what: "write-only keys need a repository whose data is sealed to a public key; \
                       `virtward repo key rotate --sealed` makes it one"
                    .into(),
            });
        }
        self.add_slot(&ring, secret, label, cost)
    }

    fn add_slot(&self, ring: &KeyRing, secret: &Secret, label: &str, cost: KdfCost) -> Result<KeyInfo> {
        let Inner { store, config, .. } = &*self.inner;
        let (info, bytes) = slot::create(ObjectId::random(), config, ring, secret, label, cost)?;
        put_new(&**store, &names::key(&info.id), &bytes)?;
        Ok(info)
    }

    /// The key slots that can be read, oldest first.
    pub fn list_keys(&self) -> Result<Vec<KeyInfo>> {
        let slots = read_slots(&*self.inner.store)?;
        let mut keys: Vec<KeyInfo> = slots
            .iter()
            .filter_map(|(name, bytes)| slot::describe(name, bytes.as_ref().ok()?).ok())
            .filter(|(_, config)| config.repository == self.inner.config.repository)
            .map(|(info, _)| info)
            .collect();
        keys.sort_by_key(|k| (k.created, k.id));
        Ok(keys)
    }

    /// Removes a key slot, unless it is the last one.
    pub fn remove_key(&self, id: &ObjectId) -> Result<()> {
        let keys = self.list_keys()?;
        if !keys.iter().any(|k| k.id == *id) {
            return Err(Error::NoKey { slot: id.to_string() });
        }
        if keys.len() == 1 {
            return Err(Error::LastKey { slot: id.to_string() });
        }
        self.inner.store.delete(&names::key(id)).map(drop)
    }
}

impl Inner {
    /// What opens the records of a pack.
    pub(crate) fn sealer(&self, pack: &PackInfo) -> Result<Arc<Sealer>> {
        if let Some(sealer) = lock(&self.sealers).get(&pack.id()) {
            return Ok(sealer);
        }
        let sealer = Arc::new(pack.header.sealer(&self.ring)?);
        lock(&self.sealers).insert(pack.id(), sealer.clone());
        Ok(sealer)
    }

    /// Reads, opens and checks one chunk or page.
    pub(crate) fn read_record(&self, id: &ChunkId) -> Result<Vec<u8>> {
        let mut tried: HashSet<(ObjectId, u32)> = HashSet::new();
        let (mut refreshed, mut failure) = (false, None);
        loop {
            let untried = |pack: &PackInfo, entry: &Entry| !tried.contains(&(pack.id(), entry.offset));
            let found = match refreshed {
                false => self.index.lookup(id, &untried)?,
                true => self.index.search(id, &untried)?,
            };
            match found {
                Some(place) => match self.read_at(&place) {
                    // Damaged, or repacked since; a chunk may have another place.
                    Err(e) if e.is_damage() => {
                        tried.insert((place.pack.id(), place.entry.offset));
                        failure.get_or_insert(e);
                    }
                    other => return other,
                },
                None if !refreshed => {
                    self.index.refresh()?;
                    refreshed = true;
                }
                None => return Err(failure.unwrap_or_else(|| crate::index::not_listed(id))),
            }
        }
    }

    /// Name and length of every pack that is in the store.
    pub(crate) fn pack_lengths(&self) -> Result<HashMap<String, u64>> {
        let mut present = HashMap::new();
        for prefix in [names::DATA, names::META] {
            self.store.list(prefix, &mut |object| {
                present.insert(object.name, object.bytes);
                Ok(())
            })?;
        }
        Ok(present)
    }

    /// Packs of the index that are not in the store with the length that they should have.
    pub(crate) fn lost_packs(&self, state: &crate::index::State) -> Result<HashSet<ObjectId>> {
        let present = self.pack_lengths()?;
        let packs = state.packs();
        Ok(packs
            .values()
            .filter(|pack| present.get(&pack.name()) != Some(&pack.bytes()))
            .map(|pack| pack.id())
            .collect())
    }

    fn read_at(&self, place: &Location) -> Result<Vec<u8>> {
        let Location { pack, entry } = place;
        let name = pack.name();
        let mut sealed = self.store.get_range(&name, entry.offset.into(), entry.stored as usize)?;
        let mut plain = Vec::new();
        decode_record(&self.ring, &pack.header, &*self.sealer(pack)?, entry, &mut sealed, &mut plain)
            .map_err(|e| e.at(&*name))?;
        Ok(plain)
    }

    /// What is at a place: the chunk, cut or filled with zeros to `room` bytes, and what was written over it.
    pub(crate) fn read_place(&self, r: &Ref, room: usize) -> Result<Vec<u8>> {
        let mut plain = self.read_record(&r.id)?;
        plain.resize(room, 0);
        for id in &r.overlays {
            overlay::apply(&self.read_record(id)?, &mut plain).map_err(|e| e.at(format!("overlay {id}")))?;
        }
        Ok(plain)
    }

    pub(crate) fn get_small(&self, name: &str) -> Result<Vec<u8>> {
        self.store.get(name, ENVELOPE_BYTES_MAX)
    }

    /// Forgets what was read, so that a check sees the store and not the caches.
    pub(crate) fn forget(&self) {
        self.store.forget();
        lock(&self.pages).clear();
        lock(&self.points).clear();
    }
}

impl Pages for Inner {
    fn page(&self, id: &ChunkId, level: u8) -> Result<Arc<Page>> {
        if let Some(page) = lock(&self.pages).get(id)
            && page.level == level
        {
            return Ok(page);
        }
        let bytes = self.read_record(id)?;
        if bytes.len() > PAGE_BYTES_MAX {
            return Err(Malformed("it is too long for a manifest page").at(format!("manifest page {id}")));
        }
        let page = Arc::new(Page::decode(&bytes, level).map_err(|e| e.at(format!("manifest page {id}")))?);
        lock(&self.pages).insert(*id, page.clone());
        Ok(page)
    }
}
