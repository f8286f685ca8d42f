//! The guest comes first: quiescing with agents that are absent, hung or lying, never a guest left frozen, and a backup
//! that is given up before the guest could see an error.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Lab, text, wait};

fn quiesce(result: &Value) -> (String, String) {
    let said = |field: &str| result["quiesce"][field].as_str().unwrap_or_default().to_owned();
    (said("outcome"), said("reason"))
}

/// Runs something in the guest a moment later, so that the agent can answer before it happens to the agent.
fn later(lab: &Lab, vm: &str, script: &str) {
    lab.guest_sh(vm, &format!("(sleep 1; {script}) >/dev/null 2>&1 </dev/null &"));
    std::thread::sleep(Duration::from_millis(1500));
}

#[test]
fn the_guest_is_quiesced_as_asked_whatever_its_agent_does() {
    let lab = Lab::quick(1);
    lab.write_config("h1", "[backup]\nagent-timeout-s = 3");
    lab.guest("web1", &[]);
    let log = lab.path("hooks");
    let hook = |word: &str| format!("echo {word} $VIRTWARD_VM >> {}", log.display());
    let (pre, post) = (hook("pre"), hook("post"));
    let hooks = ["--pre-freeze", pre.as_str(), "--post-thaw", post.as_str()];
    let ran = || {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let _ = std::fs::remove_file(&log);
        said
    };

    let frozen = lab.backup("web1", &hooks);
    assert_eq!(quiesce(&frozen).0, "frozen", "{frozen}");
    assert!(frozen["quiesce"]["frozen_ms"].as_u64().is_some_and(|ms| ms < 5000), "{frozen}");
    assert_eq!(ran(), "pre web1\npost web1\n");
    let off = lab.backup("web1", &["--quiesce", "off"]);
    assert_eq!(quiesce(&off), ("not-needed".into(), String::new()), "{off}");

    // A hook that fails: no freeze, but its partner runs.
    let failing = format!("{pre}; exit 3");
    let failed = lab.backup("web1", &["--pre-freeze", &failing, "--post-thaw", &post]);
    assert_eq!(quiesce(&failed).0, "failed", "{failed}");
    assert!(failed["warnings"].to_string().contains("crash-consistent"), "{failed}");
    assert_eq!(ran(), "pre web1\npost web1\n");
    let required = ["backup", "run", "web1", "--quiesce", "required"];
    lab.fails(&[&required[..], &["--pre-freeze", &failing, "--post-thaw", &post]].concat(), 13, &["exit status: 3"]);
    assert_eq!(ran(), "pre web1\npost web1\n");

    // Nothing mounted that could be frozen.
    lab.guest_sh("web1", "sync; umount /data");
    let none = lab.backup("web1", &hooks);
    assert_eq!(quiesce(&none).0, "failed", "{none}");
    assert!(quiesce(&none).1.contains("froze no file system"), "{none}");
    assert_eq!(ran(), "pre web1\npost web1\n");
    lab.guest_sh("web1", "mount -t ext4 /dev/vda /data");

    // An agent that refuses.
    later(&lab, "web1", "sed -i 's:-t /run:-t /run -b guest-fsfreeze-freeze:' /sbin/agent; killall qemu-ga");
    lab.lab(&["vm", "wait", "web1"]);
    let refused = lab.backup("web1", &hooks);
    assert_eq!(quiesce(&refused).0, "failed", "{refused}");
    assert!(quiesce(&refused).1.starts_with("freeze: "), "{refused}");
    assert_eq!(ran(), "pre web1\npost web1\n");
    lab.fails(&required, 13, &["could not be quiesced", "qemu-guest-agent"]);

    // An agent that is there and does not answer: a few seconds, not for ever.
    later(&lab, "web1", "killall -STOP qemu-ga; sleep 45; killall -CONT qemu-ga");
    let asked = Instant::now();
    let hung = lab.backup("web1", &[]);
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert_eq!(quiesce(&hung).0, "no-agent", "{hung}");
    lab.fails(&required, 13, &["could not be quiesced"]);

    // No agent at all.
    lab.guest("bare1", &["--no-agent"]);
    let asked = Instant::now();
    let absent = lab.backup("bare1", &[]);
    assert!(asked.elapsed() < Duration::from_secs(12), "{:?}", asked.elapsed());
    assert_eq!(quiesce(&absent).0, "no-agent", "{absent}");
    assert!(absent["warnings"].to_string().contains("crash-consistent"), "{absent}");
    lab.fails(&["backup", "run", "bare1", "--quiesce", "required"], 13, &["bare1 could not be quiesced"]);
    lab.assert_nothing_left("h1", "web1");
    lab.assert_sound();
}

