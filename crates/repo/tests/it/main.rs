//! The repository as its callers see it: one binary, one module per promise.

mod common;
mod crash;
mod damage;
mod format1;
mod gc;
mod index;
mod keys;
mod races;
mod roundtrip;
mod stores;
