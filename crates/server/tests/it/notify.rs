//! Notifications against a real HTTP server and a real mail server, both with TLS.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use virtward_decide::notify::{Level, Rules};
use virtward_server::config::{ChannelConfig, MailConfig, MailTls, MaybeSecret, NotifyConfig, Target, WebhookConfig};

use crate::common::{Daemon, LIMIT, Place};

/// What a receiver got: headers that matter, and the body as it came.
#[derive(Clone)]
struct Got {
    headers: hyper::HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", self.headers)).to_str().unwrap()
    }
}

/// A web server that takes notifications and answers with a status that can be changed.
#[derive(Clone)]
struct Receiver {
    got: Arc<Mutex<Vec<Got>>>,
    status: Arc<AtomicU16>,
    url: String,
}

impl Receiver {
    /// With TLS if a certificate is given.
    async fn start(tls: Option<(&Path, &Path)>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let receiver = Self {
            got: Arc::default(),
            status: Arc::new(AtomicU16::new(200)),
            url: format!("{scheme}://127.0.0.1:{port}/hooks/very-secret-path"),
        };
        let acceptor = tls.map(|(certificate, key)| acceptor(certificate, key));
        let of = receiver.clone();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (of, acceptor) = (of.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| of.clone().take(request));
                    let builder = hyper::server::conn::http1::Builder::new();
                    match acceptor {
                        None => drop(builder.serve_connection(TokioIo::new(stream), service).await),
                        Some(acceptor) => {
                            let Ok(stream) = acceptor.accept(stream).await else { return };
                            drop(builder.serve_connection(TokioIo::new(stream), service).await);
                        }
                    }
                });
            }
        });
        receiver
    }

    async fn take(self, request: Request<Incoming>) -> Result<Response<Full<bytes::Bytes>>, hyper::Error> {
        assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/hooks/very-secret-path"));
        let headers = request.headers().clone();
        let body = request.into_body().collect().await?.to_bytes().to_vec();
        self.got.lock().unwrap().push(Got { headers, body });
        let status = self.status.load(Relaxed);
        Ok(Response::builder().status(status).body(Full::from("so it is")).unwrap())
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }

    /// Messages that arrived, each once, however often it was tried.
    fn messages(&self) -> Vec<Value> {
        let mut messages: Vec<Value> = Vec::new();
        for message in self.got().iter().map(Got::json) {
            if messages.iter().all(|known| known["id"] != message["id"]) {
                messages.push(message);
            }
        }
        messages
    }

    fn events(&self) -> Vec<Value> {
        self.messages().iter().flat_map(|message| message["events"].as_array().unwrap().clone()).collect()
    }
}

fn acceptor(certificate: &Path, key: &Path) -> tokio_rustls::TlsAcceptor {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = vec![CertificateDer::from_pem_file(certificate).unwrap()];
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap())
        .unwrap();
    Arc::new(config).into()
}

/// A certificate for this host, which is its own authority, and its key, as files.
fn certificate(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let (certificate, key) = (dir.join("server.crt"), dir.join("server.key"));
    let pair = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    std::fs::write(&certificate, params.self_signed(&pair).unwrap().pem()).unwrap();
    std::fs::write(&key, pair.serialize_pem()).unwrap();
    (certificate, key)
}

fn rules() -> Rules {
    Rules {
        severity: Level::Warning,
        group_wait: Duration::from_millis(200),
        group_interval: Duration::from_millis(200),
        repeat_after: Duration::from_secs(3600),
        recoveries: true,
        exclude: Vec::new(),
    }
}

fn webhook(name: &str, receiver: &Receiver, change: impl FnOnce(&mut WebhookConfig)) -> ChannelConfig {
    let url = MaybeSecret::Here(receiver.url.clone());
    let mut config = WebhookConfig { url, secret_file: None, token_file: None, ca_file: None };
    change(&mut config);
    ChannelConfig { name: name.into(), rules: rules(), target: Target::Webhook(config) }
}

async fn started(place: Place, channels: Vec<ChannelConfig>) -> Daemon {
    let mut config = place.config();
    config.notify = NotifyConfig { link: Some("https://kvm1:8460/".into()), channels };
    place.start_with(config).await
}

