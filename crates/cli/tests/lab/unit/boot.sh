#!/bin/bash
# boot.sh CGROUP DIRECTORY PACKAGE: starts systemd as the first process of namespaces of its own, over this machine's file
# system, of which it changes nothing: what it writes goes into memory. Runs until it is killed, and all in it with it.
#
# PACKAGE is a file that it finds as /root/virtward.deb. What systemd itself says goes to DIRECTORY.log.
set -euo pipefail

if [ "$1" != --inside ]; then
    mkdir "$1"
    echo $$ >"$1/cgroup.procs"
    exec unshare --pid --mount --uts --ipc --net --cgroup --fork --kill-child --propagation private \
        bash "$0" --inside "$2" "$3"
fi
directory=$2 package=$3

exec 3>"$directory.log"
mount -t tmpfs -o mode=755,size=2g tmpfs "$directory"
root=$directory/root
mkdir "$directory"/{changes,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$directory/changes,workdir=$directory/work" overlay "$root"

mount -t proc proc "$root/proc"
# The kernel is the machine's: nothing in here tunes it.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root"/dev/{pts,shm}
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs tmpfs "$root/dev/shm"
for path in run tmp var/tmp var/log var/lib/libvirt; do
    mkdir -p "$root/$path"
    mount -t tmpfs -o mode=755 tmpfs "$root/$path"
done
chmod 1777 "$root/tmp" "$root/var/tmp"
mkdir -m 711 "$root/var/lib/libvirt/images"

# Nothing that this machine does is done in here: its services, its VMs, its own Virtward.
rm -rf "$root"/etc/systemd/system "$root/etc/fstab" "$root"/etc/libvirt/{qemu,hooks,storage} "$root"/{etc,var/lib,var/cache}/virtward
: >"$root/etc/machine-id"
mkdir -p "$root/etc/systemd/system" "$root/etc/libvirt/qemu"
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-sysctl.service systemd-modules-load.service \
    systemd-remount-fs.service systemd-timesyncd.service systemd-resolved.service; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
cat >"$root/etc/systemd/system/test.target" <<'unit'
[Unit]
Description=A system to test a unit in
Requires=sysinit.target
After=sysinit.target
Wants=systemd-journald.service dbus.socket
unit
cp "$package" "$root/root/virtward.deb"

ip link set lo up
cd "$root"
mkdir -p .before
pivot_root . .before
umount -l /.before
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test chroot . /lib/systemd/systemd --unit=test.target \
    --log-target=console --show-status=no </dev/null >/dev/null 2>&3 3>&-