/// Answers like an agent, and freezes nothing.
const LIAR: &str = r#"
cat > /tmp/liar <<'END'
for port in /sys/class/virtio-ports/*; do [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] && break; done
exec 3<>/dev/${port##*/}
while :; do
  read -r line <&3 || { sleep 0.2; continue; }
  case $line in
    *guest-sync*) say=$(echo "$line" | sed 's/.*"id": *\([0-9]*\).*/\1/') ;;
    *fsfreeze-freeze*) say=3 ;;
    *fsfreeze-thaw*) say=0 ;;
    *) say='{}' ;;
  esac
  echo "{\"return\": $say}" >&3
done
END
printf '#!/bin/sh\nexec sh /tmp/liar\n' > /sbin/agent
"#;

#[test]
fn an_agent_that_lies_is_found_out_and_is_no_quiescing() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    lab.guest_sh("web1", LIAR);
    later(&lab, "web1", "killall qemu-ga");
    std::thread::sleep(Duration::from_secs(3));

    let believed = lab.backup("web1", &[]);
    assert_eq!(quiesce(&believed).0, "failed", "{believed}");
    assert!(quiesce(&believed).1.contains("nothing to thaw"), "{believed}");
    assert!(believed["warnings"].to_string().contains("crash-consistent"), "{believed}");

    // What was required was not given: that is a failure, and no restore point.
    let required = ["backup", "run", "web1", "--quiesce", "required"];
    lab.fails(&required, 13, &["web1 could not be quiesced", "nothing to thaw", "--quiesce auto"]);
    assert_eq!(lab.points("web1"), [believed["id"].as_str().unwrap()]);
    lab.assert_nothing_left("h1", "web1");
    assert_eq!(lab.backup("web1", &[])["kind"], "incremental");
    lab.assert_sound();
}

