"""Runs a command and appends one JSON line with what it took: seconds, CPU seconds, peak memory.

    measure.py RESULTS TOOL OPERATION [--beside PID] -- COMMAND...

CPU seconds are user and system time of the command and of everything it started and waited for. Peak memory is that of
the largest single process among them. With --beside, the CPU seconds that another process (the guest's QEMU) used
meanwhile are noted too. The command's output goes through; its failure is this program's failure, and nothing is
noted then.
"""

import json
import os
import sys
import time


def cpu_seconds_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        # The name in parentheses may hold blanks; the fields after it do not.
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    split = sys.argv.index("--")
    results, tool, operation, *options = sys.argv[1:split]
    command = sys.argv[split + 1 :]
    beside = int(options[1]) if options[:1] == ["--beside"] else None

    beside_before = cpu_seconds_of(beside) if beside else None
    started = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        print(f"bench: {tool} {operation}: {command[0]} ended with status {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)

    line = {
        "tool": tool,
        "operation": operation,
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }
    if beside:
        line["beside_cpu"] = cpu_seconds_of(beside) - beside_before
    with open(results, "a", encoding="ascii") as out:
        out.write(json.dumps(line) + "\n")


main()
