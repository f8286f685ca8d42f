//! The repository on object storage, over real HTTP: against an S3 server that each test starts for itself, and against
//! one that misbehaves as it is told.

#[path = "../it/common.rs"]
mod common;
#[path = "../it/contract.rs"]
mod contract;

mod append_only;
mod failures;
mod http;
mod jobs;
mod lock;
mod server;
mod soak;
mod stores;
