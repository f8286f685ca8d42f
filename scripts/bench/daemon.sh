# The daemon with 10,000 VMs: sourced by bench.sh.
#
# One process: the daemon as in production, with its state file, and a simulated host, whose VMs exist in memory only.

measure_daemon() {
    local place=$run/daemon
    say "daemon with $daemon_vms VMs"
    "$bin/examples/daemon_scale" "$place" "$daemon_vms" 20 50 >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "the daemon does not bear $daemon_vms VMs"
    sed 's/^{/{"tool": "daemon", "operation": "scale", /' "$run/output" >>"$results"
    rm -rf "$place"
}
