//! What a guest says of itself through its agent: its host name, its operating system, its addresses.
//!
//! A guest is not trusted: what it says is shown to people and decides nothing. It is bounded, without characters that
//! would change how the text around it looks, and what makes no sense is left out. An agent that does not know a question,
//! or refuses it while file systems are frozen, takes nothing from what is known already.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;
use virtward_hypervisor::{ErrorKind, Hypervisor};

use crate::collect::Nic;

/// How long an agent may take for one answer.
const ANSWER_S: u32 = 3;
const ANSWER_BYTES_MAX: usize = 256 << 10;
const NAME_CHARS_MAX: usize = 253;
const OS_CHARS_MAX: usize = 120;
/// Addresses of one interface.
const ADDRESSES_MAX: usize = 16;

/// What a guest says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestFacts {
    /// Its host name.
    pub hostname: Option<String>,
    /// Its operating system, for people: `Debian GNU/Linux 12 (bookworm)`.
    pub os: Option<String>,
    /// Addresses by the MAC address of the VM's interface, in lower case; without those of the loopback and of the link.
    pub addresses: BTreeMap<String, BTreeSet<IpAddr>>,
}

/// Asks a running guest; what is known of it now, if it answers at all. Takes some seconds at worst.
pub async fn ask(
    hypervisor: &dyn Hypervisor,
    vm: Uuid,
    nics: &[Nic],
    known: &GuestFacts,
) -> virtward_hypervisor::Result<GuestFacts> {
    let mut facts = known.clone();
    if let Some(answer) = question(hypervisor, vm, "guest-get-host-name").await? {
        facts.hostname = words(&answer["host-name"], NAME_CHARS_MAX);
    }
    if let Some(answer) = question(hypervisor, vm, "guest-get-osinfo").await? {
        facts.os = os(&answer);
    }
    if let Some(answer) = question(hypervisor, vm, "guest-network-get-interfaces").await? {
        facts.addresses = addresses(&answer, nics);
    }
    Ok(facts)
}

