"""Turns the benchmark's measurements into tables: report.py RESULTS MACHINE [--write FILE] [--strict]

Prints the report, and writes it to FILE as Markdown. With --strict, fails if a goal is not met. Medians throughout.
"""

import collections
import json
import statistics
import sys

MIB = 1 << 20
TIMES = ("full", "incremental", "restore", "verify")
OFFLINE = {
    "virtward": "Virtward",
    "restic": "restic",
    "borg": "borg",
    "borg-disk": "borg, fixed chunks",
    "qemu-img": "qemu-img convert",
    "qemu-img-zstd": "qemu-img convert, zstd",
}
HOT = {
    "virtward-hot": "Virtward",
    "virtnbdbackup": "virtnbdbackup",
    "virtnbdbackup-lz4": "virtnbdbackup, lz4",
}
POINTS = {"points-virtward": "Virtward", "points-restic": "restic", "points-borg": "borg"}
POINT_TIMES = ("list", "backup", "restore", "verify", "delete", "collect")
S3_TIMES = {"full": "full", "restore": "restore", "restore-elsewhere": "restore, nothing kept here", "verify": "verify"}
DEDUPLICATING = ("restic", "borg", "borg-disk")
# Against whom a goal of time is held: as they come. Advised settings are told beside it.
AS_THEY_COME = ("restic", "borg")
OTHERS_HOT = ("virtnbdbackup", "virtnbdbackup-lz4")

Goal = collections.namedtuple("Goal", "what value unit goal met")


class Results:
    """Medians by tool and operation."""

    def __init__(self, path):
        self.values = collections.defaultdict(list)
        with open(path, encoding="ascii") as lines:
            for line in map(json.loads, lines):
                for field in set(line) - {"tool", "operation"}:
                    self.values[line["tool"], line["operation"], field].append(line[field])

    def get(self, tool, operation, field="seconds"):
        found = self.values.get((tool, operation, field))
        return statistics.median(found) if found else None

    def spread(self, tool, operation):
        found = self.values.get((tool, operation, "seconds"))
        return (max(found) - min(found)) / statistics.median(found) if found else 0

    def runs(self):
        """How often everything was measured, at least."""
        counts = [len(self.values[tool, operation, "seconds"]) for tool in (*OFFLINE, *HOT) for operation in ("full", "restore")]
        return min(counts)

    def peak(self, *tools):
        return max(max(v) for (tool, _, field), v in self.values.items() if tool in tools and field == "peak")

    def least(self, tools, operation, field="seconds"):
        """The tool that needs least, and what it needs."""
        found = [(self.get(tool, operation, field), tool) for tool in tools]
        value, tool = min(pair for pair in found if pair[0] is not None)
        return tool, value


def number(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def mib(value):
    return "–" if value is None else f"{value / MIB:.0f}"


def table(head, rows):
    """A Markdown table, padded so that it is one to the eye too. The first column is text."""
    rows = [head] + rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(widths)) + "|")
    return lines


def times_table(results, tools):
    head = ["", "full s", "incr. s", "restore s", "verify s", "full MiB", "both MiB", "peak MiB", "CPU s"]
    rows = []
    for tool, name in tools.items():
        cpu = [results.get(tool, operation, "cpu") for operation in TIMES]
        rows.append(
            [name]
            + [number(results.get(tool, operation)) for operation in TIMES]
            + [mib(results.get(tool, f"stored-{when}", "bytes")) for when in ("full", "both")]
            + [mib(results.peak(tool)), number(sum(c for c in cpu if c is not None), 1)]
        )
    return table(head, rows)


def detail_table(results, tools):
    """CPU seconds and peak memory of each operation."""
    head = [""] + [f"{word} {unit}" for word in ("full", "incr.", "restore", "verify") for unit in ("CPU s", "MiB")]
    rows = []
    for tool, name in tools.items():
        row = [name]
        for operation in TIMES:
            row += [number(results.get(tool, operation, "cpu")), mib(results.get(tool, operation, "peak"))]
        rows.append(row)
    return table(head, rows)


