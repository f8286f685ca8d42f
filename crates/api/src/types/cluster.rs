//! The cluster: its nodes, its leader, its state.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::HostState;

/// The cluster as one daemon sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterStatus {
    /// The node that answers.
    pub node: String,
    /// There may be other nodes; false where the state is in a file of this host's.
    pub is_cluster: bool,
    /// Where the state is.
    pub state: String,
    /// Why the state cannot be reached, if it cannot; nothing new starts until then.
    pub state_error: Option<String>,
    /// SHA-256 of the certificate of the cluster's authority, in hex; null if there is none.
    pub authority_sha256: Option<String>,
    /// Who plans; null while nobody does.
    pub leader: Option<ClusterLeader>,
    /// Members, by name.
    pub nodes: Vec<ClusterNode>,
    /// What a person should look at.
    pub warnings: Vec<String>,
}

/// Who plans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterLeader {
    /// Name of the node.
    pub node: String,
    /// Number of this leadership; it only rises.
    pub epoch: u64,
    /// Since when.
    pub since: Timestamp,
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterNode {
    /// Name in the cluster.
    pub name: String,
    /// Name of its host; null until its daemon ran once.
    pub host: Option<String>,
    /// Where its peers reach it.
    pub address: Option<String>,
    /// Its daemon beats.
    pub is_there: bool,
    /// What is known of its host.
    pub host_state: HostState,
    /// Why that is not up.
    pub reason: Option<String>,
    /// When it became a member.
    pub joined: Timestamp,
    /// When its daemon last started.
    pub started: Option<Timestamp>,
    /// Version of its daemon.
    pub version: Option<String>,
}

/// A token to join with that is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewJoinToken {
    /// How long it can be used; default an hour, at most a week.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
}

/// A token to join with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinTokenMade {
    /// Name of the token, no secret.
    pub id: String,
    /// All of it, for `virtward cluster join` on the new node. Works once.
    pub token: String,
    /// Until when.
    pub expires: Timestamp,
    /// Where to join.
    pub address: String,
}

/// The state in a file of the daemon's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateBackup {
    /// The file, for root alone.
    pub file: String,
    /// Records in it.
    pub entries: u64,
    /// Revision of the state.
    pub revision: u64,
    /// When.
    pub made: Timestamp,
}
