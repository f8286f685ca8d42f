//! Which host reads and stores a backup: the VM's own, or a proxy that its policy names.
//!
//! A proxy takes the work off the VM's host: reading, hashing, compressing, sealing, writing. What only that host can do
//! (freeze, cut, thaw) stays there, so a job that goes through a proxy counts on both. A proxy whose daemon does not answer
//! is passed over; where none answers, the VM's own host does it all, because a backup that costs its host something is
//! worth more than none. One that answers and has as much to do as it may is waited for.

use std::collections::BTreeSet;

use super::{Limit, Why};

/// Who does it, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier<'a> {
    /// The VM's own host: no proxy was named.
    Own,
    /// The VM's own host, which is one of the proxies.
    OwnIsNamed,
    /// The VM's own host, because of these proxies none answers.
    NoneAnswers(&'a [String]),
    /// This one.
    Proxy(&'a str),
}

impl Carrier<'_> {
    /// The proxy, if there is one.
    pub fn proxy(&self) -> Option<&str> {
        match self {
            Carrier::Proxy(name) => Some(name),
            _ => None,
        }
    }

    /// For people: on which host a backup of a VM of `host` runs, and why.
    pub fn text(&self, host: &str) -> String {
        match self {
            Carrier::Own => format!("it runs on {host}, where the VM is"),
            Carrier::OwnIsNamed => format!("it runs on {host}, where the VM is, which is one of the policy's proxies"),
            Carrier::NoneAnswers(names) => {
                format!("it runs on {host}, where the VM is: no proxy of the policy answers ({})", names.join(", "))
            }
            Carrier::Proxy(name) => {
                format!("it is cut on {host}, where the VM is, and read and stored by {name}, a proxy of the policy")
            }
        }
    }
}

/// Chooses for a VM of `own` among `proxies`, hosts by name: of those in `daemons`, which answer, the one on which least
/// runs (`taken`, by host), and of equals the one that is named first.
///
/// # Errors
/// All that answer have as much to do as they may.
pub fn choose<'a>(
    own: &str,
    proxies: &'a [String],
    daemons: &BTreeSet<String>,
    taken: impl Fn(&str) -> u32,
    limit: &Limit,
) -> Result<Carrier<'a>, Why> {
    if proxies.is_empty() {
        return Ok(Carrier::Own);
    }
    if proxies.iter().any(|name| name == own) {
        return Ok(Carrier::OwnIsNamed);
    }
    let there: Vec<&str> = proxies.iter().map(String::as_str).filter(|name| daemons.contains(*name)).collect();
    let Some(first) = there.first() else { return Ok(Carrier::NoneAnswers(proxies)) };
    let free = there.iter().copied().filter(|name| taken(name) < limit.of(name));
    match free.min_by_key(|name| taken(name)) {
        Some(name) => Ok(Carrier::Proxy(name)),
        None => Err(Why::HostLimit((*first).to_owned(), limit.of(first))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_least_busy_proxy_that_answers_does_it_and_the_own_host_where_none_does() {
        let two = names(&["b1", "b2"]);
        let choose = |proxies: &[String], there: &[&str], busy: &[(&str, u32)]| {
            let taken = |name: &str| busy.iter().find(|(host, _)| *host == name).map_or(0, |(_, count)| *count);
            let daemons = names(there).into_iter().collect();
            let chosen = super::choose("h1", proxies, &daemons, taken, &Limit::each(2));
            chosen.map(|carrier| carrier.text("h1"))
        };
        let through = |name: &str| Ok(Carrier::Proxy(name).text("h1"));
        assert_eq!(choose(&[], &["h1", "b1"], &[]), Ok("it runs on h1, where the VM is".into()));
        assert_eq!(choose(&two, &["h1", "b1", "b2"], &[]), through("b1"), "the one that is named first");
        assert_eq!(choose(&two, &["h1", "b1", "b2"], &[("b1", 1)]), through("b2"));
        assert_eq!(choose(&two, &["h1", "b1"], &[("b1", 1)]), through("b1"), "another that answers is not there");
        let full = Err(Why::HostLimit("b1".into(), 2));
        assert_eq!(choose(&two, &["h1", "b1"], &[("b1", 2)]), full, "it is waited for");
        let none = "it runs on h1, where the VM is: no proxy of the policy answers (b1, b2)";
        assert_eq!(choose(&two, &["h1"], &[]), Ok(none.into()));
        let own = "it runs on h1, where the VM is, which is one of the policy's proxies";
        assert_eq!(choose(&names(&["b1", "h1"]), &["h1", "b1"], &[]), Ok(own.into()));
    }
}
