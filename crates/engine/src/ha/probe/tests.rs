//! Against real servers (Python's web server, OpenSSL's TLS server, PostgreSQL, aiosmtpd), and against peers that misbehave.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use super::*;

/// A child that ends with the test, however the test ends.
struct Server(Child);

impl Server {
    fn start(command: &[&str], dir: &Path) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(command)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("setpriv"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn at(port: u16, service: Service) -> Probe {
    Probe { address: "127.0.0.1".into(), port, service, timeout_ms: 20_000 }
}

fn http(path: &str) -> Service {
    Service::Http { path: path.into(), host: None, status: vec![], contains: None, tls: None }
}

/// Waits until the service is up, within a bound.
async fn becomes_up(asked: &Probe) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match probe(asked).await {
            Verdict::Up(said) => return said,
            other => assert!(Instant::now() < deadline, "{asked:?}: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn down(verdict: Verdict) -> String {
    match verdict {
        Verdict::Down(why) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn web_servers_are_judged_by_status_and_content() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("health"), "status: ok\n").unwrap();
    let port = free_port();
    let _server =
        Server::start(&["python3", "-m", "http.server", "--bind", "127.0.0.1", &port.to_string()], dir.path());
    assert_eq!(becomes_up(&at(port, http("/health"))).await, "answers 200");
    assert!(matches!(probe(&at(port, Service::Tcp)).await, Verdict::Up(_)));
    assert_eq!(down(probe(&at(port, http("/gone"))).await), "answers 404");
    let asked = |status: &[u16], text: &str| {
        let contains = Some(text.to_owned());
        at(port, Service::Http { path: "/health".into(), host: None, status: status.into(), contains, tls: None })
    };
    assert!(matches!(probe(&asked(&[200], "ok")).await, Verdict::Up(_)));
    assert!(down(probe(&asked(&[], "panic")).await).contains("not in the answer"));
    assert!(down(probe(&asked(&[204], "ok")).await).contains("200"));
    assert!(matches!(probe(&at(port, http("/a b\r\nX: y"))).await, Verdict::Unknown(_)));
    assert!(down(probe(&at(port, Service::Smtp)).await).len() < 300);
}

#[tokio::test]
async fn certificates_that_expire_are_noticed_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "10"])
        .args([
            "-subj",
            "/CN=web.test",
            "-addext",
            "subjectAltName=DNS:web.test",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ])
        .current_dir(dir.path())
        .stderr(Stdio::null())
        .status();
    assert!(made.expect("openssl").success());
    let port = free_port();
    let command =
        ["openssl", "s_server", "-quiet", "-accept", &port.to_string(), "-cert", "cert.pem", "-key", "key.pem", "-www"];
    let _server = Server::start(&command, dir.path());
    let tls = |days_left, ca: Option<&str>, name: &str| Tls {
        name: Some(name.into()),
        ca: ca.map(|file| dir.path().join(file)),
        days_left,
    };
    let said = becomes_up(&at(port, Service::Tls(tls(5, None, "web.test")))).await;
    assert!(said.contains("valid for 9 days") || said.contains("valid for 10 days"), "{said}");
    assert!(down(probe(&at(port, Service::Tls(tls(30, None, "web.test")))).await).contains("expires in"));
    assert!(matches!(probe(&at(port, Service::Tls(tls(0, Some("cert.pem"), "web.test")))).await, Verdict::Up(_)));
    assert!(down(probe(&at(port, Service::Tls(tls(0, Some("cert.pem"), "other.test")))).await).contains("certificate"));
    assert!(matches!(probe(&at(port, Service::Tls(tls(0, Some("nonesuch"), "web.test")))).await, Verdict::Unknown(_)));
    let over_tls = Service::Http {
        path: "/".into(),
        host: Some("web.test".into()),
        status: vec![],
        contains: None,
        tls: Some(Tls::default()),
    };
    assert!(matches!(probe(&at(port, over_tls)).await, Verdict::Up(_)));
}

#[tokio::test]
async fn a_mail_server_greets() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let place = format!("127.0.0.1:{port}");
    let _server = Server::start(&["aiosmtpd", "-n", "-l", &place, "-c", "aiosmtpd.handlers.Sink"], dir.path());
    assert!(becomes_up(&at(port, Service::Smtp)).await.starts_with("220"));
}

