//! Retention by object lock, request by request: the server that the other tests use has no object lock, so this one
//! records what is asked of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use jiff::{SignedDuration, Timestamp};
use virtward_repo::{
    Repository, Store,
    store::s3::{LockMode, ObjectLock, S3Options, S3Store},
};

use crate::{
    common::*,
    http::{Asked, Http, Reply, TIME},
    server::{BUCKET, env, options},
};

/// Enough of a server to back up to: objects in memory, put-if-absent, no listing of what is not there.
fn recorder() -> Http {
    let objects: Arc<Mutex<HashMap<String, Vec<u8>>>> = Arc::default();
    Http::start(0, move |asked| {
        let mut objects = objects.lock().unwrap();
        let path = asked.path().to_owned();
        match (&*asked.method, asked.query()) {
            ("PUT", "retention=") => Reply::ok(""),
            ("PUT", query) if query.contains("partNumber") => {
                Reply::Answer(200, vec![("etag", "\"p\"".into())], vec![])
            }
            ("POST", "uploads=") => {
                Reply::ok("<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
            }
            ("POST", _) => Reply::ok("<CompleteMultipartUploadResult/>"),
            ("PUT", _) if objects.contains_key(&path) => Reply::error(412, "PreconditionFailed"),
            ("PUT", _) => {
                objects.insert(path, asked.body.clone());
                Reply::ok("")
            }
            ("GET", query) if query.contains("list-type") => {
                let base = format!("/{BUCKET}/");
                let prefix = query.split("prefix=").nth(1).unwrap_or_default().replace("%2F", "/");
                let lines: String = objects
                    .iter()
                    .filter_map(|(key, bytes)| Some((key.strip_prefix(&base)?, bytes.len())))
                    .filter(|(key, _)| key.starts_with(&prefix))
                    .map(|(key, size)| format!("<Contents><Key>{key}</Key><Size>{size}</Size>{TIME}</Contents>"))
                    .collect();
                Reply::ok(&format!("<ListBucketResult>{lines}</ListBucketResult>"))
            }
            ("GET" | "HEAD", _) => match objects.get(&path) {
                Some(bytes) => Reply::Answer(200, vec![], bytes.clone()),
                None => Reply::error(404, "NoSuchKey"),
            },
            ("DELETE", _) => {
                objects.remove(&path);
                Reply::Answer(204, vec![], vec![])
            }
            _ => Reply::error(501, "NotImplemented"),
        }
    })
}

fn store(server: &Http, mode: LockMode) -> Arc<S3Store> {
    let lock = Some(ObjectLock { mode, days: 30 });
    let options = S3Options { object_lock: lock, ..options(&server.endpoint()) };
    Arc::new(S3Store::open_with_env(&format!("{BUCKET}/a"), &options, &env).unwrap())
}

fn writes(server: &Http) -> Vec<Asked> {
    server.asked.lock().unwrap().iter().filter(|a| a.method == "PUT" && a.query().is_empty()).cloned().collect()
}

#[test]
fn everything_that_a_restore_needs_is_written_with_retention() {
    let server = recorder();
    let repo = init(store(&server, LockMode::Governance));
    back_up(&repo, "web1", &noise(1, 3 * CHUNK as usize)).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for asked in writes(&server) {
        let name = asked.path().strip_prefix(&format!("/{BUCKET}/a/")).unwrap().to_owned();
        let kind = name.split('/').next().unwrap().to_owned();
        let mode = asked.header("x-amz-object-lock-mode");
        if kind == "leases" {
            assert_eq!(mode, None, "{name}");
        } else {
            assert_eq!(mode, Some("GOVERNANCE"), "{name}");
            let until: Timestamp = asked.header("x-amz-object-lock-retain-until-date").unwrap().parse().unwrap();
            let days = until.duration_since(Timestamp::now()).as_hours() as f64 / 24.0;
            assert!((29.9..=30.0).contains(&days), "{name}: {days}");
            // The protocol demands a checksum of the body with every retention.
            assert_eq!(asked.header("x-amz-checksum-sha256").unwrap().len(), 44, "{name}");
        }
        // None of it can be stripped on the way: it is signed.
        let signed = asked.header("authorization").unwrap();
        assert!(mode.is_none() || signed.contains("x-amz-object-lock-mode;x-amz-object-lock-retain-until-date"));
        kinds.insert(kind);
    }
    let expected = ["config", "data", "index", "keys", "leases", "meta", "points"];
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), expected);
    assert!(Repository::open(store(&server, LockMode::Governance), &secret()).is_ok());
}

#[test]
fn large_objects_have_retention_from_their_first_request() {
    let server = recorder();
    let mut writer = store(&server, LockMode::Compliance).create("data/00/large").unwrap();
    writer.write(&noise(1, 9 << 20)).unwrap();
    let _ = writer.finish().unwrap();
    let asked = server.asked.lock().unwrap();
    let begin = asked.iter().find(|a| a.query() == "uploads=").unwrap();
    assert_eq!(begin.header("x-amz-object-lock-mode"), Some("COMPLIANCE"));
    assert_eq!(begin.header("x-amz-checksum-algorithm"), Some("SHA256"));
    let sums: Vec<_> = asked.iter().filter_map(|a| a.header("x-amz-checksum-sha256")).collect();
    assert_eq!(sums.len(), 2, "one for each part");
    let complete = asked.iter().find(|a| a.query() == "uploadId=u1").unwrap();
    let body = String::from_utf8(complete.body.clone()).unwrap();
    assert!(sums.iter().all(|sum| body.contains(&format!("<ChecksumSHA256>{sum}</ChecksumSHA256>"))), "{body}");
    assert_eq!(complete.header("if-none-match"), Some("*"));
}

#[test]
fn retention_of_live_objects_is_renewed() {
    let server = recorder();
    let until = Timestamp::now() + SignedDuration::from_hours(24 * 90);
    let names = ["data/00/a", "leases/b.00000000", "index/c"].map(str::to_owned);
    store(&server, LockMode::Compliance).renew(&mut names.into_iter(), until).unwrap();
    let mut asked = server.asked.lock().unwrap().clone();
    asked.sort_by(|a, b| a.target.cmp(&b.target));
    let targets: Vec<&str> = asked.iter().map(|a| &*a.target).collect();
    assert_eq!(targets, ["/backups/a/data/00/a?retention=", "/backups/a/index/c?retention="]);
    let body = String::from_utf8(asked[0].body.clone()).unwrap();
    let date = until.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    assert!(body.contains("<Mode>COMPLIANCE</Mode>") && body.contains(&date), "{body}");
    assert!(asked[0].header("x-amz-checksum-sha256").is_some());
    // Without object lock there is nothing to renew.
    let plain = S3Store::open_with_env(BUCKET, &options(&server.endpoint()), &env).unwrap();
    let before = server.asked.lock().unwrap().len();
    plain.renew(&mut std::iter::once("data/00/a".to_owned()), until).unwrap();
    assert_eq!(server.asked.lock().unwrap().len(), before);
}
