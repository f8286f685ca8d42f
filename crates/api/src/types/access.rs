//! Who asks, and what they may do.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What somebody may do. Each role may do all that those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// See everything but tokens and the audit log.
    Viewer,
    /// Also start and cancel jobs.
    Operator,
    /// Also change policies and tokens, and read the audit log.
    Admin,
}

/// How somebody proved who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PrincipalKind {
    /// A user of the daemon's host, by the Unix socket.
    Local,
    /// A token in the `Authorization` header.
    Token,
    /// A browser session.
    Session,
    /// The daemon itself: policies, retries, start-up.
    Daemon,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Principal {
    /// `root` on the socket, else the name of the token.
    pub name: String,
    /// How it was proved.
    pub kind: PrincipalKind,
    /// What it may do.
    pub role: Role,
    /// If not empty, restores only of VMs with one of these tags.
    pub vm_tags: Vec<String>,
    /// When the token or session ends.
    pub expires: Option<Timestamp>,
    /// Sessions: what to send as `X-CSRF-Token` with every change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub csrf_token: Option<String>,
}

/// A log-in from a browser.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// A token, as `virtward token create` printed it.
    pub token: String,
}

/// A session that began. The cookie that carries it comes in a header.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Who logged in, with the CSRF token.
    pub principal: Principal,
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Public part.
    pub id: String,
    /// What it is for, unique.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// If not empty, restores only of VMs with one of these tags.
    pub vm_tags: Vec<String>,
    /// When it was made.
    pub created: Timestamp,
    /// By whom.
    pub created_by: String,
    /// When it ends.
    pub expires: Option<Timestamp>,
}

/// A token to make.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// What it is for, unique: 1 to 100 characters.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// If not empty, restores only of VMs with one of these tags.
    #[serde(default)]
    pub vm_tags: Vec<String>,
    /// Seconds that it is valid for; at most ten years. Default: 90 days.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
}

/// A token that was made. This is the only time that its secret is told.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    /// The token.
    pub token: Token,
    /// What to send as `Authorization: Bearer …`; null when the same request was repeated.
    pub secret: Option<String>,
}
