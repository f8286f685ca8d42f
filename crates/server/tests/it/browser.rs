//! A headless Chromium, driven by WebDriver over plain HTTP: only what the tests of the web interface need.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::{Mutex, Semaphore, SemaphorePermit},
};

/// Longest that one command, or what a page is to show, may take. Machines that run all tests at once are slow.
const LIMIT: Duration = Duration::from_secs(90);
/// Browsers at a time: each takes a core while it draws.
static PLACES: Semaphore = Semaphore::const_new(2);
/// Drivers that start at the same time choose the same port now and then, and one of them ends.
static STARTING: Mutex<()> = Mutex::const_new(());
const STARTS: u32 = 5;
/// How WebDriver calls an element in JSON.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser of one's own. It ends when this is dropped, also by a test that fails.
pub struct Browser {
    port: u16,
    session: String,
    base: String,
    _driver: Child,
    _profile: tempfile::TempDir,
    _place: SemaphorePermit<'static>,
}

impl Browser {
    /// Starts one for pages below `base`; it takes the daemon's own certificate.
    pub async fn start(base: String) -> Self {
        let place = PLACES.acquire().await.expect("never closed");
        let (driver, port) = start_driver().await;
        let profile = tempfile::Builder::new().prefix("virtward-browser-").tempdir().unwrap();
        let mut arguments = vec![
            "--headless=new".to_owned(),
            "--disable-gpu".into(),
            "--disable-dev-shm-usage".into(),
            "--disable-background-networking".into(),
            "--no-first-run".into(),
            "--lang=en-GB".into(),
            "--window-size=1280,900".into(),
            format!("--user-data-dir={}", profile.path().display()),
        ];
        if rustix::process::geteuid().is_root() {
            arguments.push("--no-sandbox".into());
        }
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "acceptInsecureCerts": true,
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let made = command(port, "POST", "/session", Some(wanted)).await;
        let session = made["sessionId"].as_str().expect("a session").to_owned();
        Self { port, session, base, _driver: driver, _profile: profile, _place: place }
    }

