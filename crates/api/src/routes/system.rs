//! The daemon itself: whether it lives, what it is, what it tells and whom.

use super::{ADMIN, ANYBODY, Body, GET, POST, Param, Route, text};
use crate::{openapi::Shape, types::*};

const STREAM: &[Param] = &[text(
    "topics",
    "What to send, with commas: jobs, inventory, events, policies, repositories; default: all of them.",
)];

pub(super) const ROUTES: &[Route] = &[
    Route {
        path: "/healthz",
        name: "health",
        tag: "system",
        summary: "Whether the daemon lives",
        help: "Answers as long as the daemon is not stuck. Says nothing about what it depends on.",
        access: ANYBODY,
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/readyz",
        name: "ready",
        tag: "system",
        summary: "Whether the daemon can do its work",
        help: "503 with one line per trouble while the state store does not answer or the daemon starts or stops. A \
               hypervisor or repository that is away is no such trouble: the daemon is there to tell of it.",
        access: ANYBODY,
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/metrics",
        name: "metrics",
        tag: "system",
        summary: "Metrics for Prometheus",
        help: "Text format 0.0.4.",
        response: Body::Text("text/plain"),
        ..GET
    },
    Route {
        path: "/api/v1/openapi.json",
        name: "openapi",
        tag: "system",
        summary: "This document",
        access: ANYBODY,
        response: Body::Text("application/json"),
        ..GET
    },
    Route {
        path: "/api/v1/version",
        name: "version",
        tag: "system",
        summary: "What answers",
        response: Body::One(Shape::of::<Version>()),
        ..GET
    },
    Route {
        path: "/api/v1/overview",
        name: "overview",
        tag: "system",
        summary: "Everything at a glance",
        response: Body::One(Shape::of::<Overview>()),
        ..GET
    },
    Route {
        path: "/api/v1/settings",
        name: "settings",
        tag: "system",
        summary: "What the daemon was told, without secrets",
        response: Body::One(Shape::of::<Settings>()),
        ..GET
    },
    Route {
        path: "/api/v1/stream",
        name: "stream",
        tag: "system",
        summary: "Changes as they happen",
        help: "Server-sent events, each with JSON in `data`: `job` (Job: began, ended, or its state changed), `progress` \
               ({\"id\", \"progress\": Progress}, at most once a second per job), `vm` (Vm), `vm-removed` ({\"uuid\"}), \
               `host` (Host), `event` (Event), `policy` ({\"name\", \"revision\"}; revision null: deleted), `repository` \
               (Repository), `balance` (BalanceRound), and `reset` (StreamReset): changes may have been missed, read again what is shown. Send \
               `Last-Event-ID` to go on where the connection broke; browsers do so by themselves. A comment comes every \
               15 seconds.",
        query: STREAM,
        response: Body::Text("text/event-stream"),
        ..GET
    },
    Route {
        path: "/api/v1/notifications",
        name: "notifications",
        tag: "system",
        summary: "Where notifications go, and whether they arrive",
        help: "Those of the daemon that is asked.",
        response: Body::List(Shape::of::<NotifyChannel>()),
        ..GET
    },
    Route {
        path: "/api/v1/notifications/test",
        name: "notify-test",
        tag: "system",
        summary: "Send a test message",
        help: "Answers when the last channel has accepted it or not.",
        access: ADMIN,
        request: Body::One(Shape::of::<NotifyTest>()),
        response: Body::List(Shape::of::<NotifyOutcome>()),
        ..POST
    },
];
