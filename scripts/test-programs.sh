#!/bin/bash
# Builds tests and prints the name, the package's directory and the path of each program:  test-programs.sh CARGO'S OPTIONS...
set -euo pipefail
cargo test --no-run --message-format=json-render-diagnostics "$@" | python3 -Ic 'import json, os, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["profile"]["test"]:
        print(made["target"]["name"], os.path.dirname(made["manifest_path"]), made["executable"])'
