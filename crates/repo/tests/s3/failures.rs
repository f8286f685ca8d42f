//! What an operator reads when object storage refuses or is silent: what failed, and what to do next; never a secret.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use virtward_repo::{
    Error, Repository, Store,
    store::s3::{S3Options, S3Store},
};

use crate::{
    common::secret,
    http::{Http, Reply},
    server::{ACCESS_KEY, BUCKET, SECRET_KEY, Server, env, options, store_at},
};

fn message(error: &Error, says: &[&str]) {
    let text = error.to_string();
    for part in says {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!format!("{error:?} {text}").contains(SECRET_KEY), "{text}");
}

#[test]
fn wrong_credentials_are_called_so() {
    let server = Server::start();
    let wrong = |name: &str| match name {
        "AWS_SECRET_ACCESS_KEY" => Some("not-the-secret".to_owned()),
        other => env(other),
    };
    let store = S3Store::open_with_env(&format!("{BUCKET}/a"), &options(&server.endpoint()), &wrong).unwrap();
    let error = store.list("", &mut |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Remote { is_denied: true, .. }), "{error:?}");
    message(&error, &[ACCESS_KEY, "AWS_SECRET_ACCESS_KEY"]);
    let unknown = |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some("NOBODY".to_owned()),
        other => env(other),
    };
    let store = S3Store::open_with_env(&format!("{BUCKET}/a"), &options(&server.endpoint()), &unknown).unwrap();
    let error = store.put_if_absent("config", b"x").unwrap_err();
    assert!(matches!(error, Error::Remote { is_denied: true, .. }), "{error:?}");
}

#[test]
fn a_missing_bucket_is_called_so() {
    let server = Server::start();
    let store = S3Store::open_with_env("nowhere/a", &options(&server.endpoint()), &env).unwrap();
    message(&store.list("", &mut |_| Ok(())).unwrap_err(), &["there is no bucket nowhere", "create it"]);
    let strict = Http::start(0, |_| Reply::error(404, "NoSuchBucket"));
    let store = store_at(&strict.endpoint(), "a");
    for error in [
        store.put_if_absent("config", b"x").unwrap_err(),
        store.get("config", 10).unwrap_err(),
        store.create("data/00/a").unwrap().write(&vec![1; 9 << 20]).unwrap_err(),
    ] {
        message(&error, &["there is no bucket backups"]);
    }
}

#[test]
fn an_empty_bucket_is_no_repository() {
    let server = Server::start();
    let error = Repository::open(server.store("a"), &secret()).unwrap_err();
    assert!(matches!(&error, Error::NotARepository { location } if location == "s3://backups/a"), "{error:?}");
}

#[test]
fn a_server_that_is_not_there_is_told_soon() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let begun = Instant::now();
    let error = store_at(&format!("http://127.0.0.1:{port}"), "a").exists("config").unwrap_err();
    message(&error, &["s3://backups/a/config", "cannot be reached", "check that the server runs"]);
    let error = store_at("http://no-such-host.invalid", "a").exists("config").unwrap_err();
    message(&error, &["no-such-host.invalid", "DNS"]);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_server_that_speaks_no_tls_is_called_so() {
    let server = Server::start();
    let endpoint = format!("https://127.0.0.1:{}", server.port);
    let error = store_at(&endpoint, "a").exists("config").unwrap_err();
    message(&error, &["TLS", "ca-file"]);
    let ca = S3Options { ca_file: Some("/nonexistent.pem".into()), ..options(&endpoint) };
    assert!(S3Store::open_with_env(&format!("{BUCKET}/a"), &ca, &env).is_err());
}

#[test]
fn what_the_server_says_becomes_advice() {
    let told = |status: u16, code: &'static str, headers: Vec<(&'static str, String)>| {
        let body = format!("<Error><Code>{code}</Code><Message>m.</Message><Region>eu-7</Region></Error>");
        let server = Http::start(0, move |_| Reply::Answer(status, headers.clone(), body.clone().into_bytes()));
        store_at(&server.endpoint(), "a").get("config", 100).unwrap_err()
    };
    let date = jiff::Timestamp::now() - jiff::SignedDuration::from_mins(95);
    let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&date).unwrap();
    let skew = told(403, "RequestTimeTooSkewed", vec![("date", date)]);
    message(&skew, &["clocks", "1h 35m", "timedatectl"]);
    message(&told(403, "AccessDenied", vec![]), &["access denied", ACCESS_KEY, "docs/object-storage.md"]);
    message(&told(400, "AuthorizationHeaderMalformed", vec![]), &["AWS_REGION=eu-7"]);
    let moved = told(301, "PermanentRedirect", vec![("x-amz-bucket-region", "us-9".into())]);
    message(&moved, &["AWS_REGION=us-9"]);
    message(&told(403, "ExpiredToken", vec![]), &["AWS_SESSION_TOKEN"]);
    message(&told(501, "NotImplemented", vec![]), &["lacks an operation"]);
    assert!(matches!(told(507, "", vec![]), Error::StorageFull { .. }));
    assert!(matches!(told(404, "NoSuchKey", vec![]), Error::Missing { .. }));
}

#[test]
fn an_answer_that_is_no_s3_is_refused() {
    let page = Http::start(0, |_| Reply::ok("<html><body>It works!</body></html>"));
    let store = store_at(&page.endpoint(), "a");
    message(&store.list("", &mut |_| Ok(())).unwrap_err(), &["makes no sense", "S3-compatible"]);
    let mut writer = store.create("data/00/a").unwrap();
    message(&writer.write(&vec![1; 9 << 20]).unwrap_err(), &["makes no sense"]);
    assert!(matches!(store.get_range("config", 0, 100), Err(Error::Damaged { .. })));
    assert!(store.get_range("config", 1, 2).is_err());
    assert!(matches!(store.get("config", 3), Err(Error::Damaged { .. })));
}

#[test]
fn who_cancels_does_not_wait_for_a_server_that_is_away() {
    let mut server = Server::start();
    let gone = server.store("a");
    // A server that was reached once is waited for, for two minutes.
    assert!(!gone.exists("config").unwrap());
    server.kill();
    let busy = Http::start(0, |_| Reply::error(503, "SlowDown"));
    for store in [gone, store_at(&busy.endpoint(), "a")] {
        let cancel = Arc::new(AtomicBool::new(false));
        store.heed(&cancel);
        let raised = std::thread::scope(|scope| {
            let raise = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1500));
                cancel.store(true, SeqCst);
                Instant::now()
            });
            let error = store.get("config", 100).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error:?}");
            assert!(cancel.load(SeqCst), "it gave up before it was told to");
            raise.join().unwrap()
        });
        // Cleaning up is not worth any patience either.
        for _ in 0..20 {
            assert!(store.delete("config").is_err());
            assert!(store.put_if_absent("config", b"x").is_err());
        }
        assert!(raised.elapsed() < Duration::from_secs(3), "{:?}", raised.elapsed());
    }
}
