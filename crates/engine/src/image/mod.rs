//! Image files that a restore writes.

pub(crate) mod qcow2;
