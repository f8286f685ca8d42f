//! Seeds, mistakes planted on purpose, and runs that people can read.

use super::{faults::play, world::World};
use crate::ha::planted::{PLANTED, Planted};

fn seeds() -> u64 {
    std::env::var("VIRTWARD_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(500)
}

fn fails(seed: u64) -> Option<World> {
    Some(play(seed)).filter(|world| world.checks.broken.is_some())
}

/// Runs one part of the seeds in each of some threads; the first that fails is printed whole.
#[test]
fn no_seed_breaks_an_invariant() {
    if let Some(seed) = std::env::var("VIRTWARD_SEED").ok().and_then(|text| text.parse().ok()) {
        let world = play(seed);
        println!("{}", world.log.join("\n"));
        assert_eq!(world.checks.broken, None);
        return;
    }
    let (all, threads) = (seeds(), 2);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for seed in (thread..all).step_by(threads as usize) {
                    if let Some(world) = fails(seed) {
                        let log = world.log.join("\n");
                        let what = world.checks.broken.unwrap_or_default();
                        panic!("{log}\n\nseed {seed}: {what}\nagain: VIRTWARD_SEED={seed} cargo test -p virtward-decide no_seed");
                    }
                }
            });
        }
    });
}

#[test]
fn every_planted_mistake_is_found() {
    const SEEDS_MAX: u64 = 600;
    use Planted::*;
    let mistakes = [
        WaitOneTimeout,
        FreshFromAnswer,
        BelieveUnverified,
        SkipRecheck,
        IgnoreLease,
        PetWhileKilling,
        WaitNotRestarted,
        UnguardedHeartbeat,
        ClaimWithoutProof,
        TrustAnyWatchdog,
        AckWhileFencing,
        Resurrect,
        CountBlindness,
        SkipDrain,
    ];
    let missed: Vec<Planted> = mistakes
        .into_iter()
        .filter(|mistake| {
            PLANTED.set(Some(*mistake));
            let found = (0..SEEDS_MAX).find_map(fails);
            PLANTED.set(None);
            match &found {
                Some(world) => println!("{mistake:?}: {}: {:?}", &world.log[0], world.checks.broken),
                None => println!("{mistake:?}: NOT FOUND"),
            }
            found.is_none()
        })
        .collect();
    assert!(missed.is_empty(), "{SEEDS_MAX} seeds did not find {missed:?}");
}
