//! Which segments to merge, so that their number stays small whatever the size of the repository. Pure.
//!
//! Sizes are kept geometric: every segment holds at least twice as many entries as all smaller ones together; those that
//! do not are merged. An entry is rewritten about as often as the repository doubles. Segments too large to be worth it
//! are left alone, so that a merge has a bounded size. A segment that lists packs which are to go is always rewritten.

/// Outputs have at most this many entries, or a quarter of all if that is more: a merge of 1.5 GB. The filter of an output
/// is in memory while it is made, which is a quarter at most of what every reader holds.
pub const OUTPUT_ENTRIES_MAX: u64 = 32 << 20;
/// Segments below this are all alike: merging them costs next to nothing.
const SMALL_ENTRIES: u64 = 64 << 10;
const FACTOR: u64 = 2;

/// What matters of a segment.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Entries that stay.
    pub entries: u64,
    /// Whether it lists packs that are to go.
    pub is_rewritten: bool,
}

/// Groups of segments, by their number; each becomes one segment.
pub fn plan(segments: &[Candidate]) -> Vec<Vec<usize>> {
    let total: u64 = segments.iter().map(|s| s.entries).sum();
    let output_max = OUTPUT_ENTRIES_MAX.max(total / 4);
    let mut order: Vec<usize> = (0..segments.len()).filter(|n| segments[*n].entries <= output_max / 2).collect();
    order.sort_by_key(|n| segments[*n].entries);
    let (mut below, mut merged) = (0u64, 0);
    for (place, number) in order.iter().enumerate() {
        let entries = segments[*number].entries;
        if place > 0 && entries < FACTOR * below.max(SMALL_ENTRIES) {
            merged = place + 1;
        }
        below += entries;
    }
    let mut rest: Vec<usize> = (0..segments.len()).filter(|n| !order[..merged].contains(n)).collect();
    rest.retain(|n| segments[*n].is_rewritten);
    rest.sort_by_key(|n| segments[*n].entries);
    let mut groups = split(segments, &order[..merged], output_max);
    groups.extend(split(segments, &rest, output_max));
    groups.retain(|group| group.len() > 1 || segments[group[0]].is_rewritten);
    groups
}

/// Cuts a list into groups whose outputs are not too large.
fn split(segments: &[Candidate], numbers: &[usize], output_max: u64) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut entries = 0;
    for number in numbers {
        let more = segments[*number].entries;
        match groups.last_mut() {
            Some(group) if entries + more <= output_max => group.push(*number),
            _ => {
                groups.push(vec![*number]);
                entries = 0;
            }
        }
        entries += more;
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(sizes: &[u64]) -> Vec<Candidate> {
        sizes.iter().map(|entries| Candidate { entries: *entries, is_rewritten: false }).collect()
    }

    /// What is left, and how many entries were written.
    fn apply(sizes: &[u64]) -> (Vec<u64>, u64) {
        let groups = plan(&plain(sizes));
        let touched: Vec<usize> = groups.iter().flatten().copied().collect();
        let mut left: Vec<u64> = (0..sizes.len()).filter(|n| !touched.contains(n)).map(|n| sizes[n]).collect();
        let outputs: Vec<u64> = groups.iter().map(|group| group.iter().map(|n| sizes[*n]).sum()).collect();
        left.extend(&outputs);
        (left, outputs.iter().sum())
    }

    #[test]
    fn years_of_daily_runs_leave_few_segments_and_rewrite_little() {
        for daily in [[300, 40, 5], [60_000, 9_000, 700], [900_000, 200_000, 10]] {
            let (mut sizes, mut added, mut written) = (Vec::new(), 0u64, 0);
            for _ in 0..1500 {
                sizes.extend(daily);
                added += daily.iter().sum::<u64>();
                let (left, wrote) = apply(&sizes);
                (sizes, written) = (left, written + wrote);
                assert!(sizes.len() <= 13, "{} segments at {added} entries: {sizes:?}", sizes.len());
                assert_eq!(sizes.iter().sum::<u64>(), added);
            }
            // Small segments are merged each time; of the others each entry was written a few times.
            assert!(written / added < 8 || written / 1500 < SMALL_ENTRIES, "{written} written of {added}");
        }
    }

    #[test]
    fn a_hundred_million_entries_are_about_ten_segments() {
        let mut sizes = vec![1u64 << 20; 100];
        for _ in 0..4 {
            sizes = apply(&sizes).0;
        }
        assert!(sizes.len() <= 10, "{sizes:?}");
        assert!(sizes.iter().all(|s| *s <= OUTPUT_ENTRIES_MAX));
    }

    #[test]
    fn nothing_to_gain_nothing_done() {
        assert!(plan(&[]).is_empty());
        assert!(plan(&plain(&[5])).is_empty());
        assert!(plan(&plain(&[OUTPUT_ENTRIES_MAX, 8 << 20, 1 << 20])).is_empty());
    }

    #[test]
    fn segments_with_packs_that_go_are_always_rewritten() {
        let huge = Candidate { entries: 30 << 20, is_rewritten: true };
        assert_eq!(plan(&[huge]), [[0]]);
        assert_eq!(plan(&[huge, huge]), [[0], [1]]);
        let shrunk = Candidate { entries: 3 << 20, is_rewritten: true };
        assert_eq!(plan(&[Candidate { entries: 30 << 20, is_rewritten: false }, shrunk, shrunk]), [[1, 2]]);
    }

    proptest! {
        #[test]
        fn groups_are_disjoint_bounded_and_worth_it(
            sizes in prop::collection::vec((0u64..50 << 20, prop::bool::weighted(0.1)), 0..60),
        ) {
            let segments: Vec<_> =
                sizes.iter().map(|(entries, is_rewritten)| Candidate { entries: *entries, is_rewritten: *is_rewritten }).collect();
            let output_max = OUTPUT_ENTRIES_MAX.max(sizes.iter().map(|s| s.0).sum::<u64>() / 4);
            let groups = plan(&segments);
            let mut all: Vec<usize> = groups.iter().flatten().copied().collect();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len(), count);
            for group in &groups {
                let sum: u64 = group.iter().map(|n| segments[*n].entries).sum();
                prop_assert!(group.len() == 1 || sum <= output_max);
                prop_assert!(group.len() > 1 || segments[group[0]].is_rewritten);
            }
            prop_assert!((0..segments.len()).all(|n| !segments[n].is_rewritten || all.contains(&n)));
        }
    }
}
