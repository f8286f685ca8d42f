//! A client for the Network Block Device protocol, made for backup: fast reads of large exports, and their block status.
//!
//! ```no_run
//! # async fn example() -> virtward_nbd::Result<()> {
//! use virtward_nbd::{Address, BASE_ALLOCATION, Client, Options};
//! let (address, export) = Address::parse_uri("nbd+unix:///vda?socket=/run/backup.sock")?;
//! let contexts = vec![BASE_ALLOCATION.to_string()];
//! let client = Client::connect(&address, Options { export, contexts, ..Options::default() }).await?;
//! let mut walk = client.extents(BASE_ALLOCATION, 0..client.info().size_bytes)?;
//! while let Some(batch) = walk.next_batch().await? {
//!     for extent in batch {
//!         println!("{} {} {}", extent.offset, extent.length, extent.flags);
//!     }
//! }
//! let first = client.read(0, 4096).await?;
//! # drop(first);
//! client.disconnect().await;
//! # Ok(())
//! # }
//! ```
//!
//! Layers, each knowing only those above it in this list:
//! - `wire`: numbers and headers.
//! - [`handshake`], [`demux`]: the two phases of the protocol as state machines that do no input or output.
//! - `socket`, `link`: a connection, and its transmission phase.
//! - `lane`: a place for a connection that reconnects; requests survive.
//! - [`Client`]: spreads requests over lanes, checks and aligns them.
//!
//! The server is not trusted: lengths are bounded before memory is taken for them, and answers that make no sense end
//! the connection with [`Error::Protocol`].
//!
//! Not here: a server, encryption, policy about what to read.

mod address;
mod client;
mod coverage;
pub mod demux;
mod durability;
mod error;
mod extents;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
mod lane;
mod link;
mod options;
mod socket;
mod wire;

pub use address::{Address, DEFAULT_PORT};
pub use client::{Client, list_exports};
pub use error::{Error, Result};
pub use extents::{Extent, ExtentWalk};
pub use handshake::{ExportEntry, ExportInfo};
pub use options::{Options, ReconnectPolicy};
pub use wire::{Command, Framing};

/// Context that tells holes and zeroes: [`ALLOC_HOLE`], [`ALLOC_ZERO`].
pub const BASE_ALLOCATION: &str = "base:allocation";
/// QEMU's context whose flags are the depth in the backing chain at which a range is allocated; 0 means nowhere.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// In [`BASE_ALLOCATION`]: the range takes no space.
pub const ALLOC_HOLE: u64 = 1;
/// In [`BASE_ALLOCATION`]: the range reads as zeroes.
pub const ALLOC_ZERO: u64 = 2;
/// In a [`dirty_bitmap`] context: the range was written since the bitmap began.
pub const DIRTY: u64 = 1;

/// Name of QEMU's context for a dirty bitmap.
pub fn dirty_bitmap(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}
