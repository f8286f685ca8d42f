//! Pairs of an active VM and its standby, as people make and switch them.

use std::{collections::BTreeMap, net::Ipv4Addr};

use virtward_api::{Code, HaAddress, HaPair, HaStandby, HaVm, Principal, Problem};
use virtward_decide::ha::{
    Txn, View, VmId,
    pair::{self, Floating, PairRecord, Told},
    record::{VmPhase, VmRecord, pair_key, vm_key},
};

use super::{
    actions::{TRIES, commit, fresh},
    of, views,
};
use crate::{
    daemon::Daemon,
    failures::{self, Result},
};

/// Addresses that one pair may have.
const ADDRESSES_MAX: usize = 16;
/// Longest name of a network device, as Linux has it.
const DEVICE_BYTES_MAX: usize = 15;

fn invalid(text: String) -> Problem {
    Problem::new(Code::Invalid, text)
}

fn conflict(text: String) -> Problem {
    Problem::new(Code::Conflict, text)
}

fn name(view: &View, vm: VmId) -> String {
    view.vms.get(&vm).map_or_else(|| vm.to_string(), |of| of.value.name.clone())
}

/// Gives a protected VM a standby, changes how they are switched, or takes the standby away.
pub(super) async fn set(daemon: &Daemon, vm: VmId, wanted: &HaStandby) -> Result<()> {
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let txn = match wanted.vm.as_str() {
            "" => match view.pair_of(vm) {
                Some((key, pair)) => Txn::default().expect(pair_key(key), Some(pair)).delete(pair_key(key)),
                None => return Ok(()),
            },
            standby => make(&view, vm, views::find(&view, standby)?, wanted)?,
        };
        if commit(daemon, &txn).await? {
            return Ok(());
        }
    }
    Err(failures::changed("the pair"))
}

fn make(view: &View, active: VmId, standby: VmId, wanted: &HaStandby) -> Result<Txn> {
    let (addresses, promote, demote) = (addresses(&wanted.addresses)?, wanted.promote.clone(), wanted.demote.clone());
    hook("promote", &promote)?;
    if !demote.is_empty() {
        hook("demote", &demote)?;
    }
    let (one, two) = (name(view, active), name(view, standby));
    if let Some((key, old)) = view.pair_of(active) {
        if old.value.active == standby {
            return Err(conflict(format!("{two} is the active one, and {one} its standby"))
                .hint(format!("virtward ha enable {two} --standby {one} …, or virtward ha switch {two}")));
        }
        if old.value.standby != standby {
            let other = name(view, old.value.standby);
            return Err(conflict(format!("{other} is the standby of {one}"))
                .hint(format!("virtward ha enable {one} --standby none")));
        }
        let mut value = PairRecord { addresses, promote, demote, ..old.value.clone() };
        if value.addresses != old.value.addresses {
            // Told again, it gets those that are new.
            value.told.remove(&active);
        }
        return Ok(Txn::default().expect(pair_key(key), Some(old)).put(pair_key(key), &value));
    }
    if active == standby || view.pair_of(standby).is_some() {
        return Err(conflict(format!("{two} cannot be the standby of {one}: it is one of a pair, or the same")));
    }
    let (of_one, of_two) = (&view.vms[&active], &view.vms[&standby]);
    let at = |record: &VmRecord| {
        let runs = record.phase == VmPhase::Running && record.moving_to.is_none();
        record.owner.clone().filter(|owner| runs && view.is_armed(owner)).map(|owner| owner.host)
    };
    match (at(&of_one.value), at(&of_two.value)) {
        (Some(one_at), Some(two_at)) if one_at == two_at => {
            return Err(conflict(format!("{one} and {two} are both on {one_at}; a standby has to be on another host"))
                .hint("virtward vm migrate moves one of them"));
        }
        (Some(_), Some(_)) => {}
        (None, _) | (_, None) => {
            return Err(conflict(format!("{one} and {two} have to run, each on a host that is in service"))
                .hint("virtward ha status"));
        }
    }
    let record = PairRecord {
        generation: 1,
        active,
        standby,
        addresses,
        promote,
        demote,
        // That it follows is the word of whoever made it so.
        told: BTreeMap::from([(standby, Told { pair: 1, vm: of_two.value.generation })]),
        returns: false,
        note: "the pair was made".into(),
    };
    Ok(Txn::default()
        .expect(vm_key(active), Some(of_one))
        .expect(vm_key(standby), Some(of_two))
        .expect::<PairRecord>(pair_key(active), None)
        .put(pair_key(active), &record))
}

fn hook(what: &str, command: &[String]) -> Result<()> {
    match command.first() {
        Some(program) if program.starts_with('/') => Ok(()),
        _ => Err(invalid(format!("{what}: give the program in the guest by its whole path"))),
    }
}

