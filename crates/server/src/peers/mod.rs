//! How the daemons of a cluster talk to each other: mutual TLS with certificates of the cluster's own authority, on a port
//! of its own beside the public API.
//!
//! ```text
//! node ─ certificate of the authority ─► peer listener ─┬► /peer/v1/store/…   a directory repository for others
//!                                                       ├► /peer/v1/proxy/…   reads and stores backups for others
//!                                                       ├► /api/v1/…          forwarded for somebody who was admitted
//! new node ─ token, no certificate ─► /peer/v1/join ────┘
//! ```
//!
//! Records are not passed here but by the state store; this is for what does not belong there: data of repositories, and
//! questions that only one host can answer.

pub mod client;
pub mod identity;
pub mod join;
pub mod proxy;
mod serve;
mod store_client;
mod store_server;

pub use self::{
    client::Peers,
    identity::Identity,
    serve::{listen, member, peer, renew, router},
    store_client::RemoteStore,
    store_server::Served,
};

/// Scheme of a repository that another node serves: `node://NODE/REPOSITORY`.
pub const NODE_SCHEME: &str = "node://";

/// The node and the name there of a repository that a node serves.
pub fn served_by(location: &str) -> Option<(&str, &str)> {
    let (node, repository) = location.strip_prefix(NODE_SCHEME)?.split_once('/')?;
    (!node.is_empty() && !repository.is_empty()).then_some((node, repository))
}
