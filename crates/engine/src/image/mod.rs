//! Image files: what an untrusted one refers to, reading raw ones, and writing new ones.

pub(crate) mod chain;
mod locks;
pub(crate) mod qcow2;
pub(crate) mod raw;
mod vmdk;
