#!/bin/bash
# Compares Virtward with other backup tools on this machine: bench.sh [--quick] [--report FILE] [--parts LIST]
#
# Makes a 4 GiB disk with about 1.3 GiB of a real Debian file system, and the same disk with about 50 MB changed. Every
# tool backs up the first state (full), then the second (incremental), restores the second to a new file (which is
# compared), and verifies all that it stored. Virtward and virtnbdbackup do so with a running guest too, and Virtward over
# object storage that is 30 ms away. Then all work with repositories of 10,000 restore points, a daemon has 10,000 VMs to look after, on one host and on 1,000, and an index of 100 million chunks is made
# and measured. Everything is in the page cache before each measurement. Prints tables and writes docs/benchmarks.md.
#
#   --quick          a small disk, one run: to try the benchmark itself; writes no report unless --report is given
#   --report FILE    write the report there
#   --parts LIST     only these, for a machine that is free for minutes at a time: prepare (makes what takes long and measures
#                    nothing), limits, offline, hot, remote, points, daemon, scale, report; separated by commas. What they
#                    measure is added to what earlier calls with the same binary measured
#
#   BENCH_RUNS       how often everything is repeated; medians are shown (3)
#   BENCH_DIR        work directory (/var/tmp/virtward-bench); what takes long to make stays there for the next run
#   BENCH_BIN        directory of virtward and virtward-lab (target/release)
#   BENCH_S3_SERVER  the program s3s-fs (target/tools/fast/bin/s3s-fs)
#   BENCH_STRICT=1   fail if a goal is not met
#   BENCH_MIRROR, BENCH_SUITE   where the disk's Debian comes from (deb.debian.org, this system's release)
set -Eeuo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
bin=${BENCH_BIN:-$top/target/release}
work=${BENCH_DIR:-/var/tmp/virtward-bench}
runs=${BENCH_RUNS:-3}
quick=
report=
all_parts=prepare,limits,offline,hot,remote,points,daemon,scale,report
parts=
disk_mib=4096
change_mb=50
need_gib=20
scale_chunks=100000000
daemon_vms=10000
daemon_hosts=1000

say() { printf 'bench: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}
# $1: a log to show the end of
die_with() {
    tail -n 20 "$1" >&2
    shift
    die "$*"
}

while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 disk_mib=1024 change_mb=12 need_gib=3 scale_chunks=1000000 daemon_vms=1000 daemon_hosts=100 runs=${BENCH_RUNS:-1} ;;
        --report)
            report=${2:?--report needs a file}
            shift
            ;;
        --parts)
            parts=${2:?--parts needs a list}
            shift
            ;;
        -h | --help)
            sed -n '2,/^set -E/{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        *) die "unknown argument '$1' (bench.sh --help)" ;;
    esac
    shift
