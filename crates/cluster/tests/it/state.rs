//! All keys in a file, and back.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use virtward_cluster::{
    Error, MemStore, Op, Store,
    mem::{Call, Fault},
    state,
};

use crate::backend::{self, put, value};

async fn filled() -> MemStore {
    let store = MemStore::new();
    for n in 0..150u32 {
        let ops = vec![
            Op::put(format!("/vm/{n:03}"), vec![n as u8; (n * 100) as usize]),
            Op::put(vec![0, 255, n as u8], vec![]),
        ];
        assert!(store.txn(vec![], ops).await.unwrap().succeeded);
    }
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    assert!(store.txn(vec![], vec![Op::put_leased("/presence", "here", lease.id)]).await.unwrap().succeeded);
    store
}

async fn contents(store: &dyn Store) -> Vec<(Vec<u8>, Vec<u8>)> {
    let listing = store.list(b"").await.unwrap();
    let kept = listing.entries.into_iter().filter(|entry| entry.lease.is_none());
    kept.map(|entry| (entry.key.to_vec(), entry.value.to_vec())).collect()
}

async fn exported() -> (tempfile::TempDir, PathBuf, MemStore) {
    let dir = tempfile::tempdir().unwrap();
    let (path, store) = (dir.path().join("state.vws"), filled().await);
    let summary = state::export(&store, &path).await.unwrap();
    assert_eq!(summary.entries, 300);
    (dir, path, store)
}

#[tokio::test]
async fn what_was_saved_comes_back_in_any_store() {
    let (_dir, path, store) = exported().await;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    for target in [backend::mem().await, backend::embedded().await, backend::etcd().await] {
        let summary = state::import(&*target.store, &path, false).await.unwrap();
        assert_eq!(summary, state::inspect(&path).unwrap());
        assert!(contents(&*target.store).await == contents(&store).await);
        assert_eq!(value(&*target.store, "/presence").await, None, "who was there then is not there now");
        assert!(!state::restoring(&*target.store).await.unwrap());
    }
    assert!(state::export(&store, &path).await.is_err(), "nothing is overwritten");
}

#[tokio::test]
async fn a_store_that_holds_something_is_refused_unless_asked() {
    let (_dir, path, store) = exported().await;
    let target = MemStore::new();
    put(&target, "/vm/001", "other").await;
    put(&target, "/extra", "x").await;
    let before = contents(&target).await;
    let error = state::import(&target, &path, false).await.unwrap_err();
    assert!(error.to_string().contains("2 keys"), "{error}");
    assert!(contents(&target).await == before);
    state::import(&target, &path, true).await.unwrap();
    assert!(contents(&target).await == contents(&store).await);
}

#[tokio::test]
async fn an_interrupted_restore_is_known_and_run_again() {
    let (_dir, path, store) = exported().await;
    let target = MemStore::new();
    // The marker, one batch, and then the way is cut.
    for fault in [Fault::Delay(Duration::ZERO), Fault::Delay(Duration::ZERO), Fault::Unavailable] {
        target.faults().once(Call::Txn, fault);
    }
    let error = state::import(&target, &path, false).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(state::restoring(&target).await.unwrap());
    assert!(contents(&target).await.len() > 10, "it was in the middle");
    assert!(state::export(&target, &path.with_extension("half")).await.is_err(), "half a state is not saved");
    state::import(&target, &path, false).await.unwrap();
    assert!(!state::restoring(&target).await.unwrap());
    assert!(contents(&target).await == contents(&store).await);
}

#[tokio::test]
async fn a_damaged_file_changes_nothing() {
    let (dir, path, _) = exported().await;
    let good = fs::read(&path).unwrap();
    let bad = dir.path().join("bad");
    let lines: Vec<&[u8]> = good.split_inclusive(|b| *b == b'\n').collect();
    let mut damages =
        vec![Vec::new(), b"{}\n".to_vec(), good[..good.len() / 2].to_vec(), good[..good.len() - 1].to_vec()];
    damages.push([&good[..], b"more\n"].concat());
    damages.push([lines[..5].concat(), lines[6..].concat()].concat());
    damages.push([lines[..5].concat(), lines[6].to_vec(), lines[5].to_vec(), lines[7..].concat()].concat());
    damages.push(vec![b'x'; 3 << 20]);
    for n in 0..200 {
        let mut flipped = good.clone();
        flipped[(n * 7919) % good.len()] ^= 1 << (n % 8);
        damages.push(flipped);
    }
    for (n, bytes) in damages.into_iter().enumerate() {
        fs::write(&bad, bytes).unwrap();
        let target = MemStore::new();
        let error = state::import(&target, &bad, true).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::NewerFormat { .. }), "damage {n}: {error:?}");
        assert!(error.to_string().contains(bad.to_str().unwrap()), "{error}");
        assert_eq!(target.list(b"").await.unwrap().entries, []);
    }
}
