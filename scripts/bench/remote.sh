# Object storage far away: sourced by bench.sh. A real S3 server on this machine, and 30 ms between it and the client.
#
# The server shares the cores with what is measured; a local directory on the same file system is measured beside it, and the
# same server without the distance: what is left between these two is the server's own work.

remote_delay_ms=30

remote() {
    local v=$bin/virtward place
    for place in local near remote; do
        rm -rf "$run/repo" "$run/home" "$run/restored" "$run/source"
        mkdir -p "$run/repo/backups" "$run/home" "$run/restored"
        [ "$place" = local ] || start_object_storage "$place"
        remote_settings $place
        use_state 2
        measure "s3-$place" full -- "$v" backup image "$run/source/disk.raw" --name bench --format raw --json
        prime "$run/repo"
        measure "s3-$place" restore -- "$v" restore disk image/bench@latest --to "$run/restored/disk.raw" --format raw
        same "$disks/state2.raw" "$run/restored/disk.raw" "virtward ($place)"
        # The index as another host has it that never saw the repository.
        rm -rf "$run/home/cache" "$run/restored/disk.raw"
        measure "s3-$place" restore-elsewhere -- "$v" restore disk image/bench@latest --to "$run/restored/disk.raw" \
            --format raw
        prime "$run/repo"
        measure "s3-$place" verify -- "$v" backup verify --all --mode full
        [ "$place" = local ] || stop_object_storage
    done
    rm -rf "$run/repo" "$run/home" "$run/restored" "$run/source"
}

remote_settings() {
    local repo=$run/repo/r
    [ "$1" = local ] || repo=s3://backups/r
    mkdir -p "$run/home/runtime" "$run/home/cache"
    printf '%s\n' "repo = \"$repo\"" "key-file = \"$run/home/repo.key\"" "runtime-dir = \"$run/home/runtime\"" \
        "cache-dir = \"$run/home/cache\"" >"$run/home/config.toml"
    [ "$1" = local ] || printf '%s\n' '[s3]' "endpoint = \"http://127.0.0.1:$far_port\"" >>"$run/home/config.toml"
    export VIRTWARD_CONFIG=$run/home/config.toml
    "$bin/virtward" repo init --quiet >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "virtward repo init failed ($1)"
}

# start_object_storage near|remote: sets far_port. Both processes end with this one: the server is told so by the kernel, the other by its standard input.
start_object_storage() {
    export AWS_ACCESS_KEY_ID=BENCHMARK AWS_SECRET_ACCESS_KEY=benchmark AWS_REGION=us-east-1
    local near_port delay=0
    [ "$1" = near ] || delay=$remote_delay_ms
    near_port=$(python3 -Ic 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
    RUST_LOG=error setpriv --pdeathsig KILL "$s3_server" --host 127.0.0.1 --port "$near_port" \
        --access-key $AWS_ACCESS_KEY_ID --secret-key $AWS_SECRET_ACCESS_KEY "$run/repo" >"$run/s3.log" 2>&1 9>&- &
    s3_pid=$!
    for _ in $(seq 100); do
        (: <"/dev/tcp/127.0.0.1/$near_port") 2>/dev/null && break
        kill -0 $s3_pid 2>/dev/null || die_with "$run/s3.log" "the S3 server does not start"
        sleep 0.1
    done
    coproc distance { exec python3 -I "$here/bench/distance.py" "$near_port" $delay 9>&-; }
    distance_pid=$distance_PID
    read -r far_port <&"${distance[0]}" || die "the way to the S3 server does not start"
}

stop_object_storage() {
    kill $s3_pid
    wait $s3_pid 2>/dev/null || true
    eval "exec ${distance[1]}>&-"
    wait $distance_pid 2>/dev/null || true
    unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION
}
