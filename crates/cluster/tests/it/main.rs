//! The cluster's foundations as their callers see them: one binary, one module per promise.

mod backend;
mod contract;
mod embedded;
mod kill;
mod mem;
