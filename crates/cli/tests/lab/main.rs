//! End-to-end tests: the `virtward` binary against real libvirt, QEMU and guests of a lab, driven from outside as a user
//! drives it. They need root and what `make test` installs.

mod harness;

#[path = "../../../server/tests/it/browser.rs"]
#[allow(dead_code, reason = "its other tests are those of the server")]
mod browser;

mod backup;
mod balance;
mod cluster;
mod daemon;
mod guest;
mod ha_failover;
mod ha_guests;
mod ha_hands;
mod ha_pairs;
mod interrupted;
mod migrate;
mod moves;
mod proxy;
mod remote;
mod repository;
mod restore;
mod tracking;
mod unit;
mod web;
