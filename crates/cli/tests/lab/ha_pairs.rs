//! An active VM and its standby: PostgreSQL with streaming replication in two guests, a client that keeps what was
//! acknowledged to it, and two ways to lose the active one. Nothing that was acknowledged is missing afterwards.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    ha_failover::{Cluster, SOON},
    harness::{Lab, run, text, wait},
};

/// Makes the root directory of a disk with PostgreSQL as it is installed on this machine, and an empty database that both
/// begin with:  sh -e -c MAKE make ROOT FLOATING
const MAKE: &str = r#"
root=$1 floating=$2
pg=$(ls -d /usr/lib/postgresql/*/ | tail -n 1); pg=${pg%/}; version=${pg##*/}
# PostgreSQL makes its database as a user of its own.
chmod 711 "$(dirname "$root")"
mkdir -p "$root"/bin "$root"/etc "$root"/dev "$root"/proc "$root$pg"/bin "$root$pg"/lib
mkdir -p "$root"/usr/share/postgresql/"$version"
install -d -m 1777 "$root"/tmp
install -d -o postgres -m 700 "$root"/pgdata
cp /bin/busybox "$root"/bin; ln -s busybox "$root"/bin/sh
grep -E '^(root|postgres):' /etc/passwd >"$root"/etc/passwd
grep -E '^(root|postgres):' /etc/group >"$root"/etc/group
cp -r /usr/share/postgresql/"$version"/timezonesets "$root"/usr/share/postgresql/"$version"
for file in bin/postgres bin/pg_ctl bin/psql bin/pg_basebackup lib/libpqwalreceiver.so lib/plpgsql.so; do
    cp "$pg/$file" "$root$pg/$file"
    ldd "$pg/$file" | grep -o '/[^ ]*' | while read -r library; do cp -L --parents -u "$library" "$root"; done
done
runuser -u postgres -- "$pg"/bin/initdb -D "$root"/pgdata -U postgres -E UTF8 --locale=C -A trust --wal-segsize=4 \
    --no-sync >/dev/null
cat >>"$root"/pgdata/postgresql.conf <<END
listen_addresses = '*'
unix_socket_directories = '/tmp'
dynamic_shared_memory_type = mmap
shared_buffers = 8MB
max_wal_size = 32MB
wal_keep_size = 32MB
autovacuum = off
jit = off
timezone = 'GMT'
log_timezone = 'GMT'
wal_retrieve_retry_interval = 500ms
wal_receiver_timeout = 5s
wal_sender_timeout = 5s
primary_conninfo = 'host=$floating user=postgres connect_timeout=3'
include_if_exists = 'first.conf'
END
printf 'host all all 0.0.0.0/0 trust\nhost replication all 0.0.0.0/0 trust\n' >>"$root"/pgdata/pg_hba.conf

# Run in the guest, outside of that directory.
cat >"$root"/pg <<END
#!/bin/sh
as() { chroot /data /bin/busybox su postgres -s /bin/sh -c "\$1"; }
grep -q ' /data/proc ' /proc/mounts || {
    mount --bind /dev /data/dev
    mount -t proc proc /data/proc
    ip address replace "\$(cat /data/own)" dev eth0
}
case \$1 in
    sql) as "$pg/bin/psql -h \$2 -U postgres -qAt -c \"\$3\"" ;;
    clone) as "$pg/bin/pg_basebackup -h $floating -U postgres -D /pgdata -R -X stream -c fast" ;;
    *) as "$pg/bin/pg_ctl -D /pgdata -w -t 100 -l /pgdata/log \$1" ;;
