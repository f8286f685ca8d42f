//! The store's promises over HTTP.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use virtward_repo::{
    Error, Store,
    store::{
        Put,
        s3::{S3Options, S3Store},
    },
};

use crate::{
    common::noise,
    contract::{contract, racing_puts_have_one_winner},
    http::{Http, Reply, TIME},
    server::{BUCKET, Server, env, names, options, store_at},
};

#[test]
fn a_bucket_keeps_the_contract() {
    let server = Server::start();
    contract(&S3Store::open_with_env(BUCKET, &options(&server.endpoint()), &env).unwrap());
    contract(&*server.store("deep/er"));
    contract(&*server.store("with space+and%percent"));
}

#[test]
fn racing_writers_have_one_winner() {
    let server = Server::start();
    // The real server looks first and writes then; one after the other it keeps the condition as others do.
    let gate = Http::start(server.port, |asked| match &*asked.method {
        "PUT" | "POST" if asked.header("if-none-match").is_some() => Reply::ForwardAlone,
        _ => Reply::Forward,
    });
    racing_puts_have_one_winner(&*store_at(&gate.endpoint(), "race"));
    let created = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for n in 0..3u8 {
            let (store, created) = (store_at(&gate.endpoint(), "race"), &created);
            scope.spawn(move || {
                let mut writer = store.create("data/00/large").unwrap();
                writer.write(&vec![n; 17 << 20]).unwrap();
                if writer.finish().unwrap() == Put::Created {
                    created.fetch_add(1, SeqCst);
                }
            });
        }
    });
    assert_eq!(created.into_inner(), 1);
}

#[test]
fn large_objects_arrive_whole_and_neighbours_are_left_alone() {
    let server = Server::start();
    let store = server.store("a");
    let bytes = noise(1, (41 << 20) + 12_345);
    let mut writer = store.create("data/00/large").unwrap();
    for part in bytes.chunks(1_000_003) {
        writer.write(part).unwrap();
    }
    assert!(!store.exists("data/00/large").unwrap(), "nothing appears before the end");
    assert_eq!(writer.finish().unwrap(), Put::Created);
    assert_eq!(store.size("data/00/large").unwrap(), bytes.len() as u64);
    let at = (8 << 20) - 5;
    assert_eq!(store.get_range("data/00/large", at as u64, 10).unwrap(), bytes[at..at + 10]);
    assert!(store.get("data/00/large", 1 << 30).unwrap() == bytes);
    assert_eq!(store.put_if_absent("data/00/large", &bytes).unwrap(), Put::Exists);
    assert_eq!(store.put_if_absent("index/large", &bytes).unwrap(), Put::Created);
    let _ = server.store("ab").put_if_absent("config", b"other repository").unwrap();
    assert_eq!(names(&*store), ["data/00/large", "index/large"]);
}

#[test]
fn an_upload_that_is_dropped_leaves_nothing() {
    let server = Server::start();
    let seen = Http::start(server.port, |_| Reply::Forward);
    let store = store_at(&seen.endpoint(), "a");
    let mut writer = store.create("data/00/dropped").unwrap();
    writer.write(&noise(2, 20 << 20)).unwrap();
    drop(writer);
    assert!(names(&*store).is_empty());
    assert_eq!(seen.count(|asked| asked.method == "DELETE" && asked.query().starts_with("uploadId=")), 1);
    // The name is free for somebody else.
    assert_eq!(store.put_if_absent("data/00/dropped", b"x").unwrap(), Put::Created);
}

#[test]
fn a_lost_acknowledgement_is_a_success_and_not_somebody_elses_object() {
    let server = Server::start();
    let losses = Arc::new(AtomicUsize::new(0));
    let lost = losses.clone();
    let proxy = Http::start(server.port, move |asked| {
        let is_write =
            asked.method == "PUT" && !asked.query().contains("partNumber") || asked.query().starts_with("uploadId");
        match is_write && asked.method != "DELETE" && lost.load(SeqCst) > 0 {
            true => {
                lost.fetch_sub(1, SeqCst);
                Reply::LoseAnswer
            }
            false => Reply::Forward,
        }
    });
    let store = store_at(&proxy.endpoint(), "a");
    assert_eq!(store.put_if_absent("config", b"first").unwrap(), Put::Created);

    losses.store(2, SeqCst);
    assert_eq!(store.put_if_absent("epochs/1", b"same").unwrap(), Put::Created, "it was ours");
    assert_eq!(losses.load(SeqCst), 0);
    losses.store(1, SeqCst);
    assert_eq!(store.put_if_absent("epochs/1", b"same").unwrap(), Put::Exists, "same bytes, and yet not ours");

    let mut writer = store.create("data/00/large").unwrap();
    writer.write(&noise(3, 9 << 20)).unwrap();
    losses.store(1, SeqCst);
    assert_eq!(writer.finish().unwrap(), Put::Created);
    assert_eq!(losses.load(SeqCst), 0);
    assert!(store.get("data/00/large", 1 << 30).unwrap() == noise(3, 9 << 20));
    let mut late = store.create("data/00/large").unwrap();
    late.write(&noise(3, 9 << 20)).unwrap();
    losses.store(1, SeqCst);
    assert_eq!(late.finish().unwrap(), Put::Exists);
}