/// One question; none if the agent does not answer it, or no sense.
async fn question(hypervisor: &dyn Hypervisor, vm: Uuid, command: &str) -> virtward_hypervisor::Result<Option<Value>> {
    match hypervisor.agent(vm, &json!({ "execute": command }).to_string(), ANSWER_S).await {
        Ok(answer) => Ok(value(&answer)),
        Err(error) if error.kind == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

fn value(answer: &str) -> Option<Value> {
    if answer.len() > ANSWER_BYTES_MAX {
        return None;
    }
    let mut answer: Value = serde_json::from_str(answer).ok()?;
    Some(answer.get_mut("return")?.take())
}

/// A text on one line, without what a terminal or a browser would obey.
fn words(value: &Value, chars_max: usize) -> Option<String> {
    // Marks of direction let a text show another one than it is.
    let is_mark =
        |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    let plain = value.as_str()?.chars().filter(|c| !is_mark(*c)).map(|c| if c.is_control() { ' ' } else { c });
    let text: String = plain.take(chars_max).collect();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn os(answer: &Value) -> Option<String> {
    let field = |name: &str| words(&answer[name], OS_CHARS_MAX);
    field("pretty-name").or_else(|| {
        let name = field("name").or_else(|| field("id"))?;
        let version = field("version").or_else(|| field("version-id"));
        Some(version.map_or(name.clone(), |version| format!("{name} {version}")))
    })
}

fn addresses(answer: &Value, nics: &[Nic]) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let mut found: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    let macs: BTreeSet<String> = nics.iter().filter_map(|nic| Some(nic.mac.as_ref()?.to_ascii_lowercase())).collect();
    for interface in answer.as_array().into_iter().flatten() {
        // Bridges and containers inside the guest come and go; what is of use is where the VM itself is reached.
        let mac = interface["hardware-address"].as_str().map(str::to_ascii_lowercase);
        let Some(mac) = mac.filter(|mac| macs.contains(mac)) else { continue };
        let of = found.entry(mac).or_default();
        for address in interface["ip-addresses"].as_array().into_iter().flatten() {
            let address = address["ip-address"].as_str().and_then(|text| text.parse().ok());
            let Some(address) = address.filter(is_useful) else { continue };
            if of.len() < ADDRESSES_MAX {
                of.insert(address);
            }
        }
    }
    found.retain(|_, addresses| !addresses.is_empty());
    found
}

fn is_useful(address: &IpAddr) -> bool {
    let is_of_link = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(is_of_link || address.is_loopback() || address.is_unspecified() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nics(macs: &[&str]) -> Vec<Nic> {
        macs.iter().map(|mac| Nic { mac: Some((*mac).into()), ..Nic::default() }).collect()
    }

    #[test]
    fn systems_name_themselves_in_different_ways() {
        let linux =
            json!({"pretty-name": "Debian GNU/Linux 12 (bookworm)", "name": "Debian GNU/Linux", "id": "debian"});
        assert_eq!(os(&linux).as_deref(), Some("Debian GNU/Linux 12 (bookworm)"));
        let bare = json!({"name": "FreeBSD", "version-id": "14.1"});
        assert_eq!(os(&bare).as_deref(), Some("FreeBSD 14.1"));
        assert_eq!(os(&json!({"kernel-release": "6.1.0"})), None);
    }

    #[test]
    fn addresses_are_those_by_which_the_vm_is_reached() {
        let answer = json!([
            {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
            {"name": "eth0", "hardware-address": "52:54:00:00:00:0A", "ip-addresses": [
                {"ip-address": "2001:db8::5"}, {"ip-address": "192.0.2.5"}, {"ip-address": "fe80::1"},
                {"ip-address": "169.254.1.1"}, {"ip-address": "192.0.2.5<script>"}, {"ip-address": 7}, {}]},
            {"name": "docker0", "hardware-address": "02:42:00:00:00:01", "ip-addresses": [{"ip-address": "172.17.0.1"}]},
            {"name": "eth1", "hardware-address": "52:54:00:00:00:0b"},
        ]);
        let found = addresses(&answer, &nics(&["52:54:00:00:00:0a", "52:54:00:00:00:0B"]));
        let of: Vec<String> = found["52:54:00:00:00:0a"].iter().map(ToString::to_string).collect();
        assert_eq!((found.len(), of), (1, vec!["192.0.2.5".to_owned(), "2001:db8::5".to_owned()]));
        let many: Vec<Value> =
            (0..5000).map(|n| json!({"ip-address": format!("10.0.{}.{}", n / 250, n % 250 + 1)})).collect();
        let answer = json!([{"hardware-address": "52:54:00:00:00:0a", "ip-addresses": many}]);
        assert_eq!(addresses(&answer, &nics(&["52:54:00:00:00:0a"]))["52:54:00:00:00:0a"].len(), ADDRESSES_MAX);
    }

    #[test]
    fn a_hostile_guest_says_little() {
        let name = |text: &str| words(&json!(text), NAME_CHARS_MAX);
        assert_eq!(name("\u{1b}[31mroot\r\n\u{0}").as_deref(), Some("[31mroot"));
        assert_eq!(name("db\u{202e}1\u{200b}").as_deref(), Some("db1"));
        assert_eq!(name(&"x".repeat(1 << 20)).map(|name| name.len()), Some(NAME_CHARS_MAX));
        assert_eq!((name(" \n\t"), words(&json!({"a": 1}), 9), words(&Value::Null, 9)), (None, None, None));
        let deep = format!("{{\"return\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        let long = json!({"return": {"host-name": "y".repeat(ANSWER_BYTES_MAX)}}).to_string();
        for nonsense in ["", "{", "[]", "7", "{\"error\":{}}", &deep, &long] {
            assert_eq!(value(nonsense), None);
        }
        for odd in [json!(null), json!("x"), json!([1, [], {"hardware-address": 3}]), json!({"a": []})] {
            assert_eq!((os(&odd), addresses(&odd, &nics(&["52:54:00:00:00:0a"])).len()), (None, 0));
        }
    }
}
