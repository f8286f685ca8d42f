//! Real etcd, from Debian's package, on loopback, in a directory of its own, for one test.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use etcd_client::{Client, ConnectOptions};
use rustix::process::{Pid, Signal, kill_process};
use virtward_cluster::etcd::EtcdTls;

/// One member. Killed when dropped.
pub struct Member {
    child: Child,
    pub url: String,
    log: PathBuf,
}

impl Member {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Freezes it: it keeps its connections and answers nothing.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A cluster of etcd.
pub struct Etcd {
    pub members: Vec<Member>,
    tls: Option<EtcdTls>,
    _dir: tempfile::TempDir,
}

/// Files of a server's certificate, and what a client needs.
pub struct Tls {
    pub cert_pem: String,
    pub key_pem: String,
    pub client: EtcdTls,
}

impl Etcd {
    /// Starts `count` members and waits until all answer.
    pub async fn start(count: usize) -> Self {
        Self::start_with(count, None).await
    }

    pub async fn start_with(count: usize, tls: Option<Tls>) -> Self {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let etcd = Self::spawn(count, tls.as_ref());
            // A port that was free may be taken by now; then all of it is tried again.
            if etcd.ready(deadline).await {
                return etcd;
            }
            let logs: Vec<_> =
                etcd.members.iter().map(|one| fs::read_to_string(&one.log).unwrap_or_default()).collect();
            assert!(Instant::now() < deadline, "etcd does not start:\n{}", logs.join("\n---\n"));
        }
    }

    fn spawn(count: usize, tls: Option<&Tls>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Held together, so that they differ.
        let held: Vec<_> = (0..count * 2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<u16> = held.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
        drop(held);
        let peers: Vec<_> = (0..count).map(|n| format!("m{n}=http://127.0.0.1:{}", ports[count + n])).collect();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let members = (0..count).map(|n| {
            let (url, log) = (format!("{scheme}://127.0.0.1:{}", ports[n]), dir.path().join(format!("log{n}")));
            let out = File::create(&log).unwrap();
            // Ends with this test even if the test is killed.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "etcd", "--name", &format!("m{n}")]);
            command.arg("--data-dir").arg(dir.path().join(format!("data{n}")));
            command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
            let peer = &peers[n][3..];
            command.args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]);
            command.args(["--initial-cluster", &peers.join(","), "--initial-cluster-token", "virtward-test"]);
            command.args(["--logger", "zap", "--log-level", "error"]);
            if let Some(tls) = tls {
                for (name, pem) in [("cert", &tls.cert_pem), ("key", &tls.key_pem), ("ca", &tls.client.ca_pem)] {
                    fs::write(dir.path().join(name), pem).unwrap();
                }
                command.arg("--cert-file").arg(dir.path().join("cert"));
                command.arg("--key-file").arg(dir.path().join("key"));
                command.arg("--trusted-ca-file").arg(dir.path().join("ca")).arg("--client-cert-auth");
            }
            command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
            let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).status();
            assert!(found.is_ok(), "this test needs etcd; run scripts/setup.sh test");
            Member { child: command.spawn().unwrap(), url, log }
        });
        Self { members: members.collect(), tls: tls.map(|tls| tls.client.clone()), _dir: dir }
    }

    async fn ready(&self, deadline: Instant) -> bool {
        let patience = deadline.min(Instant::now() + Duration::from_secs(30));
        for member in &self.members {
            loop {
                let answered = tokio::time::timeout(Duration::from_secs(2), async {
                    self.client(member).await?.get("ready", None).await
                });
                if matches!(answered.await, Ok(Ok(_))) {
                    break;
                }
                if Instant::now() > patience {
                    return false;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        true
    }

    pub async fn client(&self, member: &Member) -> Result<Client, etcd_client::Error> {
        let mut options = ConnectOptions::new();
        if let Some(EtcdTls { ca_pem, identity_pem: Some((chain, key)), .. }) = &self.tls {
            let tls = etcd_client::TlsOptions::new()
                .ca_certificate(etcd_client::Certificate::from_pem(ca_pem))
                .identity(etcd_client::Identity::from_pem(chain, key));
            options = options.with_tls(tls);
        }
        Client::connect([&member.url], Some(options)).await
    }

    pub fn urls(&self) -> Vec<String> {
        self.members.iter().map(|member| member.url.clone()).collect()
    }

    /// Number of the member that leads, as a member that lives tells.
    pub async fn leader(&self) -> usize {
        for _ in 0..100 {
            for (number, member) in self.members.iter().enumerate() {
                let status = tokio::time::timeout(Duration::from_secs(1), async {
                    let mut client = self.client(member).await?;
                    let status = client.status().await?;
                    Ok::<_, etcd_client::Error>(
                        status.header().is_some_and(|header| header.member_id() == status.leader()),
                    )
                });
                if matches!(status.await, Ok(Ok(true))) {
                    return number;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no member leads");
    }
}
