//! What must be true when a VM has arrived.

use uuid::Uuid;

use super::Finding;

/// Most that a guest's clock may be off more than before, in milliseconds.
const CLOCK_OFF_MAX_MS: i64 = 1000;

/// What was seen of a VM before and after its move.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// The VM.
    pub uuid: Uuid,
    /// Runs at the source still.
    pub runs_here: bool,
    /// Runs at the destination.
    pub runs_there: bool,
    /// Target and source of each disk, before.
    pub disks_before: Vec<(String, String)>,
    /// The same, after.
    pub disks_after: Vec<(String, String)>,
    /// Guest clock minus ours, before and after, in milliseconds, where an agent tells.
    pub clock_ms: (Option<i64>, Option<i64>),
    /// Whether an address of the guest answered, before and after; none if it has none that could be tried.
    pub answers: (Option<bool>, Option<bool>),
}

/// Judges an arrival. Blockers are what an operator must look at now.
pub fn judge(a: &Arrival) -> Vec<Finding> {
    let mut findings = vec![match (a.runs_here, a.runs_there) {
        (false, true) => Finding::fine("place", "runs there and nowhere else"),
        (true, true) => Finding::blocker("place", "runs on both hosts").advise("end the copy at the source at once"),
        (true, false) => Finding::blocker("place", "did not leave"),
        (false, false) => Finding::blocker("place", "runs on neither host").advise("start it: virsh start"),
    }];
    findings.push(match a.disks_before == a.disks_after {
        true => Finding::fine("disks", "the same disks"),
        false => Finding::blocker("disks", format!("{:?} became {:?}", a.disks_before, a.disks_after)),
    });
    if let (Some(before), Some(after)) = a.clock_ms {
        let off = (after - before).abs();
        findings.push(match off > CLOCK_OFF_MAX_MS {
            false => Finding::fine("clock", format!("the guest's clock is {off} ms off what it was")),
            true => Finding::warning("clock", format!("the guest's clock is {off} ms off what it was"))
                .advise("set it: virsh domtime --sync"),
        });
    }
    match a.answers {
        (Some(true), Some(true)) => findings.push(Finding::fine("network", "answers, as before")),
        (Some(true), Some(false)) => findings.push(
            Finding::blocker("network", "answered before and does not answer now")
                .advise("compare the bridges and VLANs of the two hosts; the VM runs and can be moved back"),
        ),
        _ => {}
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::{Level, blockers};

    fn arrived() -> Arrival {
        let disks = vec![("vda".to_owned(), "/i/vda".to_owned())];
        Arrival {
            runs_there: true,
            disks_before: disks.clone(),
            disks_after: disks,
            clock_ms: (Some(5), Some(40)),
            answers: (Some(true), Some(true)),
            ..Arrival::default()
        }
    }

    #[test]
    fn a_good_arrival_and_each_bad_one() {
        assert!(judge(&arrived()).iter().all(|f| f.level == Level::Fine));
        let bad: [fn(&mut Arrival); 4] = [
            |a| a.runs_here = true,
            |a| a.runs_there = false,
            |a| a.disks_after[0].1 = "/i/other".into(),
            |a| a.answers.1 = Some(false),
        ];
        for change in bad {
            let mut a = arrived();
            change(&mut a);
            assert_eq!(blockers(&judge(&a)).count(), 1, "{a:?}");
        }
        let mut a = arrived();
        a.clock_ms.1 = Some(5000);
        assert!(judge(&a).iter().any(|f| f.level == Level::Warning && f.check == "clock"));
        // What did not answer before proves nothing.
        a.answers = (Some(false), Some(false));
        a.clock_ms = (None, Some(7));
        assert!(judge(&a).iter().all(|f| f.level == Level::Fine));
    }
}
