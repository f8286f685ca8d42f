//! Which operations of one VM may meet: a table of every operation that runs against every one that is wanted.
//!
//! The rules behind it: failover goes before everything; a drain may cancel what can be done again at no loss, and waits
//! for the rest; a person's migration waits for a backup; the balancer never waits, because it plans anew in a minute;
//! nothing meets a restore. What is cancelled cleans up before the other begins, so that two never run at once.
//!
//! Pure. Who holds which claim, and waiting, are the caller's.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What can be done to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Making a restore point.
    Backup,
    /// Overwriting its disks from a restore point.
    Restore,
    /// Moving it to another host because a person says so.
    Migrate,
    /// Moving a disk to another storage.
    MoveDisk,
    /// Moving it to another host for the sake of load.
    Balance,
    /// Starting it elsewhere because its host is lost.
    Failover,
    /// Moving it away so that its host can be serviced.
    Drain,
    /// Taking, reverting or deleting a snapshot.
    Snapshot,
}

impl Operation {
    /// Every operation, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::Backup,
        Self::Restore,
        Self::Migrate,
        Self::MoveDisk,
        Self::Balance,
        Self::Failover,
        Self::Drain,
        Self::Snapshot,
    ];

    /// Its word.
    pub fn name(self) -> &'static str {
        ["backup", "restore", "migration", "disk move", "balancing", "failover", "drain", "snapshot"][self as usize]
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What becomes of an operation that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ruling {
    /// It runs at once, beside what runs.
    Run,
    /// What runs is cancelled and cleans up; then it runs.
    CancelOther,
    /// It runs when what runs has ended.
    Wait,
    /// It does not run, and is not kept for later.
    Refuse,
}

use Ruling::{CancelOther as C, Refuse as R, Wait as W};

/// Rows: what runs. Columns: what is wanted, in the order of [`Operation::ALL`].
///
/// Disk moves of one VM wait for each other, though different disks could move at once: they share their link.
const TABLE: [[Ruling; 8]; 8] = [
    //                Backup Restore Migrate MoveDisk Balance Failover Drain Snapshot
    /* Backup   */
    [W, W, W, W, R, C, C, W],
    /* Restore  */ [W, R, W, W, R, C, W, W],
    /* Migrate  */ [W, W, R, W, R, C, W, W],
    /* MoveDisk */ [W, W, W, W, R, C, C, W],
    /* Balance  */ [W, W, C, W, R, C, W, W],
    /* Failover */ [W, W, W, W, R, R, W, W],
    /* Drain    */ [W, W, R, W, R, C, R, W],
    /* Snapshot */ [W, W, W, W, R, C, W, W],
];

/// What becomes of an operation that is wanted while another one of the same VM runs.
pub fn rule(running: Operation, wanted: Operation) -> Ruling {
    TABLE[running as usize][wanted as usize]
}

/// The ruling over everything that runs on a VM: the strictest, with the operation that it is because of.
pub fn admit(running: &[Operation], wanted: Operation) -> (Ruling, Option<Operation>) {
    let strictest = running.iter().map(|running| (rule(*running, wanted), *running)).max();
    strictest.map_or((Ruling::Run, None), |(ruling, because)| (ruling, Some(because)))
}

/// Why a pair is ruled as it is, for people.
pub fn reason(running: Operation, wanted: Operation) -> String {
    match rule(running, wanted) {
        Ruling::Run => format!("a {wanted} runs beside a {running}"),
        Ruling::CancelOther => format!("the {wanted} cancels the {running}"),
        Ruling::Wait => format!("the {wanted} waits for the {running} to end"),
        Ruling::Refuse if wanted == Operation::Balance => {
            format!("balancing leaves a VM alone during a {running} and plans anew after it")
        }
        Ruling::Refuse if wanted == running => format!("a {running} of this VM is under way already"),
        Ruling::Refuse => format!("the {running} decides where the VM goes; a {wanted} has to be asked for after it"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Operation::*, *};

    /// The whole table once more, in words: who cancels whom and who is refused by what; all other pairs wait.
    #[test]
    fn every_pair_is_ruled_as_written_down() {
        let cancels = [
            (Migrate, &[Balance][..]),
            (Failover, &[Backup, Restore, Migrate, MoveDisk, Balance, Drain, Snapshot]),
            (Drain, &[Backup, MoveDisk]),
        ];
        let refused_by = [
            (Restore, &[Restore][..]),
            (Migrate, &[Migrate, Drain]),
            (Balance, &Operation::ALL),
            (Failover, &[Failover]),
            (Drain, &[Drain]),
        ];
        let among = |list: &[(Operation, &[Operation])], wanted, running| {
            list.iter().any(|(operation, others)| *operation == wanted && others.contains(&running))
        };
        for running in Operation::ALL {
            for wanted in Operation::ALL {
                let expected = match (among(&cancels, wanted, running), among(&refused_by, wanted, running)) {
                    (true, false) => Ruling::CancelOther,
                    (false, true) => Ruling::Refuse,
                    (false, false) => Ruling::Wait,
                    (true, true) => panic!("{running} {wanted}"),
                };
                assert_eq!(rule(running, wanted), expected, "{wanted} while {running} runs");
                assert!(reason(running, wanted).contains(wanted.name()), "{running} {wanted}");
            }
        }
    }

    #[test]
    fn the_page_shows_the_table() {
        let page = include_str!("../../../docs/policies.md");
        for running in Operation::ALL {
            let cells = Operation::ALL.map(|wanted| match rule(running, wanted) {
                Ruling::Run => "runs",
                Ruling::CancelOther => "cancels it",
                Ruling::Wait => "waits",
                Ruling::Refuse => "refused",
            });
            let row = format!("| **{running}** | {} |", cells.join(" | "));
            assert!(page.contains(&row), "docs/policies.md: {row}");
        }
    }

    #[test]
    fn the_order_of_operations_is_that_of_the_table() {
        for (place, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, place);
        }
    }

    #[test]
    fn no_two_operations_cancel_each_other() {
        for a in Operation::ALL {
            for b in Operation::ALL {
                assert!(rule(a, b) != Ruling::CancelOther || rule(b, a) != Ruling::CancelOther, "{a} {b}");
            }
        }
    }

    #[test]
    fn the_strictest_ruling_counts() {
        assert_eq!(admit(&[], Backup), (Ruling::Run, None));
        assert_eq!(admit(&[Balance], Migrate), (Ruling::CancelOther, Some(Balance)));
        assert_eq!(admit(&[Balance, Drain], Migrate), (Ruling::Refuse, Some(Drain)));
        assert_eq!(admit(&[Backup, Restore], Drain), (Ruling::Wait, Some(Restore)));
    }
}
