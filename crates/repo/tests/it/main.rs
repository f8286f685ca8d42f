//! The repository as its callers see it: one binary, one module per promise.

mod common;
mod contract;
mod crash;
mod damage;
mod format1;
mod gc;
mod hooked;
mod independent;
mod index;
mod keys;
mod many;
mod mirror;
mod overlays;
mod races;
mod rotation;
mod roundtrip;
mod stores;
mod trash;