def points_lines(results):
    """Many restore points, and how much longer the others take."""
    head = ["", "list s", "backup s", "restore s", "verify s", "delete s", "collect s", "peak MiB", "stored MiB"]
    rows = [
        [name]
        + [number(results.get(tool, operation)) for operation in POINT_TIMES]
        + [mib(results.peak(tool)), mib(results.get(tool, "stored-full", "bytes"))]
        for tool, name in POINTS.items()
    ]
    for tool in list(POINTS)[1:]:
        ratios = [results.get(tool, operation) / results.get("points-virtward", operation) for operation in POINT_TIMES]
        rows.append([f"{POINTS[tool]} / Virtward"] + [f"{ratio:.1f} ×" for ratio in ratios] + ["", ""])
    count = int(results.get("points", "made", "count"))
    text = f"""\
{count} restore points of 20 small disks, {count // 20} of each; from one to the next half of a disk changed, of which
16 KiB do not compress. **list**: all of them, which the host has listed before. **backup**: one more, with one change.
**restore**: one from the middle. **verify**: all that is stored. **delete**: the oldest tenth of each disk's. **collect**:
what only those needed is given back. Commands as above, and `virtward backup prune`, `repo gc --grace 0`; `restic forget`,
`prune`; `borg delete`, `compact`. No program can make so many in a reasonable time as a user would: restic stored all
states of a disk in one run, and its snapshot objects were written for it; borg's own code made its archives in one
process; our library made ours in memory. All are laid out as after a collection.""".splitlines()
    return text + [""] + table(head, rows)


def remote_lines(results):
    """The same over object storage, and how much longer it takes."""
    rows = []
    for operation, word in S3_TIMES.items():
        here, near, far = (results.get(f"s3-{place}", operation) for place in ("local", "near", "remote"))
        rows.append([word, number(here), number(near), number(far), f"{far / here:.2f} ×", f"{far / near:.2f} ×"])
    text = """\
The second state of the disk image into an empty repository and back. **directory**: on the file system of the others here.
**object storage**: s3s-fs on this machine, over HTTP, each request 30 ms late; the server shares the cores with what is
measured, so it is measured without the delay too. **nothing kept here**: as on a host that never saw the repository.""".splitlines()
    head = ["s", "directory", "object storage near by", "30 ms away", "against directory", "against near by"]
    return text + [""] + table(head, rows)


def scale_lines(results):
    """The index at a size that no test machine fills."""
    get = lambda field: results.get("scale", "index", field)
    rows = [
        ["open, s", number(get("open_s"))],
        ["resident memory after opening, MiB", mib(get("open_bytes"))],
        ["peak memory, everything below included, MiB", mib(get("peak_bytes"))],
        ["look-ups of chunks that are there, per second, 1 thread / 2", f"{get('hit_per_s_1'):.0f} / {get('hit_per_s_2'):.0f}"],
        ["look-ups of chunks that are not, per second, 1 thread / 2", f"{get('miss_per_s_1'):.0f} / {get('miss_per_s_2'):.0f}"],
        ["absent chunks that a filter lets through, %", number(get("filter_pass_rate") * 100)],
        ["entries read in sequence, million per second", number(get("stream_per_s") / 1e6, 1)],
        ["merging the segment of a small run, s", number(get("compact_s"))],
    ]  # fmt: skip
    if marks := results.get("scale", "mark", "marks"):
        get = lambda field: results.get("scale", "mark", field)
        rows += [
            [f"collection: following {marks / 1e6:.1f} million references, s", number(get("mark_s"), 1)],
            ["collection: comparing the index with them, s", number(get("sweep_s"), 1)],
            ["collection: peak memory, MiB", mib(get("mark_peak_bytes"))],
        ]
    get = lambda field: results.get("scale", "index", field)
    size = f"{get('chunks') / 1e6:.0f} million chunks ({get('chunks') / (1 << 20):.0f} TiB in chunks of 1 MiB) in {get('segments'):.0f} segments"
    return [f"The index alone, of {size}; none of its packs exists. Restore points refer to all of it."] + [""] + table(["index", ""], rows)


DAEMON_PAGES = {"overview": "overview", "vms_first": "VMs, first page of 100", "vms_searched": "VMs, searched and sorted",
                "vms_unprotected": "VMs, filtered by protection", "vm": "one VM", "explain": "what its policies do and why",
                "hosts": "hosts, first page of 100", "host": "one host", "vms_of_host": "VMs of one host", "cluster": "the cluster",
                "jobs": "jobs", "events": "events", "metrics": "metrics"}  # fmt: skip


