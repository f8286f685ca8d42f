//! Failures, cancellation and SIGKILL in the middle: nothing half-done under a real name, nothing left in the end.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use virtward_engine::{Cancel, Error, Silent, restore_disk};
use virtward_model::PointId;
use virtward_repo::{Repository, Secret, store};

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_from_a_damaged_repository_leaves_nothing_and_keeps_what_was_there() {
    let bench = Bench::new();
    let point = bench.back_up(&bench.raw("a.raw", &noise(1, 6 << 20)), None).await.unwrap();
    let packs = files(&bench.path("repo/data"));
    for pack in &packs {
        let length = pack.metadata().unwrap().len();
        std::fs::File::options().write(true).open(pack).unwrap().set_len(length / 2).unwrap();
    }
    for (to, driver) in FORMATS {
        let dir = bench.subdir(&format!("{to:?}"));
        let path = dir.join(format!("disk.{driver}"));
        let error = bench.restore(point.id, &path, Some(to)).await.unwrap_err();
        assert!(matches!(&error, Error::Repo(error) if error.is_damage()), "{error}");
        assert!(names(&dir).is_empty(), "{:?}", names(&dir));
        std::fs::write(&path, "precious").unwrap();
        bench.replace(point.id, &path, Some(to)).await.unwrap_err();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        assert_eq!(names(&dir).len(), 1, "{:?}", names(&dir));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_destination_says_so_and_is_left_as_it_was() {
    let bench = Bench::new();
    let point = bench.back_up(&bench.raw("a.raw", &noise(1, 24 << 20)), None).await.unwrap();
    let small = bench.subdir("small");
    run("mount", &["-t", "tmpfs", "-o", "size=8M", "none", text(&small)]);
    let mut said = Vec::new();
    for (to, driver) in FORMATS {
        let outcome = bench.restore(point.id, &small.join(format!("disk.{driver}")), Some(to)).await;
        said.push((to, outcome, names(&small)));
    }
    run("umount", &[text(&small)]);
    for (to, outcome, left) in said {
        assert!(left.is_empty(), "{to:?} left {left:?}");
        match outcome.unwrap_err() {
            Error::Io { context, source } => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{to:?}");
                assert!(context.contains("small"), "{context}");
            }
            other => panic!("{to:?}: {other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_leaves_nothing_wherever_it_was() {
    let bench = Bench::new();
    let source = bench.raw("a.raw", &noise(1, 24 << 20));
    let start = Instant::now();
    let point = bench.back_up(&source, None).await.unwrap();
    let backup_time = start.elapsed();
    let dir = bench.subdir("out");
    for step in 0..12u32 {
        let (to, driver) = FORMATS[step as usize % FORMATS.len()];
        let path = dir.join(format!("disk.{driver}"));
        let cancel = Cancel::default();
        let options = options(&path, Some(to));
        let (outcome, ()) = tokio::join!(restore_disk(&bench.repo, point.id, &options, &Silent, &cancel), async {
            tokio::time::sleep(Duration::from_millis(u64::from(step) * 9)).await;
            cancel.cancel();
        });
        match outcome {
            Ok(_) => {
                assert_same(&source, "raw", &path, driver);
                std::fs::remove_dir_all(&dir).unwrap();
                std::fs::create_dir(&dir).unwrap();
            }
            Err(error) => assert!(is_cancelled(&error), "{error}"),
        }
        assert!(names(&dir).is_empty(), "{:?}", names(&dir));
    }
    for step in 0..10 {
        let fresh = bench.raw("b.raw", &noise(100 + u64::from(step), 24 << 20));
        let cancel = Cancel::default();
        let (outcome, ()) = tokio::join!(bench.back_up_until(&fresh, None, &cancel), async {
            tokio::time::sleep(backup_time * step / 8).await;
            cancel.cancel();
        });
        match outcome {
            Ok(point) => assert!(bench.repo.delete_point(point.id).is_ok()),
            Err(error) => assert!(is_cancelled(&error), "{error}"),
        }
        assert_eq!(bench.repo.points().unwrap().points.len(), 1);
    }
    assert!(bench.repo.check(&()).unwrap().is_ok());
}

fn is_cancelled(error: &Error) -> bool {
    matches!(error, Error::Cancelled | Error::Repo(virtward_repo::Error::Cancelled))
}

const CHILD: &str = "VIRTWARD_TEST_RESTORE";

/// Not a test of its own: what [`a_killed_restore_is_cleaned_up_by_the_next_one`] kills.
#[tokio::test(flavor = "multi_thread")]
async fn child_that_restores() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let [repo, point, to, format] = task.split('\n').collect::<Vec<_>>()[..] else { panic!("{task}") };
    let repo = Repository::open(store::open(repo).unwrap(), &Secret::password("secret")).unwrap();
    let format = FORMATS[format.parse::<usize>().unwrap()].0;
    let mut options = options(Path::new(to), Some(format));
    options.overwrite = true;
    let point: PointId = point.parse().unwrap();
    restore_disk(&repo, point, &options, &Silent, &Cancel::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_restore_is_cleaned_up_by_the_next_one() {
    let bench = Bench::new();
    let source = bench.raw("a.raw", &noise(1, 48 << 20));
    let point = bench.back_up(&source, None).await.unwrap();
    for (number, (to, driver)) in FORMATS.into_iter().enumerate() {
        let dir = bench.subdir(&format!("{to:?}"));
        let path = dir.join(format!("disk.{driver}"));
        std::fs::write(&path, "precious").unwrap();
        let task = format!("{}\n{}\n{}\n{number}", text(&bench.path("repo")), point.id, text(&path));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child_that_restores", "--test-threads=1"])
            .env(CHILD, task)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let staged =
            || files(&dir).into_iter().any(|file| file != path && file.metadata().is_ok_and(|m| m.len() > 1 << 20));
        let deadline = Instant::now() + Duration::from_secs(60);
        while !staged() && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the restore did not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if std::fs::read(&path).unwrap() != b"precious" {
            // It was faster than the kill: then it must be whole.
            assert_same(&source, "raw", &path, driver);
        }
        let other = dir.join("other.raw");
        bench.restore(point.id, &other, None).await.unwrap();
        assert_same(&source, "raw", &other, "raw");
        let left: Vec<String> = names(&dir).into_iter().filter(|name| name.starts_with(".virtward-restore")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Every file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}
