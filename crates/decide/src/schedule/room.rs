//! What backups take of the cluster, of hosts, storages and repositories, and what is left.
//!
//! The same limits hold for what the planner starts and for what people ask for. The latter wait as jobs in a queue, on
//! whatever node will do them; [`admit`] tells of the whole queue which may begin. Every daemon that knows the same jobs
//! comes to the same answer, so two never take the same room: whoever was asked for first goes first.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Carrier, Job, Limits, Why, proxy};

/// How many backups run where.
#[derive(Default)]
pub(super) struct Taken<'a> {
    total: u32,
    hosts: HashMap<&'a str, u32>,
    storages: HashMap<&'a str, u32>,
    repositories: HashMap<&'a str, u32>,
}

impl<'a> Taken<'a> {
    /// One more.
    pub(super) fn add(&mut self, host: &'a str, proxy: Option<&'a str>, storages: &'a [String], repository: &'a str) {
        self.total += 1;
        for host in [Some(host), proxy].into_iter().flatten() {
            *self.hosts.entry(host).or_default() += 1;
        }
        *self.repositories.entry(repository).or_default() += 1;
        for storage in storages {
            *self.storages.entry(storage).or_default() += 1;
        }
    }

    /// Who does one more, if it may run there; if not, why.
    pub(super) fn room<'p>(
        &self,
        limits: &Limits,
        host: &str,
        (proxies, daemons): (&'p [String], &BTreeSet<String>),
        storages: &[String],
        repository: &str,
    ) -> Result<Carrier<'p>, Why> {
        self.own_room(limits, host, storages, repository)?;
        let taken = |name: &str| self.hosts.get(name).copied().unwrap_or_default();
        proxy::choose(host, proxies, daemons, taken, &limits.per_host)
    }

    fn own_room(&self, limits: &Limits, host: &str, storages: &[String], repository: &str) -> Result<(), Why> {
        let taken = |of: &HashMap<&str, u32>, name: &str| of.get(name).copied().unwrap_or_default();
        if self.total >= limits.total {
            return Err(Why::Total(limits.total));
        }
        let limit = limits.per_repository.of(repository);
        if taken(&self.repositories, repository) >= limit {
            return Err(Why::RepositoryLimit(repository.to_owned(), limit));
        }
        let limit = limits.per_host.of(host);
        if taken(&self.hosts, host) >= limit {
            return Err(Why::HostLimit(host.to_owned(), limit));
        }
        for storage in storages {
            let limit = limits.per_storage.of(storage);
            if taken(&self.storages, storage) >= limit {
                return Err(Why::StorageLimit(storage.clone(), limit));
            }
        }
        Ok(())
    }
}

/// A backup that may begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The host that reads and stores in place of the VM's own.
    pub proxy: Option<String>,
}

