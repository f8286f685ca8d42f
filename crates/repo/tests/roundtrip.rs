//! What goes in comes out: full, incremental, resized, sparse, concurrent.

mod common;

use std::sync::Arc;

use common::*;
use proptest::prelude::*;
use virtward_repo::{Compared, DiskSpec, Error, Repository, Store, store, store::fs::FsStore};

#[test]
fn a_disk_comes_back_from_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repo");
    let store: Arc<dyn Store> = Arc::new(FsStore::new(&path));
    let image = noise(1, 5_000_001);
    let saved = back_up(&init(store), "web1", &image).unwrap();

    let repo = Repository::open(store::open(path.to_str().unwrap()).unwrap(), &secret()).unwrap();
    let listed = repo.points().unwrap();
    assert!(listed.unreadable.is_empty());
    assert_eq!(listed.points, vec![saved.clone()]);
    assert!(restore(&repo, &saved.disks[0]).unwrap() == image);
    assert!(restore_slowly(&repo, &saved.disks[0]).unwrap() == image);
    assert_eq!(repo.attachments(saved.id).unwrap(), attachments());
    let check = repo.check(&()).unwrap();
    assert!(check.is_ok(), "{check:?}");
    let verify = repo.verify(&Default::default(), &()).unwrap();
    assert!(verify.is_ok() && verify.chunks_checked > 0, "{verify:?}");
    assert!(virtward_repo::verify_ciphertext(&**repo.store(), 0, &()).unwrap().is_ok());
    let leases = std::fs::read_dir(path.join("leases")).unwrap().count();
    assert_eq!(leases, 0, "a finished run leaves no lease");
    assert_eq!(std::fs::read_dir(path.join("tmp")).unwrap().count(), 0);
}
