//! A connection to libvirt, and what is asked of the host rather than of one domain.

use std::ffi::{c_uint, c_ulong};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use super::events::{self, Registration};
use super::{Domain, Params, Sink, VirError, VirResult, c_string, check, copy_string, error, take_string};

/// An open connection. Usable from several threads at once; closed on drop.
pub(in crate::libvirt) struct Conn {
    ptr: NonNull<virt_sys::virConnect>,
    registration: Mutex<Option<Registration>>,
}

// SAFETY: libvirt documents virConnectPtr as usable from any thread, with locks of its own; errors are thread-local.
unsafe impl Send for Conn {}
// SAFETY: as above.
unsafe impl Sync for Conn {}

impl Conn {
    /// Opens `uri`; blocks for as long as the transport takes. Starts the event loop first, as keepalive needs it.
    pub(in crate::libvirt) fn open(uri: &str) -> VirResult<Conn> {
        error::silence();
        events::ensure_loop()?;
        let uri = c_string(uri)?;
        // SAFETY: the URI is NUL-terminated and read during the call only; no credentials callback: a daemon cannot
        // answer prompts.
        let ptr = unsafe { virt_sys::virConnectOpenAuth(uri.as_ptr(), ptr::null_mut(), 0) };
        let ptr = NonNull::new(ptr).ok_or_else(VirError::last)?;
        Ok(Conn { ptr, registration: Mutex::new(None) })
    }

    pub(super) fn raw(&self) -> virt_sys::virConnectPtr {
        self.ptr.as_ptr()
    }

    /// Asks for a sign of life every `interval_s` seconds, and breaks the connection after `count` without one.
    pub(in crate::libvirt) fn keepalive(&self, interval_s: i32, count: u32) -> VirResult<()> {
        // SAFETY: the connection is open. A driver without keepalive returns 1 or an error, which the caller judges.
        check(unsafe { virt_sys::virConnectSetKeepAlive(self.raw(), interval_s, count) })?;
        Ok(())
    }

    /// Delivers domain events and the connection's end to `sink` until drop.
    pub(in crate::libvirt) fn subscribe(&self, sink: Arc<dyn Sink>) {
        // SAFETY: the connection is open, and drop removes the registration before it closes the connection.
        let registration = unsafe { Registration::add(self.raw(), &sink) };
        *self.registration.lock().unwrap_or_else(PoisonError::into_inner) = Some(registration);
    }

    /// Whether the transport works as far as is known here. Does not ask the daemon.
    pub(in crate::libvirt) fn is_alive(&self) -> bool {
        // SAFETY: the connection is open.
        unsafe { virt_sys::virConnectIsAlive(self.raw()) == 1 }
    }

    pub(in crate::libvirt) fn hostname(&self) -> VirResult<String> {
        // SAFETY: the connection is open; the string returned is ours.
        take_string(unsafe { virt_sys::virConnectGetHostname(self.raw()) })
    }

    pub(in crate::libvirt) fn uri(&self) -> VirResult<String> {
        // SAFETY: the connection is open; the string returned is ours.
        take_string(unsafe { virt_sys::virConnectGetURI(self.raw()) })
    }

    pub(in crate::libvirt) fn capabilities(&self) -> VirResult<String> {
        // SAFETY: the connection is open; the string returned is ours.
        take_string(unsafe { virt_sys::virConnectGetCapabilities(self.raw()) })
    }

    /// Version of the daemon's libvirt.
    pub(in crate::libvirt) fn libvirt_version(&self) -> VirResult<u64> {
        let mut version: c_ulong = 0;
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        check(unsafe { virt_sys::virConnectGetLibVersion(self.raw(), &mut version) })?;
        Ok(version)
    }

    /// Version of the hypervisor.
    pub(in crate::libvirt) fn hypervisor_version(&self) -> VirResult<u64> {
        let mut version: c_ulong = 0;
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        check(unsafe { virt_sys::virConnectGetVersion(self.raw(), &mut version) })?;
        Ok(version)
    }

    /// Every domain, active and inactive.
    pub(in crate::libvirt) fn domains(&self) -> VirResult<Vec<Domain>> {
        let mut array: *mut virt_sys::virDomainPtr = ptr::null_mut();
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virConnectListAllDomains(self.raw(), &mut array, 0) })?;
        // SAFETY: on success the array holds `count` domain references that become ours, and is malloc'ed.
        Ok(unsafe { super::domain::take_array(array, count) })
    }

    pub(in crate::libvirt) fn by_uuid(&self, uuid: Uuid) -> VirResult<Domain> {
        // SAFETY: the connection is open, the pointer is to VIR_UUID_BUFLEN (16) bytes.
        Domain::take(unsafe { virt_sys::virDomainLookupByUUID(self.raw(), uuid.as_bytes().as_ptr()) })
    }

    pub(in crate::libvirt) fn by_name(&self, name: &str) -> VirResult<Domain> {
        let name = c_string(name)?;
        // SAFETY: the connection is open, the string is NUL-terminated.
        Domain::take(unsafe { virt_sys::virDomainLookupByName(self.raw(), name.as_ptr()) })
    }

    pub(in crate::libvirt) fn define(&self, xml: &str) -> VirResult<Domain> {
        let xml = c_string(xml)?;
        // SAFETY: the connection is open, the string is NUL-terminated.
        Domain::take(unsafe { virt_sys::virDomainDefineXMLFlags(self.raw(), xml.as_ptr(), 0) })
    }

    /// Counters of every active domain: UUID, name, parameters.
    pub(in crate::libvirt) fn stats(&self, groups: c_uint) -> VirResult<Vec<(Uuid, String, Params)>> {
        let mut records: *mut virt_sys::virDomainStatsRecordPtr = ptr::null_mut();
        let flags =
            virt_sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | virt_sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virConnectGetAllDomainStats(self.raw(), groups, &mut records, flags) })?;
        let mut answer = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: on success `records` holds `count` non-null records.
            let record = unsafe { &**records.add(i) };
            let mut uuid = [0u8; 16];
            // SAFETY: the record's domain is valid until the list is freed; the buffer has 16 bytes.
            if unsafe { virt_sys::virDomainGetUUID(record.dom, uuid.as_mut_ptr()) } < 0 {
                continue;
            }
            // SAFETY: as above; the name belongs to the domain and is copied.
            let name = copy_string(unsafe { virt_sys::virDomainGetName(record.dom) });
            // SAFETY: the record describes its own array.
            let params = unsafe { Params::copy(record.params, record.nparams) };
            answer.push((Uuid::from_bytes(uuid), name, params));
        }
        // SAFETY: the list came from virConnectGetAllDomainStats, is freed once and not used again.
        unsafe { virt_sys::virDomainStatsRecordListFree(records) };
        Ok(answer)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let registration = self.registration.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut registration) = registration.take() {
            // SAFETY: the same connection, still open.
            unsafe { registration.remove(self.raw()) };
        }
        // SAFETY: this reference is ours and not used again. A positive result says that others remain (domain objects
        // of calls still under way), which is harmless.
        if unsafe { virt_sys::virConnectClose(self.raw()) } < 0 {
            tracing::debug!(error = %VirError::last().message, "closing a libvirt connection");
        }
    }
}
