//! libvirt's XML: reading domains, checkpoints and hosts, writing backups, checkpoints, block copies and volumes.
//!
//! What is read may come from other people's definitions: it is bounded, and bad input is an error, never a panic.

mod domain;
mod machine;
mod write;

pub(crate) use domain::{CheckpointXml, DiskXml, DomainXml, XmlError, host_uuid};
pub(crate) use machine::{host_model, machine, net_device, pool, volume};
pub(crate) use write::{backup, block_copy, checkpoint, new_volume, open_directory};