/// A backup that cannot succeed, because the VM's disk is not there.
async fn fail(daemon: &Daemon, vm: &str) -> Value {
    let job = daemon.post("/api/v1/jobs/backup", json!({ "vm": vm })).await;
    let job = daemon.ended(job["id"].as_str().unwrap()).await;
    assert_eq!(job["state"], "failed", "{job}");
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_arrives_signed_and_its_end_too_and_repetitions_do_not() {
    let place = Place::new();
    let (crt, key) = certificate(place.dir.path());
    let receiver = Receiver::start(Some((&crt, &key))).await;
    std::fs::write(place.path("secret"), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
    std::fs::write(place.path("token"), "bearer-of-news\n").unwrap();
    let (secret, token) = (place.path("secret"), place.path("token"));
    let channel = webhook("ops", &receiver, |hook| {
        (hook.secret_file, hook.token_file, hook.ca_file) = (Some(secret), Some(token), Some(crt.clone()));
    });
    place.vm("web1", &[], 1).await;
    let disk = place.path("web1.raw");
    let daemon = started(place, vec![channel]).await;
    // At first nobody is there to take it.
    receiver.status.store(503, Relaxed);
    std::fs::rename(&disk, disk.with_extension("away")).unwrap();
    let job = fail(&daemon, "web1").await;
    daemon.wait("two tries", async || receiver.got().len() >= 2).await;
    let shown = daemon.get("/api/v1/notifications").await;
    assert_eq!(shown[0]["target"], receiver.url.trim_end_matches("/hooks/very-secret-path"), "the path may be secret");
    assert_eq!((&shown[0]["waiting"], &shown[0]["delivered"]), (&json!(1), &json!(0)), "{shown}");
    assert!(shown[0]["error"].as_str().unwrap().contains("503: so it is"), "{shown}");
    receiver.status.store(204, Relaxed);
    daemon.wait("delivery", async || daemon.get("/api/v1/notifications").await[0]["delivered"] == 1).await;

    let tries = receiver.got();
    assert!(
        tries.iter().all(|got| got.header("webhook-id") == tries[0].header("webhook-id")),
        "a retry is no new message"
    );
    let last = tries.last().unwrap();
    let signed =
        [last.header("webhook-id"), last.header("webhook-timestamp"), std::str::from_utf8(&last.body).unwrap()]
            .join(".");
    let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let mac =
        aws_lc_rs::hmac::sign(&aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret), signed.as_bytes());
    assert_eq!(last.header("webhook-signature"), format!("v1,{}", STANDARD.encode(mac)));
    assert_eq!(last.header("authorization"), "Bearer bearer-of-news");
    let message = last.json();
    assert_eq!((&message["severity"], &message["node"]), (&json!("error"), &json!("h1")), "{message}");
    assert!(message["title"].as_str().unwrap().starts_with("backup of web1 failed"), "{message}");
    assert_eq!((&message["events"][0]["kind"], &message["events"][0]["job"]), (&json!("job-failed"), &job["id"]));
    assert!(message["text"].as_str().unwrap().contains("https://kvm1:8460/"));

    // The same again is no news; that it is over is.
    fail(&daemon, "web1").await;
    std::fs::rename(disk.with_extension("away"), &disk).unwrap();
    daemon.backup("web1").await;
    daemon.wait("the end of it", async || receiver.messages().len() >= 2).await;
    let over = &receiver.messages()[1];
    assert_eq!((&over["events"][0]["is_over"], &over["repeated"]), (&json!(true), &json!(1)), "{over}");
    assert_eq!(over["title"], "over: backup of web1 succeeded");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nobody_takes_them_many_failures_become_few_messages() {
    const VMS: usize = 25;
    let place = Place::new();
    let receiver = Receiver::start(None).await;
    for number in 0..VMS {
        let name = format!("vm{number:02}");
        place.vm(&name, &[], 1).await;
        std::fs::remove_file(place.path(format!("{name}.raw").as_str())).unwrap();
    }
    let daemon = started(place, vec![webhook("ops", &receiver, |_| {})]).await;
    receiver.status.store(500, Relaxed);
    for number in 0..VMS {
        fail(&daemon, &format!("vm{number:02}")).await;
    }
    receiver.status.store(200, Relaxed);
    daemon
        .wait("all of them", async || {
            daemon.get("/api/v1/notifications").await[0]["waiting"] == 0
                && receiver.events().iter().filter(|event| event["kind"] == "job-failed").count() == VMS
        })
        .await;
    let messages = receiver.messages();
    assert!(messages.len() <= 3, "{} messages", messages.len());
    // How many fit into which depends on how fast they fail; the title of one with several names their kind.
    let titles: Vec<&str> = messages.iter().filter_map(|message| message["title"].as_str()).collect();
    assert!(titles.iter().any(|title| title.contains("job-failed")), "{titles:?}");
    daemon.end().await;
}

/// aiosmtpd as a process, killed at the end.
struct MailServer(Child, std::path::PathBuf);

impl MailServer {
    fn start(dir: &Path, certificate: &Path, key: &Path, mode: &str) -> Self {
        let dir = dir.join(format!("mail-{mode}"));
        std::fs::create_dir(&dir).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/smtp_server.py");
        // Debian's, which has aiosmtpd; another Python may come first in the path.
        let child = Command::new("/usr/bin/python3")
            .arg(script)
            .args([dir.as_path(), certificate, key])
            .arg(mode)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child, dir)
    }

    async fn port(&self) -> u16 {
        let until = std::time::Instant::now() + LIMIT;
        loop {
            if let Ok(port) = std::fs::read_to_string(self.1.join("port")) {
                return port.parse().unwrap();
            }
            assert!(std::time::Instant::now() < until, "the mail server does not start");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn mails(&self) -> Vec<Value> {
        let read = |number: u32| std::fs::read(self.1.join(format!("{number}.json"))).ok();
        (1..).map_while(read).map(|bytes| serde_json::from_slice(&bytes).unwrap()).collect()
    }
}

impl Drop for MailServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mail_arrives_over_tls_with_a_password_and_what_is_wrong_is_told() {
    let place = Place::new();
    let (crt, key) = certificate(place.dir.path());
    let starttls = MailServer::start(place.dir.path(), &crt, &key, "starttls");
    let implicit = MailServer::start(place.dir.path(), &crt, &key, "implicit");
    let (one, two) = (starttls.port().await, implicit.port().await);
    std::fs::write(place.path("right"), "right\n").unwrap();
    std::fs::write(place.path("wrong"), "wrong\n").unwrap();
    let mail = |name: &str, port: u16, tls: MailTls, password: &str, trusted: bool| {
        let mut rules = rules();
        if name != "starttls" {
            rules.severity = Level::Error;
        }
        let target = Target::Mail(MailConfig {
            server: "127.0.0.1".into(),
            port,
            tls,
            ca_file: trusted.then(|| crt.clone()),
            login: Some(("virtward".into(), place.path(password))),
            from: "Virtward Wächter <virtward@example.org>".into(),
            to: vec!["Admins <admins@example.org>".into(), "night@example.org".into()],
        });
        ChannelConfig { name: name.into(), rules, target }
    };
    let channels = vec![
        mail("starttls", one, MailTls::StartTls, "right", true),
        mail("implicit", two, MailTls::Implicit, "right", true),
        mail("refused", one, MailTls::StartTls, "wrong", true),
        mail("untrusted", two, MailTls::Implicit, "right", false),
        mail("clear", one, MailTls::None, "right", true),
    ];
    place.vm("web1", &[], 1).await;
    std::fs::remove_file(place.path("web1.raw")).unwrap();
    let daemon = started(place, channels).await;
    let tested = daemon.post("/api/v1/notifications/test", json!({})).await;
    let of = |name: &str| tested.as_array().unwrap().iter().find(|one| one["channel"] == name).unwrap().clone();
    for good in ["starttls", "implicit"] {
        assert_eq!(of(good)["is_ok"], true, "{tested}");
    }
    for (bad, says) in [("refused", "535"), ("untrusted", "certificate"), ("clear", "")] {
        let outcome = of(bad);
        assert!(!outcome["is_ok"].as_bool().unwrap() && outcome["error"].as_str().unwrap().contains(says), "{outcome}");
    }
    let mails = starttls.mails();
    assert_eq!(mails.len(), 1, "what was refused arrived");
    assert_eq!(mails[0]["to"], json!(["admins@example.org", "night@example.org"]));
    assert_eq!((&mails[0]["user"], &mails[0]["tls"]), (&json!("virtward"), &json!(true)));
    assert_eq!(
        mails[0]["subject"],
        "[virtward h1] info: a test: notifications of the Virtward daemon on h1 arrive here"
    );
    let data = mails[0]["data"].as_str().unwrap();
    for part in ["Auto-Submitted: auto-generated", "Message-ID: <", "Date: "] {
        assert!(data.contains(part), "{part:?} is not in {data}");
    }
    assert_eq!(implicit.mails().len(), 1);

    fail(&daemon, "web1").await;
    daemon.wait("the mail", async || starttls.mails().len() >= 2 && implicit.mails().len() >= 2).await;
    let mail = &starttls.mails()[1];
    assert!(mail["subject"].as_str().unwrap().starts_with("[virtward h1] error: "), "{mail}");
    // A channel that does not work is told through those that do.
    daemon
        .wait("the trouble of the others", async || {
            let told: String = starttls.mails().iter().map(|mail| mail["text"].as_str().unwrap().to_owned()).collect();
            ["through refused", "through untrusted"].iter().all(|part| told.contains(part))
        })
        .await;
    let log = std::fs::read_to_string(daemon.place.path("state/events.jsonl")).unwrap();
    assert!(log.contains("notify-channel") && !log.contains("wrong"), "no secret in events: {log}");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_daemons_one_tells_that_a_vm_is_overdue() {
    let (one, two) = Place::two().await;
    let receiver = Receiver::start(None).await;
    one.vm("web1", &["gold"], 1).await;
    std::fs::remove_file(one.path("web1.raw")).unwrap();
    let one = started(one, vec![webhook("ops", &receiver, |_| {})]).await;
    let two = started(two, vec![webhook("ops", &receiver, |_| {})]).await;
    let policy = json!({
        "name": "gold", "repository": "default", "select": {"any": ["tag:gold"]},
        "schedule": {"cron": ["* * * * *"], "time-zone": "UTC"}, "retention": {"keep-last": 2}, "retries": {"count": 0},
    });
    let put =
        crate::common::send(&two.client, "PUT", "/api/v1/policies/gold", &[], Some(json!({ "policy": policy }))).await;
    assert_eq!(put.status, 200, "{}", String::from_utf8_lossy(&put.body));
    let overdue = |events: &[Value]| events.iter().filter(|event| event["kind"] == "vm-overdue").count();
    // The policy's first run is due within a minute, and fails.
    let until = std::time::Instant::now() + 3 * LIMIT;
    while overdue(&receiver.events()) == 0 {
        assert!(std::time::Instant::now() < until, "nobody tells of it: {:?}", receiver.events());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let told = receiver.events().into_iter().find(|event| event["kind"] == "vm-overdue").unwrap();
    assert!(told["message"].as_str().unwrap().starts_with("web1 is overdue: policy gold"), "{told}");
    // Both look every second; neither a look nor a restart nor another leader tells it again.
    let place = one.end().await;
    let mut config = place.config();
    config.notify = two_channels(&receiver);
    let one = place.start_with(config).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(overdue(&receiver.events()), 1, "{:?}", receiver.events());
    let metrics = crate::common::send(&two.client, "GET", "/metrics", &[], None).await;
    let metrics = String::from_utf8(metrics.body.to_vec()).unwrap();
    assert!(metrics.contains("virtward_alarms{kind=\"vm-overdue\"} 1\n"), "{metrics}");
    one.end().await;
    two.end().await;
}

fn two_channels(receiver: &Receiver) -> NotifyConfig {
    NotifyConfig { link: None, channels: vec![webhook("ops", receiver, |_| {})] }
}
