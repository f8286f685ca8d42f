//! Secrets, key slots, and what opening says when it cannot.

use std::sync::Arc;

use virtward_repo::{Error, KdfCost, KeyKind, Repository, Secret, Store, store::mem::MemStore};

use crate::common::*;

fn open(store: &MemStore, secret: &Secret) -> Result<Repository, Error> {
    Repository::open(Arc::new(store.clone()), secret)
}

#[test]
fn keys_are_added_listed_and_removed() {
    let (store, repo) = mem_repo();
    let saved = back_up(&repo, "web1", &noise(1, 1000)).unwrap();
    let file = Secret::key_bytes(vec![7; 32]).unwrap();
    let added = repo.add_key(&file, "escrow", KdfCost::weak_for_tests()).unwrap();
    let keys = repo.list_keys().unwrap();
    assert_eq!(keys.len(), 2);
    assert_eq!((keys[1].id, keys[1].kind, &*keys[1].label), (added.id, KeyKind::KeyFile, "escrow"));
    let by_file = open(&store, &file).unwrap();
    assert!(restore(&by_file, &saved.disks[0]).unwrap() == noise(1, 1000));
    by_file.remove_key(&keys[0].id).unwrap();
    assert!(matches!(open(&store, &secret()), Err(Error::WrongSecret { slots: 1, .. })));
    assert!(matches!(by_file.remove_key(&keys[0].id), Err(Error::NoKey { .. })));
    assert!(matches!(by_file.remove_key(&added.id), Err(Error::LastKey { .. })));
    open(&store, &file).unwrap();
}

#[test]
fn a_wrong_secret_is_called_that() {
    let (store, _) = mem_repo();
    for wrong in [Secret::password("Correct horse"), Secret::password(""), Secret::key_bytes(vec![1; 32]).unwrap()] {
        let error = open(&store, &wrong).unwrap_err();
        assert!(matches!(error, Error::WrongSecret { slots: 1, .. }), "{error}");
    }
    assert!(matches!(Secret::key_bytes(vec![1; 31]), Err(Error::BadSecret { .. })));
    assert!(matches!(Secret::key_file("/nonexistent"), Err(Error::Missing { .. })));
    let empty = Repository::init(Arc::new(MemStore::new()), &Secret::password(""), &init_options());
    assert!(matches!(empty, Err(Error::BadSecret { .. })));
    assert!(!format!("{:?} {:?}", secret(), open(&store, &secret()).unwrap()).contains("horse"));
}

#[test]
fn places_that_are_no_repository_are_told_apart() {
    let empty = MemStore::new();
    assert!(matches!(open(&empty, &secret()), Err(Error::NotARepository { .. })));
    let (store, _) = mem_repo();
    let again = Repository::init(Arc::new(store.clone()), &secret(), &init_options());
    assert!(matches!(again, Err(Error::AlreadyExists { .. })));
    let other = MemStore::new();
    other.tamper("notes.txt", Some(b"mine".to_vec()));
    let taken = Repository::init(Arc::new(other), &secret(), &init_options());
    assert!(matches!(taken, Err(Error::AlreadyExists { .. })));
}

#[test]
fn a_newer_format_is_refused_and_a_lost_description_is_not_fatal() {
    let (store, _) = mem_repo();
    let config = store.get("config", u64::MAX).unwrap();
    let newer = store.fork();
    let text = String::from_utf8_lossy(&config[..config.len() - 32]).replace("\"format\":1", "\"format\":2");
    // The header's JSON is ASCII, the lengths before it are small: the lossy conversion changes nothing.
    let mut bytes = text.into_bytes();
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    newer.tamper("config", Some(bytes));
    assert!(matches!(open(&newer, &secret()), Err(Error::NewerFormat { found: 2, supported: 1, .. })));
    store.tamper("config", None);
    let repo = open(&store, &secret()).unwrap();
    assert!(repo.check(&()).unwrap().damaged.iter().any(|d| d.object == "config"));
}

#[test]
fn different_repositories_give_the_same_bytes_different_ids() {
    let image = noise(1, 3 * CHUNK as usize);
    let roots = [0, 1].map(|_| back_up(&mem_repo().1, "web1", &image).unwrap().disks[0].root.clone());
    assert_ne!(roots[0], roots[1]);
}

#[test]
fn objects_of_another_repository_do_not_open() {
    let ((store, repo), (other, other_repo)) = (mem_repo(), mem_repo());
    back_up(&repo, "a", &noise(1, 1000)).unwrap();
    let foreign = back_up(&other_repo, "b", &noise(1, 1000)).unwrap();
    let name = format!("points/{}", foreign.id);
    store.tamper(&name, Some(other.get(&name, u64::MAX).unwrap()));
    let list = open(&store, &secret()).unwrap().points().unwrap();
    assert_eq!((list.points.len(), list.unreadable.len(), &*list.unreadable[0].0), (1, 1, &*name));
}

#[test]
fn an_interrupted_creation_can_be_repeated() {
    let (store, _) = mem_repo();
    store.tamper("config", None);
    let repo = Repository::init(Arc::new(store.clone()), &secret(), &init_options()).unwrap();
    assert_eq!(repo.list_keys().unwrap().len(), 1);
    assert_eq!(store.names().len(), 2);
}

#[test]
fn a_write_only_host_backs_up_and_cannot_read() {
    let store = MemStore::new();
    let sealed = virtward_repo::InitOptions { sealed: true, ..init_options() };
    let owner = Repository::init(Arc::new(store.clone()), &secret(), &sealed).unwrap();
    let host = Secret::key_bytes(vec![9; 32]).unwrap();
    owner.add_write_only_key(&host, "host", KdfCost::weak_for_tests()).unwrap();
    let on_host = open(&store, &host).unwrap();
    assert!(owner.can_restore() && !on_host.can_restore());
    let mut image = noise(1, 9 * CHUNK as usize);
    let first = back_up(&on_host, "web1", &image).unwrap();
    image[..CHUNK as usize].fill(5);
    let base = first.disks[0].clone();
    let second = back_up_on(&on_host, "web1", &image, Some(&base), &|index| index == 0).unwrap();
    assert!(second.disks[0].new_bytes <= u64::from(CHUNK), "dedup works without reading");
    assert!(matches!(restore(&on_host, &second.disks[0]), Err(Error::KeyNotHeld { class: "data" })));
    assert!(matches!(on_host.attachments(second.id), Err(Error::KeyNotHeld { .. })));
    assert_eq!(on_host.points().unwrap().points.len(), 2);
    assert!(on_host.check(&()).unwrap().is_ok());
    let mode = virtward_repo::VerifyMode::Ciphertext;
    assert!(on_host.verify(&virtward_repo::VerifyOptions { mode, ..Default::default() }, &()).unwrap().is_ok());
    let full = on_host.verify(&Default::default(), &());
    assert!(matches!(full, Err(Error::KeyNotHeld { .. })));
    assert!(restore(&owner, &second.disks[0]).unwrap() == image);
    let (_, symmetric) = mem_repo();
    assert!(symmetric.add_write_only_key(&host, "", KdfCost::weak_for_tests()).is_err());
}
