//! Where VMs go: at their first start, after a host failed, and when they are to be moved.
//!
//! One model for all of it ([`virtward_model::world`]): what must never be exceeded (memory, space, reservations), what
//! may be wanted twice at the cost of speed (CPU, I/O, network), and rules that must or should be kept.
//!
//! - [`place`] finds hosts for VMs that run nowhere, without moving others.
//! - [`plan()`] moves VMs, in steps that can be carried out; [`check`] is the linter that accepts what it makes.
//! - [`crate::admission`] says whether room is left for failures.
//!
//! A "no" that is proved is told apart from "none was found".

mod even;
mod lint;
mod pack;
mod place;
mod planner;
mod route;
pub mod rules;
mod space;

pub use even::{Evening, migration_seconds};
pub use lint::{Violation, check};
pub use pack::Impossible;
pub use place::{Line, Outcome, Place, Placement, Purpose, Report, Request, place};
pub use planner::{Because, Goal, Plan, PlanReport, Reason, SetAside, Step, plan};
pub(crate) use {
    even::{hottest, percent},
    pack::*,
    place::blocked,
    route::*,
    space::*,
};

use serde::{Deserialize, Serialize};
use virtward_model::world::{HostState, Resource};

/// Why a VM cannot be on a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum WhyNot {
    /// The host takes no VMs.
    State {
        /// Its state.
        state: HostState,
    },
    /// The host is kept empty for failover.
    Spare,
    /// The caller ruled it out.
    Avoided,
    /// The host does not offer what the VM requires.
    Lacks {
        /// The label.
        label: String,
    },
    /// The host holds the VM's DR copy.
    HoldsReplica,
    /// A must rule forbids it.
    Rule {
        /// Its name.
        rule: String,
    },
    /// Too little is left.
    Short {
        /// Of what.
        resource: Resource,
        /// By how much, at most, over the hosts that this is said of.
        missing: u64,
    },
}

impl std::fmt::Display for WhyNot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WhyNot::State { state } => write!(f, "{state}"),
            WhyNot::Spare => f.write_str("kept empty for failover"),
            WhyNot::Avoided => f.write_str("ruled out by the caller"),
            WhyNot::Lacks { label } => write!(f, "does not offer {label}"),
            WhyNot::HoldsReplica => f.write_str("holds its DR copy"),
            WhyNot::Rule { rule } => write!(f, "rule {rule}"),
            WhyNot::Short { resource, missing } => write!(f, "{} of {resource} too little", resource.show(*missing)),
        }
    }
}