    async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        command(self.port, method, &format!("/session/{}{path}", self.session), body).await
    }

    /// Opens an address.
    pub async fn open(&self, path: &str) {
        self.ask("POST", "/url", Some(json!({"url": format!("{}{path}", self.base)}))).await;
    }

    /// Opens the page of an address and waits until it shows what it is about.
    pub async fn page(&self, path: &str) {
        self.open(path).await;
        self.until(path, "document.querySelector('main h1') && !document.querySelector('[aria-busy]')").await;
    }

    /// What a piece of JavaScript returns.
    pub async fn run(&self, script: &str, arguments: Value) -> Value {
        self.ask("POST", "/execute/sync", Some(json!({"script": script, "args": arguments}))).await
    }

    /// Everything that can be read on the page.
    pub async fn text(&self) -> String {
        self.run("return document.body.innerText", json!([])).await.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression holds.
    pub async fn until(&self, what: &str, expression: &str) {
        let until = Instant::now() + LIMIT;
        let script = format!("return Boolean({expression})");
        while self.run(&script, json!([])).await != true {
            if Instant::now() >= until {
                panic!(
                    "waited too long for {what}; the page says:\n{}\n{:?}",
                    self.text().await,
                    self.complaints().await
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until the page says something.
    pub async fn sees(&self, text: &str) {
        // Numbers and their units are kept together by spaces of another kind.
        let shown = "document.body.innerText.replaceAll('\\u00a0', ' ')";
        self.until(&format!("the text {text:?}"), &format!("{shown}.includes({})", json!(text))).await;
    }

    /// The first element that a selector finds and whose text or label begins so, once there is one.
    async fn find(&self, selector: &str, text: &str) -> String {
        let script = "return [...document.querySelectorAll(arguments[0])].find(one => !one.disabled && \
                      (one.textContent.trim().startsWith(arguments[1]) || one.getAttribute('aria-label') === arguments[1]))";
        let until = Instant::now() + LIMIT;
        loop {
            let found = self.run(script, json!([selector, text])).await;
            if let Some(id) = found[ELEMENT].as_str() {
                return id.to_owned();
            }
            assert!(Instant::now() < until, "there is no {selector} {text:?} on the page:\n{}", self.text().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Clicks as a person does: what is covered or out of sight cannot be.
    pub async fn click(&self, selector: &str, text: &str) {
        let element = self.find(selector, text).await;
        self.ask("POST", &format!("/element/{element}/click"), Some(json!({}))).await;
    }

    /// Replaces what is in a field, key by key.
    pub async fn write(&self, selector: &str, text: &str) {
        let element = self.find(selector, "").await;
        self.ask("POST", &format!("/element/{element}/clear"), Some(json!({}))).await;
        self.ask("POST", &format!("/element/{element}/value"), Some(json!({"text": text}))).await;
    }

    /// A screen of this size.
    pub async fn resize(&self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        let body = json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": size});
        self.ask("POST", "/goog/cdp/execute", Some(body)).await;
    }

    /// Presses Tab.
    pub async fn tab(&self) {
        for kind in ["rawKeyDown", "keyUp"] {
            let key = json!({"type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9});
            let body = json!({"cmd": "Input.dispatchKeyEvent", "params": key});
            self.ask("POST", "/goog/cdp/execute", Some(body)).await;
        }
    }

    /// What the console has against the pages since it was last asked: script errors, and what the policy forbids.
    pub async fn complaints(&self) -> Vec<String> {
        let log = self.ask("POST", "/se/log", Some(json!({"type": "browser"}))).await;
        let entries = log.as_array().cloned().unwrap_or_default().into_iter();
        let severe = entries.filter(|entry| entry["level"] == "SEVERE");
        let texts = severe.filter_map(|entry| entry["message"].as_str().map(str::to_owned));
        // That nobody is logged in yet is an answer.
        texts.filter(|text| !text.contains("the server responded with a status of 4")).collect()
    }
}

impl Drop for Browser {
    /// Without this, the browser would outlive its driver.
    fn drop(&mut self) {
        let (port, path) = (self.port, format!("/session/{}", self.session));
        let end = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            if let Ok(runtime) = runtime {
                let _ = runtime.block_on(async {
                    tokio::time::timeout(Duration::from_secs(20), send(port, "DELETE", &path, None)).await
                });
            }
        };
        let _ = std::thread::spawn(end).join();
    }
}

/// Starts a driver on a port of its own choice.
async fn start_driver() -> (Child, u16) {
    let _alone = STARTING.lock().await;
    for _ in 0..STARTS {
        if let Some(started) = try_driver().await {
            return started;
        }
    }
    panic!("chromedriver ended without a word, {STARTS} times");
}

/// None if it ended at once, as when something else took the port that it chose.
async fn try_driver() -> Option<(Child, u16)> {
    let mut driver = Command::new("chromedriver")
        .arg("--port=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("chromedriver: {error}; scripts/setup.sh test installs it"));
    let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let port = tokio::time::timeout(LIMIT, async {
        while let Ok(Some(line)) = lines.next_line().await {
            let port = line.split_once("started successfully on port ").map(|(_, rest)| rest.trim_end_matches('.'));
            if let Some(port) = port {
                return Some(port.parse().expect("a port"));
            }
        }
        None
    });
    let port = port.await.expect("chromedriver starts in time")?;
    // It goes on to write there, and must not meet a closed pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Some((driver, port))
}

async fn command(port: u16, method: &str, path: &str, body: Option<Value>) -> Value {
    let answer = tokio::time::timeout(LIMIT, send(port, method, path, body)).await;
    let value = answer.unwrap_or_else(|_| panic!("{method} {path}: the browser takes too long"));
    let value = value.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
    if let Some(error) = value["value"]["error"].as_str() {
        panic!("{method} {path}: {error}: {}", value["value"]["message"].as_str().unwrap_or_default());
    }
    value["value"].clone()
}

async fn send(
    port: u16,
    method: &str,
    path: &str,
    body: Option<Value>,
) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", format!("127.0.0.1:{port}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let bytes = response.into_body().collect().await?.to_bytes();
    driving.abort();
    Ok(serde_json::from_slice(&bytes)?)
}
