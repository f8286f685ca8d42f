#!/bin/bash
# Runs all tests that Cargo built:  test.sh [FILTER...]
#
# Tests with guests wait more than they work, and those of high availability run one at a time, because guests are judged by
# how long they could not write. Everything else is run beside them at a lower priority, and told when it has ended.
set -uo pipefail
cd "$(dirname "$0")/.."
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-6}

# Where each test is to be run and which program it is; those with guests are named lab.
tests=$(cargo test --workspace --lib --bins --tests --no-run --message-format=json-render-diagnostics |
    python3 -Ic 'import json, os, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["profile"]["test"]:
        kind = "lab" if made["target"]["name"] == "lab" else "other"
        print(kind, os.path.dirname(made["manifest_path"]), made["executable"])') || exit
[ -n "$tests" ] || { echo "test.sh: Cargo names no tests" >&2; exit 1; }

# run KIND FILTER...: one program after the other; fails if any did.
run() {
    local kind=$1 result=0 of directory program
    shift
    while read -r of directory program; do
        [ "$of" = "$kind" ] || continue
        echo
        echo "     Running ${program#"$PWD/"}"
        (cd "$directory" && exec "$program" "$@") </dev/null || { result=1 && failed+=("${program##*/}"); }
    done <<<"$tests"
    return $result
}

failed=()
others=$(mktemp)
# A group of its own, to be ended whole with this script.
set -m
(
    renice -n 10 -p $BASHPID >/dev/null
    run other "$@"
    cargo test --workspace --doc || failed+=(documentation)
    [ ${#failed[@]} = 0 ] || {
        echo "test.sh: failed: ${failed[*]}"
        exit 1
    }
) >"$others" 2>&1 &
beside=$!
set +m
trap 'kill -- -$beside 2>/dev/null; rm -f "$others"' EXIT
echo "test.sh: the tests with guests first; the others run beside them and are told afterwards"
run lab "$@"
result=$?
[ $result = 0 ] || echo "test.sh: failed: ${failed[*]}"
wait $beside || result=1
cat "$others"
exit $result
