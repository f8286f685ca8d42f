//! A small HTTP server in front of a real S3 server, or in place of one: it sees every request, and may pass it on, answer
//! by itself, or break the connection before or after the request took effect.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

/// The time of an object in a listing.
pub const TIME: &str = "<LastModified>2026-01-02T03:04:05.000Z</LastModified>";

/// What a client asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
    pub fn query(&self) -> &str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }
}

/// What happens with it.
pub enum Reply {
    /// The server behind answers.
    Forward,
    /// The server behind answers, and nobody else is served this way meanwhile: makes it atomic where it is not.
    ForwardAlone,
    /// The server behind acts, and nobody learns of it.
    LoseAnswer,
    /// Nothing happens, and the connection breaks.
    Break,
    /// This answer.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
}

impl Reply {
    pub fn error(status: u16, code: &str) -> Self {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>as told</Message></Error>");
        Reply::Answer(status, vec![], body.into_bytes())
    }
    pub fn ok(body: &str) -> Self {
        Reply::Answer(200, vec![], body.into())
    }
}

type Handler = dyn Fn(&Asked) -> Reply + Send + Sync;

pub struct Http {
    port: u16,
    stop: Arc<AtomicBool>,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    thread: Option<JoinHandle<()>>,
}

impl Http {
    /// Listens on a free port. `behind` is the port of the server to pass requests on to.
    pub fn start(behind: u16, handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<Asked>>>::default());
        let handler: Arc<Handler> = Arc::new(handler);
        let (stopped, log, alone) = (stop.clone(), asked.clone(), Arc::<Mutex<()>>::default());
        let thread = std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if stopped.load(SeqCst) {
                    return;
                }
                let (handler, log, alone) = (handler.clone(), log.clone(), alone.clone());
                std::thread::spawn(move || drop(serve(connection, behind, &*handler, &log, &alone)));
            }
        });
        Self { port, stop, asked, thread: Some(thread) }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
    pub fn count(&self, wanted: impl Fn(&Asked) -> bool) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| wanted(asked)).count()
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut client: TcpStream,
    behind: u16,
    handler: &Handler,
    log: &Mutex<Vec<Asked>>,
    alone: &Mutex<()>,
) -> io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(client.try_clone()?);
    while let Some((asked, head)) = read_request(&mut reader)? {
        log.lock().unwrap().push(asked.clone());
        match handler(&asked) {
            Reply::Break => return client.shutdown(Shutdown::Both),
            Reply::LoseAnswer => {
                forward(behind, &head, &asked.body)?;
                return client.shutdown(Shutdown::Both);
            }
            reply @ (Reply::Forward | Reply::ForwardAlone) => {
                let _alone = matches!(reply, Reply::ForwardAlone).then(|| alone.lock());
                client.write_all(&forward(behind, &head, &asked.body)?)?;
                // The server behind was asked to close: so does this one.
                return client.shutdown(Shutdown::Both);
            }
            Reply::Answer(status, headers, body) => {
                let mut text = format!("HTTP/1.1 {status} As Told\r\ncontent-length: {}\r\n", body.len());
                for (name, value) in headers {
                    text.push_str(&format!("{name}: {value}\r\n"));
                }
                client.write_all(format!("{text}\r\n").as_bytes())?;
                if asked.method != "HEAD" {
                    client.write_all(&body)?;
                }
            }
        }
    }
    Ok(())
}

/// The request and its head as it came, without the blank line at the end.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<(Asked, Vec<u8>)>> {
    let mut head = Vec::new();
    loop {
        let before = head.len();
        if reader.read_until(b'\n', &mut head)? == 0 {
            return Ok(None);
        }
        if &head[before..] == b"\r\n" {
            head.truncate(before);
            break;
        }
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let mut lines = text.lines();
    let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    let pair = |line: &str| line.split_once(':').map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned()));
    let headers: Vec<_> = lines.filter_map(pair).collect();
    let mut asked = Asked { method, target, headers, body: Vec::new() };
    let length = asked.header("content-length").map_or(0, |length| length.parse().unwrap());
    asked.body.resize(length, 0);
    reader.read_exact(&mut asked.body)?;
    Ok(Some((asked, head)))
}

fn forward(behind: u16, head: &[u8], body: &[u8]) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, behind))?;
    server.set_read_timeout(Some(Duration::from_secs(60)))?;
    server.write_all(head)?;
    server.write_all(b"connection: close\r\n\r\n")?;
    server.write_all(body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Passes bytes on in both directions, those to the server late: a round trip takes `delay` longer, and bandwidth stays.
pub struct Distance {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Distance {
    pub fn start(behind: u16, delay: Duration) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if stopped.load(SeqCst) {
                    return;
                }
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, behind)) else { continue };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (client_too, server_too) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || carry(client, server, delay));
                std::thread::spawn(move || carry(server_too, client_too, Duration::ZERO));
            }
        });
        Self { port, stop, thread: Some(thread) }
    }
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (late, due) = std::sync::mpsc::sync_channel::<(std::time::Instant, Vec<u8>)>(256);
    std::thread::spawn(move || {
        for (at, bytes) in due {
            std::thread::sleep(at.saturating_duration_since(std::time::Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || late.send((std::time::Instant::now() + delay, buffer[..count].to_vec())).is_err() {
            break;
        }
    }
}
