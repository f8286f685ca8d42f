//! Signed HTTP requests with retries. Knows the protocol's frame and not what objects mean.
//!
//! A request is repeated after failures of the connection, time-outs, and answers that ask for it; every repetition is
//! signed anew. Whether an attempt that failed may have taken effect is told, because a conditional write that is
//! repeated may find its own object. No header and no URL is ever part of a message, and no secret of any log.

use std::{
    io::Read,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use ureq::{
    Agent, AsSendBody,
    http::{HeaderMap, Request, Response},
};

use super::{
    failure,
    settings::Settings,
    sign::{self, Unsigned},
    tls, xml,
};
use crate::{
    error::{Error, Result},
    store::retry::Backoff,
};

/// Fetches in flight that pay: at 30 ms a fetch, 32 of them fill 10 Gbit/s with chunks of 1 MiB.
pub const IN_FLIGHT: usize = 32;
/// Longest answer that is not the content of an object.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// Total time for one operation with its repetitions.
const RETRY_FOR: Duration = Duration::from_secs(120);
/// The same as long as the server was never reached: a wrong address is told soon.
const RETRY_FIRST: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// For at most 8 MiB either way.
const BODY_TIMEOUT: Duration = Duration::from_secs(180);

/// Longest attempt once the job was cancelled: what it cleans up is worth little patience.
const CANCELLED_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at the cancel token.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One operation.
pub struct Call<'a> {
    pub method: &'static str,
    /// Full key; empty for the bucket itself.
    pub key: &'a str,
    pub query: &'a [(&'a str, &'a str)],
    /// Further headers, names in lower case.
    pub headers: &'a [(&'a str, &'a str)],
    pub body: &'a [u8],
    /// Where the content of an object goes; otherwise the answer holds it.
    pub into: Option<&'a mut [u8]>,
    /// Longest body to read.
    pub max_bytes: u64,
    /// Whether repetitions make sense.
    pub retry: bool,
    /// Raised to give up early.
    pub cancel: Option<&'a AtomicBool>,
}

impl<'a> Call<'a> {
    /// Without anything but method and key.
    pub fn new(method: &'static str, key: &'a str) -> Self {
        Self {
            method,
            key,
            query: &[],
            headers: &[],
            body: &[],
            into: None,
            max_bytes: TEXT_BYTES_MAX,
            retry: true,
            cancel: None,
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_some_and(|cancel| cancel.load(Relaxed))
    }
}

/// What the server said.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    /// Content, or an XML document.
    pub body: Vec<u8>,
    /// An earlier attempt failed in a way that leaves open whether it took effect.
    pub is_ambiguous: bool,
    /// What the `Error` document says, if the answer is one.
    pub failure: Option<xml::Failure>,
}

impl Answer {
    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
    /// The `Content-Length`.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }
    /// The server's clock.
    pub fn date(&self) -> Option<Timestamp> {
        jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(self.header("date")?).ok()
    }
    /// Code of the `Error` document.
    pub fn code(&self) -> &str {
        self.failure.as_ref().map_or("", |failure| &failure.code)
    }
    fn asks_for_repetition(&self) -> bool {
        matches!(self.status, 408 | 429 | 500 | 502 | 503 | 504)
            || matches!(self.code(), "ConditionalRequestConflict" | "OperationAborted" | "RequestTimeout")
    }
}

/// Why there was no answer.
enum NoAnswer {
    /// Nothing was sent.
    Unsent(ureq::Error),
    /// Anything can have happened.
    Broken(ureq::Error),
}

/// A client of one bucket. Cheap to share between threads.
pub struct Client {
    pub settings: Settings,
    agent: Agent,
    reached: AtomicBool,
    /// Raised when the job is to end.
    cancel: OnceLock<Arc<AtomicBool>>,
    /// Whether the server did not answer after that: it is not asked again.
    is_away: AtomicBool,
}

impl Client {
    /// Makes the client; nothing is asked yet.
    pub fn new(settings: Settings) -> Result<Arc<Self>> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("virtward/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_send_body(Some(BODY_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .max_idle_connections(2 * IN_FLIGHT)
            .max_idle_connections_per_host(2 * IN_FLIGHT);
        if settings.is_local() {
            config = config.proxy(None);
        }
        if settings.origin.starts_with("https:") {
            config = config.tls_config(tls::config(settings.ca_file.as_deref())?);
        }
        Ok(Arc::new(Self {
            agent: config.build().into(),
            settings,
            reached: AtomicBool::new(false),
            cancel: OnceLock::new(),
            is_away: AtomicBool::new(false),
        }))
    }

    /// Gives up waiting for the server when this is raised. The first token counts.
    pub fn heed(&self, cancel: &Arc<AtomicBool>) {
        let _ = self.cancel.set(cancel.clone());
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.get().is_some_and(|cancel| cancel.load(Relaxed))
    }

    /// Waits before a repetition; less if that is not wanted any more.
    fn wait(&self, pause: Duration, call: &Call<'_>) {
        let begun = Instant::now();
        while !self.is_cancelled() && !call.is_cancelled() {
            let Some(left) = pause.checked_sub(begun.elapsed()) else { return };
            std::thread::sleep(left.min(LOOK_EVERY));
        }
    }

