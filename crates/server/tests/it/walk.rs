//! Every route of the document, walked through: a request that is right, then the same with one thing after the other
//! replaced by what is at the edge of its schema, beyond it, or meant badly. What comes back is what the document says:
//! the right answer is right in every field, whatever else is a problem, nothing is 5xx. `fuzz` sends the rest, at random.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use virtward_api::{Role, client::Client, openapi};
use virtward_server::admin;

use crate::{
    common::{Daemon, Place, send},
    schema::misfits,
};

/// Requests under way together: some are answered only after hosts were looked at for seconds.
const AT_ONCE: usize = 16;

/// Texts for whatever takes a text.
fn texts() -> Vec<String> {
    let fixed = [
        "",
        " ",
        "web1",
        "..",
        "../../etc/passwd",
        "/",
        "%2e%2e%2f",
        "\u{0}",
        "a\r\nx-evil: 1",
        "' or 1=1 --",
        "<script>alert(1)</script>",
        "ünïcödé 🦀 \u{202e}",
        "-1",
        "0",
        "1001",
        "18446744073709551616",
        "9223372036854775808",
        "1e309",
        "NaN",
        "true",
        "null",
        "all",
        "*",
        "00000000-0000-0000-0000-000000000000",
        "9999-12-31T23:59:59Z",
        "-009999-01-01T00:00:00Z",
        "{\"$ref\":\"#\"}",
    ];
    let long = ["x".repeat(255), "x".repeat(5000), "%".repeat(300), "a/".repeat(500), "🦀".repeat(1000)];
    fixed.iter().map(|text| (*text).to_owned()).chain(long).collect()
}

/// Values for a field, by its schema: those at the edges, and those of every other kind.
fn values() -> Vec<Value> {
    let mut values = vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1.5),
        json!(1e300),
        json!([]),
        json!({}),
        json!([null]),
        json!(vec!["x"; 2000]),
        json!({"a": {"b": {"c": []}}}),
        (0..100).fold(json!(1), |inner, _| json!([inner])),
    ];
    values.extend(texts().into_iter().map(Value::from));
    values
}

fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A request that can be sent.
#[derive(Clone, Debug)]
struct Asked {
    method: String,
    route: String,
    path: BTreeMap<String, String>,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Option<Value>,
}

impl Asked {
    fn path(&self) -> String {
        let parts = self.route.split('/').map(|part| match part.strip_prefix('{').and_then(|p| p.strip_suffix('}')) {
            Some(name) => escaped(&self.path[name]),
            None => part.to_owned(),
        });
        let query: Vec<String> = self.query.iter().map(|(name, value)| format!("{name}={}", escaped(value))).collect();
        let mark = if query.is_empty() { "" } else { "?" };
        format!("{}{mark}{}", parts.collect::<Vec<_>>().join("/"), query.join("&"))
    }

    /// The same with one thing replaced, once for each thing and value.
    fn variations(&self, parameters: &[Value]) -> Vec<Self> {
        let mut all = Vec::new();
        let mut with = |change: &dyn Fn(&mut Self)| {
            let mut other = self.clone();
            change(&mut other);
            all.push(other);
        };
        for name in self.path.keys() {
            for text in texts().into_iter().filter(|text| !text.is_empty()) {
                with(&|other| _ = other.path.insert(name.clone(), text.clone()));
            }
        }
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().unwrap();
            for text in texts() {
                with(&|other| other.query.push((name.to_owned(), text.clone())));
            }
            with(&|other| other.query.extend([(name.to_owned(), "1".into()), (name.to_owned(), "2".into())]));
        }
        with(&|other| other.query.push(("no-such-parameter".into(), "1".into())));
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "header") {
            let name = parameter["name"].as_str().unwrap();
            for text in ["", "0", "-1", "x", "\"1\"", "99999999999999999999", "a b", &"k".repeat(201)] {
                with(&|other| other.headers.push((name.to_owned(), text.to_owned())));
            }
        }
        let Some(body) = &self.body else {
            with(&|other| other.body = Some(json!({"unasked": 1})));
            return all;
        };
        for value in values() {
            with(&|other| other.body = Some(value.clone()));
        }
        with(&|other| other.body = None);
        for place in places(body) {
            for value in values() {
                let mut changed = body.clone();
                *changed.pointer_mut(&place).unwrap() = value;
                with(&|other| other.body = Some(changed.clone()));
            }
            let mut changed = body.clone();
            let (parent, name) = place.rsplit_once('/').unwrap();
            if let Some(object) = changed.pointer_mut(parent).and_then(Value::as_object_mut) {
                object.remove(name);
                object.insert("no-such-field".into(), json!(1));
            }
            with(&|other| other.body = Some(changed.clone()));
        }
        all
    }
}

