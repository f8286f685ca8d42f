//! The `virtward` binary from outside, as a user drives it, without a hypervisor.

mod common;
mod disasters;
mod gc;
mod general;
mod image;
mod index;
mod mirror;
mod operations;
mod package;
mod repo;
mod retention;
mod s3;
mod serve;
mod terminal;
