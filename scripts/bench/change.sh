#!/bin/sh
# Takes the benchmark's disk from its first state to its second: change.sh ROOT
#
# Follows ROOT/root/change.plan (see plan.py). Runs on the host over a mounted image and, the same, in a running guest,
# so it needs a busybox and nothing else. The new bytes are old ones with letters exchanged or all values shifted: they
# compress as real ones do, and no tool has seen them before.
set -eu
cd "$1"

letters() { tr 'A-Za-z' 'N-ZA-Mn-za-m'; }
shifted() { tr '\000-\377' '\001-\377\000'; }

while read -r operation path from page; do
    case $operation in
        # As a package manager upgrades a file: a new one beside it, then in its place.
        replace) letters <"$path" >"$path.dpkg-new" && mv "$path.dpkg-new" "$path" ;;
        append) letters <"$from" >>"$path" ;;
        create) mkdir -p "${path%/*}" && shifted <"$from" >"$path" ;;
        # As a database writes: some pages of a large file, in place.
        pages) letters <"$from" | dd of="$path" bs=8192 seek="$page" count=2 conv=notrunc iflag=fullblock 2>/dev/null ;;
        delete) rm "$path" ;;
        *) echo "change: unknown operation $operation" >&2 && exit 1 ;;
    esac
done <root/change.plan
sync
