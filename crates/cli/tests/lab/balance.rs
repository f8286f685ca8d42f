//! Planning on real hosts: what is seen, what is planned and why, and that a plan is carried out.

use serde_json::{Value, json};

use crate::harness::{CHECKSUMS, Lab, text};

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("one JSON object")
}

#[test]
fn hosts_are_surveyed_planned_on_and_balanced() {
    let lab = Lab::quick(2);
    lab.guest("web1", &[]);
    lab.guest("web2", &[]);
    let sums = lab.guest_sh("web2", CHECKSUMS);
    let (h1, h2) = (lab.tcp_uri("h1"), lab.tcp_uri("h2"));
    let look = |words: &[&str]| -> String {
        lab.ok(&[&["--connect", &h1], words, &["--with", &h2, "--interval", "1s"]].concat())
    };
    let on = |host: &str| lab.virsh_ok(host, &["list", "--name"]);

    // What is there, and that both hosts could run both.
    let path = lab.path("today.json").display().to_string();
    look(&["inventory", "export", "--out", &path]);
    let mut world = parsed(&std::fs::read_to_string(&path).expect("the snapshot"));
    let names: Vec<&str> =
        world["hosts"].as_array().expect("hosts").iter().filter_map(|h| h["name"].as_str()).collect();
    assert_eq!((names.len(), world["vms"].as_array().map(Vec::len)), (2, Some(2)), "{world}");
    assert!(world["vms"].as_array().expect("VMs").iter().all(|vm| vm["stuck"].is_null()), "{world}");
    let (first, second) = (names[0].to_owned(), names[1].to_owned());
    assert_eq!(world["vms"][0]["host"], first, "{world}");

    // Both of them busy: one should go. The same snapshot gives the same plan, and says why.
    for vm in world["vms"].as_array_mut().expect("VMs") {
        vm["size"]["cpu_milli"] = json!(2000);
        vm["demand"]["cpu_milli"] = json!(1500);
    }
    for host in world["hosts"].as_array_mut().expect("hosts") {
        host["capacity"]["cpu_milli"] = json!(2000);
    }
    std::fs::write(&path, world.to_string()).expect("written");
    let plan = |more: &[&str]| parsed(&lab.ok(&[&["--json", "balance", "plan", "--snapshot", &path], more].concat()));
    let planned = plan(&[]);
    assert_eq!(planned["plan"]["steps"].as_array().map(Vec::len), Some(1), "{planned}");
    let step = &planned["plan"]["steps"][0];
    assert_eq!((step["from"].as_str(), step["to"].as_str()), (Some(&*first), Some(&*second)), "{planned}");
    assert_eq!(step["why"]["resource"], "cpu", "{planned}");
    assert_eq!(plan(&[]), planned);
    let told = lab.ok(&["balance", "plan", "--snapshot", &path]);
    assert!(told.contains("CPU at 150 % here, 75 % there afterwards"), "{told}");
    assert_eq!(plan(&["--eagerness", "1"])["plan"]["steps"], json!([]));
    let moving = step["name"].as_str().expect("a name");
    let told = lab.ok(&["balance", "explain", moving, "--snapshot", &path]);
    assert!(told.contains(&format!("it moves to {second}")), "{told}");
    lab.fails(&["balance", "explain", "web9", "--snapshot", &path], 3, &["web9"]);

    // What if.
    let without = parsed(&lab.ok(&["--json", "balance", "simulate", "--snapshot", &path, "--without-host", &first]));
    let lines = without["placement"]["lines"].as_array().expect("lines");
    assert!(lines.len() == 2 && lines.iter().all(|line| line["outcome"]["host"] == second.as_str()), "{without}");
    let full = lab.output(&["balance", "simulate", "--snapshot", &path, "--add-vm", "2x1:1000GiB"]);
    assert_eq!(full.status.code(), Some(4), "{}", text(&full));
    assert!(text(&full).contains("would have no host") && text(&full).contains("memory too little"), "{}", text(&full));
    lab.fails(&["balance", "simulate", "--snapshot", &path, "--without-host", "h9"], 3, &["no host h9", &first]);
    let order = parsed(&lab.ok(&["--json", "upgrade-plan", "--snapshot", &path]));
    assert_eq!(order["services"].as_array().map(Vec::len), Some(2), "{order}");
    // The empty one first: nothing has to move for it.
    assert_eq!((&order["services"][0]["host"], &order["services"][0]["plan"]["steps"]), (&json!(second), &json!([])));
    let placed = lab.ok(&["vm", "place", "--cpus", "1", "--memory", "1GiB", "--snapshot", &path]);
    assert!(placed.starts_with(&second), "{placed}");
    let refused =
        lab.output(&["vm", "place", "--cpus", "1", "--memory", "1GiB", "--network", "x", "--snapshot", &path]);
    assert!(
        refused.status.code() == Some(4) && text(&refused).contains("does not offer network:x"),
        "{}",
        text(&refused)
    );

    // Bad input is told, with what is wrong.
    std::fs::write(lab.path("bad.json"), "{\"format\": 99}").expect("written");
    let bad = lab.path("bad.json").display().to_string();
    lab.fails(&["balance", "plan", "--snapshot", &bad], 2, &["format 99"]);
    let rules = lab.path("rules.toml").display().to_string();
    std::fs::write(&rules, "[failover]\nfailure = 1\n").expect("written");
    lab.fails(&["balance", "plan", "--snapshot", &path, "--rules", &rules], 2, &["rules.toml", "line 2"]);

    // A rule that is broken is mended for real; then nothing is left to do.
    std::fs::write(&rules, "[[rule]]\nname = \"web apart\"\nkind = \"apart\"\nvms = [\"web1\", \"web2\"]\n")
        .expect("written");
    let applied = parsed(&look(&["--json", "balance", "apply", "--eagerness", "1", "--rules", &rules]));
    assert_eq!(applied["moved"].as_array().map(Vec::len), Some(1), "{applied}");
    assert_eq!(applied["plan"]["steps"][0]["why"]["rule"], "web apart", "{applied}");
    assert_eq!((on("h1").trim().lines().count(), on("h2").trim().lines().count()), (1, 1));
    let again = parsed(&look(&["--json", "balance", "apply", "--eagerness", "1", "--rules", &rules]));
    assert_eq!(again["moved"], json!([]), "{again}");
    lab.lab(&["vm", "wait", "web2"]);
    assert_eq!(lab.guest_sh("web2", CHECKSUMS), sums);
}
