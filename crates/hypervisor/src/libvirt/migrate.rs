//! Migration: what is asked for in libvirt's flags and parameters.

use virt_sys as v;

use super::error::Attempt;
use super::ffi::{Domain, ParamsBuilder};
use crate::{Compression, MigrateSpec, Steer};

/// Migrates; returns when it is done.
pub(super) fn run(domain: &Domain, spec: &MigrateSpec) -> Attempt<()> {
    let params = params(spec)?;
    let offline = !domain.is_active()?;
    // Peer to peer: the two daemons finish it without us, should we go away.
    let mut flags = v::VIR_MIGRATE_PEER2PEER | v::VIR_MIGRATE_ABORT_ON_ERROR;
    for (wanted, flag) in [
        (spec.live, v::VIR_MIGRATE_LIVE),
        (spec.with_storage, v::VIR_MIGRATE_NON_SHARED_DISK),
        // The guest cannot write faster than its disks are copied.
        (spec.with_storage, v::VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES),
        (spec.persist, v::VIR_MIGRATE_PERSIST_DEST),
        (spec.persist && domain.is_persistent()?, v::VIR_MIGRATE_UNDEFINE_SOURCE),
        (spec.force_unsafe, v::VIR_MIGRATE_UNSAFE),
        (spec.postcopy, v::VIR_MIGRATE_POSTCOPY),
        (spec.auto_converge, v::VIR_MIGRATE_AUTO_CONVERGE),
        (spec.parallel > 0, v::VIR_MIGRATE_PARALLEL),
        (spec.compression.is_some(), v::VIR_MIGRATE_COMPRESSED),
        (spec.tls, v::VIR_MIGRATE_TLS),
    ] {
        if wanted && !offline {
            flags |= flag;
        }
    }
    if offline {
        flags = v::VIR_MIGRATE_PEER2PEER | v::VIR_MIGRATE_OFFLINE | v::VIR_MIGRATE_PERSIST_DEST;
        if spec.persist {
            flags |= v::VIR_MIGRATE_UNDEFINE_SOURCE;
        }
    }
    let none = ParamsBuilder::new();
    Ok(domain.migrate(&spec.destination, if offline { &none } else { &params }, flags)?)
}

fn params(spec: &MigrateSpec) -> Attempt<ParamsBuilder> {
    let mut params = ParamsBuilder::new();
    if let Some(uri) = &spec.data_uri {
        params.text("migrate_uri", uri)?;
    }
    if spec.bandwidth_mib_s > 0 {
        params.u64("bandwidth", spec.bandwidth_mib_s)?;
    }
    if spec.parallel > 0 {
        params.int("parallel.connections", i32::try_from(spec.parallel).unwrap_or(i32::MAX))?;
    }
    if spec.with_storage {
        for disk in &spec.disks {
            params.text("migrate_disks", disk)?;
        }
    }
    if let Some(compression) = spec.compression {
        let method = match compression {
            Compression::Zstd => "zstd",
            Compression::Zlib => "zlib",
            Compression::Xbzrle => "xbzrle",
        };
        params.text("compression", method)?;
    }
    if let Some(name) = spec.tls_name.as_ref().filter(|_| spec.tls) {
        params.text("tls.destination", name)?;
    }
    Ok(params)
}

/// Changes a migration that runs.
pub(super) fn steer(domain: &Domain, steer: Steer) -> Attempt<()> {
    match steer {
        Steer::MaxDowntime { ms } => domain.migrate_max_downtime(ms.max(1))?,
        Steer::Bandwidth { mib_s } => domain.migrate_max_speed(mib_s.max(1))?,
        Steer::Postcopy => domain.migrate_postcopy()?,
    }
    Ok(())
}