/// Pointers to everything in a value.
fn places(value: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, inner)| (name.clone(), inner)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(number, inner)| (number.to_string(), inner)).collect(),
        _ => Vec::new(),
    };
    let deeper = |(name, inner): &(String, &Value)| {
        let below: Vec<String> = places(inner).into_iter().map(|place| format!("/{name}{place}")).collect();
        [vec![format!("/{name}")], below].concat()
    };
    children.iter().flat_map(deeper).collect()
}

fn policy(name: &str) -> Value {
    json!({"policy": {
        "name": name, "repository": "default", "select": {"any": ["tag:gold"], "exclude": ["name:x*"]},
        "schedule": {"cron": ["0 3 1 1 *"], "time-zone": "UTC", "jitter": "1m",
            "window": {"start": "22:00", "end": "05:00", "days": ["fri"]}},
        "retention": {"keep-last": 3, "keep-within": "30d"}, "rpo": "400d", "bandwidth": "1MiB",
        "retries": {"count": 1, "backoff": "5m"}, "priority": 1, "quiesce": "auto",
        "copy-to": [{"repository": "default2", "retention": {"keep-last": 1}}],
    }})
}

/// What there is to ask for, and what to send: made anew before every request that uses it up.
struct World<'a> {
    daemon: &'a Daemon,
    job: String,
    point: String,
}

impl World<'_> {
    async fn request(&self, method: &str, route: &str, name: &str) -> Asked {
        let known = [
            ("vm", "web1"),
            ("host", "h1"),
            ("policy", "gold"),
            ("repository", "default"),
            ("node", "h2"),
            ("token", "made"),
            ("job", &self.job),
            ("point", &self.point),
        ];
        self.prepare(name).await;
        let path = known.iter().filter(|(name, _)| route.contains(&format!("{{{name}}}")));
        let body = match name {
            "cluster-token" => Some(json!({"expires_in_s": 60})),
            "policy-put" | "policy-validate" | "policy-diff" => Some(policy("gold")),
            "job-backup" => Some(json!({"vm": "web1", "repository": "default", "full": false, "warm": false,
                "quiesce": "off", "bandwidth_bytes_s": 1 << 30, "only_disks": ["vda"], "exclude_disks": [],
                "tags": ["t"]})),
            "job-restore" => Some(json!({"point": self.point, "repository": "default", "name": "copy", "host": "h1",
                "disk_dir": self.daemon.place.dir.path(), "overwrite": false, "start": false, "dry_run": true})),
            "job-gc" => Some(json!({"repository": "default"})),
            "job-verify" => Some(json!({"repository": "default", "points": [self.point]})),
            "token-create" => Some(json!({"name": "other", "role": "viewer", "vm_tags": ["gold"], "expires_in_s": 60})),
            "login" => Some(json!({"token": self.daemon.token("walker", Role::Viewer, &[]).await})),
            "ha-arm" | "ha-disarm" | "ha-confirm-off" => Some(json!({"reason": "a walk"})),
            "ha-test-fencing" => Some(json!({"power_cycle": false})),
            "ha-enable" => Some(json!({"tier": 1, "after": [], "gate": "running", "only_on": "h1", "resets_max": 3,
                "services": [{"check": "tcp://10.0.0.5:80", "every_s": 5, "restart_unit": "nginx", "actions": ["relocate"]}]})),
            "ha-move" => Some(json!({"to": "h2", "force": false})),
            "ha-start" => Some(json!({"force": false})),
            "ha-switch" => Some(json!({"reason": "a kernel update"})),
            "notify-test" => Some(json!({})),
            "vm-migrate" => Some(json!({"to": "h1", "max_downtime_ms": 300, "bandwidth_bytes_s": 1 << 30,
                "timeout_s": 60, "with_storage": false, "unsafe_cache": false, "dry_run": true})),
            "vm-move-disk" => Some(json!({"disk": "vda", "to": "/no/such/directory/x.qcow2", "format": "qcow2",
                "bandwidth_bytes_s": 1 << 30, "keep_source": true})),
            "host-drain" => Some(json!({"parallel": 2, "first": ["web1"], "within_s": 60, "with_inactive": false,
                "dry_run": true})),
            "balance-plan" | "balance-apply" => Some(json!({"eagerness": 3, "parallel": 2, "interval_s": 1})),
            _ => None,
        };
        Asked {
            method: method.to_uppercase(),
            route: route.to_owned(),
            path: path.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            query: Vec::new(),
            headers: Vec::new(),
            body,
        }
    }

    /// Makes what the right request of a route needs.
    async fn prepare(&self, name: &str) {
        let client = &self.daemon.client;
        match name {
            "policy" | "policy-delete" => {
                let made: Result<Value, _> = client.put("/api/v1/policies/gold", &policy("gold"), None).await;
                made.unwrap();
            }
            "token-revoke" => _ = self.daemon.token("made", Role::Viewer, &[]).await,
            "cluster-remove" => {
                let member = format!("{{\"joined\":\"{}\"}}", jiff::Timestamp::now());
                let put = virtward_cluster::Op::put("/v1/nodes/h2".to_owned(), member);
                assert!(self.daemon.place.store.txn(Vec::new(), vec![put]).await.unwrap().succeeded);
            }
            _ => {}
        }
    }
}

