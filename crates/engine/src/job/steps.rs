//! Carrying out a plan: each step as soon as those that it waits for have succeeded, several at a time.
//!
//! How a step is made is the caller's: by this process between two connections, or by a job of another daemon. A step that
//! fails leaves its VM where it was, and what waits for it does not start.

use std::{collections::BTreeSet, future::Future, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::Instant;
use virtward_decide::placement::{Plan, Step};

use crate::Cancel;

/// How a plan is carried out.
pub struct Pace<'a> {
    /// Steps at the same time; at least one.
    pub parallel: usize,
    /// No step begins later than this after the first.
    pub within: Option<Duration>,
    /// VMs whose steps go before others that could begin as well, in this order.
    pub first: &'a [String],
}

/// What became of the steps, by their index in the plan.
#[derive(Debug)]
pub struct Carried<T, E> {
    /// In the order in which they ended.
    pub done: Vec<(usize, T)>,
    /// In the order in which they ended.
    pub failed: Vec<(usize, E)>,
    /// What they wait for failed, the time was over, or it was cancelled.
    pub not_started: BTreeSet<usize>,
    /// The time was over.
    pub late: bool,
}

/// Carries out a plan. `begin` makes one step; those that run when `cancel` is raised are awaited, none begins after it.
pub async fn carry_out<'a, T, E, F>(
    plan: &'a Plan,
    pace: &Pace<'_>,
    cancel: &Cancel,
    begin: impl Fn(&'a Step) -> F,
) -> Carried<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let steps = &plan.steps;
    let started = Instant::now();
    let rank = |at: usize| pace.first.iter().position(|name| *name == steps[at].name).unwrap_or(usize::MAX);
    let mut arrived = BTreeSet::new();
    let not_started = (0..steps.len()).collect();
    let mut carried = Carried { done: Vec::new(), failed: Vec::new(), not_started, late: false };
    let mut running = FuturesUnordered::new();
    loop {
        while running.len() < pace.parallel.max(1) && !cancel.is_cancelled() && !carried.late {
            let ready = |at: &usize| steps[*at].after.iter().all(|before| arrived.contains(before));
            let next = carried.not_started.iter().copied().filter(ready).min_by_key(|at| (rank(*at), *at));
            let Some(at) = next else { break };
            carried.late = pace.within.is_some_and(|limit| started.elapsed() > limit);
            if carried.late {
                break;
            }
            carried.not_started.remove(&at);
            let step = begin(&steps[at]);
            running.push(async move { (at, step.await) });
        }
        let Some((at, outcome)) = running.next().await else { break };
        match outcome {
            Ok(done) => {
                arrived.insert(at);
                carried.done.push((at, done));
            }
            Err(error) => carried.failed.push((at, error)),
        }
    }
    drop(running);
    carried
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use uuid::Uuid;
    use virtward_decide::placement::Reason;

    use super::*;

    fn plan(after: &[(&str, &[usize])]) -> Plan {
        let steps = after.iter().map(|(name, after)| Step {
            vm: Uuid::nil(),
            name: (*name).into(),
            from: "a".into(),
            to: "b".into(),
            after: after.to_vec(),
            layer: 0,
            temporary: false,
            why: Reason::MakeRoom { vm: String::new() },
        });
        Plan { steps: steps.collect() }
    }

    #[tokio::test]
    async fn what_waits_for_a_failed_step_does_not_start_and_all_else_does() {
        let plan = plan(&[("one", &[]), ("two", &[0]), ("bad", &[]), ("never", &[1, 2]), ("dear", &[])]);
        let order = Mutex::new(Vec::new());
        let pace = Pace { parallel: 1, within: None, first: &["dear".to_owned()] };
        let carried = carry_out(&plan, &pace, &Cancel::default(), |step| {
            order.lock().unwrap().push(step.name.clone());
            async move { if step.name == "bad" { Err("no") } else { Ok(()) } }
        })
        .await;
        assert_eq!(*order.lock().unwrap(), ["dear", "one", "two", "bad"]);
        assert_eq!(carried.failed, [(2, "no")]);
        assert_eq!(carried.not_started, [3].into());
        assert!(!carried.late);
    }

    #[tokio::test]
    async fn nothing_begins_after_the_time_or_when_cancelled() {
        let plan = plan(&[("one", &[]), ("two", &[])]);
        let pace = Pace { parallel: 1, within: Some(Duration::from_millis(20)), first: &[] };
        let slow = |_: &Step| async {
            tokio::time::sleep(Duration::from_millis(40)).await;
            Ok::<_, ()>(())
        };
        let carried = carry_out(&plan, &pace, &Cancel::default(), slow).await;
        assert_eq!((carried.done.len(), carried.not_started.len(), carried.late), (1, 1, true));

        let cancel = Cancel::default();
        cancel.cancel();
        let pace = Pace { parallel: 4, within: None, first: &[] };
        let carried = carry_out(&plan, &pace, &cancel, slow).await;
        assert_eq!((carried.done.len(), carried.not_started.len(), carried.late), (0, 2, false));
    }
}