/// Which of the backups that wait may begin, and through which proxy, and what the others wait for. `waiting` is in the
/// order in which they were asked for, and holds only what nothing but limits keeps from beginning. `daemons`: hosts whose
/// daemon answers. One whose VM is being backed up, or waits further
/// ahead, takes no room: it will not begin now. The time between two starts on a host is the planner's, for runs that
/// nobody waits for.
pub fn admit(
    running: &[Job],
    waiting: &[Job],
    limits: &Limits,
    daemons: &BTreeSet<String>,
) -> Vec<Result<Admitted, Why>> {
    let mut taken = Taken::default();
    let mut vms: HashSet<_> = running.iter().map(|job| job.vm).collect();
    for job in running {
        taken.add(&job.host, job.proxies.first().map(String::as_str), &job.storages, &job.repository);
    }
    let judge = waiting.iter().map(|job| {
        let carrier = taken.room(limits, &job.host, (&job.proxies, daemons), &job.storages, &job.repository)?;
        let proxy = match carrier {
            Carrier::Proxy(name) => Some(name),
            _ => None,
        };
        if vms.insert(job.vm) {
            taken.add(&job.host, proxy, &job.storages, &job.repository);
        }
        Ok(Admitted { proxy: proxy.map(str::to_owned) })
    });
    judge.collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use uuid::Uuid;

    use super::{super::Limit, *};

    fn job(vm: u128, host: &str, storage: &str, repository: &str) -> Job {
        Job {
            vm: Uuid::from_u128(vm),
            policy: None,
            host: host.into(),
            proxies: Vec::new(),
            storages: vec![storage.into()],
            repository: repository.into(),
            started: Timestamp::UNIX_EPOCH,
        }
    }

    fn limits(total: u32, host: u32, storage: u32, repository: u32) -> Limits {
        Limits {
            total,
            per_host: Limit::each(host),
            per_storage: Limit::each(storage),
            per_repository: Limit::each(repository),
            ..Limits::default()
        }
    }

    /// What each waits for.
    fn admit(running: &[Job], waiting: &[Job], limits: &Limits) -> Vec<Option<Why>> {
        super::admit(running, waiting, limits, &BTreeSet::new()).into_iter().map(Result::err).collect()
    }

    #[test]
    fn a_job_through_a_proxy_takes_room_on_both_hosts() {
        let through = |vm, host: &str, proxies: &[&str]| Job {
            proxies: proxies.iter().map(|name| (*name).to_owned()).collect(),
            ..job(vm, host, host, "main")
        };
        let daemons = ["h1", "h2", "h3", "b1", "b2"].map(str::to_owned).into();
        let running = [through(1, "h1", &["b1"])];
        let both = ["b1", "b2"];
        let waiting = [
            through(2, "h2", &both),
            through(3, "h3", &both),
            // A VM of the proxy's own, which has something to do already.
            job(4, "b1", "local", "main"),
            job(5, "h1", "local", "main"),
        ];
        let begins = |proxy: &str| Ok(Admitted { proxy: Some(proxy.into()) });
        let waits = |host: &str, limit| Err(Why::HostLimit(host.into(), limit));
        let told = super::admit(&running, &waiting, &limits(64, 1, 8, 16), &daemons);
        assert_eq!(told, [begins("b2"), waits("b1", 1), waits("b1", 1), waits("h1", 1)]);
        let told = super::admit(&running, &waiting, &limits(64, 2, 8, 16), &daemons);
        let own = || Ok(Admitted { proxy: None });
        assert_eq!(told, [begins("b2"), begins("b1"), waits("b1", 2), own()]);
        let alone = ["h1", "h2", "h3"].map(str::to_owned).into();
        assert_eq!(super::admit(&[], &waiting[..1], &limits(64, 1, 8, 16), &alone), [own()], "none answers");
    }

    #[test]
    fn the_first_that_fit_begin_and_nobody_is_held_up_by_who_does_not() {
        let running = [job(1, "h1", "san", "main")];
        let waiting = [
            job(2, "h1", "san", "main"),
            job(3, "h2", "san", "main"),
            job(4, "h2", "local", "other"),
            job(5, "h3", "local3", "main"),
        ];
        let all_fit = admit(&running, &waiting, &limits(64, 2, 8, 16));
        assert_eq!(all_fit, [None, None, None, None]);
        let by_repository = admit(&running, &waiting, &limits(64, 2, 8, 2));
        let full = Some(Why::RepositoryLimit("main".into(), 2));
        assert_eq!(by_repository, [None, full.clone(), None, full]);
        let by_storage = admit(&running, &waiting, &limits(64, 2, 2, 16));
        assert_eq!(by_storage, [None, Some(Why::StorageLimit("san".into(), 2)), None, None]);
        let by_host = admit(&running, &waiting, &limits(64, 1, 8, 16));
        // The second on h2 is one too many there; the first took the place.
        let on = |host: &str| Some(Why::HostLimit(host.into(), 1));
        assert_eq!(by_host, [on("h1"), None, on("h2"), None]);
        assert_eq!(admit(&running, &waiting, &limits(2, 2, 8, 16))[1..], vec![Some(Why::Total(2)); 3]);
    }

    #[test]
    fn a_vm_that_is_busy_already_takes_no_room_twice() {
        let running = [job(1, "h1", "san", "main")];
        let waiting = [job(1, "h1", "san", "main"), job(2, "h2", "san", "main"), job(2, "h2", "san", "main")];
        let three = [waiting.to_vec(), vec![job(3, "h3", "san", "main")]].concat();
        assert_eq!(admit(&running, &three, &limits(64, 4, 8, 3)), [None, None, None, None]);
    }
}
