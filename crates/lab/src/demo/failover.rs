//! The second story: three hosts with five guests, and the power of one host is cut.
//!
//! A lab of its own, with a daemon on every host. Guests append records to their disks all the time, so that what is on the
//! disks afterwards shows whether a write was lost, or two wrote at once. It is gone after the story, whatever came of it.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Demo, LAB, print_indented, said};
use crate::run::wait_until;

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// Guests and their hosts. The host with most of them loses its power.
const GUESTS: [(&str, &str); 5] = [("shop1", "h1"), ("shop2", "h1"), ("mail1", "h1"), ("wiki1", "h2"), ("chat1", "h3")];
const VICTIM: &str = "h1";
/// Who is asked, and sees it happen.
const WITNESS: &str = "h2";
const SOON: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(200);

/// Name of the lab.
fn name() -> String {
    format!("{LAB}-ha")
}

/// Takes away what an earlier story left.
pub fn clear(demo: &Demo) -> Result<()> {
    lab(demo, &["down"]).map(drop)
}

/// Tells it.
pub fn tell(demo: &mut Demo) -> Result<()> {
    demo.step("Three more hosts, with etcd, daemons, watchdogs and fence devices", hosts)?;
    demo.step("Five guests on them, which write all the time", guests)?;
    demo.step("Protected by high availability", protect)?;
    let (cut, proof) = demo.step("Disaster: the power of h1 is cut", power_cut)?;
    demo.step("What took how long", |demo| phases(demo, cut))?;
    demo.step("Proof: never two writers, and no write was lost", |demo| {
        println!("   h1 was proved dead by {proof}");
        intact(demo)
    })?;
    clear(demo)
}

fn lab(demo: &Demo, arguments: &[&str]) -> Result<String> {
    let mut command = std::process::Command::new(&demo.lab);
    command.args(["--name", &name()]).args(arguments);
    said(command)
}

/// The product on a host.
fn virtward(demo: &Demo, host: &str, arguments: &[&str]) -> Result<String> {
    let program = demo.virtward.canonicalize().context("find virtward")?;
    let config = format!("/var/lib/virtward-lab/{}/{host}/virtward/config.toml", name());
    let before = ["host", "exec", host, "--", path(&program)?, "--config", &config];
    lab(demo, &[&before[..], arguments].concat())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path is not UTF-8")
}

fn status(demo: &Demo) -> Value {
    let said = virtward(demo, WITNESS, &["ha", "status", "--json"]).unwrap_or_default();
    serde_json::from_str(&said).unwrap_or_default()
}

fn each<'a>(status: &'a Value, what: &str) -> impl Iterator<Item = &'a Value> {
    status[what].as_array().into_iter().flatten()
}

/// Waits, asking slowly: every question is a process on a machine that has better to do.
fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let came = wait_until(SOON, || {
        let holds = holds();
        if !holds {
            std::thread::sleep(POLL);
        }
        holds
    });
    ensure!(came, "{what} did not come within {} s", SOON.as_secs());
    Ok(())
}

fn hosts(demo: &mut Demo) -> Result<()> {
    let shared = format!("/var/lib/virtward-lab/{}/shared", name());
    let mut config = format!("[ha]\nwatchdog = \"@WATCHDOG@\"\nlease-dirs = [\"{shared}\"]\nmemory = \"4GiB\"\n");
    for host in HOSTS {
        config.push_str(&format!(
            "[[ha.fence]]\nhost = \"{host}\"\nname = \"power-switch-{host}\"\nagent = \"@FENCE_AGENT@\"\n\
             parameters = {{ plug = \"{host}\" }}\n"
        ));
    }
    demo.write("ha.toml", &config)?;
    let (file, program) = (demo.dir.join("ha.toml"), demo.virtward.clone());
    lab(demo, &["up", "--hosts", "3", "--etcd", "--daemon", path(&program)?, "--daemon-config", path(&file)?])?;
    // libvirt looks for hooks when it starts.
    HOSTS.iter().try_for_each(|host| lab(demo, &["host", "libvirtd", "restart", host]).map(drop))?;
    until("all hosts in service", || {
        let status = status(demo);
        each(&status, "hosts").filter(|host| host["phase"] == "armed" && host["grade"] == "full").count() == HOSTS.len()
    })
}

