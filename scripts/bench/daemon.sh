# The daemon with 10,000 VMs, on one host and on 1,000: sourced by bench.sh.
#
# One process: the daemon as in production, and a simulated host, whose VMs exist in memory only. Alone it has its state
# file. In the cluster the state is in an etcd beside it, and the other hosts are what their daemons would publish there.

measure_daemon() {
    local place=$run/daemon
    say "daemon with $daemon_vms VMs"
    measure_daemon_of scale "$place" "$daemon_vms" 20 50
    command -v etcd >/dev/null || { say "no etcd: the cluster is left out"; return; }
    say "daemon with $daemon_vms VMs on $daemon_hosts hosts"
    # Ports of one's own; the kernel gives no two listeners the same.
    local port=$((20000 + RANDOM % 20000)) etcd
    etcd --data-dir "$place-etcd" --listen-client-urls "http://127.0.0.1:$port" --advertise-client-urls "http://127.0.0.1:$port" \
        --listen-peer-urls "http://127.0.0.1:$((port + 1))" --initial-advertise-peer-urls "http://127.0.0.1:$((port + 1))" \
        --initial-cluster "default=http://127.0.0.1:$((port + 1))" >"$run/etcd" 2>&1 9>&- &
    etcd=$!
    measure_daemon_of cluster "$place" "$daemon_vms" 20 50 "$daemon_hosts" "http://127.0.0.1:$port"
    kill "$etcd"
    wait "$etcd" || true
    rm -rf "$place-etcd"
}

# OPERATION DIR ARGUMENTS…
measure_daemon_of() {
    local operation=$1 place=$2
    shift
    "$bin/examples/daemon_scale" "$@" >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "the daemon does not bear it: $*"
    sed "s/^{/{\"tool\": \"daemon\", \"operation\": \"$operation\", /" "$run/output" >>"$results"
    rm -rf "$place"
}
