//! High availability.

use super::{ADMIN, Body, GET, OPERATOR, POST, Param, Route, text};
use crate::{openapi::Shape, types::*};

pub(super) const ROUTES: &[Route] = &[
    Route {
        path: "/api/v1/ha",
        name: "ha",
        tag: "ha",
        summary: "High availability: hosts, how well each is protected, and protected VMs",
        response: Body::One(Shape::of::<HaStatus>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/arm",
        name: "ha-arm",
        tag: "ha",
        summary: "Fence silent hosts and restart VMs (again)",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/disarm",
        name: "ha-disarm",
        tag: "ha",
        summary: "Fence nobody and restart nothing until it is armed again",
        help: "Guests run on and watchdogs are stopped. Refused while a host is being fenced.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/capacity",
        name: "ha-capacity",
        tag: "ha",
        summary: "What would not run again if hosts were lost",
        query: &[
            text("without", "As if this host were empty and took nothing; and whether it may be emptied."),
            text("vm", "As if this VM had the memory of `memory_bytes`; and whether it may have it."),
            Param { name: "memory_bytes", kind: "integer", help: "With `vm`." },
        ],
        response: Body::One(Shape::of::<HaCapacity>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/hosts/{host}/test-fencing",
        name: "ha-test-fencing",
        tag: "ha",
        summary: "Test the fence devices of a host",
        help: "Looks at them in every way that switches nothing; with `power_cycle` also switches the host off and on, \
               which is refused while it is in service.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaFenceTestRequest>()),
        response: Body::One(Shape::of::<HaFenceTest>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/hosts/{host}/confirm-off",
        name: "ha-confirm-off",
        tag: "ha",
        summary: "A person's word that a host is off",
        help: "Frees its VMs where nothing else proves that it does not run them any more. If it does run them, their \
               disks are lost. Not believed of a host that sends heartbeats.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaReason>()),
        status: 202,
        response: Body::One(Shape::of::<HaStatus>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}",
        name: "ha-vm",
        tag: "ha",
        summary: "A protected VM: where it is, why, and what it waits for",
        response: Body::One(Shape::of::<HaExplanation>()),
        ..GET
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/enable",
        name: "ha-enable",
        tag: "ha",
        summary: "Protect a VM, or change how it is protected",
        help: "Its host has to be in service. From then on libvirt starts it only when it was claimed.",
        access: ADMIN,
        request: Body::One(Shape::of::<HaPolicy>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/disable",
        name: "ha-disable",
        tag: "ha",
        summary: "Protect a VM no longer",
        help: "It runs on where it runs. Refused while it is lost: nobody would know who may write to its disks.",
        access: ADMIN,
        status: 204,
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/move",
        name: "ha-move",
        tag: "ha",
        summary: "Announce that a protected VM migrates, or say where it is after that",
        help: "For whoever migrates it, as `virtward vm migrate` does. Between the two calls both hosts count as having it.",
        access: OPERATOR,
        request: Body::One(Shape::of::<HaMove>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/start",
        name: "ha-start",
        tag: "ha",
        summary: "Start a protected VM, on the host that is best",
        help: "Refused if room that is kept for host failures would be taken, unless forced.",
        access: OPERATOR,
        status: 202,
        request: Body::One(Shape::of::<HaStart>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
    Route {
        path: "/api/v1/ha/vms/{vm}/switch",
        name: "ha-switch",
        tag: "ha",
        summary: "Let the standby of a protected VM take over",
        help: "The active one is ended first. Answers with the standby, which is the active one from then on; refused while \
               it could not take over.",
        access: OPERATOR,
        status: 202,
        request: Body::One(Shape::of::<HaReason>()),
        response: Body::One(Shape::of::<HaVm>()),
        ..POST
    },
];
