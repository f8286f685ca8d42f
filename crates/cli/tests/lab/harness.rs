//! A lab of one's own for each test, and the two binaries to act on it.
//!
//! At most four labs are up at a time: the machine may have two cores, and most of a lab's time is waiting. A lab is taken
//! down when its test ends, however it ends; labs of test processes that were killed are taken down by the next run.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Condvar, Mutex, Once,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

const LABS_MAX: u32 = 4;
const PREFIX: &str = "vt";
const DIR_PREFIX: &str = "virtward-test-";

static CLEANED: Once = Once::new();
static NUMBER: AtomicU32 = AtomicU32::new(0);
static UP: Mutex<u32> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

/// The `virtward` binary under test.
pub const VIRTWARD: &str = env!("CARGO_BIN_EXE_virtward");

fn lab_binary() -> PathBuf {
    let path = Path::new(VIRTWARD).with_file_name("virtward-lab");
    assert!(
        path.exists(),
        "{} is missing: run `cargo build -p virtward-lab` first, as `make test` does",
        path.display()
    );
    path
}

/// The product, with the tools and libraries that the lab's hosts have.
pub fn product() -> Command {
    let Some(root) = std::env::var_os("VIRTWARD_LAB_ROOT") else { return Command::new(VIRTWARD) };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-ec", "mount --bind \"$0/usr\" /usr; exec \"$@\""]).arg(root).arg(VIRTWARD);
    command
}

/// A lab, a repository beside it, and a directory for everything else.
pub struct Lab {
    pub name: String,
    pub dir: tempfile::TempDir,
    hosts: Value,
    /// Opened by a key file instead of a password, which takes a second each time, on purpose.
    keyed: bool,
    mounts: Vec<PathBuf>,
    places: u32,
}

impl Lab {
    /// Brings up a lab with an empty repository.
    pub fn up(hosts: u32) -> Self {
        let lab = Self::place(false);
        lab.start_with(hosts)
    }

    /// The same with a repository that opens quickly, for tests that open it often.
    pub fn quick(hosts: u32) -> Self {
        let lab = Self::place(true);
        lab.start_with(hosts)
    }

    /// The same with little room for scratch images. A lab's hosts see what was mounted before they came up.
    pub fn with_small_scratch(hosts: u32, size: &str) -> Self {
        let mut lab = Self::place(true);
        let scratch = lab.path("scratch");
        std::fs::create_dir(&scratch).expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=711"), "virtward-test"]).arg(&scratch);
        let output = run(mount, Duration::from_secs(10));
        assert!(output.status.success(), "{}", text(&output));
        lab.mounts.push(scratch);
        lab.start_with(hosts)
    }

    fn place(keyed: bool) -> Self {
        Self::place_beside(keyed, 1)
    }