fn is_frozen(lab: &Lab, vm: &str) -> Option<bool> {
    let output =
        lab.virsh("h1", &["qemu-agent-command", vm, "--timeout", "5", r#"{"execute":"guest-fsfreeze-status"}"#]);
    let said = text(&output);
    match (said.contains("frozen"), said.contains("thawed")) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

/// Starts a backup and stops it while the guest is frozen. None if it was quicker.
fn stop_while_frozen(lab: &Lab, signal: &str, after: Duration) -> Option<crate::harness::Running> {
    let markers = lab.path("run/frozen");
    let mut running = lab.start(&["--json", "backup", "run", "web1"]);
    let there = || std::fs::read_dir(&markers).is_ok_and(|mut entries| entries.next().is_some());
    while !there() {
        if !running.is_running() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(after);
    if !there() || !running.is_running() {
        return None;
    }
    running.signal(signal);
    Some(running)
}

#[test]
fn a_guest_is_thawed_when_the_backup_dies_or_hangs_in_the_middle_of_the_freeze() {
    let lab = Lab::quick(1);
    lab.guest("web1", &[]);
    lab.backup("web1", &[]);
    let writable = |limit| {
        wait("a guest that can write", limit, || {
            is_frozen(&lab, "web1") == Some(false)
                && lab
                    .lab_output(&["vm", "exec", "web1", "--", "sh", "-c", "date > /data/probe && sync"])
                    .status
                    .success()
        });
    };

    // Killed at several points of the freeze: the guard thaws at once.
    let mut killed = 0;
    for delay_ms in [0, 60, 120, 180, 240, 320] {
        let Some(running) = stop_while_frozen(&lab, "KILL", Duration::from_millis(delay_ms)) else { continue };
        killed += 1;
        running.finish(Duration::from_secs(5));
        writable(Duration::from_secs(12));
    }
    assert!(killed > 0, "every backup was quicker than the test");

    // Hung while the guest is frozen: the guard thaws after 10 s, and the backup does not claim a freeze that it had not.
    let mut hung = false;
    for delay_ms in [80, 140, 200, 260, 40, 320] {
        let Some(running) = stop_while_frozen(&lab, "STOP", Duration::from_millis(delay_ms)) else { continue };
        let frozen = is_frozen(&lab, "web1") == Some(true);
        if frozen {
            writable(Duration::from_secs(16));
        }
        running.signal("CONT");
        let (code, out, err) = running.finish(Duration::from_secs(60));
        assert_eq!(code, Some(0), "{err}");
        if frozen {
            let result: Value = serde_json::from_str(&out).expect("JSON");
            assert!(result["warnings"] != Value::Array(Vec::new()) || quiesce(&result).0 == "failed", "{result}");
            hung = true;
            break;
        }
    }
    assert!(hung, "the guest was never seen frozen");
    let next = lab.backup("web1", &[]);
    assert_eq!((next["kind"].as_str(), quiesce(&next).0.as_str()), (Some("incremental"), "frozen"), "{next}");
    lab.assert_nothing_left("h1", "web1");
    lab.assert_sound();
}

#[test]
fn a_backup_is_given_up_before_its_scratch_space_is_full() {
    let lab = Lab::with_small_scratch(1, "224m");
    lab.write_config("h1", "[backup]\nscratch-reserve = \"64MiB\"");
    lab.guest("web1", &[]);
    let first = lab.backup("web1", &[]);
    lab.guest_sh("web1", "dd if=/dev/urandom of=/data/big bs=1M count=200 2>/dev/null; sync");

    // Not begun without room.
    let ballast = lab.path("scratch/ballast");
    std::fs::write(&ballast, vec![1_u8; 150 << 20]).unwrap();
    lab.fails(&["backup", "run", "web1"], 13, &["scratch", "to begin"]);
    std::fs::remove_file(&ballast).unwrap();

    // Room runs out because the guest overwrites more than fits: the guest never learns of it.
    let running = lab.slow_backup("web1", "1MiB");
    let wrote =
        lab.guest_sh("web1", "dd if=/dev/zero of=/data/big bs=1M count=200 conv=notrunc,fsync 2>&1; echo status $?");
    assert!(wrote.contains("status 0"), "{wrote}");
    let (code, out, err) = running.finish(Duration::from_secs(30));
    assert_eq!(code, Some(13), "{out}{err}");
    for word in ["given up", "scratch space is down to", "bandwidth"] {
        assert!(err.contains(word), "{err}");
    }
    let complaints = lab.guest_sh("web1", "dmesg | grep -iE 'i/o error|remount|ext4-fs error' || true");
    assert_eq!(complaints.trim(), "");
    assert_eq!(lab.state("h1", "web1"), "running");
    lab.assert_nothing_left("h1", "web1");

    // The tracking of the last restore point has not suffered.
    assert_eq!(lab.points("web1"), [first["id"].as_str().unwrap()]);
    let next = lab.backup("web1", &[]);
    assert_eq!(next["kind"], "incremental", "{next}");
    lab.assert_sound();
}

#[test]
fn a_guest_paused_for_the_cut_runs_again_when_the_backup_dies() {
    let lab = Lab::up(1);
    lab.guest("web1", &["--no-agent"]);
    let state = || text(&lab.virsh("h1", &["domstate", "web1"])).trim().to_owned();
    let mut killed = false;
    for _ in 0..20 {
        let mut backup = lab.start(&["backup", "run", "web1", "--mode", "warm", "--quiesce", "off", "--full"]);
        while !killed && backup.is_running() {
            if state() == "paused" {
                backup.signal("KILL");
                killed = true;
            }
        }
        if killed {
            break;
        }
    }
    assert!(killed, "the guest was never seen paused");
    wait("a running guest", Duration::from_secs(15), || state() == "running");
    lab.ok(&["backup", "run", "web1", "--quiesce", "off"]);
    lab.assert_nothing_left("h1", "web1");
}
