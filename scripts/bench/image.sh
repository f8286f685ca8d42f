# The disk that is backed up, in two states: sourced by bench.sh.
#
# $disks/state1.raw is an ext4 with a Debian system unpacked from its packages (none of their scripts are run, nothing
# is started, no device is needed), state2.raw the same after change.sh ran on it, mounted for the purpose in a mount
# namespace of its own, so that a crash leaves no mount. state1.qcow2 is what the running guest gets. All is kept and
# used again until the packages, these scripts or the size change.

# A server as many are: Debian's base system, a kernel, a database, a web server with PHP, compilers.
packages=('?essential' '?priority(required)' '?priority(important)' linux-image-amd64 systemd-sysv openssh-server
    nginx php-fpm postgresql python3-venv git gcc g++ make vim rsync curl locales)
quick_packages=('?essential' vim-tiny perl python3-minimal curl ca-certificates grub-pc-bin)

# apt with a root of its own: its own lists, its own empty idea of what is installed.
private_apt() {
    apt-get -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$cache/apt/sources" \
        -o Dir::State::Lists="$cache/apt/lists" -o Dir::State::status="$cache/apt/status" \
        -o Dir::Cache="$cache/apt" -o Dir::Cache::archives="$cache/apt/archives" -o Dir::Cache::pkgcache= \
        -o Dir::Cache::srcpkgcache= -o Dir::Log="$cache/apt" -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 "$@"
}

prepare_apt() {
    mkdir -p "$cache"/apt/{sources,lists/partial,archives/partial}
    : >"$cache/apt/status"
    # shellcheck source=/dev/null
    local codename=${BENCH_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")}
    printf '%s\n' 'Types: deb' "URIs: ${BENCH_MIRROR:-http://deb.debian.org/debian}" "Suites: $codename" \
        'Components: main' 'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' \
        >"$cache/apt/sources/debian.sources"
}

download_packages() {
    local want=("${packages[@]}")
    [ -z "$quick" ] || want=("${quick_packages[@]}")
    say "downloading the packages of the disk's Debian (once; kept in $cache)"
    prepare_apt
    private_apt update >"$run/apt.log" 2>&1 || die_with "$run/apt.log" "cannot read Debian's package lists"
    # Of what is there already apt prints no address, so this looks at an empty directory.
    mkdir -p "$run/none/partial"
    private_apt -o Dir::Cache::archives="$run/none" install -y --print-uris --no-install-recommends "${want[@]}" \
        2>"$run/apt.log" | awk '/^\047/ {print $2}' | LC_ALL=C sort >"$cache/packages.new" ||
        die_with "$run/apt.log" "apt cannot tell which packages the disk needs"
    [ -s "$cache/packages.new" ] || die "apt names no packages for the disk"
    private_apt install -y --download-only --no-install-recommends "${want[@]}" >"$run/apt.log" 2>&1 ||
        die_with "$run/apt.log" "cannot download the packages of the disk"
    mv "$cache/packages.new" "$cache/packages"
}

unpack_tree() {
    local package dir
    for dir in bin sbin lib lib64; do
        mkdir -p "$tree/usr/$dir"
        ln -s "usr/$dir" "$tree/$dir"
    done
    while read -r package; do
        dpkg-deb --fsys-tarfile "$cache/apt/archives/$package" |
            tar -x -C "$tree" --keep-directory-symlink --numeric-owner
    done <"$cache/packages"
}

# What the disk was made from. Downloading is not repeated when nothing changed.
disk_key() {
    {
        echo "$disk_mib $change_mb ${quick:-all} ${BENCH_SUITE:-} ${BENCH_MIRROR:-}"
        cat "$here/bench/image.sh" "$here/bench/plan.py" "$here/bench/change.sh"
        grep ^VERSION_ID= /etc/os-release
    } | sha256sum | cut -c 1-16
}

make_disks() {
    local key tree=$run/tree made=$run/disks
    key=$(disk_key)
    disks=$cache/${quick:+quick-}disks-$key
    if [ -e "$disks/done" ]; then
        say "using the disk images made before in $disks"
        return
    fi
    # Earlier ones are of no more use, and large.
    rm -rf "$cache/${quick:+quick-}"disks-*
    download_packages
    say "unpacking $(wc -l <"$cache/packages") packages and making the file system"
    mkdir -p "$tree" "$made"
    unpack_tree
    python3 -I "$here/bench/plan.py" "$tree" "$change_mb"
    cp "$here/bench/change.sh" "$tree/root/change.sh"
    truncate -s "${disk_mib}M" "$made/state1.raw"
    mke2fs -q -F -t ext4 -L data -U 5e8d1f0a-9a3b-4c67-8f52-0d7c3f1b6a24 -m 1 \
        -E lazy_itable_init=0,lazy_journal_init=0,hash_seed=5e8d1f0a-9a3b-4c67-8f52-0d7c3f1b6a25 \
        -d "$tree" "$made/state1.raw" || die "the packages do not fit on a disk of $disk_mib MiB"
    rm -rf "$tree"
    say "changing about $change_mb MB of it"
    cp --sparse=always "$made/state1.raw" "$made/state2.raw"
    mkdir -p "$run/mnt"
    unshare --mount sh -euc 'mount -o loop "$1" "$2"; sh "$2/root/change.sh" "$2"; umount "$2"' \
        - "$made/state2.raw" "$run/mnt" || die "cannot change the second state of the disk (is there a loop device?)"
    qemu-img convert -f raw -O qcow2 "$made/state1.raw" "$made/state1.qcow2"
    cp "$cache/packages" "$made/packages"
    : >"$made/done"
    sync
    mv "$made" "$disks"
}
