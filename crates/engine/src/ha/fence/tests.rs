//! Against real agents: Debian's `fence_dummy` (a file for a host) and `fence_ipmilan` with OpenIPMI's simulated BMC; and
//! against agents that fail in every way that real ones do.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::*;

fn device(agent: &str, parameters: &[(&str, &str)]) -> Device {
    Device {
        name: "d1".into(),
        agent: agent.into(),
        level: 1,
        parameters: parameters.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        secrets: BTreeMap::new(),
        timeout_s: 20,
        verify_s: 1,
        retries: 0,
    }
}

/// A host that is a file, and the device that writes it.
fn dummy(dir: &Path) -> (PathBuf, Device) {
    let file = dir.join("power");
    fs::write(&file, "on").unwrap();
    let device = device("fence_dummy", &[("status_file", file.to_str().unwrap())]);
    (file, device)
}

fn script(dir: &Path, name: &str, body: &str) -> Device {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Device { name: name.into(), ..device(path.to_str().unwrap(), &[]) }
}

fn secret(dir: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

#[tokio::test]
async fn a_real_agent_switches_off_verified_and_on_again() {
    let dir = tempfile::tempdir().unwrap();
    let (file, device) = dummy(dir.path());
    assert_eq!(device.status().await.unwrap(), Power::On);
    let proved = Outcome::Off { level: 1, devices: vec!["d1".into()] };
    let devices = [device];
    assert_eq!(off(&devices).await, proved);
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), "off");
    // Safe to repeat: it is off already.
    assert_eq!(off(&devices).await, proved);
    assert_eq!(on(&devices).await, Vec::<String>::new());
    assert_eq!(cycle(&devices).await, (proved, vec![]));
    assert_eq!(devices[0].status().await.unwrap(), Power::On);
}

#[tokio::test]
async fn a_host_that_came_back_while_its_device_was_asked_keeps_its_power() {
    let dir = tempfile::tempdir().unwrap();
    let (file, device) = dummy(dir.path());
    let outcome = off_while(&[Device { retries: 2, ..device }], &|| Box::pin(async { false })).await;
    assert!(matches!(outcome, Outcome::Unproven { reasons } if reasons[0].contains("no longer wanted")));
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), "on");
}

#[tokio::test]
async fn a_typo_in_a_parameter_is_found_before_it_matters() {
    let dir = tempfile::tempdir().unwrap();
    let (_, good) = dummy(dir.path());
    assert!(check(&good).await.iter().all(|finding| finding.outcome.is_ok()), "{:?}", check(&good).await);
    let wrong = device("fence_dummy", &[("status_fiel", "/nowhere")]);
    let found = check(&wrong).await;
    assert!(
        found.len() == 1 && found[0].outcome.as_ref().unwrap_err().contains("did you mean status_file"),
        "{found:?}"
    );
    // No address of the BMC is given; the agent itself says so.
    let incomplete = check(&device("fence_ipmilan", &[("username", "admin")])).await;
    let reason = incomplete.last().unwrap().outcome.as_ref().unwrap_err();
    assert!(reason.contains("fence address"), "{incomplete:?}");
    let missing = check(&device("fence_nonesuch", &[])).await;
    assert!(missing[0].outcome.as_ref().unwrap_err().contains("no agent fence_nonesuch"), "{missing:?}");
}

/// OpenIPMI's simulated BMC, whose chassis is a file.
struct Bmc {
    child: Child,
    _dir: tempfile::TempDir,
    power: PathBuf,
    port: u16,
    password: PathBuf,
}

impl Bmc {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let power = dir.path().join("power");
        fs::write(&power, "1").unwrap();
        let chassis =
            format!("case $2 in get) echo \"power:$(cat {0})\";; set) echo $4 > {0};; esac; exit 0", power.display());
        let chassis = script(dir.path(), "chassis", &chassis).agent;
        // Free a moment ago; nothing else on this machine picks it in between often enough to matter.
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let lan = format!(
            "name \"h1\"\nset_working_mc 0x20\nstartlan 1\naddr 127.0.0.1 {port}\npriv_limit admin\n\
             allowed_auths_admin none md2 md5 straight\nguid a123456789abcdefa123456789abcdef\nendlan\n\
             chassis_control \"{chassis} 0x20\"\nuser 2 true \"admin\" \"secret-1\" admin 10 none md2 md5 straight\n"
        );
        fs::write(dir.path().join("lan"), lan).unwrap();
        let emu =
            "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr\nmc_enable 0x20\n";
        fs::write(dir.path().join("emu"), emu).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "ipmi_sim", "-n", "-c"])
            .arg(dir.path().join("lan"))
            .arg("-f")
            .arg(dir.path().join("emu"))
            .arg("-s")
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("ipmi_sim (package openipmi)");
        let password = secret(dir.path(), "password", "secret-1\n", 0o600);
        Self { child, _dir: dir, power, port, password }
    }

    fn device(&self) -> Device {
        let port = self.port.to_string();
        // cipher: the simulator does not answer the question which ones it has.
        let parameters = [
            ("ip", "127.0.0.1"),
            ("ipport", &port),
            ("username", "admin"),
            ("lanplus", "1"),
            ("cipher", "3"),
            ("power_wait", "0"),
        ];
        let secrets = BTreeMap::from([("password".into(), self.password.clone())]);
        Device { secrets, retries: 2, ..device("fence_ipmilan", &parameters) }
    }
}