done
[ -n "$report" ] || [ -n "$quick" ] || report=$top/docs/benchmarks.md
for part in ${parts//,/ }; do
    [[ ,$all_parts, == *,$part,* ]] || die "unknown part '$part'; there are $all_parts"
done
# Whether a part is to be run.
wanted() { [ -z "$parts" ] || [[ ,$parts, == *,$1,* ]]; }

[ "$(id -u)" = 0 ] || die "needs root: it mounts a disk image and runs guests under a libvirt of its own"
for tool in restic borg virtnbdbackup virtnbdrestore qemu-img mke2fs dpkg-deb b3sum zstd openssl python3 virsh flock; do
    command -v "$tool" >/dev/null || die "$tool is missing; install what is needed with: scripts/setup.sh bench"
done
for tool in virtward virtward-lab; do
    [ -x "$bin/$tool" ] || die "$bin/$tool is missing; build it with: cargo build --release"
done
for need in scale:repo/index_scale prepare:repo/points_scale points:repo/points_scale daemon:server/daemon_scale; do
    example=${need#*:}
    ! wanted "${need%%:*}" || [ -x "$bin/examples/${example#*/}" ] ||
        die "$bin/examples/${example#*/} is missing; build it with: cargo build --release -p virtward-${example%/*} --example ${example#*/}"
done
s3_server=${BENCH_S3_SERVER:-${CARGO_TARGET_DIR:-$top/target}/tools/fast/bin/s3s-fs}
[ -x "$s3_server" ] || die "$s3_server is missing; build it with: scripts/setup.sh bench"
case $runs in '' | *[!0-9]* | 0) die "BENCH_RUNS is '$runs'; give a number above 0" ;; esac

cache=$work/cache
mkdir -p "$cache"
exec 9>"$work/lock"
flock -n 9 || die "another benchmark runs in $work"

# The lab's disks are under /var/lib.
free_gib() { df --output=avail -B1G "$1" | tail -n 1 | tr -d ' '; }
for place in "$work" /var/lib; do
    [ "$(free_gib "$place")" -ge "$need_gib" ] ||
        die "$place has $(free_gib "$place") GiB free, $need_gib are needed; name another work directory in BENCH_DIR"
done

lab=bench$$
run=$work/run
# Measured by all calls with one binary; those of another would say nothing about it.
results=$work/${quick:+quick-}results.jsonl
disks=

# A benchmark that was killed left its files and its lab; the lock says that it is gone.
clean() {
    local name
    if [ -e "$run/lab" ]; then
        name=$(cat "$run/lab")
        "$bin/virtward-lab" down --name "$name" >/dev/null 2>&1 9>&- || say "cannot remove the lab $name"
    fi
    rm -rf "$run"
}
clean
trap clean EXIT
trap 'say "line $LINENO: failed: $BASH_COMMAND"' ERR
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir -p "$run"

# Everything that the tools keep goes below the work directory, and none of the user's own settings counts.
unset "${!VIRTWARD_@}" "${!RESTIC_@}" "${!BORG_@}" LIBVIRT_DEFAULT_URI
export TMPDIR=$run/tmp LC_ALL=C
mkdir -p "$TMPDIR"

# Without --parts everything is measured anew.
begin_results() {
    local build
    build=$(sha256sum <"$bin/virtward" | cut -c 1-16)
    if [ -z "$parts" ] || [ "$(cat "$results.build" 2>/dev/null)" != "$build" ]; then
        rm -f "$results"
        echo "$build" >"$results.build"
    fi
    touch "$results"
}

# measure TOOL OPERATION [--beside PID] -- COMMAND...: see measure.py. Nothing of earlier work is still being written.
measure() {
    sync
    python3 -I "$here/bench/measure.py" "$results" "$@" >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "$1: $2 failed"
}
# Reads everything once, so that it comes from memory when it counts.
prime() { find "$@" -type f -exec cat {} + >/dev/null; }
# stored TOOL full|both PATH...: the bytes of the files there.
stored() {
    local tool=$1 when=$2 bytes
    shift 2
    bytes=$(find "$@" -type f -printf '%s\n' | awk '{sum += $1} END {printf "%d", sum}')
    printf '{"tool": "%s", "operation": "stored-%s", "bytes": %s}\n' "$tool" "$when" "$bytes" >>"$results"
}
# same FILE FILE TOOL: a restore that brings back something else is no restore.
same() { cmp -s "$1" "$2" || die "$3 restored something else than was backed up"; }

# shellcheck source=scripts/bench/image.sh
. "$here/bench/image.sh"
# shellcheck source=scripts/bench/offline.sh
. "$here/bench/offline.sh"
# shellcheck source=scripts/bench/hot.sh
. "$here/bench/hot.sh"
# shellcheck source=scripts/bench/limits.sh
. "$here/bench/limits.sh"
# shellcheck source=scripts/bench/points.sh
. "$here/bench/points.sh"
# shellcheck source=scripts/bench/scale.sh
. "$here/bench/scale.sh"
# shellcheck source=scripts/bench/daemon.sh
. "$here/bench/daemon.sh"
# shellcheck source=scripts/bench/remote.sh
. "$here/bench/remote.sh"

say "work directory $work, $runs run(s), disk of $disk_mib MiB"
begin_results
make_disks
load=$(cut -d ' ' -f 1 /proc/loadavg)
awk -v load="$load" 'BEGIN {exit !(load > 0.5)}' &&
    say "note: the load of this machine is $load already; times will be worse than they could be, for all tools"
if wanted prepare; then make_points; fi
if wanted limits; then measure_limits; fi
if wanted offline; then
    for n in $(seq "$runs"); do
        say "disk images, run $n of $runs"
        offline
    done
fi
if wanted hot; then
    start_lab
    for n in $(seq "$runs"); do
        say "running guest, run $n of $runs"
        hot
    done
    stop_lab
fi
if wanted remote; then
    for n in $(seq "$runs"); do
        say "object storage, run $n of $runs"
        remote
    done
fi
if wanted points; then measure_points; fi
if wanted daemon; then measure_daemon; fi
# Last: it writes gigabytes, which would still be on their way to the disk while others are measured.
if wanted scale; then measure_scale; fi
wanted report || exit 0
describe >"$run/machine.json"

python3 -I "$here/bench/report.py" "$results" "$run/machine.json" ${report:+--write "$report"} \
    ${BENCH_STRICT:+--strict}
