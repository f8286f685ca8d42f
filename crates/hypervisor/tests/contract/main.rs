//! One contract for every [`Hypervisor`](virtward_hypervisor::Hypervisor), kept by the simulator and by libvirt with
//! QEMU alike.
//!
//! The real one runs in a lab: `target/debug/virtward-lab` must have been built, and it needs root.

mod backup;
mod bench;
mod blocks;
mod lab;
mod life;
mod simulated;

use std::time::Instant;

use bench::Bench;

/// Every part of the contract, on its own guests, one after the other.
async fn keep(bench: &dyn Bench) {
    let begun = Instant::now();
    macro_rules! part {
        ($part:path) => {{
            let part_begun = Instant::now();
            $part(bench).await;
            println!("{:6.2} s  {}", part_begun.elapsed().as_secs_f64(), stringify!($part));
        }};
    }
    part!(life::host_is_described);
    part!(life::states_and_transitions);
    part!(life::definitions_and_lookups);
    part!(life::disks_of_every_kind);
    part!(life::agent_absent);
    part!(life::agent_present);
    part!(life::monitor_and_stats);
    part!(backup::full_then_mixed_then_abort);
    part!(backup::refusals);
    part!(backup::checkpoints_are_forgotten_and_redefined);
    part!(backup::bitmaps_after_a_crash);
    part!(blocks::copy_and_pivot);
    part!(blocks::migration_keeps_bitmaps_and_loses_checkpoints);
    part!(life::daemon_restart);
    part!(life::closing);
    println!("{:6.2} s  in all", begun.elapsed().as_secs_f64());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simulated_hosts_keep_the_contract() {
    keep(&simulated::Simulated::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libvirt_keeps_the_contract() {
    let lab = lab::Lab::up().await;
    keep(&lab).await;
}