def daemon_lines(results, operation):
    """The daemon with more VMs than one host has, and with more hosts than one cluster has."""
    get = lambda field: results.get("daemon", operation, field)
    where = "on a simulated host" if operation == "scale" else f"on {get('hosts'):.0f} hosts of a cluster in etcd, all but one of them records"
    rows = [[f"{word}, ms", f"{get(page + '_ms'):.1f}", f"{get(page + '_slowest_ms'):.1f}"] for page, word in DAEMON_PAGES.items()]
    rows += [
        [f"planning for {get('policies'):.0f} policies, ms", f"{get('cycle_ms'):.0f}", ""],
        ["everything known, s", number(get("inventory_s")), ""],
        ["CPU seconds per minute at rest", number(get("idle_cpu_s_per_minute")), ""],
        ["peak memory, the simulated host included, MiB", mib(get("peak_bytes")), ""],
    ]  # fmt: skip
    return [f"{get('vms'):.0f} VMs {where}; 50 requests each, one at a time.", ""] + table(["daemon", "median", "slowest"], rows)


def goals(results):
    def faster(what, mine, others, least_ratio):
        tool, value = others
        ratio = value / mine
        named = f"{what}, against {({**OFFLINE, **HOT})[tool]}"
        return Goal(named, ratio, "×", f"at least {least_ratio} ×", ratio >= least_ratio)

    full, incremental, restore, verify = (results.get("virtward", operation) for operation in TIMES)
    hot_full, hot_incremental = results.get("virtward-hot", "full"), results.get("virtward-hot", "incremental")
    yield faster("full", full, results.least(AS_THEY_COME, "full"), 4)
    yield faster("incremental of a running VM", hot_incremental, results.least(AS_THEY_COME, "incremental"), 10)
    yield faster("incremental of a running VM", hot_incremental, results.least(OTHERS_HOT, "incremental"), 4)
    yield faster("restore", restore, results.least(AS_THEY_COME, "restore"), 4)
    yield faster("verify of all data", verify, results.least(AS_THEY_COME, "verify"), 2)
    for when, word in (("full", "full"), ("both", "full and incremental")):
        mine = results.get("virtward", f"stored-{when}", "bytes")
        tool, smallest = results.least(DEDUPLICATING, f"stored-{when}", "bytes")
        percent = (mine / smallest - 1) * 100
        yield Goal(f"size of {word}, against {OFFLINE[tool]}", percent, "%", "at most 5 % more", percent <= 5)
    if far := results.get("s3-remote", "restore"):
        ratio = far / results.get("s3-near", "restore")
        yield Goal("restore from object storage 30 ms away, against the same near by", ratio, "×", "at most 2 ×", ratio <= 2)
        ratio = far / results.get("s3-local", "restore")
        yield Goal("restore from object storage 30 ms away, against a directory", ratio, "×", "at most 2 ×", ratio <= 2)
    memory = results.peak("virtward", "virtward-hot", "s3-local", "s3-near", "s3-remote") / 1e6
    yield Goal("memory, highest of all operations", memory, "MB", "under 300 MB", memory < 300)
    if chunks := results.get("scale", "index", "chunks"):
        named = f"an index of {chunks / 1e6:.0f} million chunks"
        seconds, memory = results.get("scale", "index", "open_s"), results.get("scale", "index", "peak_bytes") / 1e6
        yield Goal(f"opening {named}", seconds, "s", "under 1 s", seconds < 1)
        yield Goal(f"memory of {named}", memory, "MB", "under 1000 MB", memory < 1000)
    if results.get("scale", "mark", "marks"):
        memory = results.get("scale", "mark", "mark_peak_bytes") / 1e6
        yield Goal("memory of a collection's mark over it", memory, "MB", "under 1000 MB", memory < 1000)
    for operation in ("scale", "cluster"):
        if not (vms := results.get("daemon", operation, "vms")):
            continue
        get = lambda field: results.get("daemon", operation, field)
        them = f"{vms:.0f} VMs" if operation == "scale" else f"{vms:.0f} VMs on {get('hosts'):.0f} hosts"
        slowest = max(get(f"{page}_ms") for page in DAEMON_PAGES)
        yield Goal(f"slowest page with {them}", slowest, "ms", "under 100 ms", slowest < 100)
        cycle, memory = get("cycle_ms") / 1000, get("peak_bytes") / 1e6
        yield Goal(f"planning cycle with {them}", cycle, "s", "under 1 s", cycle < 1)
        yield Goal(f"memory of a daemon with {them}", memory, "MB", "under 300 MB", memory < 300)
    # Told beside the goals, though none was set for them.
    told = [(f"{word}, against {OFFLINE[tool]}", operation, "virtward", tool)
            for word, operation in (("full", "full"), ("restore", "restore")) for tool in DEDUPLICATING]  # fmt: skip
    told += [(f"incremental of an image file, against {OFFLINE[tool]}", "incremental", "virtward", tool)
             for tool in DEDUPLICATING]  # fmt: skip
    told += [(f"full of a running VM, against {HOT[tool]}", "full", "virtward-hot", tool) for tool in OTHERS_HOT]
    for what, operation, mine, other in told:
        if other == results.least(AS_THEY_COME, operation)[0] and operation != "incremental":
            continue
        yield Goal(what, results.get(other, operation) / results.get(mine, operation), "×", "", None)


