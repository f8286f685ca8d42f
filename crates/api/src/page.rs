//! One page of a list.

use serde::{Deserialize, Serialize};

/// One page of a list. The cursor is opaque: it is given back as it came, with the same filters and order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Page<T> {
    /// What is on this page.
    pub items: Vec<T>,
    /// Cursor of the next page; none on the last one.
    pub next: Option<String>,
    /// How many there are in all, with these filters; null where counting would cost too much.
    pub total: Option<u64>,
    /// Of a list that every node has its own part of: the nodes that did not answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

impl<T> Page<T> {
    /// Items per page if the request does not say.
    pub const LIMIT_DEFAULT: usize = 100;
    /// Most items per page.
    pub const LIMIT_MAX: usize = 1000;
}
