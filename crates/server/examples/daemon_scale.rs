//! How a daemon bears many VMs and hosts: `daemon_scale DIR VMS POLICIES REQUESTS [HOSTS ETCD]`.
//!
//! A simulated host, everything else as in production: state, inventory, planner, API over its socket. Alone it keeps its
//! state in a file. With HOSTS it leads a cluster of so many, whose state is in the etcd at the URL ETCD: the other hosts are
//! records there, such as their daemons would publish, with their share of the VMs, and each tells of its use every 30 s.
//! Prints one line of JSON: milliseconds of each page (median and the slowest of REQUESTS), of a planning cycle, seconds
//! until everything is known, peak memory of the process (the simulated host lives in it too), processor time per
//! minute at rest.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde_json::{Value, json};
use virtward_api::client::Client;
use virtward_cluster::{EmbeddedOptions, EmbeddedStore, EtcdOptions, EtcdStore, Op, Store};
use virtward_decide::schedule::Limits;
use virtward_engine::{
    BackupOptions, Cancel, Dirs,
    reconcile::inventory::{Connector, HostState},
};
use virtward_hypervisor::{
    Hypervisor,
    sim::{SimHost, SimWorld},
};
use virtward_repo::{InitOptions, Repository, Secret, store};
use virtward_server::{
    config::{ClusterConfig, Config, Etcd, RepositoryConfig, SecretFile},
    wire_up::Wiring,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What an administrator's browser asks for, and a person at the command line.
const PAGES: [(&str, &str); 13] = [
    ("overview", "/api/v1/overview"),
    ("hosts", "/api/v1/hosts?limit=100"),
    ("host", "/api/v1/hosts/h1"),
    ("vms_of_host", "/api/v1/vms?host=h1&limit=100"),
    ("cluster", "/api/v1/cluster"),
    ("vms_first", "/api/v1/vms?limit=100"),
    ("vms_searched", "/api/v1/vms?limit=100&name=99&sort=-last-point"),
    ("vms_unprotected", "/api/v1/vms?limit=100&protection=unprotected"),
    ("vm", "/api/v1/vms/vm-00005"),
    ("explain", "/api/v1/vms/vm-00005/explain"),
    ("jobs", "/api/v1/jobs?limit=100"),
    ("events", "/api/v1/events?limit=100"),
    ("metrics", "/metrics"),
];
const IDLE: Duration = Duration::from_secs(20);

struct Simulated(SimHost);

#[async_trait]
impl Connector for Simulated {
    fn uri(&self) -> String {
        self.0.uri()
    }
    fn name(&self) -> String {
        "h1".into()
    }
    async fn connect(&self) -> virtward_hypervisor::Result<Arc<dyn Hypervisor>> {
        Ok(Arc::new(self.0.clone()))
    }
    async fn probe(&self) -> HostState {
        HostState::LibvirtdDown
    }
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (dir, vms, policies, requests, cluster) = match &arguments[..] {
        [dir, vms, policies, requests] => (dir, vms, policies, requests, None),
        [dir, vms, policies, requests, hosts, etcd] => (dir, vms, policies, requests, Some((hosts.parse()?, etcd))),
        _ => return Err("usage: daemon_scale DIR VMS POLICIES REQUESTS [HOSTS ETCD]".into()),
    };
    let dir = PathBuf::from(dir);
    std::fs::create_dir_all(&dir)?;
    let store: Arc<dyn Store> = match cluster {
        None => Arc::new(EmbeddedStore::open(dir.join("state.db"), EmbeddedOptions::default())?),
        Some((_, etcd)) => Arc::new(EtcdStore::new(EtcdOptions::new([etcd], "/virtward"))?),
    };
    let until = Instant::now() + Duration::from_secs(30);
    while let Err(error) = store.list(b"").await {
        if Instant::now() > until {
            return Err(error.into());
        }
    }
    let hosts = cluster.map_or(1, |(hosts, _)| hosts);
    println!("{}", measure(&dir, store, [vms.parse()?, policies.parse()?, requests.parse()?, hosts]).await?);
    Ok(())
}

async fn measure(dir: &Path, store: Arc<dyn Store>, [vms, policies, requests, hosts]: [usize; 4]) -> Outcome<Value> {
    let host = SimWorld::new().host("h1");
    for number in 0..vms / hosts {
        host.define(&domain(dir, number, policies)).await?;
    }
    let config = config(dir, hosts > 1)?;
    if hosts > 1 {
        let member = format!("{{\"joined\":\"{}\"}}", jiff::Timestamp::now());
        let _ = store.txn(Vec::new(), vec![Op::put("/v1/nodes/h1", member)]).await?;
    }
    let client = Client::unix(&config.socket);
    let (sender, ready) = tokio::sync::oneshot::channel();
    let (stop, again) = (Cancel::default(), config.clone());
    let wiring = Wiring { connector: Arc::new(Simulated(host)), store: store.clone() };
    let began = Instant::now();
    let run = virtward_server::run(config, wiring, Arc::new(move || Ok(again.clone())), stop.clone(), sender);
    let daemon = tokio::spawn(run);
    ready.await?;
    let others = if hosts > 1 { others(&*store, vms / hosts, hosts).await? } else { Vec::new() };
    while client.get::<Value>("/api/v1/vms?limit=1").await?["total"] != vms {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut result = json!({ "vms": vms, "hosts": hosts, "policies": policies, "inventory_s": rounded(began.elapsed().as_secs_f64()) });
    for number in 0..policies {
        let body = json!({ "policy": policy(number) });
        let _: Value = client.put(&format!("/api/v1/policies/tier-{number}"), &body, None).await?;
    }
    // A plan with all of them.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let telling = tokio::spawn(tell(store, others));
    for (name, path) in PAGES {
        let times = page(&client, path, requests).await?;
        result[format!("{name}_ms")] = rounded(times[times.len() / 2]);
        result[format!("{name}_slowest_ms")] = rounded(times[times.len() - 1]);
    }
    let before = processor_seconds()?;
    tokio::time::sleep(IDLE).await;
    result["idle_cpu_s_per_minute"] = rounded((processor_seconds()? - before) * 60.0 / IDLE.as_secs_f64());
    let metrics = client.send("GET".parse()?, "/metrics", &[], None).await?;
    result["cycle_ms"] = rounded(cycle(&String::from_utf8_lossy(&metrics.body)).ok_or("no planning cycle")? * 1000.0);
    result["peak_bytes"] = peak_bytes()?.into();
    telling.abort();
    stop.cancel();
    daemon.await??;
    Ok(result)
}

/// Makes all hosts but the first: copies of what the daemon published of its own, under other names. Gives the key and the
/// record of each host.
async fn others(store: &dyn Store, vms: usize, hosts: usize) -> Outcome<Vec<(String, Value)>> {
    let own = loop {
        let own = store.list(b"/v1/inventory/h1/").await?.entries;
        if own.len() == vms && store.get(b"/v1/hosts/h1").await?.is_some() {
            break own;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let read = async |key: &str| -> Outcome<Value> {
        Ok(serde_json::from_slice(&store.get(key.as_bytes()).await?.ok_or("no record")?.value)?)
    };
    let (node, host) = (read("/v1/nodes/h1").await?, read("/v1/hosts/h1").await?);
    let (mut ops, mut all) = (Vec::new(), Vec::new());
    for number in 2..=hosts {
        let name = format!("h{number}");
        let mut record = host.clone();
        (record["node"], record["host"]["name"]) = (name.clone().into(), name.clone().into());
        let beat = json!({ "boot": node["boot"], "since": node["joined"] });
        ops.push(Op::put(format!("/v1/nodes/{name}"), node.to_string()));
        ops.push(Op::put(format!("/v1/presence/{name}"), beat.to_string()));
        ops.push(Op::put(format!("/v1/hosts/{name}"), record.to_string()));
        for (place, entry) in own.iter().enumerate() {
            let mut vm: Value = serde_json::from_slice(&entry.value)?;
            let uuid = uuid::Uuid::now_v7().to_string();
            let text = format!("vm-{:05}", (number - 1) * vms + place);
            (vm["vm"]["uuid"], vm["vm"]["name"]) = (uuid.clone().into(), text.into());
            ops.push(Op::put(format!("/v1/inventory/{name}/{uuid}"), vm.to_string()));
        }
        all.push((format!("/v1/hosts/{name}"), record));
    }
    for some in ops.chunks(virtward_cluster::TXN_LEN_MAX) {
        let _ = store.txn(Vec::new(), some.to_vec()).await?;
    }
    Ok(all)
}

/// Lets every host tell of its use once in 30 s, as daemons do, until aborted.
async fn tell(store: Arc<dyn Store>, mut hosts: Vec<(String, Value)>) {
    for round in 0_u32.. {
        let each = hosts.len() / 30 + 1;
        let first = usize::try_from(round).unwrap_or_default() * each % hosts.len().max(1);
        for (key, record) in hosts.iter_mut().skip(first).take(each) {
            record["host"]["load"] = json!(f64::from(round % 40) / 10.0);
            let _ = store.txn(Vec::new(), vec![Op::put(key.clone(), record.to_string())]).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Milliseconds of each request, sorted.
async fn page(client: &Client, path: &str, requests: usize) -> Outcome<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..requests.max(1) {
        let began = Instant::now();
        let answer = client.send("GET".parse()?, path, &[], None).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        if answer.status != 200 {
            return Err(format!("{path}: {} {}", answer.status, String::from_utf8_lossy(&answer.body)).into());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn domain(dir: &Path, number: usize, policies: usize) -> String {
    let (uri, tier) = (virtward_engine::collect::METADATA_URI, number % policies.max(1));
    format!(
        "<domain type='kvm'><name>vm-{number:05}</name><memory unit='MiB'>4096</memory><vcpu>2</vcpu>\
         <metadata><v:vm xmlns:v='{uri}'><v:tag>tier-{tier}</v:tag><v:value key='owner'>team-{}</v:value></v:vm>\
         </metadata><os><type>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}/pool-{}/vm-{number}.qcow2'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
        number % 97,
        dir.display(),
        number % 16,
    )
}

/// Due once a year: everything is planned, nothing starts.
fn policy(number: usize) -> Value {
    json!({
        "name": format!("tier-{number}"),
        "repository": "default",
        "select": { "any": [format!("tag:tier-{number}")], "exclude": ["metadata:owner=team-0"] },
        "schedule": { "cron": ["0 3 1 1 *"], "time-zone": "Europe/Berlin", "jitter": "4h" },
        "retention": { "keep-daily": 14, "keep-weekly": 8 },
    })
}

fn config(dir: &Path, is_cluster: bool) -> Outcome<Config> {
    let key = dir.join("key");
    std::fs::write(&key, "k".repeat(64))?;
    let location = dir.join("repo").display().to_string();
    let secret = Secret::key_bytes("k".repeat(64).into_bytes())?;
    Repository::init(store::open(&location)?, &secret, &InitOptions::default())?;
    Ok(Config {
        config_file: None,
        socket: dir.join("run/api.sock"),
        state_dir: dir.join("state"),
        listen: None,
        tls: None,
        connect: "simulated".into(),
        dirs: Dirs { runtime: dir.join("run"), scratch: dir.join("scratch") },
        thaw_guard: None,
        repositories: vec![RepositoryConfig {
            name: "default".into(),
            location,
            store: store::StoreOptions::default(),
            secret: SecretFile::Key(key),
        }],
        backup: BackupOptions::default(),
        jobs_max: 2,
        limits: Limits::default(),
        reconcile: Duration::from_secs(60),
        stop_timeout: Duration::from_secs(10),
        node: "h1".into(),
        notify: virtward_server::config::NotifyConfig::default(),
        cluster: is_cluster.then(|| ClusterConfig {
            listen: None,
            address: None,
            etcd: Etcd::default(),
            dir: dir.join("cluster"),
            lease: Duration::from_secs(10),
        }),
        ha: None,
        moves: virtward_server::config::MovesConfig::default(),
        balance: virtward_server::config::BalanceConfig::default(),
        health: virtward_server::config::HealthConfig::default(),
    })
}

fn cycle(metrics: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.starts_with("virtward_schedule_cycle_seconds"))?;
    line.rsplit(' ').next()?.parse().ok()
}

fn peak_bytes() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn processor_seconds() -> Outcome<f64> {
    let usage = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = usage.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // Ticks of a hundredth, in user and in kernel mode: fields 14 and 15 of the whole line.
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn rounded(value: f64) -> Value {
    json!((value * 100.0).round() / 100.0)
}
