//! Hosts, virtual machines and their restore points.

use super::{Body, CURSOR, GET, LIMIT, Param, REPOSITORY, Route, text};
use crate::{openapi::Shape, types::*};

const HOSTS: &[Param] = &[
    text("name", "Only names that contain this; with `*` or `?`, only names that match it whole."),
    text("state", "Only hosts in this state: up, libvirtd-down, down, unknown."),
    LIMIT,
    CURSOR,
];
const VMS: &[Param] = &[
    text("name", "Only names that contain this; with `*` or `?`, only names that match it whole."),
    text(
        "search",
        "Only VMs whose name, or the host name or an address that their guest tells, contains this; with `*` or `?`, matches \
         it whole.",
    ),
    text("tag", "Only VMs with this tag."),
    text("host", "Only VMs of this host."),
    text("state", "Only VMs in this state: running, paused, shut-off, crashed, other."),
    text("protection", "Only VMs so protected: protected, overdue, pending, unprotected, unknown."),
    text("policy", "Only VMs that this policy selects."),
    text(
        "sort",
        "name (default), host, state, protection, size, last-point, next-run; with - before it from the other end.",
    ),
    LIMIT,
    CURSOR,
];
const POINTS: &[Param] = &[REPOSITORY, LIMIT, CURSOR];

pub(super) const ROUTES: &[Route] = &[
    Route {
        path: "/api/v1/hosts",
        name: "hosts",
        tag: "inventory",
        summary: "Hosts",
        query: HOSTS,
        response: Body::Page(Shape::of::<Host>()),
        ..GET
    },
    Route {
        path: "/api/v1/hosts/{host}",
        name: "host",
        tag: "inventory",
        summary: "One host",
        response: Body::One(Shape::of::<Host>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms",
        name: "vms",
        tag: "inventory",
        summary: "Virtual machines",
        query: VMS,
        response: Body::Page(Shape::of::<Vm>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}",
        name: "vm",
        tag: "inventory",
        summary: "One virtual machine, by name or UUID",
        response: Body::One(Shape::of::<VmDetail>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}/points",
        name: "vm-points",
        tag: "inventory",
        summary: "Restore points of a VM, newest first",
        help: "Also those of a VM that no longer exists.",
        query: POINTS,
        response: Body::Page(Shape::of::<Point>()),
        ..GET
    },
    Route {
        path: "/api/v1/vms/{vm}/explain",
        name: "vm-explain",
        tag: "inventory",
        summary: "Why a VM is, or is not, backed up",
        response: Body::One(Shape::of::<Explanation>()),
        ..GET
    },
    Route {
        path: "/api/v1/points",
        name: "points",
        tag: "inventory",
        summary: "Restore points of all VMs, newest first",
        query: POINTS,
        response: Body::Page(Shape::of::<Point>()),
        ..GET
    },
    Route {
        path: "/api/v1/points/{point}",
        name: "point",
        tag: "inventory",
        summary: "One restore point, by its id",
        query: &[REPOSITORY],
        response: Body::One(Shape::of::<Point>()),
        ..GET
    },
];
