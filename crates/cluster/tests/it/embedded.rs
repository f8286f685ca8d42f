//! The store in one file: what it survives, and what it says when it cannot.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use virtward_cluster::{Compare, EmbeddedOptions, EmbeddedStore, Error, Op, Store, embedded};

use crate::{
    backend::{put, value},
    contract::next,
};

fn open(path: &Path) -> Result<EmbeddedStore, Error> {
    EmbeddedStore::open(path, EmbeddedOptions::default())
}

/// A file with some contents, closed.
async fn filled(dir: &Path) -> PathBuf {
    let path = dir.join("state.db");
    let store = open(&path).unwrap();
    for n in 0..40 {
        let ops = vec![Op::put(format!("/vm/{n:02}"), vec![n as u8; 700]), Op::put("/count", n.to_string())];
        assert!(store.txn(vec![], ops).await.unwrap().succeeded);
    }
    path
}

#[tokio::test]
async fn state_history_and_revisions_survive_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let (before, revision) = {
        let store = open(&path).unwrap();
        (store.list(b"").await.unwrap(), put(&store, "/last", "x").await)
    };
    assert_eq!(before.entries.len(), 41);
    let store = open(&path).unwrap();
    let after = store.list(b"").await.unwrap();
    assert_eq!(after.revision, revision);
    assert_eq!(
        after.entries.iter().filter(|entry| &entry.key[..] != b"/last").cloned().collect::<Vec<_>>(),
        before.entries
    );
    // A watch goes on where one was before.
    let mut watch = store.watch(b"/count", before.entries[0].revision);
    assert_eq!(next(&mut watch).await, ["/count=39"]);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn one_process_uses_the_file_and_the_other_is_told_who() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = open(&path).unwrap();
    let Err(error) = open(&path) else { panic!("opened twice") };
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    let (text, pid) = (error.to_string(), std::process::id().to_string());
    assert!(text.contains(&format!("process {pid}")) && text.contains(path.to_str().unwrap()), "{text}");
    assert!(matches!(embedded::restore_backup(&path, &path), Err(Error::InUse { .. })));
    put(&store, "/still", "works").await;
    drop(store);
    assert_eq!(value(&open(&path).unwrap(), "/still").await.unwrap(), "works");
}

#[tokio::test]
async fn leases_end_with_the_process_that_held_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = open(&path).unwrap();
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    assert!(store.txn(vec![], vec![Op::put_leased("/p/a", "x", lease.id)]).await.unwrap().succeeded);
    let revision = put(&store, "/stays", "y").await;
    drop(store);
    let store = open(&path).unwrap();
    let mut watch = store.watch(b"/p/", revision);
    assert_eq!(value(&store, "/p/a").await, None);
    assert_eq!(next(&mut watch).await, ["-/p/a"]);
    assert_eq!(value(&store, "/stays").await.as_deref(), Some("y"));
    assert!(matches!(store.keep_alive(lease.id).await, Err(Error::LeaseEnded { .. })));
}

#[tokio::test]
async fn a_watch_left_over_ends_with_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("state.db")).unwrap();
    let mut watch = store.watch(b"", put(&store, "/a", "1").await.next());
    let waiting = tokio::spawn(async move { watch.next().await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(store);
    let error = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
}

/// Every kind of damage is told and left as it is, or changes nothing that anybody can read.
#[tokio::test]
async fn damage_is_told_with_the_backups_and_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let store = open(&path).unwrap();
    let backup = store.backup().await.unwrap();
    let contents = store.list(b"").await.unwrap();
    drop(store);
    let good = fs::read(&path).unwrap();

    let mut damages: Vec<(String, Vec<u8>)> = Vec::new();
    for len in [0, 1, 99, 4096, good.len() / 2, good.len() - 4096, good.len() - 1] {
        damages.push((format!("truncated to {len}"), good[..len].to_vec()));
    }
    damages.push(("text".into(), b"not a database, but long enough to be taken for one\n".repeat(200)));
    let mut zeroed = good.clone();
    zeroed[8192..12288].fill(0);
    damages.push(("a page of zeros".into(), zeroed));
    for (what, bytes) in damages {
        fs::write(&path, &bytes).unwrap();
        let Err(error) = open(&path) else { panic!("{what}: opened") };
        let text = error.to_string();
        assert!(matches!(error, Error::Corrupt { .. }), "{what}: {error:?}");
        assert!(text.contains(path.to_str().unwrap()), "{what}: {text}");
        assert!(text.contains(&format!("virtward state restore {}", backup.path.display())), "{what}: {text}");
        assert!(fs::read(&path).unwrap() == bytes, "{what}: the damaged file is evidence");
    }

    // The way back that the message names.
    let restored = embedded::restore_backup(&path, &backup.path).unwrap();
    assert!(restored.set_aside.unwrap().exists());
    let store = open(&path).unwrap();
    let listing = store.list(b"").await.unwrap();
    assert_eq!(listing.entries, contents.entries);
    assert!(listing.revision.0 > contents.revision.0 + 1_000_000_000, "no revision is given out twice");
    let mut watch = store.watch(b"", contents.revision.next());
    assert!(matches!(watch.next().await, Err(Error::Compacted { .. })));
    put(&store, "/goes", "on").await;
}

