//! Who is who in a cluster: its certificate authority, the certificates of its nodes, and how a node joins.
//!
//! ```text
//! init:  create_ca ─► authority's certificate and sealed key in the store; cluster key on the node's disk
//! join:  make_token ─► person ─► new node: TLS to the cluster, whose authority must have the token's fingerprint
//!        ─► token and CSR ─► redeem_token (once) ─► issue ─► certificate, cluster key
//! later: at two thirds of a certificate's life: new key ─► issue, by the node itself
//! ```
//!
//! Any daemon can lead, and the leader signs, so every node must be able to get at the authority's key. It is in the
//! store, sealed with a [cluster key](ClusterKey) that only the nodes' own disks hold: whoever reads etcd, its backups
//! or an exported state cannot sign. Whoever is root on a node can; a node that fell into wrong hands is removed by
//! making a new authority.
//!
//! Not here: the join protocol's messages, the list of members, when to renew.

mod authority;
mod files;
mod tls;
mod token;
mod vault;

pub use self::{
    authority::{Authority, CERTIFICATE_DAYS, Fingerprint, Identity, NewKey, Role, Subject, node_server_name},
    files::{read_secret, write_secret},
    tls::{ClientAuth, Credentials, client_config, join_client_config, server_config},
    token::{JoinToken, Redeemed, make_token, redeem_token, revoke_token},
    vault::{ClusterKey, create_ca, load_ca, migration_ca},
};

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with certificates and tokens.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store.
    #[error(transparent)]
    Store(#[from] crate::Error),
    /// This state has an authority already.
    #[error("this cluster has its certificate authority already; `virtward cluster status` shows it")]
    Exists,
    /// This state has no authority.
    #[error("this cluster has no certificate authority; `virtward cluster init` makes it")]
    Missing,
    /// The authority's key does not open.
    #[error("the key of the cluster's authority does not open: {what}; this node's cluster key is not this cluster's")]
    Sealed {
        /// Why.
        what: String,
    },
    /// No join token.
    #[error("this is no join token; copy all of what `virtward cluster token` printed")]
    TokenMalformed,
    /// Never made, revoked, or a wrong secret: not told apart.
    #[error("the cluster does not know this join token; make a new one with `virtward cluster token`")]
    TokenUnknown,
    /// It was used.
    #[error("this join token was used by {by} at {at}; every node needs one of its own: `virtward cluster token`")]
    TokenUsed {
        /// Name of the node.
        by: String,
        /// When.
        at: jiff::Timestamp,
    },
    /// It is too old.
    #[error("this join token expired at {at}; make a new one with `virtward cluster token`")]
    TokenExpired {
        /// When.
        at: jiff::Timestamp,
    },
    /// A signing request that cannot be granted.
    #[error("the certificate signing request cannot be granted: {what}")]
    Request {
        /// Why.
        what: String,
    },
    /// A certificate or key that cannot be used.
    #[error("the certificate or its key cannot be used: {what}")]
    Certificate {
        /// Why.
        what: String,
    },
    /// A secret that others can read.
    #[error("{path} can be read by others than its owner (mode {mode:o}); `chmod 600 {path}`, and consider it known")]
    Exposed {
        /// The file.
        path: String,
        /// Its mode.
        mode: u32,
    },
}

fn certificate(error: impl std::fmt::Display) -> Error {
    Error::Certificate { what: error.to_string() }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| certificate(format!("no random numbers: {error}")))?;
    Ok(bytes)
}
