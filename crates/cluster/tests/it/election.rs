//! Elections: one leader whose writes succeed, whatever becomes of the others.

use std::{sync::Arc, time::Duration};

use virtward_cluster::{
    EtcdOptions, EtcdStore, MemStore, Op, Store,
    clock::{Clock, ManualClock},
    election::{Candidate, Leadership},
    mem::{Call, Fault, MemOptions},
};

use crate::{backend::value, server::Etcd};

const TTL: Duration = Duration::from_secs(9);

struct World {
    clock: ManualClock,
    store: MemStore,
}

impl World {
    fn new() -> Self {
        let clock = ManualClock::new();
        let options = MemOptions { clock: Arc::new(clock.clone()), ..MemOptions::default() };
        Self { store: MemStore::with(options), clock }
    }

    /// A candidate with a connection of its own.
    fn candidate(&self, id: &str) -> (Candidate, MemStore) {
        let client = self.store.client();
        let candidate = Candidate::new(Arc::new(client.clone()), "leader", id, TTL);
        (candidate.with_clock(Arc::new(self.clock.clone())), client)
    }

    /// Lets time pass in small steps, and everybody act in each.
    async fn pass(&self, time: Duration) {
        let until = self.clock.now() + time;
        while self.clock.now() < until {
            settle().await;
            self.clock.advance(Duration::from_millis(100));
        }
        settle().await;
    }
}

/// Lets every task run until it waits.
async fn settle() {
    for _ in 0..30 {
        tokio::task::yield_now().await;
    }
}

fn campaign(candidate: Candidate) -> tokio::task::JoinHandle<Leadership> {
    tokio::spawn(async move { candidate.campaign().await.unwrap() })
}

async fn write(store: &dyn Store, leader: &Leadership, value: &str) -> bool {
    let put = Op::put("/work", value.to_owned());
    store.txn(vec![leader.guard()], vec![put]).await.unwrap().succeeded
}

#[tokio::test]
async fn one_leads_and_the_next_has_a_higher_epoch() {
    let world = World::new();
    let ((one, client_one), (two, _)) = (world.candidate("one"), world.candidate("two"));
    let first = one.campaign().await.unwrap();
    assert_eq!(two.leader().await.unwrap().unwrap().id, "one");
    assert!(write(&client_one, &first, "by one").await);
    let waiting = campaign(two.clone());
    // Longer than a lease: kept alive it stays.
    world.pass(TTL * 3).await;
    assert!(!waiting.is_finished() && !first.is_lost());
    let epoch = first.epoch();
    let guard = first.guard();
    first.resign().await;
    settle().await;
    let second = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    assert!(second.epoch() > epoch);
    let leader = two.leader().await.unwrap().unwrap();
    assert_eq!((leader.id.as_str(), leader.epoch), ("two", second.epoch()));
    assert!(!world.store.txn(vec![guard], vec![Op::put("/work", "late")]).await.unwrap().succeeded);
    assert_eq!(value(&world.store, "/work").await.unwrap(), "by one");
}

#[tokio::test]
async fn dropping_leadership_resigns() {
    let world = World::new();
    let ((one, _), (two, _)) = (world.candidate("one"), world.candidate("two"));
    drop(one.campaign().await.unwrap());
    settle().await;
    let second = tokio::time::timeout(Duration::from_secs(10), two.campaign()).await.unwrap().unwrap();
    assert!(!second.is_lost());
}

/// The leader stops between its decision and its write, for longer than its lease lives. Another leads. The write
/// fails.
#[tokio::test]
async fn a_paused_leaders_late_write_fails() {
    let world = World::new();
    let ((one, client_one), (two, client_two)) = (world.candidate("one"), world.candidate("two"));
    let first = one.campaign().await.unwrap();
    assert!(write(&client_one, &first, "in time").await);
    // Its machine is suspended: nothing gets through, and its own clock would not tell it either.
    client_one.faults().cut_off(true);
    let waiting = campaign(two);
    world.pass(TTL + Duration::from_secs(1)).await;
    let second = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    assert!(write(&client_two, &second, "by two").await);
    client_one.faults().cut_off(false);
    assert!(!write(&client_one, &first, "late").await);
    assert_eq!(value(&world.store, "/work").await.unwrap(), "by two");
    assert!(write(&client_two, &second, "by two again").await);
}

/// The leader's write is on its way when it is deposed, and arrives when another leads.
#[tokio::test]
async fn a_deposed_leaders_write_that_was_on_its_way_does_nothing() {
    let world = World::new();
    let ((one, client_one), (two, client_two)) = (world.candidate("one"), world.candidate("two"));
    let first = one.campaign().await.unwrap();
    client_one.faults().once(Call::Txn, Fault::Late(TTL * 3));
    let (sender, guard) = (client_one.clone(), first.guard());
    let late = tokio::spawn(async move { sender.txn(vec![guard], vec![Op::put("/work", "late")]).await });
    settle().await;
    client_one.faults().cut_off(true);
    let waiting = campaign(two);
    world.pass(TTL * 2).await;
    let second = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    assert!(write(&client_two, &second, "by two").await);
    world.pass(TTL * 2).await;
    assert!(late.await.unwrap().is_err());
    assert_eq!(value(&world.store, "/work").await.unwrap(), "by two");
    assert!(first.is_lost() && !second.is_lost());
}

