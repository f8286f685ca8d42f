//! Names of objects. They hold random ids and counters, never the name of a VM, host or file.

use super::ObjectId;

/// Clear-text description of the repository.
pub const CONFIG: &str = "config";
/// Key slots.
pub const KEYS: &str = "keys/";
/// Packs of chunks.
pub const DATA: &str = "data/";
/// Packs of manifest pages.
pub const META: &str = "meta/";
/// Index segments.
pub const INDEX: &str = "index/";
/// Restore points.
pub const POINTS: &str = "points/";
/// Deleted restore points, until they are collected.
pub const TRASH: &str = "trash/";
/// Holds on restore points.
pub const HOLDS: &str = "holds/";
/// Epochs with the packs that each condemns.
pub const EPOCHS: &str = "epochs/";
/// Leases of writers.
pub const LEASES: &str = "leases/";

/// Pack under its prefix, fanned out by its first byte.
pub fn pack(prefix: &str, id: &ObjectId) -> String {
    format!("{prefix}{:02x}/{id}", id.0[0])
}
/// The id of the pack that a name is of.
pub fn parse_pack(name: &str) -> Option<ObjectId> {
    let rest = name.strip_prefix(DATA).or_else(|| name.strip_prefix(META))?;
    leaf(rest).parse().ok()
}
/// Index segment.
pub fn segment(id: &ObjectId) -> String {
    format!("{INDEX}{id}")
}
/// Key slot.
pub fn key(id: &ObjectId) -> String {
    format!("{KEYS}{id}")
}
/// Restore point.
pub fn point(id: impl std::fmt::Display) -> String {
    format!("{POINTS}{id}")
}
/// Deleted restore point.
pub fn trash(id: impl std::fmt::Display) -> String {
    format!("{TRASH}{id}")
}
/// Hold on a restore point.
pub fn hold(id: impl std::fmt::Display) -> String {
    format!("{HOLDS}{id}")
}
/// Epoch, as 16 hex digits so that names sort as numbers.
pub fn epoch(number: u64) -> String {
    format!("{EPOCHS}{number:016x}")
}
/// One beat of a writer's lease.
pub fn lease(writer: &ObjectId, beat: u64) -> String {
    format!("{LEASES}{writer}.{beat:08x}")
}
/// End of a writer's lease, declared by itself or by the garbage collector; whoever comes first.
pub fn lease_end(writer: &ObjectId) -> String {
    format!("{LEASES}{writer}.end")
}
/// The part of a name after its last slash.
pub fn leaf(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}
