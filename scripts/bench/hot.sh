# Backup of a running guest: sourced by bench.sh. One lab host, one guest with the benchmark's disk.
#
# Every round starts with a fresh guest on the first state of the disk and no checkpoints; between full and incremental
# the guest itself makes the changes. The tools run inside the host, beside its libvirtd. The guest's disk goes through
# the page cache (the lab's own default does not), because the comparison is about the tools and not about this disk.

guest=bench

host() { "$bin/virtward-lab" host exec h1 --name "$lab" -- "$@" 9>&-; }
guest_do() { "$bin/virtward-lab" vm exec $guest --name "$lab" -- "$@" 9>&-; }

start_lab() {
    say "starting a lab of one host"
    echo "$lab" >"$run/lab"
    "$bin/virtward-lab" up --name "$lab" --hosts 1 >"$run/output" 2>&1 9>&- ||
        die_with "$run/output" "cannot start a lab"
    "$bin/virtward-lab" vm create $guest --name "$lab" --host h1 --disk "${disk_mib}MiB" --no-start --json \
        >"$run/guest.json" 2>"$run/errors" 9>&- || die_with "$run/errors" "cannot make a guest"
    guest_disk=$(python3 -Ic 'import json, sys; print(json.load(open(sys.argv[1]))["disks"][0])' "$run/guest.json")
    host virsh dumpxml $guest | sed "s/cache='none'/cache='writeback'/" >"$run/guest.xml"
}

stop_lab() {
    "$bin/virtward-lab" down --name "$lab" >"$run/output" 2>&1 9>&- || die_with "$run/output" "cannot remove the lab $lab"
    rm "$run/lab"
}

# A running guest on the first state; sets qemu_pid.
fresh_guest() {
    host virsh destroy $guest >/dev/null 2>&1 || true
    host virsh undefine $guest --checkpoints-metadata --nvram >/dev/null 2>&1 || true
    rm -rf "$run/repo" "$run/home" "$run/restored"
    mkdir -p "$run/repo" "$run/home" "$run/restored"
    cp "$disks/state1.qcow2" "$guest_disk"
    host virsh -q define "$run/guest.xml" >/dev/null
    host virsh -q start $guest >/dev/null
    "$bin/virtward-lab" vm wait $guest --name "$lab" --timeout 120s >/dev/null 9>&-
    # What a boot sets off has ended when it counts.
    guest_do sync
    sleep 2
    qemu_pid=$(host cat /run/libvirt/qemu/$guest.pid)
    prime "$guest_disk"
}

change_in_guest() {
    guest_do sh /data/root/change.sh /data
    prime "$guest_disk"
}

# As measure, with the command run inside the host.
measure_in_host() {
    local tool=$1 operation=$2
    sync
    host python3 -I "$here/bench/measure.py" "$results" "$tool" "$operation" --beside "$qemu_pid" -- "${@:3}" \
        >"$run/output" 2>"$run/errors" || die_with "$run/errors" "$tool: $operation of a running guest failed"
}

hot() {
    hot_virtward
    hot_virtnbdbackup virtnbdbackup
    hot_virtnbdbackup virtnbdbackup-lz4 -z
    host virsh destroy $guest >/dev/null
}

hot_virtward() {
    local tool=virtward-hot v=$bin/virtward
    fresh_guest
    virtward_settings
    measure_in_host $tool full "$v" backup run $guest --json
    stored $tool full "$run/repo"
    change_in_guest
    measure_in_host $tool incremental "$v" backup run $guest --json
    grep -q '"kind": *"incremental"' "$run/output" || die_with "$run/output" "virtward made no incremental backup"
    stored $tool both "$run/repo"
    prime "$run/repo"
    measure_in_host $tool restore "$v" restore disk $guest@latest --to "$run/restored/disk.qcow2" --format qcow2
    check_restored "$run/restored/disk.qcow2" $tool
    prime "$run/repo"
    measure_in_host $tool verify "$v" backup verify --all --mode full
    measure_in_host $tool verify-ciphertext "$v" backup verify --all --mode ciphertext
}

# hot_virtnbdbackup TOOL OPTIONS...: it encrypts nothing, and this version of it has nothing to verify with.
hot_virtnbdbackup() {
    local tool=$1 options=("${@:2}")
    fresh_guest
    mkdir -p "$run/home/scratch"
    measure_in_host "$tool" full virtnbdbackup -d $guest -l full -o "$run/repo/r" -n -S "$run/home/scratch" \
        "${options[@]}"
    stored "$tool" full "$run/repo"
    change_in_guest
    measure_in_host "$tool" incremental virtnbdbackup -d $guest -l inc -o "$run/repo/r" -n -S "$run/home/scratch" \
        "${options[@]}"
    stored "$tool" both "$run/repo"
    prime "$run/repo"
    measure_in_host "$tool" restore virtnbdrestore -i "$run/repo/r" -o "$run/restored" -n -L "$run/home/restore.log"
    check_restored "$(find "$run/restored" -type f -size +1M | head -n 1)" "$tool"
}

# Every file on the restored disk is as on the second state, which the same changes made. Blocks may differ: the guest's
# kernel lays files out as it likes, and notes each boot.
check_restored() {
    local image=$1 tool=$2
    [ -n "$image" ] || die "$tool restored no disk"
    qemu-img convert -O raw "$image" "$run/restored/check.raw"
    mkdir -p "$run/mnt" "$run/mnt2"
    unshare --mount sh -euc 'mount -o loop "$1" "$2"; mount -o loop,ro,noload "$3" "$4"
        diff -r --no-dereference --exclude=.lab "$2" "$4"; umount "$2"; umount "$4"' \
        - "$run/restored/check.raw" "$run/mnt" "$disks/state2.raw" "$run/mnt2" >"$run/compare" 2>&1 ||
        die_with "$run/compare" "$tool restored something else than the guest's disk"
}
