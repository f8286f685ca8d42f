#!/bin/bash
# All set-up for building, testing and benchmarking Virtward on Debian 12 or 13:
#
#   setup.sh build          what compiling and linking need
#   setup.sh lab            build, and what the lab and the demo need, with the guests' kernel and image
#   setup.sh test           lab, and the S3 server and the browser of the tests
#   setup.sh fuzz           build, and what linking a fuzzer needs
#   setup.sh soak           test, and what long tests run against: an object store, and a Debian 12 without backports
#   setup.sh bench          lab, the S3 server, and the tools that the benchmark compares with
#   setup.sh --dry-run MODE only say what would be done
#
# It says what it installs before it does, skips what is there (a second run takes no noticeable time), keeps versions
# of QEMU and libvirt that are installed already, and starts and enables no service. Needs root or sudo for what is
# missing; nothing when nothing is.
set -euo pipefail

build_packages=(gcc libc6-dev make pkg-config protobuf-compiler libprotobuf-dev)
lab_packages=(busybox-static cpio lz4 zstd xz-utils iproute2 nftables fdisk e2fsprogs xfsprogs btrfs-progs
    nbdkit libnbd-bin etcd-server etcd-client
    python3 python3-cryptography python3-argon2 python3-zstandard python3-lz4)
# An SSH server and certificates, to reach libvirt as on another host; TPMs and firmware for guests; the browser that the tests
# of the web interface drive, and a font with which Chinese can be read in it.
# Fence agents with a simulated BMC, servers that are probed or mailed to: a mail server, PostgreSQL; a clock that jumps;
# who tells of hardware; what runs the unit.
test_packages=(swtpm swtpm-tools ovmf openssh-server openssh-client openssl chromium chromium-driver fonts-noto-cjk
    fence-agents openipmi ipmitool python3-aiosmtpd postgresql faketime prometheus-node-exporter systemd dbus)
fuzz_packages=(g++)
soak_packages=(debootstrap)
bench_packages=(restic borgbackup virtnbdbackup b3sum openssl)
# These must come from one release, all in one call: mixing QEMU 7.2 of Debian 12 with parts of 10.0 removes qemu-utils.
build_virt=(libvirt-dev)
lab_virt=(qemu-system-x86 qemu-utils qemu-block-extra libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu)

# What tests run on a host besides.
oldest_packages=(iproute2 procps swtpm swtpm-tools ovmf openssh-server socat)

backports_file=/etc/apt/sources.list.d/virtward-backports.sources
# Servers of the tests, built once into target/tools.
s3s_fs="s3s-fs 0.14.1"
garage="garage 2.5.0"
image_cache=/var/cache/virtward-lab
here=$(cd "$(dirname "$0")" && pwd)
dry_run=

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}
usage() { sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root to run '$1', and there is no sudo; run as root: $here/setup.sh $mode"
    fi
}

# Prints those of the named packages that are not installed.
missing() {
    local have package
    have=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null | awk '$2 == "installed" {print $1}') ||
        true
    for package; do grep -qxF "$package" <<<"$have" || echo "$package"; done
}

read_release() {
    # shellcheck source=/dev/null
    . /etc/os-release
    release=${ID:-unknown}-${VERSION_ID:-0}
    case $release in
        debian-12 | debian-13) ;;
        *) die "this is ${PRETTY_NAME:-an unknown system}; set-up knows Debian 12 and 13. Install by hand: $*" ;;
    esac
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the lab's guests are x86-64; this is $(dpkg --print-architecture)"
}

# From where QEMU and libvirt come: backports on Debian 12, unless the release's own version is installed already, which
# is then completed and not replaced under its owner's running guests.
virt_source() {
    [ "$release" = debian-12 ] || return 0
    local versions
    versions=$(dpkg-query -W -f '${db:Status-Status} ${Version}\n' 'qemu-system-x86' 'qemu-utils' 'libvirt0' \
        'libvirt-daemon' 2>/dev/null | awk '$1 == "installed" {print $2}') || true
    if [ -z "$versions" ] || grep -q bpo <<<"$versions"; then echo bookworm-backports; fi
}