/// A leader that hears nothing from the store gives up before another can lead.
#[tokio::test]
async fn a_leader_that_is_cut_off_knows_before_another_leads() {
    let world = World::new();
    let ((one, client_one), (two, _)) = (world.candidate("one"), world.candidate("two"));
    let first = one.campaign().await.unwrap();
    let waiting = campaign(two);
    world.pass(TTL).await;
    client_one.faults().cut_off(true);
    let lost = tokio::spawn(first.lost());
    for _ in 0..200 {
        world.pass(Duration::from_millis(100)).await;
        if waiting.is_finished() {
            break;
        }
    }
    assert!(waiting.is_finished(), "the other never led");
    assert!(first.is_lost() && lost.is_finished());
    // And not by accident: it knew while its key was still there.
    let world = World::new();
    let (one, client_one) = world.candidate("one");
    let first = one.campaign().await.unwrap();
    client_one.faults().cut_off(true);
    world.pass(TTL.mul_f64(0.95)).await;
    assert!(first.is_lost());
    let observer = world.candidate("observer").0;
    assert_eq!(observer.leader().await.unwrap().unwrap().id, "one");
}

#[tokio::test]
async fn a_short_silence_of_the_store_costs_no_leadership() {
    let world = World::new();
    let (one, client) = world.candidate("one");
    let first = one.campaign().await.unwrap();
    for _ in 0..5 {
        client.faults().cut_off(true);
        world.pass(TTL / 2).await;
        client.faults().cut_off(false);
        world.pass(TTL / 2).await;
        assert!(!first.is_lost());
    }
    assert!(write(&client, &first, "still").await);
}

#[tokio::test]
async fn a_key_that_somebody_removed_ends_leadership() {
    let world = World::new();
    let (one, _) = world.candidate("one");
    let first = one.campaign().await.unwrap();
    assert!(world.store.txn(vec![first.guard()], vec![Op::delete("/election/leader")]).await.unwrap().succeeded);
    world.pass(TTL / 2).await;
    assert!(first.is_lost());
}

/// Whether the claim happened or not, exactly one epoch comes of it, and it is the one in the store.
#[tokio::test]
async fn a_claim_in_doubt_is_settled() {
    for fault in [Fault::Indeterminate { happens: true }, Fault::Indeterminate { happens: false }] {
        let world = World::new();
        let (one, client) = world.candidate("one");
        client.faults().once(Call::Txn, fault);
        let waiting = campaign(one.clone());
        world.pass(Duration::from_secs(2)).await;
        let first = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
        assert_eq!(one.leader().await.unwrap().unwrap().epoch, first.epoch());
        assert!(write(&client, &first, "x").await, "{fault:?}");
    }
}

#[tokio::test]
async fn many_candidates_on_a_bad_network_never_write_together() {
    let world = World::new();
    let mut seed = 42u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % below
    };
    let candidates: Vec<_> = (0..4).map(|n| world.candidate(&format!("c{n}"))).collect();
    let mut tasks = Vec::new();
    for (candidate, client) in &candidates {
        let (candidate, client) = (candidate.clone(), client.clone());
        let clock = world.clock.clone();
        tasks.push(tokio::spawn(async move {
            loop {
                let leader = candidate.campaign().await.unwrap();
                while !leader.is_lost() {
                    // Read, wait, write what was read: another leader in between would be overwritten.
                    if let Ok(entry) = client.get(b"/log").await {
                        let mut log = entry.map(|entry| entry.value.to_vec()).unwrap_or_default();
                        log.extend(format!("{}\n", leader.epoch()).as_bytes());
                        clock.sleep_until(clock.now() + Duration::from_millis(700)).await;
                        let _ = client.txn(vec![leader.guard()], vec![Op::put("/log", log)]).await;
                    } else {
                        clock.sleep_until(clock.now() + Duration::from_millis(700)).await;
                    }
                }
            }
        }));
    }
    for _ in 0..60 {
        // Mostly the one that leads, as far as anybody does.
        let leader = world.candidate("observer").0.leader().await.unwrap();
        let leading = leader.and_then(|leader| leader.id[1..].parse::<usize>().ok());
        let client = &candidates[leading.filter(|_| random(4) > 0).unwrap_or(random(4) as usize)].1;
        match random(5) {
            0 | 1 => client.faults().cut_off(true),
            2 => client.faults().once(Call::Txn, Fault::Indeterminate { happens: random(2) == 0 }),
            3 => client.faults().once(Call::Txn, Fault::Late(Duration::from_secs(random(20)))),
            _ => {}
        }
        world.pass(Duration::from_secs(1 + random(14))).await;
        client.faults().cut_off(false);
    }
    world.pass(TTL * 2).await;
    for task in tasks {
        task.abort();
    }
    let log = value(&world.store, "/log").await.unwrap();
    let epochs: Vec<u64> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert!(epochs.windows(2).all(|two| two[0] <= two[1]), "a deposed leader wrote: {epochs:?}");
    let distinct: std::collections::BTreeSet<_> = epochs.iter().collect();
    assert!(distinct.len() > 3, "leadership hardly moved: {distinct:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn elections_on_etcd_with_real_time() {
    let etcd = Etcd::start(1).await;
    let open = || -> Arc<dyn Store> { Arc::new(EtcdStore::new(EtcdOptions::new(etcd.urls(), "/v/")).unwrap()) };
    let ttl = Duration::from_secs(2);
    let (one, two) = (Candidate::new(open(), "leader", "one", ttl), Candidate::new(open(), "leader", "two", ttl));
    let first = one.campaign().await.unwrap();
    let waiting = campaign(two);
    tokio::time::sleep(ttl * 3).await;
    assert!(!waiting.is_finished() && !first.is_lost());
    // All of etcd stops for longer than the leader waits; then time stands still for the lease too.
    etcd.members[0].freeze();
    tokio::time::timeout(Duration::from_secs(20), first.lost()).await.expect("it noticed");
    etcd.members[0].thaw();
    let store = open();
    let second = tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap();
    assert!(second.epoch() > first.epoch());
    assert!(write(&*store, &second, "by two").await);
    assert!(!write(&*store, &first, "late").await);
    second.resign().await;
}
