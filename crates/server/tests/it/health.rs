//! A host's hardware, from a page of metrics and a management controller that change under the daemon.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use virtward_server::config::{Config, HealthConfig, RedfishConfig};

use crate::common::{Daemon, Place};

/// Documents by path; the others are not there. `None` for a login: anybody may read.
#[derive(Clone, Default)]
struct Pages {
    all: Arc<Mutex<BTreeMap<String, String>>>,
    login: Option<String>,
}

impl Pages {
    async fn serve(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let of = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let of = of.clone();
                let answer = service_fn(move |request| {
                    let of = of.clone();
                    async move { Ok::<_, std::convert::Infallible>(of.answer(&request)) }
                });
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
            }
        });
        url
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<bytes::Bytes>> {
        let said = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        let page = self.all.lock().unwrap().get(request.uri().path()).cloned();
        let (status, body) = match page {
            _ if self.login.as_deref() != said => (401, String::new()),
            Some(page) => (200, page),
            None => (404, String::new()),
        };
        Response::builder().status(status).body(Full::new(body.into())).unwrap()
    }

    fn put(&self, path: &str, page: impl ToString) {
        self.all.lock().unwrap().insert(path.into(), page.to_string());
    }
}

async fn with_health(place: Place, health: HealthConfig) -> Daemon {
    let config = Config { health, ..place.config() };
    place.start_with(config).await
}

async fn health(daemon: &Daemon) -> Value {
    daemon.get("/api/v1/hosts/h1").await["health"].clone()
}

fn quickly() -> HealthConfig {
    HealthConfig { interval: Duration::from_millis(50), ..HealthConfig::default() }
}

#[tokio::test]
async fn what_metrics_say_is_believed_told_and_kept_while_they_are_silent() {
    let pages = Pages::default();
    let url = pages.serve().await;
    pages.put("/metrics", "smartmon_device_smart_healthy{disk=\"/dev/sda\"} 1\n");
    let daemon = with_health(Place::new(), HealthConfig { metrics: vec![format!("{url}/metrics")], ..quickly() }).await;
    daemon.wait("a first look", async || health(&daemon).await["level"] == "ok").await;

    pages.put("/metrics", "smartmon_device_smart_healthy{disk=\"/dev/sda\"} 0\n");
    daemon.wait("the failure", async || health(&daemon).await["level"] == "critical").await;
    let text = "disk /dev/sda: SMART says that it fails";
    assert_eq!(health(&daemon).await["troubles"], json!([{"level": "critical", "text": text}]));
    let events = daemon.get("/api/v1/events?kind=host-health").await;
    assert_eq!(events["items"][0]["message"], format!("the hardware of h1 fails: {text}"), "{events}");
    let metrics = crate::common::send(&daemon.client, "GET", "/metrics", &[], None).await;
    assert!(String::from_utf8_lossy(&metrics.body).contains("virtward_host_health{host=\"h1\"} 2"));

    // An exporter that is gone does not heal a disk.
    pages.all.lock().unwrap().clear();
    daemon.wait("its silence", async || health(&daemon).await["unread"][0].is_string()).await;
    let now = health(&daemon).await;
    assert_eq!((&now["level"], &now["troubles"][0]["text"]), (&"critical".into(), &text.into()), "{now}");
    assert!(now["unread"][0].as_str().unwrap().ends_with("it answered 404"), "{now}");
    daemon.end().await;
}

#[tokio::test]
async fn metrics_over_tls_are_asked_for_by_tls() {
    // A server that speaks none: what it answers is no handshake, and is said to be that.
    let url = Pages::default().serve().await.replace("http:", "https:");
    let daemon = with_health(Place::new(), HealthConfig { metrics: vec![url.clone()], ..quickly() }).await;
    daemon.wait("the refusal", async || health(&daemon).await["unread"][0].is_string()).await;
    let unread = health(&daemon).await["unread"][0].as_str().unwrap().to_owned();
    assert!(unread.contains("InvalidContentType") || unread.contains("corrupt message"), "{unread}");
    daemon.end().await;
}

#[tokio::test]
async fn a_management_controller_is_walked_with_a_login_that_is_never_shown() {
    let login = format!("Basic {}", STANDARD.encode("reader:very-secret"));
    let pages = Pages { login: Some(login), ..Pages::default() };
    let url = pages.serve().await;
    let link = |path: &str| json!({"@odata.id": path});
    pages.put("/redfish/v1/", json!({"Systems": link("/redfish/v1/Systems"), "Chassis": link("/redfish/v1/Chassis")}));
    // A collection that leads to itself, and to what is not there.
    let systems = [link("/redfish/v1/Systems"), link("/redfish/v1/Systems/9")];
    pages.put("/redfish/v1/Systems", json!({"Members": systems}));
    pages.put("/redfish/v1/Chassis", json!({"Members": [link("/redfish/v1/Chassis/1")]}));
    pages.put("/redfish/v1/Chassis/1", json!({"Name": "Chassis", "Power": link("/redfish/v1/Chassis/1/Power")}));
    let supply = json!({"Name": "PSU 2", "Status": {"State": "Enabled", "Health": "Warning"}});
    pages.put("/redfish/v1/Chassis/1/Power", json!({"Name": "Power", "PowerSupplies": [supply]}));
    let place = Place::new();
    let file = place.path("bmc.pw");
    std::fs::write(&file, "wrong\n").unwrap();
    let login = Some(("reader".into(), file.clone()));
    let redfish = Some(RedfishConfig { url: url.clone(), login, ca_file: None, insecure: false });
    let daemon = with_health(place, HealthConfig { redfish, ..quickly() }).await;

    daemon.wait("the refusal", async || health(&daemon).await["unread"][0].is_string()).await;
    let refused = health(&daemon).await;
    assert_eq!(refused["unread"], json!([format!("{url}: it refuses the user; check user and password-file")]));
    assert_eq!(refused["level"], "unknown", "{refused}");
    std::fs::write(&file, "very-secret\n").unwrap();
    daemon.wait("the warning", async || health(&daemon).await["level"] == "warning").await;
    let now = health(&daemon).await;
    assert_eq!(now["troubles"], json!([{"level": "warning", "text": "Power PSU 2: warning"}]));
    assert_eq!(now["unread"], json!([]));
    let all = daemon.get("/api/v1/events").await.to_string();
    assert!(!all.contains("very-secret") && !all.contains(&STANDARD.encode("reader:very-secret")), "{all}");
    daemon.end().await;
}
