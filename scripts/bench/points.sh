# Many restore points: sourced by bench.sh. Small disks of some VMs, each with many states, the same for all tools.
#
# The programs would need hours to make them one by one. restic's and borg's repositories are made by points_restic.py and
# points_borg.py, which say how, and kept for the next run; ours by an example of the library, anew each time. All are
# laid out as after a collection (prune, compact). What is measured is the programs as users call them.

point_vms=20

# Sets point_states, and $points_cache with what restic and borg have.
make_points() {
    local vm begin states=$run/points/states
    point_states=500
    [ -z "$quick" ] || point_states=10
    points_cache=$cache/points-$point_vms-$point_states-$(cat "$here"/bench/points_*.py | sha256sum | cut -c 1-12)
    [ ! -e "$points_cache/complete" ] || return 0
    say "making $((point_vms * point_states)) restore points with restic and borg (once; kept in $cache)"
    rm -rf "$cache"/points-*
    mkdir -p "$points_cache"
    begin=$(($(date +%s) - 3600 * point_states))
    restic_points "$points_cache" && restic init -q --repository-version 2
    borg_points "$points_cache" && borg init -e repokey-blake2 2>"$run/errors"
    for vm in $(seq -f %02g 0 $((point_vms - 1))); do
        "$bin/examples/points_scale" states "$states" "$((10#$vm))" "$point_states"
        (cd "$states" && restic -q backup --host "vm-$vm-all" .) >"$run/output" 2>"$run/errors" ||
            die_with "$run/errors" "restic cannot make snapshots"
        "$(sed -n '1s/^#! *//p' "$(command -v borg)")" -I "$here/bench/points_borg.py" "$BORG_REPO" "vm-$vm" "$begin" \
            "$states"/*/disk.raw 2>"$run/errors" || die_with "$run/errors" "cannot make borg's archives"
        rm -rf "$states"
    done
    python3 -I "$here/bench/points_restic.py" "$begin" 2>"$run/errors" ||
        die_with "$run/errors" "cannot add restic's snapshots"
    touch "$points_cache/complete"
}

restic_points() { export RESTIC_REPOSITORY=$1/restic RESTIC_PASSWORD=benchmark RESTIC_CACHE_DIR=$1/restic-cache; }
borg_points() {
    export BORG_REPO=$1/borg BORG_PASSPHRASE=benchmark BORG_BASE_DIR=$1/borg-home BORG_RELOCATED_REPO_ACCESS_IS_OK=yes
}

measure_points() {
    make_points
    local tool middle next=$run/points/vm-07/disk.raw expected=$run/points/expected.raw
    "$bin/examples/points_scale" image "$next" 7 "$point_states"
    "$bin/examples/points_scale" image "$expected" 7 $((point_states / 2))
    say "$((point_vms * point_states)) restore points"
    printf '{"tool": "points", "operation": "made", "count": %s}\n' $((point_vms * point_states)) >>"$results"
    points_virtward
    for tool in restic borg; do
        cp -a "$points_cache/$tool"* "$run/points/"
        "points_$tool"
    done
    rm -rf "$run/points"
}

# Everything has been listed once before, as on a host that works with the repository every day.
points_virtward() {
    local v=$bin/virtward tool=points-virtward place=$run/points/virtward
    "$bin/examples/points_scale" make "$place" "$point_vms" "$point_states" "$run/points/key" >"$run/output" \
        2>"$run/errors" || die_with "$run/errors" "cannot make restore points"
    printf '%s\n' "repo = \"$place\"" "key-file = \"$run/points/key\"" "cache-dir = \"$run/points/cache\"" \
        "runtime-dir = \"$run/points/runtime\"" >"$run/points/config.toml"
    export VIRTWARD_CONFIG=$run/points/config.toml
    stored $tool full "$place"
    middle=$("$v" backup list image/vm-07 --json | python3 -Ic \
        'import json, sys; points = json.load(sys.stdin); print(points[len(points) // 2]["id"])')
    measure $tool list -- "$v" backup list
    measure $tool backup -- "$v" backup image "$next" --name vm-07 --format raw --json
    measure $tool restore -- "$v" restore disk "$middle" --to "$run/points/restored" --format raw
    same "$expected" "$run/points/restored" $tool
    measure $tool verify -- "$v" backup verify --all --mode full
    measure $tool delete -- "$v" backup prune --keep-last $((point_states * 9 / 10)) --json
    measure $tool collect -- "$v" repo gc --grace 0
    rm -rf "$place" "$run/points/restored"
}

points_restic() {
    local tool=points-restic
    restic_points "$run/points"
    stored $tool full "$RESTIC_REPOSITORY"
    middle=$(restic snapshots --json --host vm-07 | python3 -Ic \
        'import json, sys; points = sorted(json.load(sys.stdin), key=lambda p: p["time"])
print(points[len(points) // 2]["id"])')
    measure $tool list -- restic snapshots
    measure $tool backup -- restic -q backup --host vm-07 "$next"
    measure $tool restore -- restic -q restore "$middle" --target "$run/points/restored"
    same "$expected" "$run/points/restored/disk.raw" $tool
    measure $tool verify -- restic -q check --read-data
    measure $tool delete -- restic -q forget --group-by host --keep-last $((point_states * 9 / 10))
    measure $tool collect -- restic -q prune
    rm -rf "$RESTIC_REPOSITORY" "$run/points/restored"
}

points_borg() {
    local tool=points-borg
    borg_points "$run/points"
    stored $tool full "$BORG_REPO"
    middle=vm-07-$(printf %04d $((point_states / 2)))
    borg list >"$run/output" 2>"$run/errors" || die_with "$run/errors" "borg list failed"
    measure $tool list -- borg list
    measure $tool backup -- borg create -C zstd,1 ::vm-07-next "$next"
    mkdir -p "$run/points/restored"
    measure $tool restore -- env -C "$run/points/restored" borg extract "::$middle"
    same "$expected" "$run/points/restored/disk.raw" $tool
    measure $tool verify -- borg check --verify-data
    # The oldest tenth of each VM's: of 500, those from 0000 to 0049.
    local oldest="vm-*-00[0-$((point_states / 100 - 1))]?"
    [ "$point_states" -ge 100 ] || oldest="vm-*-0000"
    measure $tool delete -- borg delete --glob-archives "$oldest"
    measure $tool collect -- borg compact
    rm -rf "$BORG_REPO" "$run/points/restored"
}