    /// Takes so many of the places for labs: all of them, to be alone.
    fn place_beside(keyed: bool, places: u32) -> Self {
        CLEANED.call_once(clear_abandoned);
        let mut up = UP.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while *up + places > LABS_MAX {
            up = FREED.wait(up).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        *up += places;
        drop(up);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let prefix = format!("{DIR_PREFIX}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        Self { name, dir, hosts: Value::Null, keyed, mounts: Vec::new(), places }
    }

    /// The same with an etcd, a member of which is on each of the first three hosts.
    pub fn with_etcd(hosts: u32) -> Self {
        Self::place(true).start_as(hosts, &["--etcd"])
    }

    /// The same with a daemon on every host, in one cluster, which the lab starts again when it dies.
    pub fn with_daemons(hosts: u32) -> Self {
        Self::place(true).start_as(hosts, &["--etcd", "--daemon", VIRTWARD])
    }

    /// The same with high availability configured so; @SHARED@ is the shared storage, and what the lab replaces.
    pub fn with_ha(hosts: u32, config: &str) -> Self {
        // Alone: a machine that is too busy for seconds is a fault that this lab would act on.
        let lab = Self::place_beside(true, LABS_MAX);
        let shared = format!("/var/lib/virtward-lab/{}/shared", lab.name);
        let file = lab.path("ha.toml");
        std::fs::write(&file, config.replace("@SHARED@", &shared)).expect("a configuration file");
        let file = file.display().to_string();
        lab.start_as(hosts, &["--etcd", "--daemon", VIRTWARD, "--daemon-config", &file])
    }

    fn start_with(self, hosts: u32) -> Self {
        self.start_as(hosts, &[])
    }

    fn start_as(mut self, hosts: u32, more: &[&str]) -> Self {
        let lab = &mut self;
        let status = lab.lab(&[&["up", "--hosts", &hosts.to_string(), "--json"], more].concat());
        lab.hosts = serde_json::from_str(&status).expect("JSON of virtward-lab up");
        std::fs::write(lab.path("password"), "correct horse battery staple\n").expect("a password file");
        lab.restrict("password");
        lab.write_config("h1", "");
        lab.ok(&["repo", "init"]);
        self
    }

    fn restrict(&self, name: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(0o600)).expect("chmod");
    }

    /// Points the configuration at a host, with more lines at its end.
    pub fn write_config(&self, host: &str, more: &str) {
        let path = |name: &str| self.path(name).display().to_string();
        // `repo init` makes a key beside the configuration where no password is named.
        let secret = if self.keyed { String::new() } else { format!("password-file = {:?}", path("password")) };
        let text = format!(
            "repo = {:?}\nconnect = {:?}\n{secret}\nruntime-dir = {:?}\nscratch-dir = {:?}\n{more}\n",
            path("repo"),
            self.uri(host),
            path("run"),
            path("scratch"),
        );
        std::fs::write(self.path("config.toml"), text).expect("a configuration file");
    }

    /// libvirt's address of a host.
    pub fn uri(&self, host: &str) -> String {
        let hosts = self.hosts["hosts"].as_array().expect("hosts");
        let found = hosts.iter().find(|entry| entry["name"] == host).expect("a host of that name");
        found["uri"].as_str().expect("a uri").to_owned()
    }

    /// libvirt's TCP address of a host.
    pub fn tcp_uri(&self, host: &str) -> String {
        let hosts = self.hosts["hosts"].as_array().expect("hosts");
        let found = hosts.iter().find(|entry| entry["name"] == host).expect("a host of that name");
        found["tcp_uri"].as_str().expect("a uri").to_owned()
    }

    /// The directory that every host of the lab sees; goes with the lab.
    pub fn shared(&self) -> PathBuf {
        self.hosts["shared_storage"].as_str().expect("shared storage").into()
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command in a host, to be continued; its process is the command's own.
    pub fn host_exec(&self, host: &str) -> Command {
        let mut command = Command::new(lab_binary());
        command.arg("--name").arg(&self.name).args(["host", "exec", host, "--"]);
        command
    }

    /// The processes of etcd's members.
    pub fn etcd_pids(&self) -> Vec<String> {
        let file = |host: &str| Path::new("/run/virtward-lab").join(&self.name).join(host).join("etcd.pid");
        let hosts = self.hosts["hosts"].as_array().expect("hosts");
        let names = hosts.iter().filter_map(|host| host["name"].as_str());
        names.filter_map(|host| std::fs::read_to_string(file(host)).ok()).map(|pid| pid.trim().to_owned()).collect()
    }

    /// Sends a signal to processes of the lab.
    pub fn signal(&self, pids: &[String], signal: &str) {
        let mut command = Command::new("kill");
        command.arg(format!("-{signal}")).args(pids);
        let output = run(command, Duration::from_secs(5));
        assert!(output.status.success(), "kill -{signal}: {}", text(&output));
    }

    /// Runs `virtward-lab` on this lab and gives its standard output.
    pub fn lab(&self, arguments: &[&str]) -> String {
        let output = self.lab_output(arguments);
        assert!(output.status.success(), "virtward-lab {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `virtward-lab` on this lab, whatever comes of it.
    pub fn lab_output(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(lab_binary());
        command.arg("--name").arg(&self.name).args(arguments);
        run(command, Duration::from_secs(180))
    }

    /// A guest with one data disk, up and answering.
    pub fn guest(&self, name: &str, more: &[&str]) {
        let mut arguments = vec!["vm", "create", name, "--host", "h1", "--disk", "1GiB", "--fill", "40MiB"];
        arguments.extend(more);
        self.lab(&arguments);
        if !more.contains(&"--no-agent") && !more.contains(&"--no-start") {
            self.lab(&["vm", "wait", name]);
        }
    }

    /// Runs a shell command in a guest and gives its output.
    pub fn guest_sh(&self, vm: &str, script: &str) -> String {
        self.lab(&["vm", "exec", vm, "--", "sh", "-c", script])
    }

    /// `virsh` on a host.
    pub fn virsh(&self, host: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new("virsh");
        command.arg("-c").arg(self.uri(host)).args(arguments);
        run(command, Duration::from_secs(60))
    }

    /// The product, configured for this lab.
    pub fn virtward(&self, arguments: &[&str]) -> Command {
        let mut command = product();
        for name in ["VIRTWARD_REPO", "VIRTWARD_CONNECT", "VIRTWARD_PASSWORD_FILE", "VIRTWARD_KEY_FILE"] {
            command.env_remove(name);
        }
        command.arg("--config").arg(self.path("config.toml")).args(arguments);
        command
    }

    /// Runs the product, whatever comes of it.
    pub fn output(&self, arguments: &[&str]) -> Output {
        run(self.virtward(arguments), Duration::from_secs(180))
    }

    /// Runs the product on a host, where it sees what is the host's own, and gives its standard output.
    pub fn ok_on(&self, host: &str, arguments: &[&str]) -> String {
        let config = self.path("config.toml").display().to_string();
        let before = ["host", "exec", host, "--", VIRTWARD, "--config", &config];
        self.lab(&[&before[..], arguments].concat())
    }

    /// Runs the product, which must succeed, and gives its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "virtward {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `virsh` that must succeed, and its output.
    pub fn virsh_ok(&self, host: &str, arguments: &[&str]) -> String {
        let output = self.virsh(host, arguments);
        assert!(output.status.success(), "virsh {arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The state of a VM in libvirt's words.
    pub fn state(&self, host: &str, vm: &str) -> String {
        self.virsh_ok(host, &["domstate", vm])
    }

    /// Waits until a VM is shut off.
    pub fn wait_off(&self, host: &str, vm: &str) {
        wait("the end of the VM", Duration::from_secs(60), || self.state(host, vm) == "shut off");
    }

    /// The ids of a VM's restore points.
    pub fn points(&self, vm: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.ok(&["--json", "backup", "list", vm])).expect("JSON");
        let points = list.as_array().expect("an array");
        points.iter().map(|point| point["id"].as_str().expect("an id").to_owned()).collect()
    }

    /// Runs the product, which must fail with `code` and say all of `words`.
    pub fn fails(&self, arguments: &[&str], code: i32, words: &[&str]) -> String {
        check_failure(&self.output(arguments), arguments, code, words)
    }

    /// Backs up a VM and gives the JSON object of the run.
    pub fn backup(&self, vm: &str, more: &[&str]) -> Value {
        let mut arguments = vec!["--json", "backup", "run", vm];
        arguments.extend(more);
        serde_json::from_str(&self.ok(&arguments)).expect("one JSON object")
    }

    /// Starts the product and leaves it running.
    pub fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.virtward(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running(command.spawn().expect("virtward starts"))
    }

    /// Starts `virtward-lab` on this lab and leaves it running; killed when forgotten.
    pub fn start_lab(&self, arguments: &[&str]) -> Running {
        let mut command = Command::new(lab_binary());
        command.arg("--name").arg(&self.name).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Running(command.spawn().expect("virtward-lab starts"))
    }

    /// Starts a backup slowed down so that there is time to do something to it, and waits until data moves.
    pub fn slow_backup(&self, vm: &str, bandwidth: &str) -> Running {
        let running = self.start(&["--json", "backup", "run", vm, "--full", "--bandwidth", bandwidth]);
        // QEMU makes it when the job begins.
        let runs = self.path("run/backup");
        wait("the job's socket", Duration::from_secs(30), || {
            let Ok(vms) = std::fs::read_dir(&runs) else { return false };
            vms.flatten().any(|vm| vm.path().join("nbd.sock").exists())
        });
        std::thread::sleep(Duration::from_millis(700));
        running
    }

    /// The repository is sound and every restore point in it reads in full.
    pub fn assert_sound(&self) {
        self.ok(&["repo", "check"]);
        self.ok(&["backup", "verify", "--all", "--mode", "full"]);
    }

    /// Restores a restore point as a new VM, boots it and compares its files with what they were.
    pub fn assert_boots(&self, point: &str, name: &str, checksums: &str) {
        let disks = self.path(name);
        std::fs::create_dir_all(&disks).expect("a directory for disks");
        self.ok(&["restore", "vm", point, "--name", name, "--start", "--disk-dir", disks.to_str().expect("UTF-8")]);
        self.lab(&["vm", "wait", name]);
        let found = self.guest_sh(name, CHECKSUMS);
        assert!(found == checksums, "files differ after the restore of {point}:\n{found}\n---\n{checksums}");
    }

    /// Ends [`HEARTBEAT`] in a guest: it could write all the time, but for moments.
    pub fn assert_guest_went_on(&self, vm: &str) {
        // It may be in the middle of a write.
        let end = "touch /tmp/stop; n=0; while kill -0 $(cat /tmp/beat.pid) 2>/dev/null && [ $n -lt 200 ]; do \
                   sleep 0.1; n=$((n + 1)); done; cat /tmp/beats";
        let beats = self.guest_sh(vm, end);
        let numbers: Vec<u32> = beats.split_whitespace().map(|number| number.parse().expect("a number")).collect();
        assert!(numbers[0] < GAP_MAX, "the guest could not write for {} ms", numbers[0] * 10);
        assert_eq!(numbers[1], 0, "writes failed in the guest");
    }

    /// The same of a guest that is to go on.
    pub fn assert_guest_goes_on(&self, vm: &str) {
        self.assert_guest_went_on(vm);
        self.guest_sh(vm, HEARTBEAT);
    }

    /// No backup job, no scratch file, no socket, at most one checkpoint of ours.
    pub fn assert_nothing_left(&self, host: &str, vm: &str) {
        for dir in ["scratch", "run/backup", "run/frozen"] {
            let left: Vec<PathBuf> =
                std::fs::read_dir(self.path(dir)).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
        let job = self.virsh(host, &["domjobinfo", vm]);
        assert!(!text(&job).contains("Backup"), "a job is left: {}", text(&job));
        let checkpoints = self.virsh(host, &["checkpoint-list", vm, "--name"]);
        let ours = text(&checkpoints).lines().filter(|line| line.starts_with("virtward-")).count();
        assert!(ours <= 1, "{}", text(&checkpoints));
    }
}

/// Runs in the guest: writes and syncs all the time; keeps the longest gap between two writes, in hundredths of a
/// second, and the number of errors.
pub const HEARTBEAT: &str = r#"
rm -f /tmp/stop /tmp/beats
cat > /tmp/beat.sh <<'END'
echo $$ > /tmp/beat.pid
now() { read up rest < /proc/uptime; echo "${up%.*}${up#*.}"; }
worst=0; errors=0; last=$(now)
while [ ! -e /tmp/stop ]; do
  dd if=/proc/uptime of=/data/.lab/beat bs=4k conv=fsync 2>/dev/null || errors=$((errors + 1))
  at=$(now); [ $((at - last)) -gt $worst ] && worst=$((at - last)); last=$at
  echo "$worst $errors" > /tmp/beats.new; mv /tmp/beats.new /tmp/beats
  sleep 0.1
done
END
setsid sh /tmp/beat.sh >/dev/null 2>&1 </dev/null &
"#;
/// Hundredths of a second.
const GAP_MAX: u32 = 500;

/// Prints the checksum of every file of a guest's data disk, in order, but for those that count its boots.
pub const CHECKSUMS: &str = "cd /data && find . -path ./.lab -prune -o -type f -exec sha256sum {} + | sort -k 2";

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.lab_output(&["down"]);
        if !output.status.success() && !std::thread::panicking() {
            eprintln!("virtward-lab down: {}", text(&output));
        }
        for mount in &self.mounts {
            unmount(mount);
        }
        *UP.lock().unwrap_or_else(std::sync::PoisonError::into_inner) -= self.places;
        FREED.notify_all();
    }
}

/// A product process that is killed when forgotten.
pub struct Running(pub Child);

impl Running {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status().expect("kill runs");
        assert!(status.success());
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("wait").is_none()
    }

    /// Waits for the end: exit code and everything that was said.
    pub fn finish(mut self, limit: Duration) -> (Option<i32>, String, String) {
        use std::io::Read;
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.0.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < deadline, "virtward is still running after {limit:?}");
            std::thread::sleep(Duration::from_millis(20));
        };
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().map(|mut pipe| pipe.read_to_string(&mut out));
        self.0.stderr.take().map(|mut pipe| pipe.read_to_string(&mut err));
        assert!(!err.contains("panicked"), "{err}");
        (status.code(), out, err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Polls until something holds.
pub fn wait(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    loop {
        let asked = Instant::now();
        if holds() {
            return;
        }
        assert!(Instant::now() < deadline, "{what} did not come within {limit:?}");
        // Most questions are commands. Asked one upon the other, they would take from the hosts what they wait for.
        std::thread::sleep((asked.elapsed() * 2).clamp(Duration::from_millis(20), Duration::from_millis(500)));
    }
}

/// Everything that a command said.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a command within a limit.
pub fn run(mut command: Command, limit: Duration) -> Output {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let pid = child.id();
    let (mut out, mut err) = (child.stdout.take().expect("stdout"), child.stderr.take().expect("stderr"));
    let read = |pipe: &mut dyn std::io::Read| {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    };
    let (done, timeout) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if timeout.recv_timeout(limit).is_err() {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
    });
    let (stdout, stderr) = std::thread::scope(|scope| {
        let errors = scope.spawn(|| read(&mut err));
        (read(&mut out), errors.join().unwrap_or_default())
    });
    let status = child.wait().expect("wait");
    let _ = done.send(());
    let _ = guard.join();
    Output { status, stdout, stderr }
}

/// The output of the product, which must have failed with `code` and said all of `words`; what it said.
pub fn check_failure(output: &Output, arguments: &[&str], code: i32, words: &[&str]) -> String {
    let said = text(output);
    assert_eq!(output.status.code(), Some(code), "virtward {arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "virtward {arguments:?} does not say {word:?}: {said}");
    }
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
    said
}

/// Runs a program of the system, which must succeed.
pub fn tool(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = run(command, Duration::from_secs(120));
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output));
    output
}

/// Bytes that do not repeat and do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn unmount(path: &Path) {
    let mut command = Command::new("umount");
    command.arg("-l").arg(path);
    run(command, Duration::from_secs(10));
}

