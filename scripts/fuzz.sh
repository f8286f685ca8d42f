#!/bin/bash
# Fuzzes the parsers of what others give us, each for some time, with the stable compiler:  fuzz.sh [SECONDS [TARGET...]]
#
# Inputs are kept in target/fuzz/corpus and used again by the next run. What fails stands in target/fuzz/artifacts; to see why:
# target/fuzz/HOST/release/TARGET FILE
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
[ $# -lt 1 ] || shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(basename -s .rs -a fuzz/fuzz_targets/*.rs)

host=$(rustc -vV | sed -n 's/^host: //p')
out=${CARGO_TARGET_DIR:-target}/fuzz
# What cargo-fuzz passes, without a sanitizer, which needs a nightly compiler and finds little in safe Rust.
flags="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares"
RUSTFLAGS=$(tr -s ' \n' ' ' <<<"$flags") cargo build --release --manifest-path fuzz/Cargo.toml --target "$host" \
    --target-dir "$out"

failed=()
for target in "${targets[@]}"; do
    mkdir -p "$out/corpus/$target" "$out/artifacts/$target"
    echo "fuzz: $target for $seconds s"
    "$out/$host/release/$target" "$out/corpus/$target" "fuzz/seeds/$target" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 -artifact_prefix="$out/artifacts/$target/" \
        >"$out/$target.log" 2>&1 || failed+=("$target")
    grep -E '^stat::number_of_executed_units|^SUMMARY|panicked|Test unit written' "$out/$target.log" || true
done
[ ${#failed[@]} = 0 ] || {
    echo "fuzz: failed: ${failed[*]} (see $out/TARGET.log)" >&2
    exit 1
}
