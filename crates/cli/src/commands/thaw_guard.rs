//! `virtward internal thaw-guard`: thaws (or resumes) a guest whose backup died between freeze and thaw (or pause and
//! resume).
//!
//! Started by a backup before it freezes. The word `thawed` on standard input ends it; the end of standard input without
//! that word (the backup is gone) or the time running out makes it thaw the guest. It leaves the backup's session and
//! outlives the usual signals, because what kills the backup must not kill the guard.

use std::{
    io::{self, BufRead},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;
use virtward_hypervisor::{ErrorKind, Hypervisor, libvirt::Libvirt};

use crate::{
    cli::Global,
    config,
    exit::{Failure, Kind},
};

/// How long the guard keeps trying to thaw.
const TRY_FOR: Duration = Duration::from_secs(30);
const TRY_EVERY: Duration = Duration::from_millis(500);

/// Arguments of `internal thaw-guard`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM's UUID
    #[arg(long)]
    pub vm: Uuid,
    /// Thaw after this many milliseconds whatever happens
    #[arg(long, value_name = "N")]
    pub after_ms: u64,
    /// Let the guest's CPUs run again instead
    #[arg(long)]
    pub resume: bool,
}

/// Waits, and thaws if nobody says that it is done.
pub fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    // Fails only for the leader of a process group, whom the group's signals reach only by its own id.
    let _ = rustix::process::setsid();
    let uri = match &global.connect {
        Some(uri) => uri.clone(),
        None => config::load(global, &|name| std::env::var_os(name))?.connect,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(Failure::io("cannot start the runtime"))?;
    let ignored: Result<Vec<_>, Failure> = runtime.block_on(async {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        kinds.into_iter().map(|kind| signal(kind).map_err(Failure::io("cannot hold off signals"))).collect()
    });
    let _ignored = ignored?;
    if was_thawed(Duration::from_millis(args.after_ms)) {
        return Ok(());
    }
    let outcome = runtime.block_on(put_right(&uri, args));
    runtime.shutdown_background();
    outcome
}

/// Whether the word came before the end of input and before the time was up.
fn was_thawed(limit: Duration) -> bool {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        // A word is short; whatever writes more than that is not the backup.
        let heard = io::stdin().lock().read_line(&mut line).is_ok() && line.trim_end() == "thawed";
        let _ = sender.send(heard);
    });
    receiver.recv_timeout(limit).unwrap_or(false)
}

async fn put_right(uri: &str, args: &Args) -> Result<(), Failure> {
    let deadline = Instant::now() + TRY_FOR;
    loop {
        let error = match attempt(uri, args).await {
            Ok(()) => return Ok(()),
            // Nothing is frozen in a VM that does not exist or does not run.
            Err(error) if matches!(error.kind, ErrorKind::NoDomain | ErrorKind::WrongState) => return Ok(()),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            let failure = Failure::from(error);
            let vm = args.vm;
            let hint = match args.resume {
                true => format!("the guest may still be paused; run: virsh -c {uri} resume {vm}"),
                false => format!("the guest may still be frozen; run: virsh -c {uri} domfsthaw {vm}"),
            };
            return Err(Failure { kind: Kind::Other, ..failure }.about(&vm.to_string()).hint(hint));
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

async fn attempt(uri: &str, args: &Args) -> Result<(), virtward_hypervisor::Error> {
    let libvirt = Libvirt::connect(uri).await?;
    let done = match args.resume {
        true => libvirt.resume(args.vm).await,
        false => libvirt.fs_thaw(args.vm).await.map(|_| ()),
    };
    libvirt.close().await;
    done
}
