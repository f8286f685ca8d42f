#!/bin/bash
# Runs all tests that Cargo built:  test.sh [FILTER...]
#
# Tests of high availability (ha_…) need a lab of their own and wait more than they work: everything without guests runs beside
# them, at a lower priority, and is told at the end. Then come the other tests with guests.
set -uo pipefail
cd "$(dirname "$0")/.."
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-6}

tests=$(scripts/test-programs.sh --workspace --lib --bins --tests) || exit
[ -n "$tests" ] || { echo "test.sh: Cargo names no tests" >&2; exit 1; }

# run lab|other FILTER...: one program after the other; fails if any did. Those with guests are named lab.
run() {
    local kind=$1 result=0 name directory program
    shift
    while read -r name directory program; do
        [ "$name" = lab ] || name=other
        [ "$name" = "$kind" ] || continue
        echo
        echo "     Running ${program#"$PWD/"}"
        (cd "$directory" && exec "$program" "$@") </dev/null || {
            result=1
            failed+=("${program##*/}")
        }
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
if [ $# -gt 0 ]; then
    run lab "$@"
    result=$?
else
    echo "test.sh: tests of high availability; what needs no guests runs beside them and is told at the end"
    run lab ha_
    result=$?
    run lab --skip ha_ || result=1
fi
[ $result = 0 ] || echo "test.sh: failed: ${failed[*]}"
wait $beside || result=1
cat "$others"
exit $result
