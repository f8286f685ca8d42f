//! What a restore point holds: its record ([`point`]) and, per disk, a tree of pages ([`page`], [`tree`], [`edit`], [`diff`])
//! whose leaves name chunks and what was written over them ([`overlay`]).

pub mod diff;
pub mod edit;
pub mod overlay;
pub mod page;
pub mod point;
pub mod tree;

pub use page::{FANOUT, Page, Ref};
pub use tree::Tree;
