//! Image files: what an untrusted one refers to, and writing new ones.

pub(crate) mod chain;
pub(crate) mod qcow2;
mod vmdk;
