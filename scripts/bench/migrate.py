#!/usr/bin/env python3
"""Live migration of a busy guest: virtward against virsh migrate --live, in turns, of the same guest in the same run.

    scripts/bench/migrate.py [--runs 10] [--dirty 16MiB] [--hot] [--json FILE]

In a lab of two hosts. The guest rewrites --dirty of its memory all the time, and writes to its disk. Told are the time
of the whole command, QEMU's own measure of the downtime (domjobinfo of the destination), and the longest gap in a log
that the guest sends every 10 ms over the network. --hot also has a guest that dirties memory faster than it can be sent
at a limited bandwidth, and asks who brings it over within two minutes.
"""
import argparse, json, os, re, socket, statistics, subprocess, sys, threading, time

LAB = "migratebench"
BIN = os.environ.get("VIRTWARD_BIN", "target/release")
LIMIT = 120


def run(command, limit=180):
    return subprocess.run(command, capture_output=True, text=True, timeout=limit)


def lab(*arguments):
    done = run([f"{BIN}/virtward-lab", "--name", LAB, *arguments])
    if done.returncode:
        sys.exit(f"virtward-lab {' '.join(arguments)}: {done.stderr}{done.stdout}")
    return done.stdout


def mib(text):
    return int(re.sub(r"\D", "", text))


class Log:
    """The guest's lines, each with the time at which it came."""

    def __init__(self, network):
        self.times = []
        self.server = socket.create_server((f"{network}.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        connection, _ = self.server.accept()
        with connection.makefile() as lines:
            for _ in lines:
                self.times.append(time.monotonic())

    def gap_ms(self, since):
        time.sleep(0.5)
        times = [at for at in self.times if at >= since]
        return max((b - a) * 1000 for a, b in zip(times, times[1:]))


def guest(network, log, dirty):
    lab("vm", "create", "busy", "--host", "h1", "--disk", "1GiB", "--fill", "20MiB", "--wait")
    script = f"""
    dev=$(ls /sys/class/net | grep -v lo | head -n 1)
    ip addr add {network}.77/24 dev $dev; ip link set $dev up
    (i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done | nc {network}.1 {log.port}) >/dev/null 2>&1 </dev/null &
    mkdir -p /dev/shm
    (setsid sh -c 'while :; do dd if=/dev/urandom of=/dev/shm/x bs=256k count={dirty * 4} conv=notrunc 2>/dev/null
      dd if=/dev/urandom of=/data/load bs=256k count=4 conv=fsync 2>/dev/null; usleep 50000; done') >/dev/null 2>&1 </dev/null &
    """
    lab("vm", "exec", "busy", "--", "sh", "-c", script)


def command(tool, uris, source, to, bandwidth):
    if tool == "virsh":
        limit = [] if bandwidth is None else ["--bandwidth", str(bandwidth)]
        return ["virsh", "-c", uris[source], "migrate", "--live", "--p2p", "--unsafe", *limit, "busy", uris[to]]
    limit = [] if bandwidth is None else ["--bandwidth", f"{bandwidth}MiB"]
    return [f"{BIN}/virtward", "--json", "--connect", uris[source], "vm", "migrate", "busy", "--to", uris[to], *limit]


def downtime_ms(uri):
    told = run(["virsh", "-c", uri, "domjobinfo", "busy", "--completed"]).stdout
    found = re.search(r"Total downtime:\s+(\d+)\s+ms", told)
    return int(found.group(1)) if found else None


def one(tool, uris, source, to, log, bandwidth=None):
    began = time.monotonic()
    try:
        done = run(command(tool, uris, source, to, bandwidth), LIMIT)
    except subprocess.TimeoutExpired:
        # Called back: it goes on at the source.
        run(["virsh", "-c", uris[source], "domjobabort", "busy"])
        time.sleep(3)
        return None
    took = time.monotonic() - began
    if done.returncode not in (0, 1):
        return None
    return {"tool": tool, "total_s": took, "downtime_ms": downtime_ms(uris[to]), "gap_ms": log.gap_ms(began)}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--dirty", type=mib, default=16)
    options.add_argument("--hot", action="store_true")
    options.add_argument("--json", metavar="FILE")
    options = options.parse_args()
    hosts = json.loads(lab("up", "--hosts", "2", "--json"))["hosts"]
    uris = {host["name"]: host["tcp_uri"] for host in hosts}
    network = re.search(r"//([\d.]+)\.\d+[:/]", uris["h1"]).group(1)
    results = []
    try:
        log = Log(network)
        guest(network, log, options.dirty)
        source, to = "h1", "h2"
        for number in range(options.runs):
            for tool in ("virsh", "virtward") if number % 2 == 0 else ("virtward", "virsh"):
                result = one(tool, uris, source, to, log)
                if result is None:
                    sys.exit(f"{tool} did not migrate the guest")
                results.append(result)
                source, to = to, source
                time.sleep(1)
        for tool in ("virsh", "virtward"):
            own = [result for result in results if result["tool"] == tool]
            middle = {name: statistics.median(of[name] for of in own) for name in ("total_s", "downtime_ms", "gap_ms")}
            print(f"{tool:9} total {middle['total_s']:6.2f} s   downtime {middle['downtime_ms']:5.0f} ms   "
                  f"longest gap outside {middle['gap_ms']:5.0f} ms   (medians of {len(own)})", flush=True)
        if options.hot:
            for tool in ("virsh", "virtward"):
                began = time.monotonic()
                result = one(tool, uris, source, to, log, bandwidth=max(1, options.dirty // 4))
                if result is None:
                    print(f"{tool:9} did not bring over a guest that dirties more than the link carries: {time.monotonic() - began:.0f} s")
                else:
                    print(f"{tool:9} brought it over in {result['total_s']:.1f} s, downtime {result['downtime_ms']} ms")
                    source, to = to, source
    finally:
        lab("down")
    if options.json:
        with open(options.json, "w") as out:
            json.dump(results, out)


main()
