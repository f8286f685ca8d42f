//! One contract for every store.

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use virtward_repo::{
    Error, Repository, Store,
    store::{
        self, Put,
        faulty::{Faults, FaultyStore},
        fs::FsStore,
        mem::MemStore,
    },
};

use crate::{
    common::*,
    contract::{contract, racing_puts_have_one_winner},
};

#[test]
fn all_stores_keep_the_contract() {
    contract(&MemStore::new());
    contract(&FaultyStore::new(Arc::new(MemStore::new()), Faults::default()));
    let dir = tempfile::tempdir().unwrap();
    contract(&FsStore::new(&dir.path().join("deep/er")));
}

#[test]
fn racing_puts_to_a_directory_have_one_winner() {
    let dir = tempfile::tempdir().unwrap();
    racing_puts_have_one_winner(&FsStore::new(dir.path()));
}

#[test]
fn files_are_private_and_leftovers_of_the_dead_go() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("repo");
    let store = FsStore::new(&root);
    let _ = store.put_if_absent("keys/a", b"x").unwrap();
    let mode = |path: &str| std::fs::metadata(root.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("keys"), mode("keys/a"), mode("tmp")), (0o700, 0o600, 0o700));

    let live = store.create("data/00/live").unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(30 * 86_400);
    for name in ["1.dead", "2.fresh"] {
        std::fs::write(root.join("tmp").join(name), b"x").unwrap();
    }
    for entry in std::fs::read_dir(root.join("tmp")).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("2.fresh") {
            std::fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        }
    }
    store.clean();
    assert!(!root.join("tmp/1.dead").exists(), "old and nobody holds it");
    assert!(root.join("tmp/2.fresh").exists(), "may be somebody's who is about to lock it");
    assert_eq!(live.finish().unwrap(), Put::Created, "old, but its writer lives");
}

#[test]
fn foreign_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("lost+found")).unwrap();
    let store: Arc<dyn Store> = Arc::new(FsStore::new(dir.path()));
    let repo = init(store);
    std::fs::write(dir.path().join("README.txt"), "hands off").unwrap();
    back_up(&repo, "a", b"x").unwrap();
    std::fs::write(dir.path().join("points/.nfs0001"), "").unwrap();
    assert!(repo.check(&()).unwrap().is_ok());
}

#[test]
fn urls_are_understood_or_refused_with_advice() {
    assert!(store::open("/srv/backup").is_ok() && store::open("file:///srv/backup").is_ok());
    for (bad, says) in [("ftp://bucket/x", "not supported"), ("file://host/x", "three slashes"), ("", "empty")] {
        let error = store::open(bad).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = Repository::open(store::open("/nonexistent/place").unwrap(), &secret()).unwrap_err();
    assert!(matches!(error, Error::NotARepository { .. }), "{error}");
}

#[test]
fn a_store_that_refuses_is_called_by_its_name() {
    // Root ignores permissions, but nobody can make a directory below a file.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let store = FsStore::new(&dir.path().join("file/repo"));
    let error = store.put_if_absent("config", b"x").unwrap_err();
    assert!(error.to_string().contains("file/repo"), "{error}");
}
