//! End-to-end tests: the `virtward` binary against real libvirt, QEMU and guests of a lab, driven from outside as a user
//! drives it. They need root and what `make test` installs.

mod harness;

mod backup;
mod daemon;
mod guest;
mod interrupted;
mod remote;
mod repository;
mod restore;
mod tracking;
