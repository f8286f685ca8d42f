//! Requests that nobody would send: made from the routes and the schemas, with a seed. Whatever comes, the daemon
//! answers with a problem or with what was asked for, never with 5xx, and goes on.

use futures::{StreamExt, stream};
use serde_json::{Map, Value, json};
use virtward_api::{
    openapi,
    routes::{self, Route},
};

use crate::common::{Place, send};

/// Splitmix64: reproducible, and good enough to be unpleasant.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn text(&mut self) -> String {
        const TEXTS: [&str; 22] = [
            "",
            "web1",
            "gold",
            "default",
            "web1@latest",
            "@",
            "..",
            "/etc/passwd",
            "%00",
            "a b",
            "\u{0}",
            "ü",
            "🦀",
            "-1",
            "18446744073709551616",
            "00000000-0000-0000-0000-000000000000",
            "null",
            "*",
            "?",
            "vwt_a_b",
            "4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f",
            "2026-11-23T10:00:00Z",
        ];
        match self.below(8) {
            0 => "x".repeat(self.below(5000)),
            1 => (0..self.below(20))
                .filter_map(|_| char::from_u32(u32::try_from(self.below(0x11_0000)).unwrap()))
                .collect(),
            _ => (*self.pick(&TEXTS)).to_owned(),
        }
    }

    fn anything(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 6 } else { 8 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.next()),
            3 => json!(-(i64::try_from(self.next() >> 2).unwrap())),
            4 => json!(1e300),
            5 => json!(self.text()),
            6 => (0..self.below(5)).map(|_| self.anything(depth - 1)).collect(),
            _ => Value::Object((0..self.below(5)).map(|_| (self.text(), self.anything(depth - 1))).collect()),
        }
    }

    /// A value that fits a schema, or almost.
    fn fitting(&mut self, schema: &Value, document: &Value, depth: usize) -> Value {
        if depth == 0 || self.below(12) == 0 {
            return self.anything(2);
        }
        if let Some(reference) = schema["$ref"].as_str() {
            let target = document.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null).clone();
            return self.fitting(&target, document, depth - 1);
        }
        for key in ["oneOf", "anyOf"] {
            if let Some(options) = schema[key].as_array().filter(|options| !options.is_empty()) {
                let option = self.pick(options).clone();
                return self.fitting(&option, document, depth - 1);
            }
        }
        if let Some(words) = schema["enum"].as_array().filter(|words| !words.is_empty()) {
            return self.pick(words).clone();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) if !kinds.is_empty() => self.pick(kinds).clone(),
            kind => kind.clone(),
        };
        match kind.as_str() {
            Some("object") => {
                let mut object = Map::new();
                for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
                    if self.below(3) > 0 {
                        object.insert(name.clone(), self.fitting(inner, document, depth - 1));
                    }
                }
                Value::Object(object)
            }
            Some("array") => {
                let inner = schema["items"].clone();
                (0..self.below(4)).map(|_| self.fitting(&inner, document, depth - 1)).collect()
            }
            Some("string") => json!(self.text()),
            Some("boolean") => json!(self.below(2) == 0),
            Some("integer") => json!(*self.pick(&[0, 1, 2, 60, 100, 1000, u64::MAX, 1 << 40])),
            Some("null") => Value::Null,
            _ => self.anything(2),
        }
    }
}

fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A request as it is sent.
#[derive(Debug)]
struct Sent {
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Option<Value>,
}

impl Sent {
    fn any(random: &mut Random, routes: &[&'static Route], document: &Value) -> Self {
        let route = *random.pick(routes);
        let mut path: String = route
            .path
            .split('/')
            .map(|part| if part.starts_with('{') { escaped(&random.text()) } else { part.to_owned() })
            .collect::<Vec<_>>()
            .join("/");
        if random.below(2) == 0 && !route.query.is_empty() {
            let pairs: Vec<String> = (0..1 + random.below(3))
                .map(|_| format!("{}={}", random.pick(route.query).name, escaped(&random.text())))
                .collect();
            path = format!("{path}?{}", pairs.join("&"));
        }
        let method = if random.below(10) == 0 {
            *random.pick(&["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
        } else {
            route.method.as_str()
        };
        let operation = &document["paths"][route.path][route.method.as_str().to_lowercase()];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let body = match (schema.is_null(), random.below(10)) {
            (_, 0) => Some(random.anything(4)),
            (true, _) => None,
            (false, _) => Some(random.fitting(schema, document, 6)),
        };
        let mut headers = Vec::new();
        if random.below(4) == 0 {
            headers.push(("idempotency-key", format!("k{}", random.below(50))));
        }
        if random.below(8) == 0 {
            headers.push(("if-match", (*random.pick(&["0", "x", "\"1\"", "99999999999999999999"])).to_owned()));
        }
        Self { method, path, headers, body }
    }
}

/// Requests under way together.
const AT_ONCE: usize = 16;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_sent_breaks_the_daemon() {
    const REQUESTS: usize = 2500;
    let place = Place::new();
    place.vm("web1", &["gold"], 1).await;
    let daemon = place.start().await;
    daemon.backup("web1").await;
    let document = openapi::document();
    let seed = std::env::var("VIRTWARD_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut random = Random(seed);
    let mut counts = std::collections::BTreeMap::<u16, usize>::new();
    let routes: Vec<_> = routes::ROUTES.iter().filter(|route| route.name != "stream").collect();
    let requests = (0..REQUESTS).map(|_| Sent::any(&mut random, &routes, &document));
    let mut answers = stream::iter(requests.enumerate())
        .map(async |(number, sent)| {
            let headers: Vec<_> = sent.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let answer = send(&daemon.client, sent.method, &sent.path, &headers, sent.body.clone()).await;
            let shown = || format!("seed {seed}, request {number}: {sent:?}");
            let text = String::from_utf8_lossy(&answer.body);
            assert!(answer.status < 500, "{}: {} {text}", shown(), answer.status);
            if answer.status >= 400 && sent.method != "HEAD" {
                assert_eq!(answer.headers["content-type"], "application/problem+json", "{}: {text}", shown());
            }
            answer.status
        })
        .buffer_unordered(AT_ONCE);
    while let Some(status) = answers.next().await {
        *counts.entry(status).or_default() += 1;
    }
    drop(answers);
    assert!(counts.len() >= 6, "too uniform to have tested much: {counts:?}");
    // It still works.
    daemon.call_back_all().await;
    assert_eq!(send(&daemon.client, "GET", "/readyz", &[], None).await.status, 200);
    assert!(daemon.get("/api/v1/vms").await["total"].as_u64() >= Some(1));
    daemon.end().await;
}