#[test]
fn trouble_that_passes_is_not_noticed() {
    let server = Server::start();
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let proxy = Http::start(server.port, move |_| match counter.fetch_add(1, SeqCst) % 4 {
        0 => Reply::error(503, "SlowDown"),
        1 => Reply::error(500, "InternalError"),
        2 => Reply::Break,
        _ => Reply::Forward,
    });
    let store = store_at(&proxy.endpoint(), "a");
    // The first answer shows that the server is there; from then on there is patience.
    assert_eq!(store.put_if_absent("config", b"hello").unwrap(), Put::Created);
    assert_eq!(store.get("config", 10).unwrap(), b"hello");
    assert_eq!(names(&*store), ["config"]);
    assert!(store.delete("config").unwrap());
    assert!(asked.load(SeqCst) >= 20);
}

#[test]
fn a_server_that_overwrites_is_refused_at_the_first_write() {
    let careless = Http::start(0, |asked| match &*asked.method {
        "PUT" | "DELETE" => Reply::ok(""),
        "HEAD" => Reply::Answer(404, vec![], vec![]),
        _ => Reply::ok("<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"),
    });
    let store = store_at(&careless.endpoint(), "a");
    let secret = crate::common::secret();
    let error = virtward_repo::Repository::init(store, &secret, &crate::common::init_options()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("If-None-Match"), "{error}");
}

#[test]
fn a_server_that_overwrites_can_be_worked_with_carefully() {
    let server = Server::start();
    let seen = Http::start(server.port, |_| Reply::Forward);
    let options = S3Options { emulate_conditions: true, ..options(&seen.endpoint()) };
    let store = S3Store::open_with_env(&format!("{BUCKET}/a"), &options, &env).unwrap();
    contract(&store);
    let mut large = store.create("data/00/large").unwrap();
    large.write(&noise(4, 9 << 20)).unwrap();
    assert_eq!(large.finish().unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("data/00/large", &noise(4, 9 << 20)).unwrap(), Put::Exists);
    assert_eq!(seen.count(|asked| asked.header("if-none-match").is_some()), 0);
}

#[test]
fn listings_go_on_until_the_last_page() {
    let page = |name: &str, next: &str| {
        let more = if next.is_empty() { "false" } else { "true" };
        let key = format!("<Contents><Key>a/{name}</Key><Size>3</Size>{TIME}</Contents>");
        let odd = format!("<Contents><Key>a/data/NOT OURS</Key><Size>3</Size>{TIME}</Contents>");
        Reply::ok(&format!(
            "<ListBucketResult><IsTruncated>{more}</IsTruncated><NextContinuationToken>{next}</NextContinuationToken>\
             {key}{odd}</ListBucketResult>"
        ))
    };
    let server = Http::start(0, move |asked| match asked.query() {
        query if query.contains("continuation-token=p2") => page("data/2", "p3/+="),
        query if query.contains("continuation-token=p3%2F%2B%3D") => page("data/3", ""),
        _ => page("data/1", "p2"),
    });
    assert_eq!(names(&*store_at(&server.endpoint(), "a")), ["data/1", "data/2", "data/3"]);
    let forever = Http::start(0, move |_| page("data/1", "same"));
    let error = store_at(&forever.endpoint(), "a").list("", &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("makes no sense"), "{error}");
}

#[test]
fn uploads_of_the_dead_are_aborted_and_those_of_slow_writers_are_not() {
    let upload = |key: &str, id: &str, at: &str| {
        format!("<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{at}</Initiated></Upload>")
    };
    let now = "Mon, 02 Mar 2026 12:00:00 GMT";
    let (old, fresh) = ("2026-03-01T11:00:00.000Z", "2026-03-02T11:00:00.000Z");
    let uploads = [
        upload("a/data/00/dead", "dead", old),
        upload("a/data/00/fresh", "fresh", fresh),
        upload("a/data/00/slow", "slow", old),
        upload("ab/data/00/foreign", "foreign", old),
    ];
    let server = Http::start(0, move |asked| {
        let parts =
            |at: &str| format!("<ListPartsResult><Part><LastModified>{at}</LastModified></Part></ListPartsResult>");
        let body = match (&*asked.method, asked.query()) {
            ("GET", query) if query.contains("uploads") => {
                format!("<ListMultipartUploadsResult>{}</ListMultipartUploadsResult>", uploads.concat())
            }
            ("GET", "uploadId=slow") => parts(fresh),
            ("GET", _) => parts(old),
            _ => String::new(),
        };
        Reply::Answer(200, vec![("date", now.into())], body.into_bytes())
    });
    store_at(&server.endpoint(), "a").clean();
    let asked = server.asked.lock().unwrap();
    let aborted: Vec<_> = asked.iter().filter(|a| a.method == "DELETE").map(|a| a.target.clone()).collect();
    assert_eq!(aborted, [format!("/{BUCKET}/a/data/00/dead?uploadId=dead")]);
}