/// One disk of a backup's JSON.
pub fn disk(result: &Value, target: &str) -> Value {
    let disks = result["disks"].as_array().expect("disks");
    disks.iter().find(|disk| disk["target"] == target).unwrap_or_else(|| panic!("no {target} in {result}")).clone()
}

/// A number of a disk's JSON.
pub fn bytes(disk: &Value, field: &str) -> u64 {
    disk[field].as_u64().unwrap_or_else(|| panic!("no {field} in {disk}"))
}

/// The directories of test processes that were killed.
fn clear_directories() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(DIR_PREFIX)).and_then(|rest| rest.split_once('-'));
        if pid.is_some_and(|(pid, _)| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            unmount(&entry.path().join("scratch"));
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn clear_abandoned() {
    clear_directories();
    let mut command = Command::new(lab_binary());
    command.args(["list", "--json"]);
    let output = run(command, Duration::from_secs(30));
    let Ok(labs) = serde_json::from_slice::<Value>(&output.stdout) else { return };
    let names = labs.as_array().into_iter().flatten().filter_map(|lab| lab["name"].as_str().or(lab.as_str()));
    for name in names {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let mut down = Command::new(lab_binary());
            down.args(["--name", name, "down"]);
            run(down, Duration::from_secs(60));
        }
    }
}