/// Sends a request and judges the answer; its status.
async fn judged(client: &Client, asked: &Asked, operation: &Value, document: &Value) -> u16 {
    let headers: Vec<(&str, &str)> = asked.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    let path = asked.path();
    let shown = || {
        let body: String = asked.body.as_ref().map(ToString::to_string).unwrap_or_default().chars().take(600).collect();
        let path: String = path.chars().take(300).collect();
        format!("{} {path} {headers:?} {body}", asked.method)
    };
    let answer = send(client, &asked.method, &path, &headers, asked.body.clone()).await;
    let text = String::from_utf8_lossy(&answer.body);
    assert!(answer.status < 500, "{}: {} {text}", shown(), answer.status);
    let response = &operation["responses"][answer.status.to_string()];
    let kind = answer.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if answer.status >= 400 {
        assert_eq!(kind, "application/problem+json", "{}: {text}", shown());
        let problem: Value = serde_json::from_slice(&answer.body).expect("JSON");
        let wrong = misfits(&problem, &document["components"]["schemas"]["Problem"], document);
        assert!(wrong.is_empty() && problem["detail"] != "", "{}: {wrong:?} {problem}", shown());
        return answer.status;
    }
    assert!(response.is_object(), "{}: {} is not in the document", shown(), answer.status);
    if let Some(schema) = response["content"].get("application/json").map(|content| &content["schema"]) {
        let value: Value = serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error}: {text}"));
        let wrong = misfits(&value, schema, document);
        assert!(wrong.is_empty(), "{}: {wrong:?} in {text}", shown());
    }
    answer.status
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_as_the_document_says_whatever_it_is_sent() {
    let place = Place::with(&["default", "default2"]).with_peers();
    let config = place.config();
    admin::found(&*place.store, &config, config.cluster.as_ref().unwrap(), "test").await.unwrap();
    place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    let job = daemon.backup("web1").await;
    // Whoever saw the end of a backup sees its restore point too.
    let points = daemon.get("/api/v1/points").await;
    assert_eq!(points["total"], 1, "{points}");
    let world = World {
        daemon: &daemon,
        job: job["id"].as_str().unwrap().to_owned(),
        point: points["items"][0]["id"].as_str().unwrap().to_owned(),
    };
    let document = openapi::document();
    let (mut sent, mut never, mut statuses) = (0, BTreeSet::new(), BTreeMap::<u16, usize>::new());
    for (route, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap();
            // It has no end. What it takes is looked at by the tests of the stream.
            if name == "stream" {
                continue;
            }
            let right = world.request(method, route, name).await;
            let status = judged(&daemon.client, &right, operation, &document).await;
            if status >= 400 {
                never.insert(format!("{name}: {status}"));
            }
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let answers = stream::iter(right.variations(&parameters))
                .map(async |asked| judged(&daemon.client, &asked, operation, &document).await)
                .buffer_unordered(AT_ONCE);
            for status in answers.collect::<Vec<_>>().await {
                *statuses.entry(status).or_default() += 1;
                sent += 1;
            }
        }
    }
    // A job that has ended cannot be cancelled; nobody is logged in on the socket; this daemon takes no part in high
    // availability.
    never.retain(|name| name != "job-cancel: 409" && !(name.starts_with("ha") && name.ends_with(": 409")));
    assert!(never.is_empty(), "routes whose right request was refused: {never:?}");
    assert!(sent > 3000 && statuses.len() >= 6, "too little to have tested much: {sent} {statuses:?}");
    daemon.call_back_all().await;
    assert_eq!(send(&daemon.client, "GET", "/readyz", &[], None).await.status, 200);
    daemon.end().await;
}
