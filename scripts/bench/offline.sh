# Backup of disk images that no guest uses: sourced by bench.sh. Each function is one tool's full round.
#
# restic and borg tell a changed file by its path, so both states appear under one name, $run/source/disk.raw.

use_state() {
    mkdir -p "$run/source"
    ln -f "$disks/state$1.raw" "$run/source/disk.raw"
    prime "$disks/state$1.raw"
}

offline() {
    local tool
    for tool in virtward restic borg borg_disk qemu_plain qemu_zstd; do
        rm -rf "$run/repo" "$run/home" "$run/restored" "$run/source"
        mkdir -p "$run/repo" "$run/home" "$run/restored"
        "offline_$tool"
    done
    rm -rf "$run/repo" "$run/home" "$run/restored" "$run/source"
}

# A configuration as `repo init` makes it: a key file, encryption, all defaults.
virtward_settings() {
    mkdir -p "$run/home/runtime" "$run/home/scratch"
    printf '%s\n' "repo = \"$run/repo/r\"" "key-file = \"$run/home/repo.key\"" \
        "runtime-dir = \"$run/home/runtime\"" "scratch-dir = \"$run/home/scratch\"" >"$run/home/config.toml"
    export VIRTWARD_CONFIG=$run/home/config.toml
    "$bin/virtward" repo init --quiet >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "virtward repo init failed"
}

offline_virtward() {
    local tool=virtward v=$bin/virtward
    virtward_settings
    use_state 1
    measure $tool full -- "$v" backup image "$run/source/disk.raw" --name bench --format raw --json
    stored $tool full "$run/repo"
    use_state 2
    measure $tool incremental -- "$v" backup image "$run/source/disk.raw" --name bench --format raw --json
    stored $tool both "$run/repo"
    prime "$run/repo"
    measure $tool restore -- "$v" restore disk image/bench@latest --to "$run/restored/disk.raw" --format raw
    same "$disks/state2.raw" "$run/restored/disk.raw" $tool
    prime "$run/repo"
    measure $tool verify -- "$v" backup verify --all --mode full
    measure $tool verify-ciphertext -- "$v" backup verify --all --mode ciphertext
}

offline_restic() {
    local tool=restic sparse=()
    export RESTIC_REPOSITORY=$run/repo/r RESTIC_PASSWORD=benchmark RESTIC_CACHE_DIR=$run/home/cache
    restic restore --help | grep -q -- --sparse && sparse=(--sparse)
    restic init -q --repository-version 2
    use_state 1
    measure $tool full -- restic -q backup --compression auto "$run/source/disk.raw"
    stored $tool full "$run/repo"
    use_state 2
    measure $tool incremental -- restic -q backup --compression auto "$run/source/disk.raw"
    stored $tool both "$run/repo"
    prime "$run/repo"
    measure $tool restore -- restic -q restore latest --target "$run/restored" "${sparse[@]}"
    same "$disks/state2.raw" "$run/restored$run/source/disk.raw" $tool
    prime "$run/repo"
    measure $tool verify -- restic -q check --read-data
}

offline_borg() { borg_round borg --; }

# What borg's manual advises for disk images and devices.
offline_borg_disk() { borg_round borg-disk --chunker-params=fixed,4194304 --sparse; }

# borg_round TOOL OPTIONS OF CREATE...
borg_round() {
    local tool=$1 options=("${@:2}")
    [ "${options[0]}" != -- ] || options=()
    export BORG_REPO=$run/repo/r BORG_PASSPHRASE=benchmark BORG_BASE_DIR=$run/home
    borg init -e repokey-blake2 2>"$run/errors" || die_with "$run/errors" "borg init failed"
    use_state 1
    measure "$tool" full -- borg create -C zstd,1 "${options[@]}" ::first "$run/source/disk.raw"
    stored "$tool" full "$run/repo"
    use_state 2
    measure "$tool" incremental -- borg create -C zstd,1 "${options[@]}" ::second "$run/source/disk.raw"
    stored "$tool" both "$run/repo"
    prime "$run/repo"
    measure "$tool" restore -- env -C "$run/restored" borg extract --sparse ::second
    same "$disks/state2.raw" "$run/restored$run/source/disk.raw" "$tool"
    prime "$run/repo"
    measure "$tool" verify -- borg check --verify-data
}

offline_qemu_plain() { qemu_round qemu-img; }
offline_qemu_zstd() { qemu_round qemu-img-zstd -c -o compression_type=zstd; }

# qemu-img knows whole copies only, has no checksums to verify, and encrypts nothing here.
qemu_round() {
    local tool=$1
    use_state 1
    measure "$tool" full -- qemu-img convert -f raw -O qcow2 "${@:2}" "$run/source/disk.raw" "$run/repo/1.qcow2"
    stored "$tool" full "$run/repo"
    use_state 2
    measure "$tool" incremental -- qemu-img convert -f raw -O qcow2 "${@:2}" "$run/source/disk.raw" "$run/repo/2.qcow2"
    stored "$tool" both "$run/repo"
    prime "$run/repo"
    measure "$tool" restore -- qemu-img convert -f qcow2 -O raw "$run/repo/2.qcow2" "$run/restored/disk.raw"
    same "$disks/state2.raw" "$run/restored/disk.raw" "$tool"
}
