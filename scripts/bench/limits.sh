# What this machine can do at best, and what it is: sourced by bench.sh.
#
# A full backup has to read the data, hash, compress and encrypt them. Each is measured alone, on one core, on the data
# of the disk (its allocated clusters, as qemu-img puts them one after the other into a qcow2 file). What counts is CPU
# seconds, so that something else at work on the machine does not make the limit look lower than it is.

limit() { printf '{"tool": "limit", "operation": "%s", "per_second": %.0f}\n' "$1" "$2" >>"$results"; }

# CPU seconds of a command that reads the data from its standard input.
seconds_of() {
    local TIMEFORMAT='%U %S'
    { time "$@" <"$disks/state1.qcow2" >/dev/null 2>&1; } 2>&1 | awk '{print $1 + $2}'
}

measure_limits() {
    local bytes reading hashing packing n aes
    say "measuring the limits of this machine"
    bytes=$(stat -c %s "$disks/state1.qcow2")
    printf '{"tool": "limit", "operation": "data", "bytes": %s}\n' "$bytes" >>"$results"
    prime "$disks/state1.qcow2"
    for ((n = 0; n < runs; n++)); do
        reading=$(seconds_of cat)
        hashing=$(seconds_of b3sum --num-threads 1 --no-mmap)
        packing=$(seconds_of zstd -1 --single-thread -q -c)
        limit read "$(awk -v b="$bytes" -v s="$reading" 'BEGIN {print b / s}')"
        # The other two read as well.
        limit hash "$(awk -v b="$bytes" -v s="$hashing" -v r="$reading" 'BEGIN {print b / (s - r)}')"
        limit zstd "$(awk -v b="$bytes" -v s="$packing" -v r="$reading" 'BEGIN {print b / (s - r)}')"
        aes=$(openssl speed -mr -seconds 1 -bytes 1048576 -evp aes-256-gcm 2>/dev/null |
            awk -F: '/^\+F:/ {print $NF}')
        limit aes "${aes:?no figure from openssl speed}"
    done
}

# The machine and the versions, as JSON for the report.
describe() {
    python3 -I - "$bin/virtward" "$disk_mib" "$change_mb" "$(wc -l <"$disks/packages")" "$load" "$work" "$quick" <<'PYTHON'
import datetime, json, os, re, subprocess, sys

virtward, disk_mib, change_mb, packages, load, work, quick = sys.argv[1:]

def first(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "?").splitlines()[0]

def field(text, name):
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
    return found.group(1) if found else "?"

def package(name):
    return first("dpkg-query", "-W", "-f", "${Version}", name)

os_release = dict(line.rstrip().split("=", 1) for line in open("/etc/os-release") if "=" in line)
print(json.dumps({
    "date": datetime.date.today().isoformat(),
    "disk_mib": int(disk_mib), "change_mb": int(change_mb), "packages": int(packages),
    "load": float(load), "quick": bool(quick),
    "processor": field(open("/proc/cpuinfo").read(), "model name"),
    "cores": os.cpu_count(),
    "memory_gib": round(int(field(open("/proc/meminfo").read(), "MemTotal").split()[0]) / (1 << 20), 1),
    "virtual": first("systemd-detect-virt", "--vm") if os.path.exists("/usr/bin/systemd-detect-virt") else "?",
    "kernel": os.uname().release,
    "system": os_release.get("PRETTY_NAME", "?").strip('"'),
    "file_system": first("findmnt", "-n", "-o", "FSTYPE", "-T", work),
    "versions": {
        "virtward": first(virtward, "--version"),
        "restic": first("restic", "version"),
        "borg": first("borg", "--version"),
        "qemu-img": first("qemu-img", "--version"),
        "virtnbdbackup": "virtnbdbackup " + package("virtnbdbackup"),
        "libvirt": "libvirt " + package("libvirt0"),
        "b3sum, zstd, openssl": ", ".join([first("b3sum", "--version"), "zstd " + package("zstd"), first("openssl", "version")]),
    },
}))
PYTHON
}