impl Drop for Bmc {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bmc_is_switched_off_over_ipmi_with_a_password_that_nobody_sees() {
    let bmc = Bmc::start();
    let device = bmc.device();
    // Until the simulator listens.
    let deadline = Instant::now() + Duration::from_secs(60);
    while device.status().await.is_err() {
        assert!(Instant::now() < deadline, "ipmi_sim does not answer: {:?}", device.status().await);
    }
    let found = check(&device).await;
    assert!(found.len() == 4 && found.iter().all(|finding| finding.outcome.is_ok()), "{found:?}");
    assert!(matches!(off(std::slice::from_ref(&device)).await, Outcome::Off { level: 1, .. }));
    assert_eq!(fs::read_to_string(&bmc.power).unwrap().trim(), "0");

    // The BMC lost its power as well: nothing is proved, in bounded time, and the reason does not hold the password.
    drop(bmc);
    let dead = Device { secrets: BTreeMap::new(), timeout_s: 2, retries: 0, ..device };
    let Outcome::Unproven { reasons } = off(&[dead]).await else { panic!("a dead BMC proved something") };
    assert!(reasons.len() == 1 && reasons[0].starts_with("d1: "), "{reasons:?}");
}

#[tokio::test]
async fn neither_exit_status_nor_a_switchs_word_is_believed_alone() {
    let dir = tempfile::tempdir().unwrap();
    let agents = [
        // Switches successfully, it says; the host stays on.
        (
            "liar",
            "read a; case $a in action=status) echo 'Status: ON'; exit 0;; *) echo 'Success: Powered OFF'; exit 0;; esac",
        ),
        // An interpreter that cannot read its program ends with 2.
        ("broken", "exit 2"),
        // An answer that contradicts itself.
        ("torn", "echo 'Status: OFF'; exit 0"),
        ("mute", "exit 0"),
        ("crashing", "kill -SEGV $$"),
        ("failing", "echo 'Connection timed out' >&2; exit 1"),
    ];
    for (name, body) in agents {
        let Outcome::Unproven { reasons } = off(&[script(dir.path(), name, body)]).await else {
            panic!("{name} was believed");
        };
        assert!(reasons[0].starts_with(&format!("{name}: ")), "{reasons:?}");
    }
    assert!(matches!(off(&[]).await, Outcome::Unproven { reasons } if reasons[0].contains("no fencing device")));
}

#[tokio::test]
async fn a_switch_that_fails_and_works_all_the_same_is_verified_and_a_slow_one_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let body = |switch: &str| {
        format!(
            "read a; case $a in action=status) if [ -e {0} ]; then echo 'Status: OFF'; exit 2; fi; echo 'Status: ON';; \
             action=off) {switch};; esac",
            state.display()
        )
    };
    let failing = script(dir.path(), "failing", &body(&format!("touch {}; echo lost >&2; exit 1", state.display())));
    assert!(matches!(off(&[failing]).await, Outcome::Off { .. }));
    fs::remove_file(&state).unwrap();
    let slow = body(&format!("(sleep 2; touch {}) >/dev/null 2>&1 & sleep 3; exit 0", state.display()));
    let slow = Device { verify_s: 5, ..script(dir.path(), "slow", &slow) };
    assert!(matches!(off(&[slow]).await, Outcome::Off { .. }));
}

#[tokio::test]
async fn levels_are_tried_in_order_and_a_level_needs_all_of_its_devices() {
    let dir = tempfile::tempdir().unwrap();
    let (first, psu1) = dummy(dir.path());
    let psu1 = Device { name: "psu1".into(), ..psu1 };
    let psu2 = Device { name: "psu2".into(), ..script(dir.path(), "psu2", "echo unreachable >&2; exit 1") };
    let other = tempfile::tempdir().unwrap();
    let (_, bmc) = dummy(other.path());
    let bmc = Device { name: "bmc".into(), level: 2, ..bmc };
    // One of two power supplies is not enough.
    let half = [psu1.clone(), psu2.clone()];
    assert!(
        matches!(off(&half).await, Outcome::Unproven { reasons } if reasons.len() == 1 && reasons[0].contains("psu2"))
    );
    assert_eq!(fs::read_to_string(&first).unwrap().trim(), "off");
    assert_eq!(off(&[bmc, psu2, psu1]).await, Outcome::Off { level: 2, devices: vec!["bmc".into()] });
}

#[tokio::test]
async fn an_agent_that_hangs_is_ended_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let hanging = Device { timeout_s: 1, verify_s: 0, ..script(dir.path(), "hanging", "sleep 600") };
    let started = Instant::now();
    let Outcome::Unproven { reasons } = off(&[hanging]).await else { panic!("believed") };
    assert!(reasons[0].contains("no answer in 1 s"), "{reasons:?}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn secrets_come_from_private_files_and_are_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let mut gossip = script(dir.path(), "gossip", "cat >&2; exit 1");
    gossip.secrets.insert("password".into(), secret(dir.path(), "good", "hunter2\n", 0o600));
    let said = gossip.status().await.unwrap_err().to_string();
    assert!(said.contains("(secret)") && !said.contains("hunter2"), "{said}");
    for (name, text, mode, reason) in [("open", "x\n", 0o644, "others can read it"), ("empty", "\n", 0o600, "empty")] {
        gossip.secrets.insert("password".into(), secret(dir.path(), name, text, mode));
        assert!(gossip.status().await.unwrap_err().to_string().contains(reason));
    }
    gossip.secrets.clear();
    for (name, value) in [("port", "1\naction=metadata"), ("po rt", "1"), ("action", "status")] {
        gossip.parameters = BTreeMap::from([(name.into(), value.into())]);
        assert!(matches!(gossip.status().await, Err(Error::Parameter(_))), "{name}={value:?}");
    }
}

#[tokio::test]
async fn agents_are_programs_of_the_distribution_or_named_whole() {
    for agent in ["../bin/sh", "sh", "fence_x; reboot", ""] {
        assert!(matches!(device(agent, &[]).status().await, Err(Error::Parameter(_))), "{agent}");
    }
}
