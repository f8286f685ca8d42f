//! What the daemons of a cluster agree on: the state store, who leads, and who is who.
//!
//! - [`Store`]: a small ordered key-value store with compare-and-swap transactions, watches and leases; its guarantees
//!   are written at the trait. Three implementations keep one contract: [`MemStore`] for tests and simulators,
//!   [`EmbeddedStore`] in one file on one host, [`EtcdStore`] for three voters and more.
//! - [`election`]: one leader at a time, with a fencing number that makes a deposed leader's writes fail.
//! - [`ca`]: the cluster's certificate authority, node certificates, one-time join tokens, mutual TLS.
//! - [`state`]: all keys in one file, and back.
//!
//! Not here: what the keys mean, who may write them, commands, daemons.

pub mod ca;
pub mod clock;
mod core;
pub mod election;
pub mod embedded;
mod error;
pub mod etcd;
pub mod mem;
pub mod state;
mod store;
mod watch;

pub use self::{
    embedded::{EmbeddedOptions, EmbeddedStore},
    error::{Error, Result},
    etcd::{EtcdOptions, EtcdStore},
    mem::MemStore,
    store::{
        Compare, KEY_BYTES_MAX, Lease, LeaseId, Listing, Op, REQUEST_BYTES_MAX, Revision, Store, TXN_LEN_MAX,
        TxnOutcome, VALUE_BYTES_MAX, Versioned,
    },
    watch::{Change, Changes, Watch},
};
