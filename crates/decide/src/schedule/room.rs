//! What backups take of the cluster, of hosts, storages and repositories, and what is left.
//!
//! The same limits hold for what the planner starts and for what people ask for. The latter wait as jobs in a queue, on
//! whatever node will do them; [`admit`] tells of the whole queue which may begin. Every daemon that knows the same jobs
//! comes to the same answer, so two never take the same room: whoever was asked for first goes first.

use std::collections::{HashMap, HashSet};

use super::{Job, Limits, Why};

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
    pub(super) fn add(&mut self, host: &'a str, storages: &'a [String], repository: &'a str) {
        self.total += 1;
        *self.hosts.entry(host).or_default() += 1;
        *self.repositories.entry(repository).or_default() += 1;
        for storage in storages {
            *self.storages.entry(storage).or_default() += 1;
        }
    }

    /// Whether one more may run there, and if not, why.
    pub(super) fn room(&self, limits: &Limits, host: &str, storages: &[String], repository: &str) -> Result<(), Why> {
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

/// What each of the backups that wait waits for; nothing: it may begin. `waiting` is in the order in which they were asked
/// for, and holds only what nothing but limits keeps from beginning. One whose VM is being backed up, or waits further
/// ahead, takes no room: it will not begin now. The time between two starts on a host is the planner's, for runs that
/// nobody waits for.
pub fn admit(running: &[Job], waiting: &[Job], limits: &Limits) -> Vec<Option<Why>> {
    let mut taken = Taken::default();
    let mut vms: HashSet<_> = running.iter().map(|job| job.vm).collect();
    running.iter().for_each(|job| taken.add(&job.host, &job.storages, &job.repository));
    let judge = waiting.iter().map(|job| {
        let why = taken.room(limits, &job.host, &job.storages, &job.repository).err();
        if why.is_none() && vms.insert(job.vm) {
            taken.add(&job.host, &job.storages, &job.repository);
        }
        why
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
