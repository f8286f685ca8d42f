//! What is run beside the daemon: alert rules and a dashboard that ask for what it exports; certificates that end.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use virtward_decide::notify::{Level, Rules};
use virtward_server::config::{ChannelConfig, MaybeSecret, NotifyConfig, Target, WebhookConfig};

use crate::common::{Place, send};

/// Metrics of an expression, each with the labels that are asked of it.
fn asked(expr: &str, all: &mut BTreeMap<String, BTreeSet<String>>) {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let mut rest = expr;
    while let Some(at) = rest.find("virtward_") {
        rest = &rest[at..];
        let end = rest.find(|letter| !is_part(letter)).unwrap_or(rest.len());
        let labels = all.entry(rest[..end].to_owned()).or_default();
        rest = &rest[end..];
        if let Some(inner) = rest.strip_prefix('{').and_then(|rest| rest.split('}').next()) {
            let names = inner.split(',').filter_map(|one| one.split(['=', '!']).next());
            labels.extend(names.map(|name| name.trim().to_owned()).filter(|name| name != "instance" && name != "job"));
        }
    }
}

fn expressions(value: &Value, all: &mut BTreeMap<String, BTreeSet<String>>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("expr" | "query", Value::String(expr)) => asked(expr, all),
                    (_, value) => expressions(value, all),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, all)),
        _ => {}
    }
}

fn packaged(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn alert_rules_and_dashboard_ask_only_for_what_is_exported() {
    let mut wanted = BTreeMap::new();
    let rules = packaged("prometheus/virtward.rules.yml");
    let exprs: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).collect();
    assert!(exprs.len() > 10 && exprs.len() == rules.matches("- alert: ").count());
    exprs.iter().for_each(|expr| asked(expr, &mut wanted));
    let dashboard: Value = serde_json::from_str(&packaged("grafana/virtward.json")).unwrap();
    expressions(&dashboard, &mut wanted);
    assert!(wanted.len() > 20, "{wanted:?}");

    let place = Place::new();
    place.vm("web1", &[], 1).await;
    std::fs::create_dir_all(place.path("state/state.backups")).unwrap();
    std::fs::write(place.path("state/state.backups/20260101T030000Z-r1.db"), "").unwrap();
    let mut config = place.config();
    let rules = Rules {
        severity: Level::Error,
        group_wait: std::time::Duration::from_secs(1),
        group_interval: std::time::Duration::from_secs(1),
        repeat_after: std::time::Duration::from_secs(1),
        recoveries: true,
        exclude: Vec::new(),
    };
    let url = MaybeSecret::Here("http://127.0.0.1:9/".into());
    let target = Target::Webhook(WebhookConfig { url, secret_file: None, token_file: None, ca_file: None });
    config.notify = NotifyConfig { link: None, channels: vec![ChannelConfig { name: "ops".into(), rules, target }] };
    let daemon = place.start_with(config).await;
    daemon.backup("web1").await;
    daemon.wait("usage", async || daemon.get("/api/v1/repositories/default").await["usage"].is_object()).await;
    let answer = send(&daemon.client, "GET", "/metrics", &[], None).await;
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let mut samples: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let labels = line.split_once('{').and_then(|(_, rest)| rest.split('}').next()).unwrap_or_default();
        let labels = labels.split(',').filter_map(|one| one.split_once('=').map(|(name, _)| name));
        samples.entry(name).or_default().extend(labels);
    }
    for (metric, labels) in &wanted {
        // A node of a cluster alone has this one.
        if metric == "virtward_node_up" {
            assert!(text.contains("# TYPE virtward_node_up gauge"));
            continue;
        }
        // And this one a host whose hardware is looked at.
        if metric == "virtward_host_health" {
            continue;
        }
        let has = samples.get(metric.as_str()).unwrap_or_else(|| panic!("{metric} is not exported:\n{text}"));
        for label in labels {
            assert!(has.contains(label.as_str()), "{metric} has no label {label}");
        }
    }
    daemon.end().await;
}

/// Prometheus' own tool, where it is installed: the rules parse, and fire when they should.
#[test]
fn promtool_accepts_the_alert_rules() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/prometheus");
    for args in [["check", "rules", "virtward.rules.yml"], ["test", "rules", "virtward.rules.test.yml"]] {
        let Ok(output) = std::process::Command::new("promtool").args(args).current_dir(&dir).output() else { return };
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
    }
}

/// A certificate that ends in so many days, and its key.
fn certificate(place: &Place, days: i64) -> (std::path::PathBuf, std::path::PathBuf) {
    let (certificate, key) = (place.path("given.crt"), place.path("given.key"));
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let date = |days: i64| {
        let date = (Timestamp::now() + SignedDuration::from_hours(24 * days)).to_zoned(jiff::tz::TimeZone::UTC).date();
        rcgen::date_time_ymd(i32::from(date.year()), date.month() as u8, date.day() as u8)
    };
    (params.not_before, params.not_after) = (date(-100), date(days));
    let pair = rcgen::KeyPair::generate().unwrap();
    std::fs::write(&certificate, params.self_signed(&pair).unwrap().pem()).unwrap();
    std::fs::write(&key, pair.serialize_pem()).unwrap();
    (certificate, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_ended_or_ends_soon_is_told() {
    for (days, severity, says) in [(-2, "error", "ended at"), (10, "warning", "ends at")] {
        let place = Place::new();
        let mut config = place.config();
        config.tls = Some(certificate(&place, days));
        let daemon = place.start_with(config).await;
        let told = async || {
            let events = daemon.get("/api/v1/events?kind=certificate").await;
            events["items"].as_array().unwrap().first().cloned()
        };
        daemon.wait("the event", async || told().await.is_some()).await;
        let event = told().await.unwrap();
        assert_eq!(event["severity"], severity, "{event}");
        let message = event["message"].as_str().unwrap();
        assert!(message.contains(says) && message.contains("tls-cert") && message.contains("reload"), "{event}");
        daemon.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_the_api_needs_no_log_in_and_nothing_from_elsewhere() {
    let daemon = Place::new().start().await;
    let client = daemon.https(None);
    let page = send(&client, "GET", "/api", &[], None).await;
    assert_eq!((page.status, page.headers["content-type"].to_str().unwrap()), (200, "text/html; charset=utf-8"));
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let html = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(html.contains("/api/v1/jobs/backup") && html.contains("schema-BackupRequest"));
    for link in html.split("href=\"/").skip(1).filter_map(|rest| rest.split('"').next()) {
        let answer = send(&client, "GET", &format!("/{link}"), &[], None).await;
        assert_eq!(answer.status, 200, "/{link}");
    }
    let etag = page.headers["etag"].to_str().unwrap();
    assert_eq!(send(&client, "GET", "/api", &[("if-none-match", etag)], None).await.status, 304);
    daemon
        .fails("POST", "/api/v1/notifications/test", Some(json!({"channel": "nobody"})), virtward_api::Code::NotFound)
        .await;
    daemon.end().await;
}
