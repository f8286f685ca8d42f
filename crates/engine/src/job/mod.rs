//! Finite jobs. Each is a saga whose steps are idempotent: a killed run is cleaned up by the next one.

pub mod backup;
pub mod drain;
pub mod migrate;
pub mod move_disk;
pub mod restore;
pub mod steps;

/// Reads a definition, whatever it is, in every way in which jobs read definitions; for fuzzing.
pub(crate) fn any_definition(xml: &str) {
    let _ = backup::attach::nvram_path(xml);
    let _ = backup::attach::qemu_owner(xml);
    let _ = backup::attach::TpmState::of(xml);
    let _ = crate::collect::parse(xml);
    restore::any_definition(xml);
}
