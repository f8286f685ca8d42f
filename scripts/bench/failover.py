#!/usr/bin/env python3
"""How long a power cut of a host keeps a guest down, and which phase takes which part of it.

    scripts/bench/failover.py [--runs 20] [--watchdog-alone] [--json FILE]

In a lab of three hosts with etcd, daemons, fence devices and watchdogs. Phases, by the events of the daemons:
detect (power cut to FENCING), fence (to the proof), claim (to the claim of the VM), start (to its vCPUs), boot (to its
guest agent's answer).
"""
import argparse, datetime, json, os, statistics, subprocess, sys, tempfile, time

LAB = "failover"
HOSTS = ["h1", "h2", "h3"]
PHASES = ["detect", "fence", "claim", "start", "boot"]
BIN = os.environ.get("VIRTWARD_BIN", "target/release")


def lab(*arguments):
    run = subprocess.run([f"{BIN}/virtward-lab", "--name", LAB, *arguments], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"virtward-lab {' '.join(arguments)}: {run.stderr}{run.stdout}")
    return run.stdout


def virtward(host, *arguments):
    config = f"/var/lib/virtward-lab/{LAB}/{host}/virtward/config.toml"
    command = [f"{BIN}/virtward-lab", "--name", LAB, "host", "exec", host, "--", os.path.abspath(f"{BIN}/virtward")]
    run = subprocess.run([*command, "--config", config, *arguments], capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else ""


def status(host):
    return json.loads(virtward(host, "ha", "status", "--json") or "{}")


def wait(what, holds, limit=180):
    end = time.time() + limit
    while not holds():
        if time.time() > end:
            sys.exit(f"{what} did not come within {limit} s")
        time.sleep(0.3)


def in_service(at):
    hosts = {host["name"]: host for host in status(at).get("hosts", [])}
    return len(hosts) == 3 and all(host["phase"] == "armed" and not host["maintenance"] for host in hosts.values())


def vm(at):
    return next((vm for vm in status(at).get("vms", []) if vm["name"] == "w1"), None)


def events(hosts, since):
    found = []
    for host in hosts:
        for event in json.loads(virtward(host, "ha", "events", "--limit", "200", "--json") or "[]"):
            at = datetime.datetime.fromisoformat(event["at"].replace("Z", "+00:00")).timestamp()
            if at >= since:
                found.append((at, event["message"]))
    return sorted(found)


def first(found, *words):
    return next((at for at, text in found if all(word in text for word in words)), None)


def one(watchdog_alone):
    wait("the guest", lambda: vm("h2") or vm("h3"))
    host = (vm("h2") or vm("h3"))["host"]
    others = [other for other in HOSTS if other != host]
    if watchdog_alone:
        lab("host", "fence-mode", host, "dead")
    cut = time.time()
    lab("host", "power", "off", host)
    wait("the guest elsewhere", lambda: (now := vm(others[0])) and now["host"] in others and now["ready"])
    found = events(others, cut)
    marks = [
        cut,
        first(found, f"FENCING {host} "),
        first(found, f"{host} epoch ", " is over, "),
        first(found, "w1 generation ", " goes to "),
        first(found, " runs, generation "),
        first(found, "w1 generation ", " is ready"),
    ]
    if None in marks:
        sys.exit(f"a phase is missing: {marks}\n" + "\n".join(text for _, text in found))
    if watchdog_alone:
        lab("host", "fence-mode", host, "honest")
    lab("host", "power", "on", host)
    wait("all hosts in service", lambda: in_service(others[0]))
    return [after - before for before, after in zip(marks, marks[1:])]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--watchdog-alone", action="store_true")
    options.add_argument("--json", metavar="FILE")
    options = options.parse_args()
    shared = f"/var/lib/virtward-lab/{LAB}/shared"
    text = f'[ha]\nwatchdog = "@WATCHDOG@"\nlease-dirs = ["{shared}"]\nmemory = "8GiB"\n'
    for host in HOSTS:
        text += f'[[ha.fence]]\nhost = "{host}"\nname = "pdu-{host}"\nagent = "@FENCE_AGENT@"\nparameters = {{ plug = "{host}" }}\n'
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(text)
        config.flush()
        lab("up", "--hosts", "3", "--etcd", "--daemon", f"{BIN}/virtward", "--daemon-config", config.name)
    runs = []
    try:
        for host in HOSTS:
            lab("host", "libvirtd", "restart", host)
        wait("all hosts in service", lambda: in_service("h2"))
        lab("vm", "create", "w1", "--host", "h1", "--writer", "--wait")
        wait("protection", lambda: virtward("h2", "ha", "enable", "w1", "--json"))
        wait("readiness", lambda: (now := vm("h2")) and now["ready"])
        for number in range(options.runs):
            runs.append(one(options.watchdog_alone))
            print(f"run {number + 1}: " + ", ".join(f"{p} {s:.1f} s" for p, s in zip(PHASES, runs[-1])), flush=True)
        print(lab("vm", "check-writers", "w1").strip().splitlines()[-1])
    finally:
        lab("down")
    running = sorted(sum(run[:4]) for run in runs)
    print(f"\npower cut to guest running: median {statistics.median(running):.1f} s, "
          f"fastest {running[0]:.1f} s, slowest {running[-1]:.1f} s, of {len(runs)}")
    for number, phase in enumerate(PHASES):
        took = sorted(run[number] for run in runs)
        print(f"  {phase:8} median {statistics.median(took):5.1f} s, slowest {took[-1]:5.1f} s")
    if options.json:
        with open(options.json, "w") as out:
            json.dump({"phases": PHASES, "runs": runs, "watchdog_alone": options.watchdog_alone}, out)


main()