fn addresses(wanted: &[HaAddress]) -> Result<Vec<Floating>> {
    if wanted.len() > ADDRESSES_MAX {
        return Err(invalid(format!("{} addresses; at most {ADDRESSES_MAX}", wanted.len())));
    }
    let one = |of: &HaAddress| {
        let parts = of.address.split_once('/');
        let parts = parts.and_then(|(ip, length)| Some((ip.parse::<Ipv4Addr>().ok()?, length.parse::<u8>().ok()?)));
        let Some((ip, length @ 1..=32)) = parts else {
            let text = format!("{:?} is no IPv4 address with the length of its prefix: 10.0.0.9/24", of.address);
            return Err(invalid(text));
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        let is_device = !of.device.is_empty() && of.device.len() <= DEVICE_BYTES_MAX && of.device.chars().all(plain);
        if !is_device || of.device.starts_with('-') {
            return Err(invalid(format!("{:?} is no network device of the guest, such as eth0", of.device)));
        }
        Ok(Floating { address: format!("{ip}/{length}"), device: of.device.clone() })
    };
    wanted.iter().map(one).collect()
}

/// Lets the standby take over because a person wants it.
pub async fn switch(daemon: &Daemon, vm: &str, reason: &str, who: &Principal) -> Result<HaVm> {
    of(daemon)?;
    let reason: String = reason.chars().filter(|c| !c.is_control()).take(200).collect();
    let why = format!("{} wants it {reason}", who.name).trim_end().to_owned();
    for _ in 0..TRIES {
        let view = fresh(daemon).await?;
        let vm = views::find(&view, vm)?;
        let Some((key, pair)) = view.pair_of(vm) else {
            return Err(conflict(format!("{} has no standby", name(&view, vm)))
                .hint(format!("virtward ha enable {} --standby VM --promote COMMAND", name(&view, vm))));
        };
        let standby = pair.value.standby;
        let txn = pair::switch(&view, key, &why).map_err(|unfit| {
            conflict(format!("{} cannot take over: {unfit}", name(&view, standby)))
                .hint(format!("virtward ha explain {}", name(&view, standby)))
        })?;
        if commit(daemon, &txn).await? {
            return Ok(views::one(&fresh(daemon).await?, standby, None));
        }
    }
    Err(failures::changed("the pair"))
}

/// Refuses the start of one that led, and that nobody can tell to follow.
pub(super) fn may_start(view: &View, vm: VmId) -> Result<()> {
    let Some((_, pair)) = view.pair_of(vm).filter(|(_, pair)| !pair.value.may_run(vm)) else { return Ok(()) };
    let (old, new) = (name(view, vm), name(view, pair.value.active));
    let text = format!("{old} was the active one until {new} took over, and would be so again: two would lead");
    Err(conflict(text).hint(format!(
        "virtward ha enable {new} --standby none, start {old}, make it follow {new}, then make them a pair again: docs/ha.md"
    )))
}

/// As the API shows it.
pub(super) fn show(view: &View, vm: VmId) -> Option<HaPair> {
    let (key, pair) = view.pair_of(vm)?;
    let pair = &pair.value;
    Some(HaPair {
        role: if pair.active == vm { "active" } else { "standby" }.into(),
        other: name(view, pair.other(vm)),
        generation: pair.generation,
        settled: pair.is_settled(),
        takes_over: pair.active == vm && pair::fit(view, key).is_ok(),
        note: pair.note.clone(),
    })
}

/// How the active one of a pair was given its standby.
pub(super) fn policy(view: &View, vm: VmId) -> Option<HaStandby> {
    let (_, pair) = view.pair_of(vm).filter(|(_, pair)| pair.value.active == vm)?;
    let pair = &pair.value;
    let address = |of: &Floating| HaAddress { address: of.address.clone(), device: of.device.clone() };
    Some(HaStandby {
        vm: name(view, pair.standby),
        promote: pair.promote.clone(),
        demote: pair.demote.clone(),
        addresses: pair.addresses.iter().map(address).collect(),
    })
}

/// In sentences.
pub(super) fn explain(view: &View, vm: VmId) -> Vec<String> {
    let Some((key, pair)) = view.pair_of(vm) else { return Vec::new() };
    let (pair, other) = (&pair.value, name(view, pair.value.other(vm)));
    let mut lines = Vec::new();
    match (pair.active == vm, pair.is_settled()) {
        (true, true) => lines.push(format!("it is the active one of a pair, generation {}", pair.generation)),
        (true, false) => match pair::duty(view, vm) {
            Some(pair::Duty::Wait(_)) => {
                lines.push(format!("it takes over as soon as it is proved that {other} is over"));
            }
            _ => lines.push("it is about to be made the active one: addresses, promote hook".into()),
        },
        (false, _) => lines.push(format!("it is the standby of {other}, generation {}", pair.generation)),
    }
    if pair.active == vm {
        match pair::fit(view, key) {
            Ok(owner) => lines.push(format!("{other} on {} would take over", owner.host)),
            Err(unfit) => lines.push(format!("nobody would take over: {unfit}")),
        }
    } else if !pair.may_run(vm) {
        lines.push(format!("it led before {other} did, and stays down until it was made to follow"));
    }
    lines.push(format!("last of the pair: {}", pair.note));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_ipv4_with_a_prefix_on_a_device_and_a_hook_is_a_whole_path() {
        let of = |address: &str, device: &str| {
            addresses(&[HaAddress { address: address.into(), device: device.into() }]).map(|all| all[0].clone())
        };
        assert_eq!(of("10.0.0.9/24", "eth0").unwrap().address, "10.0.0.9/24");
        for (address, device) in [
            ("10.0.0.9", "eth0"),
            ("10.0.0.9/33", "eth0"),
            ("fd00::1/64", "eth0"),
            ("10.0.0.9/24", ""),
            ("10.0.0.9/24", "-f x"),
        ] {
            assert!(of(address, device).is_err(), "{address} {device}");
        }
        assert!(hook("promote", &["pg_ctl".into()]).is_err() && hook("promote", &[]).is_err());
        assert!(hook("promote", &["/usr/local/bin/promote".into()]).is_ok());
    }
}
