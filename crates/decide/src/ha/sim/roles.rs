//! Pairs: what the shell of the host that runs one of both does about its role.

use std::rc::Rc;

use super::world::{Ev, From, World, host_id, vm_id};
use crate::ha::{
    agent::{Event, Stage},
    pair::{self, Duty, PairRecord, Told},
    record::{Owner, View, VmId, pair_key},
    txn::Txn,
};

/// One step of it: the node, its daemon's life, the VM and its QEMU.
pub(super) struct Role {
    node: usize,
    life: u64,
    vm: VmId,
    qemu: u64,
    what: What,
}

enum What {
    /// Asks the store again, then acts.
    Asks(Duty),
    /// The hook is done; the records that it was run for.
    Done(Duty, Rc<View>),
    /// Waits for the end of its process.
    Ends,
    /// Looks anew.
    Rests,
}

/// An answer that no agent waits for.
const NOBODYS: u64 = u64::MAX;

impl World {
    pub(super) fn define_pair(&mut self) {
        let Some(demote) = self.setup.pair else { return };
        let (active, standby) = (vm_id(0), vm_id(1));
        let program = |name: &str| vec![name.to_owned()];
        let record = PairRecord {
            generation: 1,
            active,
            standby,
            addresses: Vec::new(),
            promote: program("/promote"),
            demote: if demote { program("/demote") } else { Vec::new() },
            told: [(standby, Told { pair: 1, vm: 0 })].into(),
            returns: false,
            note: String::new(),
        };
        let _ = self.kv.txn(&Txn::default().put(pair_key(active), &record));
    }

    fn me(&self, node: usize) -> Option<Owner> {
        match self.nodes[node].daemon.as_ref()?.agent.stage() {
            Stage::Armed { epoch } => Some(Owner { host: host_id(node), epoch: *epoch }),
            _ => None,
        }
    }

    /// What the VMs that run here are to be told.
    pub(super) fn see_roles(&mut self, node: usize, view: &View) {
        let Some(me) = self.me(node) else { return };
        let of_pairs = view.pairs.values().flat_map(|pair| [pair.value.active, pair.value.standby]);
        for vm in of_pairs.collect::<Vec<_>>() {
            let runs = view.vms.get(&vm).is_some_and(|of| of.value.runs_on(&me.host, me.epoch));
            let Some(duty) = pair::duty(view, vm).filter(|_| runs) else { continue };
            let Some(qemu) = self.nodes[node].qemus.get(&vm).filter(|qemu| qemu.running).map(|qemu| qemu.id) else {
                continue;
            };
            if matches!(duty, Duty::Wait(_)) || !self.nodes[node].duties.insert(vm) {
                continue;
            }
            let life = self.nodes[node].life;
            let late = self.rng.range(1, 2_000);
            self.push(late, Ev::Role(Role { node, life, vm, qemu, what: What::Asks(duty) }));
        }
    }

    pub(super) fn role(&mut self, role: Role) {
        let Role { node, life, vm, qemu, what } = role;
        let there = &self.nodes[node];
        if there.daemon.is_none() || there.life != life {
            return;
        }
        if let Some(until) = there.stopped(self.now) {
            let late = until - self.now + 1;
            return self.push(late, Ev::Role(Role { node, life, vm, qemu, what }));
        }
        let lives = there.qemus.get(&vm).is_some_and(|of| of.id == qemu && of.running && !of.dying);
        let after = |what| Ev::Role(Role { node, life, vm, qemu, what });
        match what {
            What::Asks(duty) => {
                let is_cut = there.store_cut || self.store_down;
                let view = self.kv.view();
                if is_cut || !lives || pair::duty(&view, vm).as_ref() != Some(&duty) {
                    return self.push(500, after(What::Rests));
                }
                if duty == Duty::StandDown {
                    self.agent(node, Event::GivingUp { vm });
                    self.kill(node, vm);
                    return self.push(1, after(What::Ends));
                }
                let late = if self.setup.fast { 300 } else { self.rng.range(50, 15_000) };
                self.push(late, after(What::Done(duty, view)));
            }
            What::Done(duty, view) => {
                self.push(1_000, after(What::Rests));
                if !lives {
                    return;
                }
                let leads = duty == Duty::Lead;
                let word = if leads { "leads" } else { "follows" };
                self.say(&host_id(node).0, &format!("v{} {word}", vm.as_u128()));
                self.nodes[node].qemus.get_mut(&vm).expect("it lives").leads = leads;
                if leads {
                    self.check_lead(node, vm);
                }
                let txn = self.me(node).and_then(|me| pair::told(&view, vm, &me));
                if let Some(txn) = txn {
                    self.send(node, life, From::Agent, NOBODYS, txn);
                }
            }
            What::Ends if self.nodes[node].qemus.get(&vm).is_some_and(|of| of.id == qemu) => {
                self.push(200, after(What::Ends));
            }
            What::Ends => {
                self.nodes[node].duties.remove(&vm);
                self.agent(node, Event::StoodDown { vm, why: "its standby took over".into() });
            }
            What::Rests => _ = self.nodes[node].duties.remove(&vm),
        }
    }
}
