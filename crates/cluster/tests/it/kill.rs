//! The embedded store under `kill -9`: what was acknowledged is there, what was not is there whole or not at all.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use virtward_cluster::{Compare, EmbeddedOptions, EmbeddedStore, Op, Store};

const ROUNDS: u64 = 12;
const CHILD: &str = "VIRTWARD_TEST_WRITER_FILE";

fn open(path: &std::path::Path) -> EmbeddedStore {
    // Little history, so that transactions also delete from it.
    let history = virtward_cluster::mem::History { transactions_max: 20, bytes_max: 1 << 20 };
    EmbeddedStore::open(path, EmbeddedOptions { history, ..EmbeddedOptions::default() }).unwrap()
}

/// Writes until it is killed, and says what was acknowledged.
async fn write_for_ever(path: PathBuf) {
    let store = open(&path);
    let mut count = match store.get(b"/count").await.unwrap() {
        Some(entry) => std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap(),
        None => 0,
    };
    loop {
        let entry = store.get(b"/count").await.unwrap();
        let compare = entry.map_or(Compare::absent("/count"), |entry| entry.unchanged());
        count += 1;
        let value = vec![count as u8; (count * 977 % 9000) as usize];
        let ops = vec![
            Op::put("/count", count.to_string()),
            Op::put(format!("/data/{:02}", count % 50), value.clone()),
            Op::put("/twin", value),
            Op::delete(format!("/data/{:02}", (count + 25) % 50)),
        ];
        let outcome = store.txn(vec![compare], ops).await.unwrap();
        assert!(outcome.succeeded);
        println!("acknowledged {count} {}", outcome.revision);
    }
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_sigkill() {
    if let Some(path) = std::env::var_os(CHILD) {
        return write_for_ever(path.into()).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let mut last = 0;
    let mut seed = u64::from(std::process::id());
    for round in 0..ROUNDS {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::what_was_acknowledged_survives_sigkill", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut writer = Writer(child);
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let pause = Duration::from_micros((seed >> 33) % 120_000);
        let mut lines = BufReader::new(writer.0.stdout.take().unwrap()).lines();
        // The clock starts when it writes.
        let started = Instant::now();
        let first = loop {
            let line = lines.next().expect("a writer that writes").unwrap();
            if let Some(found) = acknowledged(&line) {
                break found;
            }
            assert!(started.elapsed() < Duration::from_secs(60));
        };
        assert!(first.0 > last, "round {round}: {first:?} after {last}");
        let mut last_revision;
        (last, last_revision) = first;
        std::thread::sleep(pause);
        writer.0.kill().unwrap();
        writer.0.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            if let Some(found) = acknowledged(&line) {
                (last, last_revision) = found;
            }
        }
        let store = open(&path);
        let entry = store.get(b"/count").await.unwrap().unwrap();
        let count: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
        assert!(count == last || count == last + 1, "round {round}: {count} is there, {last} was acknowledged");
        assert!(entry.revision.0 >= last_revision);
        let expected = vec![count as u8; (count * 977 % 9000) as usize];
        let of_count = format!("/data/{:02}", count % 50);
        for key in ["/twin", &of_count] {
            let entry = store.get(key.as_bytes()).await.unwrap().unwrap();
            assert!(entry.value == expected, "round {round}: {key} is not of transaction {count}");
        }
        assert!(store.get(format!("/data/{:02}", (count + 25) % 50).as_bytes()).await.unwrap().is_none());
    }
    assert!(last > ROUNDS * 2, "hardly anything was written: {last}");
}

fn acknowledged(line: &str) -> Option<(u64, u64)> {
    let (count, revision) = line.split("acknowledged ").nth(1)?.split_once(' ')?;
    Some((count.parse().ok()?, revision.parse().ok()?))
}