#[tokio::test]
async fn no_flipped_bit_changes_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let contents = open(&path).unwrap().list(b"").await.unwrap();
    let good = fs::read(&path).unwrap();
    let mut told = 0;
    let tried = 300;
    for n in 0..tried {
        // Spread over the file without a pattern, the header's first bytes among them.
        let at = if n < 100 { n } else { (n * 7919 + n * n * 31) % good.len() };
        let mut bad = good.clone();
        bad[at] ^= 1 << (n % 8);
        fs::write(&path, &bad).unwrap();
        match EmbeddedStore::open(&path, EmbeddedOptions { create_if_missing: false, ..EmbeddedOptions::default() }) {
            Ok(store) => assert_eq!(store.list(b"").await.unwrap(), contents, "bit flipped in byte {at}"),
            Err(Error::Corrupt { .. }) => told += 1,
            // The header's format number.
            Err(Error::NewerFormat { .. }) if (60..64).contains(&at) => told += 1,
            Err(error) => panic!("bit flipped in byte {at}: {error:?}"),
        }
        for left in ["state.db-journal", "state.db-wal", "state.db-shm"] {
            let _ = fs::remove_file(dir.path().join(left));
        }
    }
    assert!(told > tried / 4, "only {told} of {tried} were found");
}

#[tokio::test]
async fn a_state_that_is_gone_is_no_empty_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let backup = open(&path).unwrap().backup().await.unwrap();
    fs::remove_file(&path).unwrap();
    let Err(error) = open(&path) else { panic!("a new cluster in place of the old") };
    let text = error.to_string();
    assert!(matches!(error, Error::Missing { .. }) && text.contains(backup.path.to_str().unwrap()), "{text}");
    embedded::restore_backup(&path, &backup.path).unwrap();
    assert_eq!(value(&open(&path).unwrap(), "/count").await.unwrap(), "39");

    let fresh = dir.path().join("elsewhere/state.db");
    let options = EmbeddedOptions { create_if_missing: false, ..EmbeddedOptions::default() };
    let Err(error) = EmbeddedStore::open(&fresh, options) else { panic!("made one unasked") };
    assert!(error.to_string().contains("virtward cluster init"), "{error}");
    open(&fresh).unwrap();
}