#[tokio::test]
async fn postgresql_is_up_when_it_takes_sessions_and_down_while_it_starts_or_is_gone() {
    let bin =
        fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL").flatten().map(|e| e.path().join("bin")).max().unwrap();
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let as_postgres = |script: &str| {
        let made =
            Command::new("runuser").args(["-u", "postgres", "--", "sh", "-c", script]).stdout(Stdio::null()).status();
        assert!(made.expect("runuser").success(), "{script}");
    };
    assert!(Command::new("chown").arg("postgres").arg(dir.path()).status().unwrap().success());
    let (data, port) = (dir.path().join("data"), free_port());
    as_postgres(&format!("{}/initdb -D {} -A scram-sha-256 --pwfile=/etc/hostname -N", bin.display(), data.display()));
    let server = [
        "runuser",
        "-u",
        "postgres",
        "--",
        &format!("{}/postgres", bin.display()),
        "-D",
        &data.display().to_string(),
        "-h",
        "127.0.0.1",
        "-p",
        &port.to_string(),
        "-k",
        &dir.path().display().to_string(),
        "-F",
    ];
    let _server = Server::start(&server, dir.path());
    assert_eq!(becomes_up(&at(port, Service::Postgresql)).await, "accepts sessions");
    as_postgres(&format!("{}/pg_ctl -D {} stop -m immediate -s", bin.display(), data.display()));
    assert!(matches!(probe(&at(port, Service::Postgresql)).await, Verdict::Down(_)));
}

/// Says the given bytes to whoever comes, and then, if told so, keeps the connection open.
fn peer(say: Vec<u8>, stay: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("no IPv4") };
    thread::spawn(move || {
        for stream in listener.incoming().take(20) {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(&say);
            if stay {
                thread::spawn(move || while stream.read(&mut [0; 512]).is_ok_and(|count| count > 0) {});
            }
        }
    });
    address.port()
}

fn pg_error(code: &str, text: &str) -> Vec<u8> {
    let body = format!("SFATAL\0C{code}\0M{text}\0\0");
    [b"E", &(body.len() as u32 + 4).to_be_bytes()[..], body.as_bytes()].concat()
}

#[tokio::test]
async fn the_words_of_servers_that_refuse_are_understood() {
    let up = |verdict| matches!(verdict, Verdict::Up(_));
    assert!(up(probe(&at(peer(pg_error("28000", "role does not exist"), true), Service::Postgresql)).await));
    let starting = at(peer(pg_error("57P03", "the database system is starting up"), true), Service::Postgresql);
    assert_eq!(down(probe(&starting).await), "the database system is starting up");
    // MariaDB's greeting and a refusal, as they are on the wire.
    let greeting = b"\x10\0\0\0\x0a10.11.6-MariaDB\0".to_vec();
    assert_eq!(probe(&at(peer(greeting, true), Service::Mysql)).await, Verdict::Up("10.11.6-MariaDB".into()));
    let refusal = b"\x17\0\0\0\xff\x10\x04Too many connections".to_vec();
    assert!(down(probe(&at(peer(refusal, true), Service::Mysql)).await).contains("error 1040"));
}

#[tokio::test]
async fn peers_that_misbehave_are_down_in_bounded_time_and_space() {
    let endless = vec![b'2'; 4 << 20];
    let services = [http("/"), Service::Smtp, Service::Postgresql, Service::Mysql, Service::Tls(Tls::default())];
    for service in services {
        for say in [&b""[..], b"\r\n\r\n\r\n\r\n", b"HTTP/1.1 999999999999\r\n\r\n", &[0xff; 64], &endless] {
            let why = down(probe(&at(peer(say.to_vec(), false), service.clone())).await);
            assert!(why.len() <= 800, "{why}");
        }
        let silent = Probe { timeout_ms: 200, ..at(peer(vec![], true), service) };
        assert_eq!(down(probe(&silent).await), "no answer in 200 ms");
    }
    assert!(down(probe(&at(free_port(), Service::Tcp)).await).contains("refused"));
    let nowhere = Probe { address: "no-such-host.invalid".into(), ..at(1, Service::Tcp) };
    assert!(matches!(probe(&nowhere).await, Verdict::Unknown(_)));
}