add_backports() {
    grep -rqsE '^[^#]*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d && return 0
    say "adding Debian's backports in $backports_file"
    printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: bookworm-backports' 'Components: main' \
        'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' | as_root tee "$backports_file" >/dev/null
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@"; }

# Packages start what they bring unless this file says no; it is ours only while packages are being installed.
policy=/usr/sbin/policy-rc.d
hold_services() {
    [ -e "$policy" ] && return 0
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    trap release_services EXIT
}
release_services() {
    trap - EXIT
    as_root rm -f "$policy"
}

# The lab runs its own copies of these; what was just installed for it need not run at every boot either.
disable_new_services() {
    [ -d /run/systemd/system ] || return 0
    local package units=()
    for package; do
        case $package in
            etcd-server) units+=(etcd.service) ;;
            postgresql) units+=(postgresql.service) ;;
            openssh-server) units+=(ssh.service ssh.socket) ;;
            prometheus-node-exporter) units+=(prometheus-node-exporter.service) ;;
            libvirt-daemon-system)
                units+=(libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket virtlogd.socket
                    virtlockd.socket libvirt-guests.service)
                ;;
        esac
    done
    [ ${#units[@]} = 0 ] && return 0
    say "leaving disabled: ${units[*]} (to use them: systemctl enable --now)"
    as_root systemctl disable --quiet "${units[@]}" 2>/dev/null || true
}

# $1: names of plain packages, $2: names of QEMU and libvirt packages
install_packages() {
    local plain virt suite=
    read -ra plain <<<"$1"
    read -ra virt <<<"$2"
    [ $((${#plain[@]} + ${#virt[@]})) = 0 ] && return 0
    read_release "${plain[@]}" "${virt[@]}"
    [ ${#virt[@]} = 0 ] || suite=$(virt_source)
    [ ${#plain[@]} = 0 ] || say "to install: ${plain[*]}"
    [ ${#virt[@]} = 0 ] || say "to install${suite:+ from $suite}: ${virt[*]}"
    [ -z "$dry_run" ] || return 0
    [ -z "$suite" ] || add_backports
    apt update
    hold_services
    [ ${#virt[@]} = 0 ] || apt install -y --no-install-recommends ${suite:+-t "$suite"} "${virt[@]}"
    [ ${#plain[@]} = 0 ] || apt install -y --no-install-recommends "${plain[@]}"
    release_services
    disable_new_services "${plain[@]}" "${virt[@]}"
}

# The guests' kernel and initramfs, in a directory named after everything that it is made from.
guest_image() {
    local key target
    key=$(
        {
            # A list with modes, then contents: a script that lost its x bit is another input.
            cd "$here/guest" && find . -type f -printf '%p %m\n' | LC_ALL=C sort
            find . -type f -print0 | LC_ALL=C sort -z | xargs -0 cat
            dpkg-query -W -f '${Version}\n' busybox-static 2>/dev/null || true
            grep ^VERSION_ID= /etc/os-release
        } | sha256sum | cut -c 1-16
    )
    target=$image_cache/$key
    if [ ! -e "$target/vmlinuz" ]; then
        say "to make: the guests' kernel and initramfs in $target, from Debian's linux-image-cloud and qemu-guest-agent"
        [ -z "$dry_run" ] || return 0
        # Something must be known about the packages to download; an old list may name versions that are gone.
        as_root "$here/guest/build.sh" "$target" || { apt update && as_root "$here/guest/build.sh" "$target"; }
    fi
    [ "$(readlink "$image_cache/current" 2>/dev/null)" = "$key" ] || [ -n "$dry_run" ] || {
        as_root ln -sfn "$key" "$image_cache/current.new.$$"
        as_root mv -T "$image_cache/current.new.$$" "$image_cache/current"
    }
}

# A Debian 12 with its own libvirt 9.0 and QEMU 7.2, the oldest that Virtward works with, for hosts of the lab.
oldest_system() {
    local root=$image_cache/debian-12
    [ -e "$root/usr/sbin/libvirtd" ] && return 0
    say "to make: a Debian 12 with its own libvirt and QEMU in $root (800 MB)"
    [ -z "$dry_run" ] || return 0
    as_root rm -rf "$root.new"
    as_root debootstrap --variant=minbase bookworm "$root.new" http://deb.debian.org/debian
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$root.new$policy" >/dev/null
    as_root chmod 755 "$root.new$policy"
    as_root chroot "$root.new" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        "${lab_virt[@]}" "${oldest_packages[@]}"
    as_root mv -T "$root.new" "$root"
}

# A small Debian whose kernel serves and mounts NFS, for a guest. Its kernel is the one that guests boot.
nfs_guest() {
    local root=$image_cache/nfs-guest version
    version=$(sed -n 's/^kernel //p' "$image_cache/current/versions" 2>/dev/null) || true
    [ -n "$version" ] && [ -e "$root/usr/lib/modules/$version/modules.dep" ] && return 0
    say "to make: a Debian with an NFS server in $root (400 MB)"
    [ -z "$dry_run" ] || return 0
    as_root rm -rf "$root.new"
    as_root debootstrap --variant=minbase --include=nfs-kernel-server,nfs-common,kmod,libvirt0 \
        "$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)" "$root.new" http://deb.debian.org/debian
    (cd "$root.new" && as_root apt-get download -qq -o APT::Sandbox::User=root "linux-image-$version" &&
        as_root dpkg-deb --fsys-tarfile ./linux-image-*.deb | as_root tar -x --keep-directory-symlink --wildcards './lib/modules/*' &&
        as_root rm ./linux-image-*.deb)
    as_root chroot "$root.new" depmod "$version"
    as_root rm -rf "$root.new"/var/cache/apt "$root.new"/var/lib/apt/lists "$root.new"/usr/share/{doc,locale,man}
    as_root rm -rf "$root"
    as_root mv -T "$root.new" "$root"
}

# $1: crate and version, $2: directory below target, $3: how far it is optimised, then further arguments of cargo install
tool() {
    local tools=${CARGO_TARGET_DIR:-$here/../target}/$2 name=${1% *} version=${1#* } cargo
    grep -qsF "\"$1 " "$tools/.crates.toml" && [ -x "$tools/bin/$name" ] && return 0
    say "to build: $1 in $tools, which takes some minutes"
    [ -z "$dry_run" ] || return 0
    cargo=$(command -v cargo || echo "${HOME:-/root}/.cargo/bin/cargo")
    [ -x "$cargo" ] || die "there is no cargo to build it with; install Rust (https://rustup.rs)"
    CARGO_PROFILE_RELEASE_OPT_LEVEL=$3 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
        "$cargo" install --quiet --locked --root "$tools" --version "$version" "${@:4}" "$name"
}

mode=
for argument; do
    case $argument in
        --dry-run) dry_run=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        build | lab | test | fuzz | soak | bench) mode=$argument ;;
        *) die "unknown argument '$argument'; give build, lab, test, fuzz, soak or bench" ;;
    esac
done
[ -n "$mode" ] || die "say for what: build, lab, test, fuzz, soak or bench (setup.sh --help)"
command -v dpkg-query >/dev/null || die "this is no Debian; see docs/lab.md for what has to be installed"

plain=("${build_packages[@]}")
virt=("${build_virt[@]}")
case $mode in lab | test | soak | bench) plain+=("${lab_packages[@]}") virt+=("${lab_virt[@]}") ;; esac
case $mode in test | soak) plain+=("${test_packages[@]}") ;; esac
case $mode in fuzz | soak) plain+=("${fuzz_packages[@]}") ;; esac
case $mode in soak) plain+=("${soak_packages[@]}") ;; esac
case $mode in bench) plain+=("${bench_packages[@]}") ;; esac

install_packages "$(missing "${plain[@]}" | tr '\n' ' ')" "$(missing "${virt[@]}" | tr '\n' ' ')"
case $mode in
    lab | test | soak | bench) guest_image ;;
esac
# What is tested with need not be fast, but soon there; what is measured with must not be what is slow.
case $mode in
    test | soak) tool "$s3s_fs" tools 0 --features binary ;;
    bench) tool "$s3s_fs" tools/fast 3 --features binary ;;
esac
if [ "$mode" = soak ]; then
    tool "$garage" tools 1
    oldest_system
    nfs_guest
fi
command -v cargo >/dev/null || [ -x "${HOME:-/root}/.cargo/bin/cargo" ] ||
    say "note: no cargo found; install Rust (https://rustup.rs) to build Virtward"
say "$mode: ready"