def goals_table(found):
    verdict = {True: "met", False: "NOT MET", None: ""}
    rows = [[g.what, f"{g.value:.1f} {g.unit}", g.goal, verdict[g.met]] for g in found]
    return table(["Virtward", "measured", "goal", ""], rows)


def limit_lines(results, cores):
    """The least time a full backup can take on this machine, and how near it is."""
    data = results.get("limit", "data", "bytes")
    stored = results.get("virtward", "stored-full", "bytes")
    stages = (
        ("read from the page cache", "read", data),
        ("hash, BLAKE3", "hash", data),
        ("compress, zstd 1", "zstd", data),
        ("encrypt, AES-256-GCM", "aes", stored),
    )
    rows, total = [], 0.0
    for name, stage, size in stages:
        rate = results.get("limit", stage, "per_second")
        total += size / rate
        rows.append([name, f"{rate / 1e6:.0f}", mib(size), f"{size / rate:.3f}"])
    floor = total / cores
    lines = table(["one core", "MB/s", "MiB", "CPU s"], rows) + [""]
    for tool, what in (("virtward", "an image file"), ("virtward-hot", "a running VM")):
        seconds = results.get(tool, "full")
        lines.append(
            f"- full backup of {what}: {seconds:.2f} s; the limit is {total:.2f} s of work over {cores} cores, "
            f"{floor:.2f} s. Virtward reaches {floor / seconds * 100:.0f} % of it."
        )
    return lines


def machine_lines(machine, runs):
    return [
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory"
        + (f" (a virtual machine, {machine['virtual']})" if machine["virtual"] not in ("none", "?") else ""),
        f"- {machine['system']}, Linux {machine['kernel']}, {machine['file_system']}",
        f"- {', '.join(machine['versions'].values())}",
        f"- {machine['date']}, {runs} run(s) of everything, medians; load before it began: {machine['load']}",
    ]


MEANING = """\
- **full**: the first state into a new, empty repository. **incr.**: the second state after it; for a running VM, after
  the same changes were made inside the guest. **restore**: the second state to a new file, which is then compared with
  what was backed up. **verify**: everything stored is read and proved: `virtward backup verify --all --mode full`,
  `restic check --read-data`, `borg check --verify-data`. qemu-img and this virtnbdbackup have nothing to verify with.
- **MiB**: bytes of all files stored, after the full and after both. **peak**: the largest process of any operation.
  **CPU**: user and system seconds of all four operations, without what QEMU did for the guest.
- Virtward, restic and borg encrypt and compress (zstd; borg level 1, restic its default); all with their defaults
  otherwise. "borg, fixed chunks" is what borg's manual advises for disk images: `--chunker-params=fixed,4194304
  --sparse`, with which it does not look for boundaries; the goals of time are held against borg as it comes. qemu-img and
  virtnbdbackup encrypt nothing; qemu-img's incremental is a second whole copy.
- restic and borg cannot read a running VM's changes. They have to read the whole image again, from a snapshot at best,
  so their incremental of the image file stands for them in the comparison of running VMs.""".splitlines()