fn guests(demo: &mut Demo) -> Result<()> {
    for (vm, host) in GUESTS {
        lab(demo, &["vm", "create", vm, "--host", host, "--writer"])?;
        println!("   {vm} on {host}");
    }
    GUESTS.iter().try_for_each(|(vm, _)| lab(demo, &["vm", "wait", vm]).map(drop))
}

fn protect(demo: &mut Demo) -> Result<()> {
    let names: Vec<&str> = GUESTS.iter().map(|(vm, _)| *vm).collect();
    let arguments = [&["ha", "enable"][..], &names].concat();
    // As soon as libvirt is seen to ask before it starts them.
    until("protection", || virtward(demo, WITNESS, &arguments).is_ok())?;
    until("readiness of all guests", || ready(&status(demo), |_| true) == GUESTS.len())?;
    print_indented(&virtward(demo, WITNESS, &["ha", "capacity"])?);
    Ok(())
}

/// How many guests run on a host of which this holds, and answer.
fn ready(status: &Value, on: impl Fn(&str) -> bool) -> usize {
    let up = |vm: &&Value| vm["phase"] == "running" && vm["ready"] == true && vm["host"].as_str().is_some_and(&on);
    each(status, "vms").filter(up).count()
}

/// When it was cut, in seconds since 1970, and by what the host was proved dead.
fn power_cut(demo: &mut Demo) -> Result<(f64, String)> {
    let begun = Instant::now();
    let cut = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
    lab(demo, &["host", "power", "off", VICTIM])?;
    until("every guest on another host", || ready(&status(demo), |host| host != VICTIM) == GUESTS.len())?;
    println!("   all five guests run and answer on the other two, {:.1} s later", begun.elapsed().as_secs_f64());
    let status = status(demo);
    for vm in each(&status, "vms") {
        let word = |field: &str| vm[field].as_str().unwrap_or("?").to_owned();
        println!("   {:6} on {}, generation {}", word("name"), word("host"), vm["generation"]);
    }
    let proof = each(&status, "hosts").find(|host| host["name"] == VICTIM).and_then(|host| host["proof"].as_str());
    Ok((cut, proof.context("there is no proof that h1 is dead")?.to_owned()))
}

/// The shares of the phases, by the events of the daemons.
fn phases(demo: &mut Demo, cut: f64) -> Result<()> {
    let mut happened: Vec<(f64, String)> = Vec::new();
    for host in HOSTS.iter().filter(|host| **host != VICTIM) {
        let events: Value =
            serde_json::from_str(&virtward(demo, host, &["ha", "events", "--limit", "300", "--json"])?)?;
        for event in events.as_array().into_iter().flatten() {
            let at: Option<jiff::Timestamp> = event["at"].as_str().and_then(|text| text.parse().ok());
            let (Some(at), Some(text)) = (at, event["message"].as_str()) else { continue };
            happened.push((at.as_millisecond() as f64 / 1000.0, text.to_owned()));
        }
    }
    happened.retain(|(at, _)| *at >= cut);
    happened.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all = |words: &[&str]| -> Vec<f64> {
        happened.iter().filter(|(_, text)| words.iter().all(|word| text.contains(word))).map(|(at, _)| *at).collect()
    };
    let first = |words: &[&str]| all(words).first().copied();
    let last = |words: &[&str]| all(words).last().copied();
    let (fencing, over) = (format!("FENCING {VICTIM} "), format!("{VICTIM} epoch "));
    let marks = [
        ("declared dead after its silence", first(&[&fencing])),
        ("power verified off, and drained", first(&[&over, " is over, "])),
        ("first guest given to another host", first(&[" goes to "])),
        ("last guest started", last(&[" runs, generation "])),
        ("last guest booted: its agent answers", last(&[" is ready"])),
    ];
    let mut before = cut;
    for (what, at) in marks {
        let Some(at) = at else {
            bail!("no event says: {what}\n{}", happened.iter().map(|(_, text)| format!("{text}\n")).collect::<String>())
        };
        println!("   {:5.1} s  {what} (+{:.1} s)", at - cut, (at - before).max(0.0));
        before = at;
    }
    Ok(())
}

fn intact(demo: &mut Demo) -> Result<()> {
    for (vm, _) in GUESTS {
        let said = lab(demo, &["vm", "check-writers", vm])?;
        println!("   {vm:6} {}", said.lines().next().unwrap_or_default());
        ensure!(said.contains("one writer at a time, nothing lost"), "{vm}: {said}");
    }
    println!();
    Ok(())
}