esac
END
cat >"$root"/promote <<'END'
#!/bin/sh
/data/pg status >/dev/null || /data/pg start || exit 1
[ -e /data/pgdata/standby.signal ] || exit 0
/data/pg promote || exit 1
# Nobody follows yet, and commits must not wait for that.
/data/pg sql /tmp "alter system set synchronous_standby_names = ''" && /data/pg sql /tmp "select pg_reload_conf()"
END
cat >"$root"/demote <<END
#!/bin/sh
/data/pg status >/dev/null && { [ -e /data/pgdata/standby.signal ] && exit 0; /data/pg stop; }
# What it wrote at its end nobody may have seen: it begins as a copy.
rm -rf /data/pgdata/* && /data/pg clone && /data/pg start || exit 1
/data/pg sql $floating "alter system set synchronous_standby_names = '*'" && /data/pg sql $floating "select pg_reload_conf()"
END
chmod 755 "$root"/pg "$root"/promote "$root"/demote
"#;

/// Makes a VM's disk of it:  sh -e -c DISK disk ROOT IMAGE OWN ROLE
const DISK: &str = r#"
root=$1 image=$2
echo "$3/24" >"$root"/own
rm -f "$root"/pgdata/first.conf "$root"/pgdata/standby.signal
case $4 in
    active) echo "synchronous_standby_names = '*'" >"$root"/pgdata/first.conf ;;
    standby) touch "$root"/pgdata/standby.signal ;;
esac
chown -R postgres "$root"/pgdata
truncate -s 400M "$image"
mkfs.ext4 -q -F -L data -d "$root" "$image"
"#;

fn script(text: &str, arguments: &[&str]) {
    let mut command = Command::new("sh");
    command.args(["-e", "-c", text, "script"]).args(arguments);
    let output = run(command, SOON);
    assert!(output.status.success(), "{}", crate::harness::text(&output));
}

/// Makes a guest with such a disk, and starts it.
fn database(lab: &Lab, root: &Path, vm: &str, host: &str, own: &str, role: &str) {
    let image = lab.shared().join(format!("{vm}-vda.raw"));
    let image = image.display().to_string();
    script(DISK, &[&root.display().to_string(), &image, own, role]);
    let definition = lab.path(&format!("{vm}.xml")).display().to_string();
    let create = ["vm", "create", vm, "--host", host, "--writer", "--memory", "256MiB", "--no-start"];
    lab.lab(&[&create[..], &["--xml-to", &definition]].concat());
    let xml = std::fs::read_to_string(&definition).expect("its definition");
    let cache = xml.split_once("cache='").and_then(|(_, rest)| rest.split_once('\'')).expect("a cache mode").0;
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='{cache}'/><source file='{image}'/>\
         <target dev='vda' bus='virtio'/></disk><interface "
    );
    std::fs::write(&definition, xml.replacen("<interface ", &disk, 1)).expect("a definition");
    lab.virsh_ok(host, &["define", &definition]);
    lab.virsh_ok(host, &["start", vm]);
}

/// Asks the database from a host that is well; nothing if there is no answer.
struct Client<'a> {
    lab: &'a Lab,
    psql: PathBuf,
    floating: String,
    done: AtomicBool,
    acknowledged: Mutex<BTreeSet<u64>>,
}

impl Client<'_> {
    fn ask(&self, sql: &str) -> Option<String> {
        let mut command = self.lab.host_exec("h3");
        command.args(["timeout", "8", "env", "PGCONNECT_TIMEOUT=2"]).arg(&self.psql);
        command.args(["-h", &self.floating, "-U", "postgres", "-qAt", "-c", sql]);
        let output = run(command, Duration::from_secs(20));
        output.status.success().then(|| text(&output).trim().to_owned())
    }

    /// Writes one number after the other, and keeps those of which it was told that they are committed.
    fn write(&self) {
        for n in 1.. {
            if self.done.load(Ordering::Relaxed) {
                return;
            }
            if self.ask(&format!("insert into numbers values ({n})")).is_some() {
                self.acknowledged.lock().expect("no panic").insert(n);
            }
        }
    }

    fn acknowledged(&self) -> BTreeSet<u64> {
        self.acknowledged.lock().expect("no panic").clone()
    }

    /// The service goes on, and has everything that it ever acknowledged.
    fn check(&self, story: impl Fn() -> String) {
        let before = self.acknowledged();
        let more = || self.acknowledged().len() > before.len() + 2;
        wait("the service to go on", SOON, more);
        let mut answer = None;
        wait("an answer", SOON, || {
            answer = self.ask("select n from numbers");
            answer.is_some()
        });
        let acknowledged = self.acknowledged();
        let rows = answer.unwrap_or_default();
        let rows: BTreeSet<u64> = rows.lines().filter_map(|line| line.parse().ok()).collect();
        let missing: Vec<&u64> = before.difference(&rows).collect();
        assert!(missing.is_empty(), "acknowledged and lost: {missing:?}\n{}", story());
        eprintln!("{} commits acknowledged, {} rows", acknowledged.len(), rows.len());
    }
}

/// A VM's place in its pair.
fn pair(cluster: &Cluster, at: &str, vm: &str) -> Value {
    let status = cluster.status(at);
    let vms = status["vms"].as_array().into_iter().flatten();
    vms.filter(|of| of["name"] == vm).map(|of| of["pair"].clone()).next().unwrap_or_default()
}

fn leads(cluster: &Cluster, vm: &str) -> bool {
    let pair = pair(cluster, "h3", vm);
    pair["role"] == "active" && pair["settled"] == true
}

fn has_a_standby(cluster: &Cluster, vm: &str) -> bool {
    pair(cluster, "h3", vm)["takes_over"] == true
}

#[test]
fn a_standby_takes_over_and_no_acknowledged_commit_is_lost() {
    let cluster = Cluster::up("2GiB");
    let lab = &cluster.lab;
    let status: Value = serde_json::from_str(&lab.lab(&["status", "--json"])).expect("JSON");
    let address = |last: &str| status["subnet"].as_str().expect("a subnet").replace(".0/24", last);
    let floating = address(".210");
    let root = lab.path("database");
    let root_text = root.display().to_string();
    script(MAKE, &[&root_text, &floating]);
    database(lab, &root, "pg1", "h1", &address(".211"), "active");
    database(lab, &root, "pg2", "h2", &address(".212"), "standby");
    for vm in ["pg1", "pg2"] {
        lab.lab(&["vm", "wait", vm]);
        lab.guest_sh(vm, "/data/pg start");
    }
    cluster.enable("h3", &["pg1", "pg2"]);
    let cidr = format!("{floating}/24");
    let hooks = ["--promote", "/data/promote", "--demote", "/data/demote", "--address", &cidr, "--device", "eth0"];
    cluster.ok("h3", &[&["ha", "enable", "pg1", "--standby", "pg2"], &hooks[..]].concat());
    wait("pg1 to lead", SOON, || leads(&cluster, "pg1"));
    wait("pg2 to be ready to take over", SOON, || has_a_standby(&cluster, "pg1"));
    let psql = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL").flatten().map(|of| of.path()).max();
    let client = Client {
        lab,
        psql: psql.expect("a version").join("bin/psql"),
        floating: floating.clone(),
        done: AtomicBool::new(false),
        acknowledged: Mutex::default(),
    };
    let follows = || {
        let state = client.ask("select sync_state from pg_stat_replication");
        state.is_some_and(|state| state == "sync")
    };
    wait("pg2 to follow", SOON, follows);
    client.ask("create table numbers (n bigint)").expect("a table");
    let to_the_same_host = cluster.virtward("h1", &["vm", "migrate", "pg1", "--to", &lab.tcp_uri("h2")]);
    assert!(
        !to_the_same_host.status.success() && text(&to_the_same_host).contains("h2 has the other one of the pair"),
        "{}",
        text(&to_the_same_host)
    );
    std::thread::scope(|scope| {
        scope.spawn(|| client.write());
        let stop = Stop(&client.done);
        client.check(|| cluster.story());

        // The host of the active one dies: no restart, its standby takes over.
        let since = Instant::now();
        lab.lab(&["host", "power", "off", "h1"]);
        wait("pg2 to lead", SOON, || leads(&cluster, "pg2"));
        eprintln!("power cut to the standby leading: {:.1} s", since.elapsed().as_secs_f64());
        client.check(|| cluster.story());
        assert_eq!(cluster.places("h3")["pg2"].generation, 1, "it was not started anew");
        // The old one comes back on the third host, as a copy that follows.
        wait("pg1 to follow", 2 * SOON, || has_a_standby(&cluster, "pg2"));
        assert_eq!(cluster.places("h3")["pg1"].host, "h3");
        wait("pg1 to be in step", SOON, follows);

        // The service dies, its host is well.
        let probe = format!("postgresql://{floating}");
        let watch = ["--every", "1s", "--failures", "2", "--grace", "3s", "--action", "switch-to-standby"];
        cluster.ok("h3", &[&["ha", "enable", "pg2", "--service", &probe], &watch[..]].concat());
        std::thread::sleep(Duration::from_secs(5));
        let since = Instant::now();
        lab.guest_sh("pg2", "killall -9 postgres");
        wait("pg1 to lead", SOON, || leads(&cluster, "pg1"));
        eprintln!("end of the service to the standby leading: {:.1} s", since.elapsed().as_secs_f64());
        let story = cluster.story();
        assert!(story.contains("its standby takes over") && story.contains("pg2 is ended"), "{story}");
        client.check(|| cluster.story());
        drop(stop);
    });
    cluster.check_writers(&["pg1", "pg2"]);
}

/// Ends the client, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
