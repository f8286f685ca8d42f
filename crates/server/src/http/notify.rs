//! Notifications: where they go, whether they arrive, and a test.

use std::sync::Arc;

use axum::extract::State;
use virtward_api::NotifyTest;

use super::{
    answer::{Answer, ok},
    params::Body,
};
use crate::{daemon::Daemon, notify};

pub async fn list(State(daemon): State<Arc<Daemon>>) -> Answer {
    ok(&daemon.events.notifier.channels())
}

pub async fn test(State(daemon): State<Arc<Daemon>>, Body(asked, _): Body<NotifyTest>) -> Answer {
    let config = daemon.config();
    ok(&notify::test(&config, asked.channel.as_deref()).await?)
}
