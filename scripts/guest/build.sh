#!/bin/bash
# Builds the kernel and initramfs that lab guests boot:  build.sh DIRECTORY
#
# Everything comes from Debian packages that are downloaded and unpacked, not installed: the cloud kernel (small, quick
# to boot) with the few modules a guest needs, the QEMU guest agent, and busybox. DIRECTORY must not exist; it is
# complete when this script succeeds and absent when it fails. Who calls decides when a rebuild is due.
set -Eeuo pipefail

here=$(cd "$(dirname "$0")" && pwd)
target=$1
[ ! -e "$target" ] || { echo "guest image: $target exists already" >&2; exit 1; }
modules='virtio_pci virtio_blk virtio_console virtio_net button evdev xfs btrfs'

mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$target.tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'echo "guest image: line $LINENO failed: $BASH_COMMAND" >&2' ERR
chmod 755 "$work"
mkdir "$work/deb" "$work/unpacked" "$work/root" "$work/image"

# --- packages -----------------------------------------------------------------------------------------------------
cd "$work/deb"
arch=$(dpkg --print-architecture)
kernel=$(apt-cache depends "linux-image-cloud-$arch" | awk '/Depends: linux-image-/ {print $2; exit}')
[ -n "$kernel" ] || { echo "guest image: no linux-image-cloud-$arch in the package lists; run apt-get update" >&2; exit 1; }
apt-get download -qq -o APT::Sandbox::User=root "$kernel" qemu-guest-agent
for package in ./*.deb; do dpkg -x "$package" "$work/unpacked"; done
cd "$work/unpacked"
version=$(basename boot/vmlinuz-*); version=${version#vmlinuz-}
# /lib is a link to /usr/lib nowadays, but packages of either time exist.
module_dir=$(find . -type d -path "*lib/modules/$version" | head -n 1)

# --- root directory -----------------------------------------------------------------------------------------------
root=$work/root
mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,mnt,root,etc,usr/bin,usr/sbin,var/run} "$root/lib/modules/$version"
cp -a "$here/root/." "$root/"
chown -R 0:0 "$root"
cp /bin/busybox "$root/bin/busybox"
for applet in $("$root/bin/busybox" --list); do
    [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
done
for applet in init reboot poweroff halt; do [ -e "$root/sbin/$applet" ] || ln -s ../bin/busybox "$root/sbin/$applet"; done

# Binaries that are not static, with the libraries the loader names for them.
install_binary() {
    local library
    cp "$1" "$root/sbin/"
    if ldd "$1" | grep 'not found' >&2; then
        echo "guest image: libraries of $1 are missing on this machine" >&2
        exit 1
    fi
    for library in $(ldd "$1" | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$library")"
        cp -Ln "$library" "$root$library"
    done
}
install_binary "$(find . -name qemu-ga -type f | head -n 1)"
install_binary "$(command -v blkid || echo /usr/sbin/blkid)"

# --- modules, with what they depend on ----------------------------------------------------------------------------
find "$module_dir" -name '*.ko.xz' -exec unxz {} +
mkdir -p "$work/all/lib/modules"
cp -a "$module_dir" "$work/all/lib/modules/$version"
(cd "$work/all/lib/modules/$version" && busybox depmod -n -b "$work/all" "$version") | grep -E '^[^ ]+\.ko:' >"$work/deps"

wanted() { # prints a module's path and, after it, those of everything it needs; nothing for one that is built in
    local line path name
    name=$(sed 's/[-_]/[-_]/g' <<<"$1")
    line=$(grep -E "(^|/)$name\.ko:" "$work/deps" | head -n 1) || true
    if [ -z "$line" ]; then
        grep -q "/$name\.ko" "$module_dir/modules.builtin" && return 0
        echo "guest image: kernel $version has no module $1" >&2
        return 1
    fi
    for path in ${line/:/ }; do echo "$path"; done
}
soft() { # soft dependencies (crypto for btrfs and xfs), which modules.dep does not list
    busybox modinfo -F softdep "$1" 2>/dev/null | tr ' ' '\n' | grep -vE '^(pre|post):$' || true
}
for module in $modules; do wanted "$module"; done | sort -u >"$work/list"
for path in $(cat "$work/list"); do
    for extra in $(soft "$work/all/lib/modules/$version/$path"); do wanted "$extra" 2>/dev/null || true; done
done >>"$work/list"
sort -u "$work/list" | while read -r path; do
    install -D -m 644 "$work/all/lib/modules/$version/$path" "$root/lib/modules/$version/$path"
done
cp "$work/unpacked/$module_dir"/modules.{order,builtin} "$root/lib/modules/$version/"
busybox depmod -b "$root" "$version"

# --- image --------------------------------------------------------------------------------------------------------
# Nothing is compressed: unpacking under emulation would cost more boot time than anything else.
(cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio --null --quiet -o -H newc) >"$work/image/initramfs.img"

# The kernel proper sits compressed inside the bzImage: payload offset and length are at 0x248 and 0x24c (boot protocol
# 2.08), counted from the end of the setup sectors (0x1f1). QEMU starts an ELF kernel through its PVH entry. When the
# compression is one we cannot undo, the bzImage boots as well, only slower.
compressed=boot/vmlinuz-$version
number() { od -An -t "u$2" -j "$1" -N "$2" "$compressed" | tr -d ' '; }
tail -c +$((($(number 0x1f1 1) + 1) * 512 + $(number 0x248 4) + 1)) "$compressed" | head -c "$(number 0x24c 4)" \
    >"$work/payload" || true
for tool in 'lz4 -dcq' 'zstd -dcq' 'xz -dcq' 'gzip -dcq'; do
    # The size that follows the payload looks like damage to these tools, so the result is judged, not their status.
    $tool <"$work/payload" >"$work/image/vmlinuz" 2>/dev/null || true
    [ "$(head -c 4 "$work/image/vmlinuz" | tail -c 3)" = ELF ] && break
done
[ "$(head -c 4 "$work/image/vmlinuz" | tail -c 3)" = ELF ] || cp "$compressed" "$work/image/vmlinuz"
{
    echo "kernel $version"
    for package in "$work"/deb/*.deb; do basename "$package"; done
} >"$work/image/versions"
chmod 644 "$work/image"/*
mv -T "$work/image" "$target"
echo "guest image: kernel $version, $(du -sh "$target" | cut -f1) in $target"
