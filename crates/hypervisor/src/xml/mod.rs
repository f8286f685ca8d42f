//! libvirt's XML: reading domains and checkpoints, writing backups, checkpoints and block copies.
//!
//! What is read may come from other people's definitions: it is bounded, and bad input is an error, never a panic.

mod domain;
mod write;

pub(crate) use domain::{CheckpointXml, DiskXml, DomainXml, XmlError, host_uuid};
pub(crate) use write::{backup, block_copy, checkpoint};
