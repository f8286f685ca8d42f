//! The cluster's foundations as their callers see them: one binary, one module per promise.

mod backend;
mod ca;
mod contract;
mod election;
mod embedded;
mod etcd;
mod kill;
mod mem;
mod server;
mod state;
