#!/bin/bash
# A repository on NFS, as several hosts see it:  nfs.sh DIRECTORY-OF-BINARIES REPOSITORY-TESTS
#
# A guest of a lab exports a directory with its kernel's NFS server and mounts it twice, with caches of their own, as two
# hosts would have them: no kernel module of this machine is needed. There, the contract of stores is tested, and two
# writers, collections, kills, a server that goes away and a full one meet a repository. Needs what `setup.sh soak` makes.
set -Eeuo pipefail
bin=$1 tests=$2
system=/var/cache/virtward-lab/nfs-guest
lab=nfs$$
work=$(mktemp -d /var/tmp/virtward-nfs.XXXXXX)
trap '"$bin/virtward-lab" down --name "$lab" >/dev/null 2>&1; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# --- the guest's disk: a small Debian with an NFS server, and what is to be tested -----------------------------------
cp -a "$system" "$work/root"
install -m 755 -s "$bin/virtward" "$work/root/usr/local/bin/virtward"
install -m 755 -s "$tests" "$work/root/usr/local/bin/repository-tests"
cat >"$work/root/serve" <<'EOF'
set -eu
mkdir -p /srv/store /mnt/a /mnt/b /proc/fs/nfsd /run/rpc_pipefs
modprobe nfsd && modprobe nfsv4
mount -t nfsd nfsd /proc/fs/nfsd
mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs
mount -t tmpfs -o size=320m tmpfs /srv/store
echo '/srv/store 127.0.0.1(rw,fsid=0,sync,no_root_squash,no_subtree_check,insecure)' >/etc/exports
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
exportfs -a
# Files can be opened 10 s after the server began, and not 90.
rpc.nfsd -N 3 -V 4.2 -G 10 -L 10 4
rpc.mountd -N 3 -V 4
for place in a b; do mount -t nfs4 -o vers=4.2,hard,nosharecache 127.0.0.1:/ /mnt/$place; done
mkdir /mnt/a/tests
EOF
cat >"$work/root/try" <<'EOF'
# Prints what held; ends with the first thing that did not.
set -Eeuo pipefail
trap 'echo "line $LINENO: failed: $BASH_COMMAND"; tail -n 5 /root/log* 2>/dev/null' ERR
export VIRTWARD_PASSWORD_FILE=/root/password
cd /root
echo only-for-this-test >password
chmod 600 password
restores() { # MOUNT NAME: the newest restore point is what the file is now
    rm -f back
    virtward --repo "/mnt/$1/r" restore disk "$2@latest" --disk "$2.raw" --to back --format raw >>log 2>&1
    cmp back "$2.raw"
}
change() { dd if=/dev/urandom of="$1.raw" bs=256k count=4 seek=$((RANDOM % 28)) conv=notrunc 2>/dev/null; }
backup() { virtward --repo "/mnt/$1/r" backup image "$2.raw" >"log.$2" 2>&1; }

virtward --repo /mnt/a/r repo init >>log 2>&1
for name in one two; do dd if=/dev/urandom of=$name.raw bs=1M count=8 2>/dev/null; done
for round in 1 2 3; do
    backup a one & first=$!
    backup b two & second=$!
    # What is deleted and collected meanwhile, through either mount, is never what they need.
    virtward --repo /mnt/b/r repo gc >>log 2>&1
    wait $first
    wait $second
    restores b one
    restores a two
    change one
    change two
done
virtward --repo /mnt/b/r backup verify --all --mode full >>log 2>&1
echo "two writers and a collector through two mounts: all restores"

killed=0
for wait in 0.2 0.4 0.6 0.8 1.0 1.3 1.6; do
    cp one.raw before.raw
    change one
    backup a one & run=$!
    sleep $wait
    kill -9 $run 2>/dev/null && killed=$((killed + 1))
    wait $run 2>/dev/null || true
    virtward --repo /mnt/b/r backup verify --all --mode light >>log 2>&1
done
[ $killed -ge 3 ]
backup b one
restores a one
echo "killed $killed times: what was acknowledged is there, the next backup works"

change two
backup b two & run=$!
sleep 0.5
rpc.nfsd 0
sleep 3
rpc.nfsd -N 3 -V 4.2 -G 10 -L 10 4
wait $run
restores a two
echo "a server that went away for 3 s: the backup waited for it and is whole"

dd if=/dev/zero of=/srv/store/fill bs=64k 2>/dev/null || true
dd if=/dev/urandom of=one.raw bs=1M count=8 conv=notrunc 2>/dev/null
if backup a one; then
    echo "a backup to a full server says that it succeeded"
    exit 1
fi
grep -qi 'space' log.one
rm /srv/store/fill
virtward --repo /mnt/b/r repo check >>log 2>&1
backup b one
restores a one
virtward --repo /mnt/a/r backup verify --all --mode full >>log 2>&1
echo "a full server is named, and costs nothing that was there"
EOF
mke2fs -q -t ext4 -d "$work/root" "$work/disk.raw" 1200M
rm -rf "$work/root"

# --- the guest ------------------------------------------------------------------------------------------------------
"$bin/virtward-lab" up --name "$lab" --hosts 1 >/dev/null
disk=$("$bin/virtward-lab" vm create nfs --name "$lab" --disk 1200MiB --format raw --memory 896MiB --no-start --json |
    python3 -Ic 'import json, sys; print(json.load(sys.stdin)["disks"][0])')
mv "$work/disk.raw" "$disk"
"$bin/virtward-lab" host exec h1 --name "$lab" -- virsh -q start nfs
"$bin/virtward-lab" vm wait nfs --name "$lab" --timeout 120s
guest() { "$bin/virtward-lab" vm exec nfs --name "$lab" --timeout 15m -- "$@"; }
guest sh -euc 'ifconfig lo 127.0.0.1 up; for at in dev proc sys; do mount --rbind /$at /mnt/vda/$at; done'
inside() { guest chroot /mnt/vda env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
inside bash /serve
inside TMPDIR=/mnt/a/tests repository-tests stores:: roundtrip::a_disk_comes_back
inside bash /try
echo "nfs: all held"
