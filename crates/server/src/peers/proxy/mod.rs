//! Backups whose data another host reads and stores: a proxy.
//!
//! ```text
//! host of the VM                                              proxy
//! engine's job: freeze, begin, thaw, watch, end      ─ line ─►  one session: writer of the repository
//! QEMU's export, a socket per job ─ bytes as they are ─ disk ─►  engine's reading and storing
//! ```
//!
//! All connections are made by the host of the VM, over the mutual TLS of peers: a line for questions and answers, and for
//! each disk one that carries the bytes between the proxy's NBD client and QEMU. So a proxy reaches nothing on the other
//! host but the exports that it is handed, and they end with the job.
//!
//! A session lives as long as its line. Both sides speak at least every few seconds; when one does not, the other takes it
//! for lost: the host of the VM ends the job, thawed long before, and the proxy forgets what it has not published.

mod client;
mod server;
mod wire;

pub use self::{
    client::Session,
    server::{Sessions, disk, serve},
};
