# The index of a repository that nobody has at hand, 100 TiB in chunks of 1 MiB: sourced by bench.sh.
#
# The segments are real, with random ids in the sizes that compaction leaves; the packs that they list do not exist. The
# manifests of restore points that refer to all these chunks are real too, so that marking them can be measured.
# Everything is in the page cache when it is measured, in a process that has opened nothing before.

measure_scale() {
    local place=$run/scale
    say "index of $scale_chunks chunks"
    index_scale make "$place" "$scale_chunks"
    sync
    prime "$place"
    index_scale measure "$place"
    note_scale index
    index_scale refer "$place" "$scale_chunks"
    sync
    prime "$place"
    index_scale mark "$place"
    note_scale mark
    rm -rf "$place"
}

index_scale() {
    "$bin/examples/index_scale" "$@" >"$run/output" 2>"$run/errors" 9>&- ||
        die_with "$run/errors" "cannot $1 the index of $scale_chunks chunks"
}
note_scale() { sed "s/^{/{\"tool\": \"scale\", \"operation\": \"$1\", /" "$run/output" >>"$results"; }
