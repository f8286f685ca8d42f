"""Adds what a server writes itself to a tree of unpacked packages, and plans how that tree will change.

    plan.py TREE MEGABYTES

Writes into TREE: var/log/*.log, var/lib/items/items.db (pages of text), and root/change.plan, which change.sh follows:
about MEGABYTES of files replaced, appended to, created, and written in place, and half as many deleted, spread over
the whole tree. The same tree gives the same plan.
"""

import os
import re
import sys

PLAIN = re.compile(r"[A-Za-z0-9._+/-]+")
PAGE = 8192
MIB = 1 << 20


def files_of(tree):
    """Regular files with plain names and a single link, as sorted (path, bytes)."""
    found = []
    for directory, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(directory, name)
            stat = os.lstat(path)
            relative = os.path.relpath(path, tree)
            if os.path.isfile(path) and not os.path.islink(path) and stat.st_nlink == 1 and PLAIN.fullmatch(relative):
                found.append((relative, stat.st_size))
    return sorted(found)


def spread(files, total, group=MIB):
    """Files that make up about `total` bytes, taken from all over the list in groups of neighbours of `group` bytes.

    As on a real server: an upgrade changes the files of some packages, and those lie together.
    """
    whole = sum(size for _, size in files)
    picked, left, seen = [], min(total, whole), 0
    for path, size in files:
        # Of each stretch of whole / total * group bytes the first `group` are taken.
        place = seen % (whole * group // max(total, 1) or 1)
        seen += size
        if place < group and size <= left:
            picked.append((path, size))
            left -= size
    return picked


def write_logs(tree, files):
    os.makedirs(f"{tree}/var/log", exist_ok=True)
    for number, log in enumerate(("syslog.log", "audit.log", "access.log")):
        with open(f"{tree}/var/log/{log}", "w", encoding="ascii") as out:
            for at, (path, size) in enumerate(files[number::3]):
                second = at * 7 + number
                clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
                out.write(f"2025-03-{1 + second // 86400 % 31:02}T{clock}Z host1 fsmon[{700 + number}]: {path} {size}\n")


def write_database(tree, files, total):
    """A file of pages, each filled with a piece of some document, as rows of text in a database are."""
    texts = [(path, size) for path, size in files if path.startswith("usr/") and PAGE <= size <= MIB]
    os.makedirs(f"{tree}/var/lib/items", exist_ok=True)
    with open(f"{tree}/var/lib/items/items.db", "wb") as out:
        left = total // PAGE
        for path, size in spread(texts, total * 2):
            with open(f"{tree}/{path}", "rb") as text:
                for number in range(min(size // PAGE, left)):
                    out.write(left.to_bytes(8, "little") + bytes(24) + text.read(PAGE - 32))
                    left -= 1
                    if number == 15:
                        break
            if left == 0:
                break
    return os.path.getsize(f"{tree}/var/lib/items/items.db")


def plan(files, database_bytes, total):
    """Yields the lines of the plan; `total` bytes are written when it is followed."""
    normal = [(path, size) for path, size in files if 4096 <= size <= 3 * MIB and path.startswith("usr/")]
    replaced = spread(normal, total * 50 // 100)
    taken = {path for path, _ in replaced}
    rest = [file for file in normal if file[0] not in taken]
    deleted = spread(rest, total * 50 // 100)
    taken = {path for path, _ in deleted}
    rest = [file for file in rest if file[0] not in taken]
    texts = [file for file in rest if file[0].startswith(("usr/share", "usr/include")) and not file[0].endswith("gz")]

    yield from (f"replace {path}" for path, _ in replaced)
    for number, (path, _) in enumerate(spread(texts, total * 14 // 100)):
        yield f"append var/log/{('syslog', 'audit', 'access')[number % 3]}.log {path}"
    for number, (path, _) in enumerate(spread(rest, total * 32 // 100)):
        yield f"create srv/upload/{number % 10}/{number:05} {path}"
    pages = database_bytes // PAGE
    places = total * 4 // 100 // (2 * PAGE)
    for number, (path, _) in zip(range(places), [f for f in texts if f[1] >= 2 * PAGE]):
        yield f"pages var/lib/items/items.db {path} {(number * 2654435761) % max(pages - 2, 1)}"
    yield from (f"delete {path}" for path, _ in deleted)


def main():
    tree, total = sys.argv[1], int(sys.argv[2]) * 1_000_000
    files = files_of(tree)
    write_logs(tree, files)
    database_bytes = write_database(tree, files, 64 * MIB * total // 50_000_000)
    os.makedirs(f"{tree}/root", exist_ok=True)
    with open(f"{tree}/root/change.plan", "w", encoding="ascii") as out:
        out.writelines(line + "\n" for line in plan(files, database_bytes, total))


main()
