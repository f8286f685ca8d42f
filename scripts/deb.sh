#!/bin/bash
# Makes target/deb/virtward_VERSION_ARCH.deb of a built binary, with dpkg-deb alone:
#
#   deb.sh [--binary FILE] [--out DIR]
#
# Without --binary it is target/release/virtward. The same sources and binary make the same package
# (SOURCE_DATE_EPOCH, else the time of the last commit). DEB_COMPRESSION is what dpkg-deb compresses with (xz).
set -euo pipefail
umask 022

here=$(cd "$(dirname "$0")/.." && pwd)
binary=${CARGO_TARGET_DIR:-$here/target}/release/virtward
out=${CARGO_TARGET_DIR:-$here/target}/deb

die() {
    printf 'deb: %s\n' "$*" >&2
    exit 1
}
while [ $# -gt 0 ]; do
    case $1 in
        --binary) binary=${2:?--binary needs a file} && shift 2 ;;
        --out) out=${2:?--out needs a directory} && shift 2 ;;
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        *) die "unknown argument '$1'; deb.sh --help" ;;
    esac
done
[ -x "$binary" ] || die "there is no $binary; build it first: make build"
for tool in dpkg-deb dpkg gzip; do command -v "$tool" >/dev/null || die "$tool is missing"; done

version=$("$binary" --version | awk '{print $2}')
[ -n "$version" ] || die "$binary --version says nothing"
arch=$(dpkg --print-architecture)
epoch=${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct 2>/dev/null || date +%s)}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"

put() { install -D -m "$1" "$here/packaging/$2" "$root/$3"; }
install -D -m 755 "$binary" "$root/usr/bin/virtward"
# Debug information is of no use to whoever installs a package.
if command -v strip >/dev/null; then strip --strip-unneeded "$root/usr/bin/virtward"; fi
put 644 virtward.service usr/lib/systemd/system/virtward.service
# Disabled unless somebody enables it: an upgrade of the distribution must not start it either.
install -d "$root/usr/lib/systemd/system-preset"
echo 'disable virtward.service' >"$root/usr/lib/systemd/system-preset/90-virtward.preset"
put 644 config.toml etc/virtward/config.toml
chmod 750 "$root/etc/virtward"
put 644 prometheus/virtward.rules.yml usr/share/doc/virtward/prometheus/virtward.rules.yml
put 644 grafana/virtward.json usr/share/doc/virtward/grafana/virtward.json
"$binary" man --dir "$root/usr/share/man/man1" >/dev/null
install -d "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions" \
    "$root/usr/share/fish/vendor_completions.d"
"$binary" completions bash >"$root/usr/share/bash-completion/completions/virtward"
"$binary" completions zsh >"$root/usr/share/zsh/vendor-completions/_virtward"
"$binary" completions fish >"$root/usr/share/fish/vendor_completions.d/virtward.fish"
docs=$root/usr/share/doc/virtward
install -m 644 "$here/README.md" "$here/docs"/*.md "$docs/"
install -d "$docs/examples" && install -m 644 "$here/docs/examples"/* "$docs/examples/"
install -m 644 "$here/packaging/debian/copyright" "$docs/copyright"
printf 'virtward (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n -- The Virtward authors <virtward@users.noreply.github.com>  %s\n' \
    "$version" "$(date -Ru -d "@$epoch")" | gzip -9n >"$docs/changelog.Debian.gz"
gzip -9nc "$here/CHANGELOG.md" >"$docs/CHANGELOG.md.gz"
gzip -9n "$root"/usr/share/man/man1/*.1

install -d "$root/DEBIAN"
for script in postinst prerm postrm; do install -m 755 "$here/packaging/debian/$script" "$root/DEBIAN/$script"; done
echo /etc/virtward/config.toml >"$root/DEBIAN/conffiles"
size=$(du -sk --exclude=DEBIAN "$root" | cut -f 1)
# The newest version of a symbol that the binary asks of the C library; without objdump, that of Debian 12.
glibc=$( (objdump -T "$binary" 2>/dev/null || true) | grep -oE 'GLIBC_[0-9.]+' | cut -d _ -f 2 | sort -V | tail -n 1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" -e "s/@GLIBC@/${glibc:-2.36}/" "$here/packaging/debian/control" >"$root/DEBIAN/control"
(cd "$root" && find usr etc -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
find "$root" -newermt "@$epoch" -print0 | xargs -0r touch --no-dereference --date="@$epoch"

mkdir -p "$out"
package=$out/virtward_${version}_${arch}.deb
SOURCE_DATE_EPOCH=$epoch dpkg-deb --root-owner-group "-Z${DEB_COMPRESSION:-xz}" --build "$root" "$package" >/dev/null
echo "$package"
