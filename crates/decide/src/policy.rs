//! What a set of policies means and what is wrong with it, before anything acts on it.
//!
//! [`file`] reads the file that people write, [`check`] finds what no type can rule out, [`diff`] tells two sets apart.

pub mod check;
pub mod diff;
pub mod file;
mod reader;
