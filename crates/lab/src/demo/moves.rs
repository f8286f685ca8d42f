//! The second story: a host is emptied while its guest works, then load is evened out. In a lab of its own with two hosts.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Demo, print_indented, said};

const LAB: &str = "demo-moves";
/// Uses one CPU for good.
const BUSY: &str = "(setsid sh -c 'while :; do :; done') >/dev/null 2>&1 </dev/null &";

/// When each of the guest's lines arrived.
type Lines = Arc<Mutex<Vec<Instant>>>;

/// Tells it as steps of the demo.
pub fn tell(demo: &mut Demo) -> Result<()> {
    let (uris, lines) = demo.step("Two hosts; web3 on h1 logs every 10 ms over the network", begin)?;
    let [h1, h2] = &uris;
    demo.step("Drain h1: its guest goes to h2 and works on", |demo| {
        let since = Instant::now();
        let drain = ["--connect", h1, "host", "drain", "--to", h2];
        print_indented(&demo.virtward(&drain)?);
        std::thread::sleep(Duration::from_secs(1));
        let gap = longest_gap(&lines, since).context("the guest logs nothing any more")?;
        println!("   longest gap in its log: {} ms", gap.as_millis());
        ensure!(runs(demo, "h2")?.iter().any(|vm| vm == "web3"), "web3 does not run on h2");
        Ok(())
    })?;
    demo.step("h1 is back; h2 gets two guests that want a CPU each", |demo| {
        demo.virtward(&["--connect", h1, "host", "resume"])?;
        for vm in ["hot1", "hot2"] {
            lab(demo, &["vm", "create", vm, "--host", "h2", "--wait"])?;
            lab(demo, &["vm", "exec", vm, "--", "sh", "-c", BUSY])?;
        }
        Ok(())
    })?;
    demo.step("Balance: who goes where, and why; then it is done", |demo| {
        let hosts = ["--connect", h2, "balance"];
        let how = ["--with", h1, "--eagerness", "5", "--interval", "5s"];
        print_indented(&demo.virtward(&[&hosts[..], &["plan"], &how].concat())?);
        print_indented(&demo.virtward(&[&hosts[..], &["apply"], &how].concat())?);
        ensure!(!runs(demo, "h1")?.is_empty(), "nothing went to h1");
        Ok(())
    })
}

/// Takes everything away.
pub fn clear(demo: &Demo) -> Result<()> {
    lab(demo, &["down"]).map(drop)
}

fn begin(demo: &mut Demo) -> Result<([String; 2], Lines)> {
    let up: Value = serde_json::from_str(&lab(demo, &["--json", "up", "--hosts", "2"])?)?;
    let uri = |name: &str| -> Result<String> {
        let host = up["hosts"].as_array().into_iter().flatten().find(|host| host["name"] == name);
        host.and_then(|host| host["tcp_uri"].as_str()).map(str::to_owned).context("the lab did not say where a host is")
    };
    let uris = [uri("h1")?, uri("h2")?];
    lab(demo, &["vm", "create", "web3", "--host", "h1", "--disk", "1GiB", "--fill", "20MiB", "--wait"])?;
    let address = uris[0].trim_start_matches("qemu+tcp://").split(['/', ':']).next().unwrap_or_default();
    let network = address.rsplit_once('.').context("the lab's network is not IPv4")?.0;
    let listener = TcpListener::bind((format!("{network}.1"), 0)).context("listen for the guest's log")?;
    let port = listener.local_addr()?.port();
    let lines = Lines::default();
    let kept = lines.clone();
    std::thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else { return };
        for _ in BufReader::new(stream).lines().map_while(Result::ok) {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        }
    });
    let script = format!(
        "dev=$(ls /sys/class/net | grep -v lo | head -n 1)
        ip addr add {network}.77/24 dev $dev; ip link set $dev up
        (i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done | nc {network}.1 {port}) >/dev/null 2>&1 </dev/null &"
    );
    lab(demo, &["vm", "exec", "web3", "--", "sh", "-c", &script])?;
    let until = Instant::now() + Duration::from_secs(20);
    while lines.lock().unwrap_or_else(PoisonError::into_inner).len() < 50 {
        ensure!(Instant::now() < until, "the guest's log does not arrive");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok((uris, lines))
}

/// None if nothing came since.
fn longest_gap(lines: &Lines, since: Instant) -> Option<Duration> {
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let pairs = lines.windows(2).filter(|pair| pair[1] >= since);
    pairs.map(|pair| pair[1].duration_since(pair[0])).max()
}

fn runs(demo: &Demo, host: &str) -> Result<Vec<String>> {
    let listed = lab(demo, &["host", "exec", host, "--", "virsh", "-q", "list", "--name"])?;
    Ok(listed.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

fn lab(demo: &Demo, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(&demo.lab);
    command.args(["--name", LAB]).args(arguments);
    said(command)
}
