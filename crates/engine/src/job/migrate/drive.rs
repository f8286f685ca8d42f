//! The migration itself: libvirt moves, this steers.

use std::time::Duration;

use tokio::time::Instant;
use virtward_decide::migration::pace::{Effect, Pace, Sample};
use virtward_hypervisor::{DomainEventKind, Error as HyperError, ErrorKind, JobInfo, JobKind, MigrateSpec, Steer};
use virtward_model::Bytes;

use super::{Journal, PARALLEL_DEFAULT, POSTCOPY_PARALLEL_SINCE, Run};
use crate::{Error, Event};

/// Between two looks at a migration that runs. A pass that begins is looked at at once.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a migration that was told to end may take to.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// What became of the drive.
pub(super) struct Driven {
    pub(super) began: Instant,
    /// libvirt's error, if it gave one.
    pub(super) error: Option<HyperError>,
    /// Why it was ended from here.
    pub(super) ended: Option<Ended>,
    /// The last look.
    pub(super) last: Option<JobInfo>,
    pub(super) throttle_percent: u64,
    pub(super) postcopy: bool,
}

/// Why a migration was ended from here.
pub(super) enum Ended {
    Cancelled,
    GivenUp(String),
}

impl Driven {
    /// The error of a migration after which the VM is where it was.
    pub(super) fn failure(self, run: &Run<'_>) -> Error {
        match (self.ended, self.error) {
            (Some(Ended::Cancelled), _) => Error::Cancelled,
            (Some(Ended::GivenUp(reason)), _) => Error::GuestFirst(format!(
                "the migration of {} was given up, and it goes on here: {reason}",
                run.vm.name
            )),
            (None, Some(error)) => Error::hyper(format!("migrate {}, which goes on here", run.vm.name))(error),
            (None, None) => Error::Busy(format!("the migration of {} was ended by someone else", run.vm.name)),
        }
    }
}

/// What libvirt is asked for.
pub(super) fn spec(run: &mut Run<'_>, journal: &Journal) -> MigrateSpec {
    let options = run.options;
    let mut parallel = options.parallel;
    let wants_parallel = !matches!(options.compression, None | Some(virtward_hypervisor::Compression::Xbzrle));
    if parallel == 0 && wants_parallel {
        parallel = PARALLEL_DEFAULT;
    }
    let postcopy = options.pace.postcopy_after_ms.is_some();
    let mut compression = options.compression;
    if postcopy && parallel > 0 && journal.qemu_version < POSTCOPY_PARALLEL_SINCE {
        run.warn("this QEMU cannot combine post-copy with parallel connections; one connection is used".into());
        (parallel, compression) = (0, compression.filter(|_| !wants_parallel));
    }
    MigrateSpec {
        destination: run.to.uri.clone(),
        data_uri: run.to.address.as_ref().map(|address| match address.contains(':') && !address.starts_with('[') {
            true => format!("tcp://[{address}]"),
            false => format!("tcp://{address}"),
        }),
        live: true,
        with_storage: !journal.copy.is_empty(),
        disks: journal.copy.clone(),
        persist: true,
        force_unsafe: journal.proved_shared || options.unsafe_cache,
        postcopy,
        auto_converge: options.pace.throttle,
        parallel,
        compression,
        tls: options.tls,
        tls_name: options.tls_name.clone(),
        bandwidth_mib_s: options.bandwidth.map_or(0, |limit| (limit.get() >> 20).max(1)),
    }
}

/// Starts it, or goes on with one that runs, and steers it to its end.
pub(super) async fn drive(run: &mut Run<'_>, journal: &Journal, taken_up: bool) -> Driven {
    let spec = spec(run, journal);
    let (mut pace, first_ms) = Pace::new(run.options.pace);
    let uuid = run.vm.uuid;
    if journal.active {
        // Before it begins: a small guest switches after the first pass.
        let set = run.here().migration_steer(uuid, Steer::MaxDowntime { ms: first_ms }).await;
        if let Err(error) = set {
            tracing::debug!(%error, "the downtime limit stays the hypervisor's");
        }
    }
    let (source, mut events) = (run.env.hypervisor.clone(), run.env.hypervisor.events());
    let mut moving = Box::pin(async move {
        match taken_up {
            false => source.migrate(uuid, &spec).await,
            true => until_over(&*source, uuid).await,
        }
    });
    let mut driven =
        Driven { began: Instant::now(), error: None, ended: None, last: None, throttle_percent: 0, postcopy: false };
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut ending: Option<Instant> = None;
    loop {
        tokio::select! {
            outcome = &mut moving => {
                driven.error = outcome.err();
                return driven;
            }
            () = run.cancel.cancelled(), if driven.ended.is_none() => end(run, &mut driven, Ended::Cancelled).await,
            _ = tick.tick() => {}
            Ok(event) = events.recv() => {
                if event.uuid != uuid || !matches!(event.kind, DomainEventKind::MigrationPass { .. }) {
                    continue;
                }
            }
        }
        if driven.ended.is_some() {
            let since = *ending.get_or_insert_with(Instant::now);
            if since.elapsed() > ENDS_WITHIN {
                return driven;
            }
            continue;
        }
        look(run, &mut pace, &mut driven).await;
    }
}

