//! The steps of a plan as jobs: one migration each, made on the host where its VM is.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use uuid::Uuid;
use virtward_api::{JobState, MigrateRequest, Origin, VmLeft, VmRef};
use virtward_decide::{
    arbiter::Operation,
    placement::{Plan, Step},
};
use virtward_engine::{Cancel, Event, Observer, Pace, carry_out};

use crate::{
    daemon::Daemon,
    jobs::record::{NewJob, Place, Record, Work},
};

/// Between two looks at a job of a step.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// How long it may take until everybody knows where a VM is.
const KNOWN_WITHIN: Duration = Duration::from_secs(15);

/// What a plan is carried out for.
pub struct Carrier<'a> {
    pub daemon: &'a Arc<Daemon>,
    /// The job that asks for it.
    pub parent: &'a Record,
    /// What its steps claim their VMs for.
    pub operation: Operation,
    /// Memory of each VM, in bytes; for progress.
    pub sizes: BTreeMap<Uuid, u64>,
    pub observer: &'a dyn Observer,
    pub cancel: &'a Cancel,
}

/// What became of it.
pub struct Outcome {
    /// VMs that arrived.
    pub moved: u64,
    /// Those that did not.
    pub left: Vec<VmLeft>,
}

impl Carrier<'_> {
    /// Carries a plan out. Steps that run when it is cancelled are cancelled too, and awaited.
    pub async fn carry(&self, plan: &Plan, pace: &Pace<'_>) -> Outcome {
        let total = plan.steps.iter().filter_map(|step| self.sizes.get(&step.vm)).sum();
        let done = std::sync::atomic::AtomicU64::new(0);
        let arrived = std::sync::atomic::AtomicUsize::new(0);
        self.tell(Event::Total { bytes: total });
        self.tell(Event::Detail(&format!("0 of {} VMs have moved", plan.steps.len())));
        let carried = carry_out(plan, pace, self.cancel, |step| {
            let (done, arrived) = (&done, &arrived);
            async move {
                let outcome = self.step(step).await;
                match &outcome {
                    Ok(()) => {
                        use std::sync::atomic::Ordering::Relaxed;
                        let size = self.sizes.get(&step.vm).copied().unwrap_or(0);
                        let bytes = done.fetch_add(size, Relaxed) + size;
                        let number = arrived.fetch_add(1, Relaxed) + 1;
                        self.tell(Event::Done { bytes });
                        self.tell(Event::Detail(&format!("{number} of {} VMs have moved", plan.steps.len())));
                    }
                    Err(why) => {
                        let text = format!("{} stays on {}: {why}", step.name, step.from);
                        self.tell(Event::Warning(&text));
                    }
                }
                outcome
            }
        })
        .await;
        let why = match (carried.late, self.cancel.is_cancelled()) {
            (true, _) => "its turn did not come within the time that was given",
            (_, true) => "cancelled",
            _ => "what it waits for did not move",
        };
        let failed = carried.failed.iter().map(|(at, why)| left(&plan.steps[*at], why));
        let not_started = carried.not_started.iter().map(|at| left(&plan.steps[*at], why));
        Outcome { moved: carried.done.len() as u64, left: failed.chain(not_started).collect() }
    }

    fn tell(&self, event: Event<'_>) {
        self.observer.event("", event);
    }

    /// One step, from its job's submission to its end.
    async fn step(&self, step: &Step) -> Result<(), String> {
        let daemon = self.daemon;
        let of = &self.parent.job;
        let request = MigrateRequest { to: step.to.0.clone(), ..MigrateRequest::default() };
        let vm = VmRef { uuid: step.vm, name: step.name.clone() };
        let origin = Origin { by: of.origin.by.clone(), policy: None, due: None, attempt: 1, after: Some(of.id) };
        let work = Work::Migrate { request, operation: self.operation };
        let new = NewJob::without_repository(work, Some(vm), origin);
        // Where it is by the plan: what is known of a VM that has just moved may be a moment older.
        let node = daemon.fleet().node_of(&step.from.0).map(str::to_owned);
        let place = node.map_or_else(|| daemon.place_for(&new), |node| Place { node, host: step.from.0.clone() });
        let submitted = daemon.jobs.submit(new, &place, None, Vec::new()).await;
        let id = submitted.map_err(|problem| problem.detail)?.0.id;
        let mut told_to_stop = false;
        loop {
            let job = daemon.jobs.job(id).map_err(|problem| problem.detail)?;
            match job.state {
                JobState::Succeeded => break,
                state if state.is_final() => {
                    let why = job.error.map_or_else(|| "its job ended".to_owned(), |error| error.message);
                    return Err(why);
                }
                _ => {}
            }
            if self.cancel.is_cancelled() && !told_to_stop {
                // It may have ended at this very moment.
                told_to_stop = daemon.jobs.cancel(id, &of.origin.by).await.is_ok();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.until_known(step).await;
        Ok(())
    }

    /// A later step of the same VM begins where this one ended.
    async fn until_known(&self, step: &Step) {
        let is_known = || {
            let fleet = self.daemon.fleet();
            fleet.vms.get(&step.vm).is_some_and(|placed| placed.host == step.to.0)
        };
        let until = tokio::time::Instant::now() + KNOWN_WITHIN;
        while !is_known() && tokio::time::Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn left(step: &Step, why: &str) -> VmLeft {
    VmLeft {
        vm: VmRef { uuid: step.vm, name: step.name.clone() },
        reasons: vec![format!("{}: {why}", step.to)],
        choices: vec!["try again".into(), format!("virsh shutdown {}", step.name)],
    }
}
