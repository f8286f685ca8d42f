#!/bin/bash
# Tests that take long or need large servers. Run by `make soak`, which does the set-up.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${CARGO_TARGET_DIR:-$PWD/target}/tools

# The repository on Garage, a clustered object store: the test starts a node of its own.
VIRTWARD_SOAK_GARAGE="$tools/bin/garage" cargo test -p virtward-repo --test s3 soak:: -- --nocapture

# The repository on a real NFS, from two mounts.
cargo build -p virtward-cli -p virtward-lab
read -r _ _ tests < <(scripts/test-programs.sh -p virtward-repo --test it)
scripts/nfs.sh "${CARGO_TARGET_DIR:-$PWD/target}/debug" "$tests"

# Writers, collectors, copies and crashes in many more orders than `make test` tries.
VIRTWARD_SEEDS="${VIRTWARD_SEEDS:-20000}" cargo test -p virtward-repo --test it races::nothing_acknowledged

# High availability: faults in many more orders; a seed that fails prints its log and how to play it again.
VIRTWARD_SEEDS="${VIRTWARD_HA_SEEDS:-10000}" cargo test --release -p virtward-decide --lib ha::sim::tests::no_seed

# Every parser, with whatever a fuzzer makes up.
scripts/fuzz.sh "${VIRTWARD_FUZZ_SECONDS:-600}"

# The oldest libvirt and QEMU: all tests with guests, on hosts and with libraries of a Debian 12 without backports.
VIRTWARD_LAB_ROOT=/var/cache/virtward-lab/debian-12 cargo test -p virtward-cli -p virtward-lab --test lab