/// Waits until no migration of the VM runs any more.
async fn until_over(hypervisor: &dyn virtward_hypervisor::Hypervisor, uuid: uuid::Uuid) -> Result<(), HyperError> {
    loop {
        match hypervisor.job(uuid).await {
            Ok(Some(job)) if job.kind == JobKind::MigrationOut => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind == ErrorKind::NoDomain => return Ok(()),
            Err(error) if error.kind == ErrorKind::Unreachable => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn end(run: &mut Run<'_>, driven: &mut Driven, why: Ended) {
    if driven.postcopy {
        run.warn(format!(
            "{} runs at the destination already and cannot be called back; it is brought to its end",
            run.vm.name
        ));
        driven.ended = Some(why);
        return;
    }
    // It may not have begun, or be over: then there is nothing to end.
    let aborted = run.here().abort_job(run.vm.uuid).await;
    match aborted {
        Err(error) if error.kind == ErrorKind::WrongState && matches!(why, Ended::Cancelled) => {
            // libvirt is still getting ready: ask again with the next look.
            tracing::debug!(%error, "no job to end yet");
            tokio::time::sleep(LOOK_EVERY).await;
            if run.here().abort_job(run.vm.uuid).await.is_ok() {
                driven.ended = Some(why);
            }
        }
        Err(error) => {
            tracing::debug!(%error, "the migration could not be ended");
            driven.ended = Some(why);
        }
        Ok(()) => driven.ended = Some(why),
    }
}

/// One look, and what follows from it.
async fn look(run: &mut Run<'_>, pace: &mut Pace, driven: &mut Driven) {
    let Ok(Some(job)) = run.here().job(run.vm.uuid).await else { return };
    let Some(migration) = job.migration.clone().filter(|_| job.kind == JobKind::MigrationOut) else { return };
    let sample = Sample {
        // Disks go first; until they are there memory does not move.
        pass: migration.iteration,
        remaining_bytes: migration.memory_remaining_bytes,
        bytes_s: migration.memory_bytes_s,
        dirty_bytes_s: migration.dirty_rate_bytes_s,
        throttle_percent: migration.throttle_percent,
        postcopy: driven.postcopy,
    };
    driven.throttle_percent = driven.throttle_percent.max(migration.throttle_percent);
    report(run, &job, &sample);
    driven.last = Some(job);
    let now_ms = u64::try_from(driven.began.elapsed().as_millis()).unwrap_or(u64::MAX);
    for effect in pace.step(now_ms, &sample) {
        tracing::info!(vm = run.vm.name, ?effect, ?sample, "migration");
        let steered = match effect {
            Effect::MaxDowntime { ms } => run.here().migration_steer(run.vm.uuid, Steer::MaxDowntime { ms }).await,
            Effect::Postcopy => {
                let switched = run.here().migration_steer(run.vm.uuid, Steer::Postcopy).await;
                driven.postcopy = switched.is_ok();
                switched
            }
            Effect::Abort { reason } => {
                end(run, driven, Ended::GivenUp(reason)).await;
                return;
            }
            Effect::Note(text) => {
                run.warn(text);
                Ok(())
            }
        };
        // It may have ended at this very moment.
        if let Err(error) = steered {
            tracing::debug!(%error, "steering");
        }
    }
}

fn report(run: &Run<'_>, job: &JobInfo, sample: &Sample) {
    let tell = |event| run.observer.event(&run.vm.name, event);
    tell(Event::Total { bytes: job.total_bytes });
    tell(Event::Done { bytes: job.total_bytes.saturating_sub(job.remaining_bytes) });
    let disks = job.migration.as_ref().map_or(0, |m| m.disk_remaining_bytes);
    let detail = match (sample.pass, sample.postcopy) {
        (0, _) if disks > 0 => format!("disks, {} left", Bytes(disks)),
        (0, _) => "getting ready".to_owned(),
        (_, true) => format!("runs there, {} of memory follow", Bytes(sample.remaining_bytes)),
        (pass, false) => {
            let predicted = sample.predicted_ms().map_or(String::new(), |ms| format!(", downtime {ms} ms if now"));
            let held = match sample.throttle_percent {
                0 => String::new(),
                percent => format!(", vCPUs held back {percent} %"),
            };
            format!(
                "pass {pass}, {} left, {}/s dirtied{predicted}{held}",
                Bytes(sample.remaining_bytes),
                Bytes(sample.dirty_bytes_s)
            )
        }
    };
    tell(Event::Detail(&detail));
}