#[tokio::test]
async fn backups_are_made_by_themselves_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let options =
        EmbeddedOptions { backup_every: Duration::from_millis(300), backups_kept: 2, ..EmbeddedOptions::default() };
    let store = EmbeddedStore::open(&path, options).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    let mut names = std::collections::BTreeSet::new();
    while names.len() < 4 && std::time::Instant::now() < deadline {
        // Names tell seconds, so every one of these is another.
        put(&store, "/count", "more").await;
        let backups = embedded::backups(&path);
        assert!(backups.len() <= 3, "{backups:?}");
        names.extend(backups.into_iter().map(|backup| backup.path));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(names.len() >= 4, "{names:?}");
    drop(store);
    let newest = embedded::backups(&path).remove(0);
    assert_eq!(fs::metadata(&newest.path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(value(&open(&newest.path).unwrap(), "/count").await.unwrap(), "more");
}

/// A transaction costs a few syncs; this says when it becomes something else.
#[tokio::test]
async fn a_refused_transaction_does_not_touch_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let store = open(&path).unwrap();
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    for _ in 0..100 {
        assert!(!store.txn(vec![Compare::absent("/count")], vec![Op::delete("/count")]).await.unwrap().succeeded);
    }
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
}

/// Runs this binary's test `name` in a file system of its own with little space, as its child.
fn in_small_file_system(name: &str, dir: &Path) -> std::process::Output {
    let script = r#"mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" --exact "$3" --nocapture"#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
    command.arg(dir).arg(std::env::current_exe().unwrap()).arg(name).env("VIRTWARD_TEST_SMALL_DIR", dir);
    command.output().unwrap()
}

/// Fills the disk under the store: each transaction happened or did not, nothing is half done, and with space it goes
/// on.
#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing_half_done() {
    let Some(dir) = std::env::var_os("VIRTWARD_TEST_SMALL_DIR").map(PathBuf::from) else {
        let dir = tempfile::tempdir().unwrap();
        let output = in_small_file_system("embedded::a_full_disk_is_told_and_leaves_nothing_half_done", dir.path());
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("filled the disk"), "{text}");
        return;
    };
    let path = dir.join("state.db");
    let store = open(&path).unwrap();
    let ballast = dir.join("ballast");
    fs::write(&ballast, vec![0u8; 800 << 10]).unwrap();
    let mut done = 0;
    let error = loop {
        let ops = vec![Op::put("/count", done.to_string()), Op::put(format!("/big/{done:04}"), vec![1; 30 << 10])];
        match store.txn(vec![], ops).await {
            Ok(outcome) => assert!(outcome.succeeded),
            Err(error) => break error,
        }
        done += 1;
        assert!(done < 200, "the disk never was full");
    };
    assert!(matches!(error, Error::Full { .. }) && error.is_retryable(), "{error:?}");
    let check = |listing: virtward_cluster::Listing| {
        assert_eq!(listing.entries.len(), done + 1);
        assert_eq!(&listing.entries[done].value[..], (done - 1).to_string().as_bytes());
    };
    check(store.list(b"").await.unwrap());
    fs::remove_file(&ballast).unwrap();
    assert!(store.txn(vec![], vec![Op::put(format!("/big/{done:04}"), "small")]).await.unwrap().succeeded);
    assert!(store.txn(vec![], vec![Op::delete(format!("/big/{done:04}"))]).await.unwrap().succeeded);
    drop(store);
    check(open(&path).unwrap().list(b"").await.unwrap());
    println!("filled the disk after {done} transactions");
}

/// Runs this binary's test `name` as its child, which may write files up to a size and gets an error beyond.
fn with_small_files(name: &str, dir: &Path) -> std::process::Output {
    let script = r#"trap '' XFSZ && exec prlimit --fsize=400000: "$1" --exact "$2" --nocapture"#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(std::env::current_exe().unwrap()).arg(name);
    command.env("VIRTWARD_TEST_FAILING_DIR", dir).output().unwrap()
}

/// A disk that fails in the middle of a write leaves doubt, which is said; then the file is read again and goes on.
#[tokio::test]
async fn a_failing_disk_is_doubt_and_then_the_file_is_read_again() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Some(dir) = std::env::var_os("VIRTWARD_TEST_FAILING_DIR").map(PathBuf::from) else {
        let dir = tempfile::tempdir().unwrap();
        let output = with_small_files("embedded::a_failing_disk_is_doubt_and_then_the_file_is_read_again", dir.path());
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("the disk failed after"), "{text}");
        return;
    };
    let store = open(&dir.join("state.db")).unwrap();
    let mut done = 0;
    let error = loop {
        let ops = vec![Op::put("/count", done.to_string()), Op::put(format!("/big/{done:04}"), vec![1; 30 << 10])];
        match store.txn(vec![], ops).await {
            Ok(outcome) => assert!(outcome.succeeded),
            Err(error) => break error,
        }
        done += 1;
        assert!(done < 200, "the disk never failed");
    };
    assert!(matches!(error, Error::Indeterminate { .. }), "{error:?}");
    let limit = getrlimit(Resource::Fsize);
    setrlimit(Resource::Fsize, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let listing = loop {
        match store.list(b"").await {
            Ok(listing) => break listing,
            Err(error) => assert!(error.is_retryable() && std::time::Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let bigs = listing.entries.len() - 1;
    assert!(bigs == done || bigs == done + 1, "{bigs} are there, {done} were acknowledged");
    assert_eq!(&listing.entries[bigs].value[..], (bigs - 1).to_string().as_bytes());
    put(&store, "/goes", "on").await;
    println!("the disk failed after {done} transactions");
}