    /// Asks, repeatedly if need be. An answer of any status is a success here. Once the job was cancelled nothing is
    /// repeated, and a server that does not answer is not asked again.
    pub fn call(&self, action: &'static str, mut call: Call<'_>) -> Result<Answer> {
        let mut backoff: Option<Backoff> = None;
        let mut is_ambiguous = false;
        if self.is_cancelled() && self.is_away.load(Relaxed) {
            return Err(Error::Cancelled);
        }
        loop {
            let outcome = self.attempt(&mut call);
            if self.is_cancelled() && outcome.as_ref().map_or(true, Answer::asks_for_repetition) {
                self.is_away.store(outcome.is_err(), Relaxed);
                return Err(Error::Cancelled);
            }
            let budget = match &outcome {
                Ok(answer) if answer.asks_for_repetition() => RETRY_FOR,
                Err(NoAnswer::Unsent(error) | NoAnswer::Broken(error)) if failure::is_final(error) => Duration::ZERO,
                Err(_) if self.reached.load(Relaxed) => RETRY_FOR,
                Err(_) => RETRY_FIRST,
                Ok(_) => Duration::ZERO,
            };
            let pause = match call.retry && !call.is_cancelled() && !budget.is_zero() {
                true => backoff.get_or_insert_with(|| Backoff::new(budget)).pause(),
                false => None,
            };
            let Some(pause) = pause else {
                return match outcome {
                    Ok(answer) => Ok(Answer { is_ambiguous, ..answer }),
                    Err(NoAnswer::Unsent(error) | NoAnswer::Broken(error)) => {
                        Err(failure::unreachable(&self.settings, action, call.key, &error))
                    }
                };
            };
            is_ambiguous |= match &outcome {
                Ok(answer) => answer.status >= 500,
                Err(NoAnswer::Broken(_)) => true,
                Err(NoAnswer::Unsent(_)) => false,
            };
            let why = match &outcome {
                Ok(answer) => format!("status {}", answer.status),
                Err(NoAnswer::Unsent(error) | NoAnswer::Broken(error)) => failure::describe(error),
            };
            tracing::debug!(action, key = call.key, why, ?pause, "object storage: trying again");
            self.wait(pause, &call);
            if self.is_cancelled() {
                return Err(Error::Cancelled);
            }
        }
    }

    fn attempt(&self, call: &mut Call<'_>) -> Result<Answer, NoAnswer> {
        let Settings { origin, host, base_path, region, credentials, .. } = &self.settings;
        let path = format!("{base_path}/{}", sign::encode(call.key, true));
        let query = sign::query(call.query);
        let signed = sign::sign(
            credentials,
            region,
            Timestamp::now(),
            &Unsigned { method: call.method, path: &path, query: &query, host, headers: call.headers, body: call.body },
        );
        let url = if query.is_empty() { format!("{origin}{path}") } else { format!("{origin}{path}?{query}") };
        let mut request = Request::builder().method(call.method).uri(url).header("host", host);
        for (name, value) in call.headers {
            request = request.header(*name, *value);
        }
        for (name, value) in &signed {
            request = request.header(*name, value);
        }
        let sent = match matches!(call.method, "PUT" | "POST") {
            true => request.body(call.body).map_err(|e| NoAnswer::Unsent(e.into())).map(|r| self.send(r))?,
            false => request.body(()).map_err(|e| NoAnswer::Unsent(e.into())).map(|r| self.send(r))?,
        };
        let response =
            sent.map_err(|e| if failure::is_unsent(&e) { NoAnswer::Unsent(e) } else { NoAnswer::Broken(e) })?;
        self.reached.store(true, Relaxed);
        read(call, response).map_err(NoAnswer::Broken)
    }
}

impl Client {
    fn send(&self, request: Request<impl AsSendBody>) -> Result<Response<ureq::Body>, ureq::Error> {
        let request = match self.is_cancelled() {
            true => self.agent.configure_request(request).timeout_global(Some(CANCELLED_TIMEOUT)).build(),
            false => request,
        };
        self.agent.run(request)
    }
}

/// Reads the answer's body to where it belongs.
fn read(call: &mut Call<'_>, response: Response<ureq::Body>) -> Result<Answer, ureq::Error> {
    let (parts, body) = response.into_parts();
    let mut status = parts.status.as_u16();
    let mut answer = Answer { status, headers: parts.headers, body: Vec::new(), is_ambiguous: false, failure: None };
    let mut reader = body.into_reader();
    match &mut call.into {
        // A server that has fewer bytes says so by the length; a connection that broke is another matter.
        Some(buffer) if status == 206 || status == 200 => {
            if answer.length().is_some_and(|length| length >= buffer.len() as u64) {
                reader.read_exact(buffer)?;
            }
        }
        _ if call.method == "HEAD" => {}
        _ => {
            let max = if status < 300 { call.max_bytes } else { TEXT_BYTES_MAX };
            if answer.length().is_none_or(|length| length <= max) {
                reader.take(max + 1).read_to_end(&mut answer.body)?;
            }
        }
    }
    if status >= 300 {
        answer.failure = xml::failure(&answer.body);
    } else if call.method == "POST" {
        // A long operation answers 200 before it knows.
        answer.failure = xml::failure(&answer.body);
        status = match answer.code() {
            "" => status,
            "PreconditionFailed" => 412,
            "NoSuchUpload" => 404,
            "AccessDenied" => 403,
            _ => 500,
        };
    }
    Ok(Answer { status, ..answer })
}