CAVEATS = """\
- Everything is in the page cache before each measurement, and what is written goes to the page cache too except as far
  as the tools flush it themselves (Virtward, restic and borg do; qemu-img and virtnbdbackup do not). With slow disks or
  a network in between all tools come nearer to each other.
- The guest is emulated without hardware virtualisation. Its QEMU and the tool share the cores; the guest is idle while
  it is backed up. Its disk goes through the host's page cache (`cache='writeback'`).
- restic derives its key from a password in about half a second at each start, borg in less; Virtward opens its
  repository with a key file here, which is its default.
- The incremental of an image file has to read the whole file with every tool; only libvirt's dirty bitmaps spare that.""".splitlines()


def report(results, machine):
    found = list(goals(results))
    disk = (
        f"The disk has {machine['disk_mib']} MiB, an ext4 with {machine['packages']} Debian packages unpacked "
        f"({mib(results.get('limit', 'data', 'bytes'))} MiB allocated); the second state has about {machine['change_mb']} MB "
        "changed all over it: files replaced, appended to, created, deleted, and pages of a database written in place."
    )
    lines = ["# Benchmarks", "", "Made by `make bench`, which repeats all of it on your machine.", ""]
    lines += machine_lines(machine, results.runs()) + ["", disk, ""]
    lines += ["## Goals", ""] + goals_table(found) + [""]
    lines += ["## Disk image files", ""] + times_table(results, OFFLINE) + [""]
    ciphertext = results.get("virtward", "verify-ciphertext")
    lines += [f"`virtward backup verify --all --mode ciphertext`, which needs no key: {ciphertext:.2f} s.", ""]
    lines += ["## A running VM", ""] + times_table(results, HOT) + [""]
    qemu = [f"{name} {number(results.get(tool, 'full', 'beside_cpu'))} and {number(results.get(tool, 'incremental', 'beside_cpu'))}"
            for tool, name in HOT.items()]  # fmt: skip
    lines += [f"CPU seconds of the guest's QEMU during full and incremental: {'; '.join(qemu)}.", ""]
    lines += ["## The limit", "", "What a full backup has to do with the data, each stage measured alone on one core:", ""]
    lines += limit_lines(results, machine["cores"]) + [""]
    if results.get("s3-remote", "restore"):
        lines += ["## Object storage", ""] + remote_lines(results) + [""]
    if results.get("points", "made", "count"):
        lines += ["## Many restore points", ""] + points_lines(results) + [""]
    if results.get("scale", "index", "chunks"):
        lines += ["## At scale", ""] + scale_lines(results) + [""]
    if results.get("daemon", "scale", "vms"):
        lines += ["## The daemon with many VMs", ""] + daemon_lines(results, "scale") + [""]
    if results.get("daemon", "cluster", "vms"):
        lines += ["## The daemon of a large cluster", ""] + daemon_lines(results, "cluster") + [""]
    lines += ["## CPU and memory of each operation", ""] + detail_table(results, OFFLINE) + [""]
    lines += detail_table(results, HOT) + [""]
    widest = max(((results.spread(tool, op), tool, op) for tool in (*OFFLINE, *HOT) for op in TIMES))
    lines += ["## What the numbers mean", ""] + MEANING + [""]
    lines += ["## To keep in mind", ""] + CAVEATS
    if results.runs() > 1:
        lines.append(
            f"- Between the slowest and the fastest of the {results.runs()} runs lie at most {widest[0] * 100:.0f} % of "
            f"the median ({({**OFFLINE, **HOT})[widest[1]]}, {widest[2]})."
        )
    return lines, found


def main():
    options = sys.argv[3:]
    results = Results(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as text:
        machine = json.load(text)
    lines, found = report(results, machine)
    text = "\n".join(lines) + "\n"
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(text)
    if "--write" in options:
        path = options[options.index("--write") + 1]
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
        print(f"bench: written to {path}", file=sys.stderr)
    missed = [goal.what for goal in found if goal.met is False]
    print(f"bench: goals not met: {'; '.join(missed)}" if missed else "bench: all goals met", file=sys.stderr)
    if missed and "--strict" in options:
        sys.exit(1)


main()
