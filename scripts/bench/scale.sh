# The index of a repository that nobody has at hand, 100 TiB in chunks of 1 MiB: sourced by bench.sh.
#
# The segments are real, with random ids in the sizes that compaction leaves; the packs that they list do not exist.
# They are in the page cache when they are measured, in a process that has opened nothing before.

measure_scale() {
    local place=$run/scale
    say "index of $scale_chunks chunks"
    "$bin/examples/index_scale" make "$place" "$scale_chunks" >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "cannot make an index of $scale_chunks chunks"
    sync
    prime "$place"
    "$bin/examples/index_scale" measure "$place" >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "cannot measure the index of $scale_chunks chunks"
    sed 's/^{/{"tool": "scale", "operation": "index", /' "$run/output" >>"$results"
    rm -rf "$place"
}
