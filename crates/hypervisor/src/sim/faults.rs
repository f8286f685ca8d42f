//! What tests do to a simulated host: guests that write, and everything that goes wrong.

use uuid::Uuid;
use virtward_model::{Fit, HostOffer, VmState};

use super::domain::Domain;
use super::{Around, SimHost, World, announce};
use crate::{DomainEvent, DomainEventKind, ErrorKind};

/// How a guest agent behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentMode {
    /// Not connected.
    Absent,
    /// Answers; the guest has this many file systems.
    Answers {
        /// Mounted file systems that can be frozen.
        filesystems: u32,
    },
    /// Connected, never answers.
    Hung,
    /// Answers pings and claims to freeze one file system, but freezes none.
    Lying,
}

impl SimHost {
    /// Sets how a domain's agent behaves from now on.
    pub fn set_agent(&self, vm: Uuid, mode: AgentMode) {
        self.touch(vm, |domain, around| {
            domain.agent = mode;
            let connected = mode != AgentMode::Absent;
            around.announce(domain, DomainEventKind::Agent { connected });
        });
    }

    /// How many file systems are frozen now.
    pub fn frozen(&self, vm: Uuid) -> u32 {
        self.touch(vm, |domain, _| domain.frozen).unwrap_or(0)
    }

    /// The guest writes.
    pub fn write(&self, vm: Uuid, target: &str, offset: u64, length: u64) {
        self.touch(vm, |domain, _| {
            *domain.written_bytes.entry(target.to_owned()).or_default() += length;
            for bitmap in domain.live.get_mut(target).into_iter().flat_map(|l| l.values_mut()) {
                bitmap.mark(offset, length);
            }
        });
    }

    /// A disk gets another size.
    pub fn resize(&self, path: &str, size_bytes: u64) {
        self.lock().image(path).size_bytes = size_bytes;
    }

    /// The running backup fills its scratch space up to here.
    pub fn set_scratch_used(&self, vm: Uuid, bytes: u64) {
        self.touch(vm, |domain, _| {
            if let Some(job) = &mut domain.job {
                job.scratch_used_bytes = bytes;
            }
        });
    }

    /// The QEMU process dies. Bitmaps are not saved.
    pub fn crash(&self, vm: Uuid) {
        self.touch(vm, |domain, around| {
            if domain.state.is_active() {
                domain.end(around, false, "failed");
            }
        });
    }

    /// A disk reports an I/O error and the guest is stopped for it.
    pub fn io_error(&self, vm: Uuid, target: &str) {
        self.touch(vm, |domain, around| {
            domain.state = VmState::Paused;
            around.announce(domain, DomainEventKind::IoError { target: target.to_owned() });
            around.announce(domain, DomainEventKind::Suspended { detail: "ioerror".into() });
        });
    }

    /// A bitmap vanishes, from QEMU and from the image.
    pub fn lose_bitmap(&self, vm: Uuid, target: &str, bitmap: &str) {
        self.on_bitmap(vm, target, |domain, world, path| {
            if let Some(live) = domain.live.get_mut(target) {
                live.remove(bitmap);
            }
            world.image(path).forget(bitmap);
        });
    }

    /// A bitmap becomes unusable, in QEMU and in the image.
    pub fn spoil_bitmap(&self, vm: Uuid, target: &str, bitmap: &str) {
        self.on_bitmap(vm, target, |domain, world, path| {
            if let Some(bitmap) = domain.live.get_mut(target).and_then(|l| l.get_mut(bitmap)) {
                bitmap.inconsistent = true;
            }
            world.image(path).spoil(bitmap);
        });
    }

    /// The host forgets a domain's checkpoints, as after a restart without its state directory.
    pub fn lose_checkpoints(&self, vm: Uuid) {
        self.touch(vm, |domain, _| domain.checkpoints.clear());
    }

    /// The next call of a method of the trait fails. Orders for one method queue up.
    pub fn fail_next(&self, method: &str, kind: ErrorKind, message: &str) {
        let mut world = self.lock();
        if let Some(host) = world.hosts.get_mut(&self.name) {
            host.failures.entry(method.to_owned()).or_default().push((kind, message.to_owned()));
        }
    }

    /// Changes what the host offers and what it says of machines that might come.
    pub fn set_offer(&self, change: impl FnOnce(&mut HostOffer, &mut Fit)) {
        let mut world = self.lock();
        if let Some(host) = world.hosts.get_mut(&self.name) {
            change(&mut host.offer, &mut host.fit);
        }
    }

    /// The connection breaks (domains go on) or comes back.
    pub fn set_connected(&self, connected: bool) {
        let mut world = self.lock();
        let Some(host) = world.hosts.get_mut(&self.name) else { return };
        if std::mem::replace(&mut host.connected, connected) == connected {
            return;
        }
        self.announce_connection(connected);
    }

    /// The host loses its power: every process dies and the connection breaks. With power again the connection is back
    /// and all domains are off.
    pub fn set_power(&self, on: bool) {
        let running: Vec<Uuid> = {
            let mut world = self.lock();
            let Some(host) = world.hosts.get_mut(&self.name) else { return };
            if std::mem::replace(&mut host.powered, on) == on {
                return;
            }
            host.domains.values().filter(|d| !on && d.state.is_active()).map(|d| d.uuid).collect()
        };
        self.announce_connection(on);
        for vm in running {
            // Nobody is there to hear what happens to the domains.
            self.touch_silently(vm, |domain, around| domain.end(around, false, "failed"));
        }
    }

    fn announce_connection(&self, connected: bool) {
        let kind = if connected { DomainEventKind::ConnectionRestored } else { DomainEventKind::ConnectionLost };
        // No receiver is no error.
        let _ = self.events.send(DomainEvent { uuid: Uuid::nil(), name: String::new(), kind });
    }

    fn on_bitmap(&self, vm: Uuid, target: &str, change: impl FnOnce(&mut Domain, &mut World, &str)) {
        self.touch(vm, |domain, around| {
            let path = domain.disk(target).ok().and_then(|d| d.source.path().map(str::to_owned));
            if let Some(path) = path {
                change(domain, around.world, &path);
            }
        });
    }

    /// Changes a domain from outside of the interface; none if it does not exist.
    fn touch<T>(&self, vm: Uuid, change: impl FnOnce(&mut Domain, &mut Around<'_>) -> T) -> Option<T> {
        self.change(vm, self.events.clone(), change)
    }

    fn touch_silently<T>(&self, vm: Uuid, change: impl FnOnce(&mut Domain, &mut Around<'_>) -> T) -> Option<T> {
        self.change(vm, tokio::sync::broadcast::Sender::new(1), change)
    }

    fn change<T>(
        &self,
        vm: Uuid,
        events: tokio::sync::broadcast::Sender<DomainEvent>,
        change: impl FnOnce(&mut Domain, &mut Around<'_>) -> T,
    ) -> Option<T> {
        let mut world = self.lock();
        let mut domain = world.hosts.get_mut(&self.name)?.domains.remove(&vm)?;
        let mut around = Around { world: &mut world, events, gone: false };
        let answer = change(&mut domain, &mut around);
        if !around.gone {
            world.hosts.get_mut(&self.name)?.domains.insert(vm, domain);
        }
        Some(answer)
    }

    /// Announces an event of a domain that only the guest can cause, such as a watchdog that fires.
    pub fn guest_event(&self, vm: Uuid, kind: DomainEventKind) {
        self.touch(vm, |domain, around| announce(&around.events, domain, kind));
    }
}
