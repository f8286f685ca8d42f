//! One domain: everything the driver does to it, each a thin wrapper of one libvirt function.

use std::ffi::{c_int, c_uint};
use std::ptr::{self, NonNull};

use uuid::Uuid;

use super::{Params, ParamsBuilder, VirError, VirResult, c_string, check, copy_string, take_string};

/// A reference to a domain, given back on drop. Used on the thread that made it.
pub(in crate::libvirt) struct Domain(NonNull<virt_sys::virDomain>);

/// A reference to a checkpoint, given back on drop.
pub(in crate::libvirt) struct Checkpoint(NonNull<virt_sys::virDomainCheckpoint>);

/// Progress of a block job.
pub(in crate::libvirt) struct BlockJob {
    pub(in crate::libvirt) kind: c_uint,
    pub(in crate::libvirt) current: u64,
    pub(in crate::libvirt) end: u64,
}

/// Takes over an array of domain references and frees the array.
///
/// # Safety
/// `array` must be a malloc'ed array of `count` non-null references that belong to the caller.
pub(super) unsafe fn take_array(array: *mut virt_sys::virDomainPtr, count: c_int) -> Vec<Domain> {
    let mut domains = Vec::new();
    for i in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: within the array (caller).
        if let Some(ptr) = NonNull::new(unsafe { *array.add(i) }) {
            domains.push(Domain(ptr));
        }
    }
    // SAFETY: malloc'ed by libvirt and not used again.
    unsafe { libc::free(array.cast()) };
    domains
}

impl Domain {
    /// Owns a pointer that a call returned; null is that call's error.
    pub(super) fn take(ptr: virt_sys::virDomainPtr) -> VirResult<Domain> {
        NonNull::new(ptr).map(Domain).ok_or_else(VirError::last)
    }

    fn raw(&self) -> virt_sys::virDomainPtr {
        self.0.as_ptr()
    }

    pub(in crate::libvirt) fn name(&self) -> String {
        // SAFETY: the domain is valid; the name belongs to it and is copied.
        copy_string(unsafe { virt_sys::virDomainGetName(self.raw()) })
    }

    pub(in crate::libvirt) fn uuid(&self) -> VirResult<Uuid> {
        let mut uuid = [0u8; 16];
        // SAFETY: the domain is valid, the buffer has VIR_UUID_BUFLEN bytes.
        check(unsafe { virt_sys::virDomainGetUUID(self.raw(), uuid.as_mut_ptr()) })?;
        Ok(Uuid::from_bytes(uuid))
    }

    /// virDomainState.
    pub(in crate::libvirt) fn state(&self) -> VirResult<c_uint> {
        let mut state: c_int = 0;
        // SAFETY: the domain is valid, the pointer is to a local; a null reason is allowed.
        check(unsafe { virt_sys::virDomainGetState(self.raw(), &mut state, ptr::null_mut(), 0) })?;
        Ok(state as c_uint)
    }

    pub(in crate::libvirt) fn is_active(&self) -> VirResult<bool> {
        // SAFETY: the domain is valid.
        Ok(check(unsafe { virt_sys::virDomainIsActive(self.raw()) })? == 1)
    }

    pub(in crate::libvirt) fn is_persistent(&self) -> VirResult<bool> {
        // SAFETY: the domain is valid.
        Ok(check(unsafe { virt_sys::virDomainIsPersistent(self.raw()) })? == 1)
    }

    pub(in crate::libvirt) fn xml(&self, flags: c_uint) -> VirResult<String> {
        // SAFETY: the domain is valid; the string returned is ours.
        take_string(unsafe { virt_sys::virDomainGetXMLDesc(self.raw(), flags) })
    }

    pub(in crate::libvirt) fn undefine(&self, flags: c_uint) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainUndefineFlags(self.raw(), flags) }).map(drop)
    }

    pub(in crate::libvirt) fn has_managed_save(&self) -> VirResult<bool> {
        // SAFETY: the domain is valid.
        Ok(check(unsafe { virt_sys::virDomainHasManagedSaveImage(self.raw(), 0) })? == 1)
    }

    pub(in crate::libvirt) fn managed_save_remove(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainManagedSaveRemove(self.raw(), 0) }).map(drop)
    }

    pub(in crate::libvirt) fn autostart(&self) -> VirResult<bool> {
        let mut on: c_int = 0;
        // SAFETY: the domain is valid; the number outlives the call.
        check(unsafe { virt_sys::virDomainGetAutostart(self.raw(), &mut on) })?;
        Ok(on != 0)
    }

    pub(in crate::libvirt) fn set_autostart(&self, on: bool) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainSetAutostart(self.raw(), c_int::from(on)) }).map(drop)
    }

    pub(in crate::libvirt) fn start(&self, flags: c_uint) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainCreateWithFlags(self.raw(), flags) }).map(drop)
    }

    pub(in crate::libvirt) fn shutdown(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainShutdownFlags(self.raw(), 0) }).map(drop)
    }

    pub(in crate::libvirt) fn destroy(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainDestroyFlags(self.raw(), 0) }).map(drop)
    }

    pub(in crate::libvirt) fn suspend(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainSuspend(self.raw()) }).map(drop)
    }

    pub(in crate::libvirt) fn resume(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainResume(self.raw()) }).map(drop)
    }

    pub(in crate::libvirt) fn reset(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainReset(self.raw(), 0) }).map(drop)
    }

    /// One guest agent command.
    pub(in crate::libvirt) fn agent(&self, command: &str, timeout_s: c_int) -> VirResult<String> {
        let command = c_string(command)?;
        // SAFETY: the domain is valid, the string NUL-terminated; the string returned is ours.
        take_string(unsafe { virt_sys::virDomainQemuAgentCommand(self.raw(), command.as_ptr(), timeout_s, 0) })
    }

    /// One QMP command; the answer is QEMU's whole reply.
    pub(in crate::libvirt) fn monitor(&self, command: &str) -> VirResult<String> {
        let command = c_string(command)?;
        let mut answer = ptr::null_mut();
        // SAFETY: the domain is valid, the string NUL-terminated, the pointer is to a local; the answer is ours.
        check(unsafe { virt_sys::virDomainQemuMonitorCommand(self.raw(), command.as_ptr(), &mut answer, 0) })?;
        take_string(answer)
    }

    pub(in crate::libvirt) fn backup_begin(
        &self,
        backup: &str,
        checkpoint: Option<&str>,
        reuse_external: bool,
    ) -> VirResult<()> {
        let backup = c_string(backup)?;
        let checkpoint = checkpoint.map(c_string).transpose()?;
        let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |c| c.as_ptr());
        let flags = if reuse_external { virt_sys::VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL } else { 0 };
        // SAFETY: the domain is valid; both strings outlive the call, a null checkpoint means none.
        check(unsafe { virt_sys::virDomainBackupBegin(self.raw(), backup.as_ptr(), checkpoint, flags) }).map(drop)
    }

    pub(in crate::libvirt) fn backup_xml(&self) -> VirResult<String> {
        // SAFETY: the domain is valid; the string returned is ours.
        take_string(unsafe { virt_sys::virDomainBackupGetXMLDesc(self.raw(), 0) })
    }

    /// virDomainJobType and what is known of the domain-wide job; of the last one that ended if `done`.
    pub(in crate::libvirt) fn job(&self, done: bool) -> VirResult<(c_uint, Params)> {
        let flags = match done {
            true => virt_sys::VIR_DOMAIN_JOB_STATS_COMPLETED | virt_sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED,
            false => 0,
        };
        let mut kind: c_int = 0;
        let mut array = ptr::null_mut();
        let mut count: c_int = 0;
        // SAFETY: the domain is valid, the pointers are to locals of the right types.
        check(unsafe { virt_sys::virDomainGetJobStats(self.raw(), &mut kind, &mut array, &mut count, flags) })?;
        // SAFETY: on success the array holds `count` parameters.
        let params = unsafe { Params::copy(array, count) };
        // SAFETY: the array is ours and not used again.
        unsafe { virt_sys::virTypedParamsFree(array, count) };
        Ok((kind as c_uint, params))
    }

    pub(in crate::libvirt) fn abort_job(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainAbortJob(self.raw()) }).map(drop)
    }

    /// Checkpoints, parents before children.
    pub(in crate::libvirt) fn checkpoints(&self) -> VirResult<Vec<Checkpoint>> {
        let mut array: *mut virt_sys::virDomainCheckpointPtr = ptr::null_mut();
        let flags = virt_sys::VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL;
        // SAFETY: the domain is valid, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virDomainListAllCheckpoints(self.raw(), &mut array, flags) })?;
        let mut list = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: on success the array holds `count` references that become ours.
            if let Some(ptr) = NonNull::new(unsafe { *array.add(i) }) {
                list.push(Checkpoint(ptr));
            }
        }
        // SAFETY: the array itself is malloc'ed and not used again.
        unsafe { libc::free(array.cast()) };
        Ok(list)
    }

    pub(in crate::libvirt) fn checkpoint(&self, name: &str) -> VirResult<Checkpoint> {
        let name = c_string(name)?;
        // SAFETY: the domain is valid, the string NUL-terminated.
        let ptr = unsafe { virt_sys::virDomainCheckpointLookupByName(self.raw(), name.as_ptr(), 0) };
        NonNull::new(ptr).map(Checkpoint).ok_or_else(VirError::last)
    }

    pub(in crate::libvirt) fn checkpoint_create(&self, xml: &str, flags: c_uint) -> VirResult<Checkpoint> {
        let xml = c_string(xml)?;
        // SAFETY: the domain is valid, the string NUL-terminated.
        let ptr = unsafe { virt_sys::virDomainCheckpointCreateXML(self.raw(), xml.as_ptr(), flags) };
        NonNull::new(ptr).map(Checkpoint).ok_or_else(VirError::last)
    }

    pub(in crate::libvirt) fn block_copy(
        &self,
        target: &str,
        xml: &str,
        params: &ParamsBuilder,
        flags: c_uint,
    ) -> VirResult<()> {
        let (target, xml) = (c_string(target)?, c_string(xml)?);
        let (array, count) = params.as_raw();
        // SAFETY: the domain is valid, strings and parameters outlive the call and are only read.
        let rc =
            unsafe { virt_sys::virDomainBlockCopy(self.raw(), target.as_ptr(), xml.as_ptr(), array, count, flags) };
        check(rc).map(drop)
    }

    /// The block job on a disk, if any.
    pub(in crate::libvirt) fn block_job(&self, target: &str) -> VirResult<Option<BlockJob>> {
        let target = c_string(target)?;
        // SAFETY: an all-zero info struct is a valid value of its integer fields.
        let mut info: virt_sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the domain is valid, the string NUL-terminated, the pointer is to a local of the right type.
        let rc = check(unsafe { virt_sys::virDomainGetBlockJobInfo(self.raw(), target.as_ptr(), &mut info, 0) })?;
        Ok((rc == 1).then_some(BlockJob { kind: info.type_ as c_uint, current: info.cur, end: info.end }))
    }

    pub(in crate::libvirt) fn block_job_abort(&self, target: &str, flags: c_uint) -> VirResult<()> {
        let target = c_string(target)?;
        // SAFETY: the domain is valid, the string NUL-terminated.
        check(unsafe { virt_sys::virDomainBlockJobAbort(self.raw(), target.as_ptr(), flags) }).map(drop)
    }

    /// Longest downtime of a migration, in milliseconds.
    pub(in crate::libvirt) fn migrate_max_downtime(&self, ms: u64) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainMigrateSetMaxDowntime(self.raw(), ms, 0) }).map(drop)
    }

    /// Bandwidth of a migration, in MiB/s.
    pub(in crate::libvirt) fn migrate_max_speed(&self, mib_s: u64) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainMigrateSetMaxSpeed(self.raw(), mib_s, 0) }).map(drop)
    }

    pub(in crate::libvirt) fn migrate_postcopy(&self) -> VirResult<()> {
        // SAFETY: the domain is valid.
        check(unsafe { virt_sys::virDomainMigrateStartPostCopy(self.raw(), 0) }).map(drop)
    }

    pub(in crate::libvirt) fn migrate(&self, uri: &str, params: &ParamsBuilder, flags: c_uint) -> VirResult<()> {
        let uri = c_string(uri)?;
        let (array, count) = params.as_raw();
        // SAFETY: the domain is valid, string and parameters outlive the call and are only read.
        let rc = unsafe { virt_sys::virDomainMigrateToURI3(self.raw(), uri.as_ptr(), array, count as c_uint, flags) };
        check(rc).map(drop)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: the reference is ours and not used again.
        unsafe { virt_sys::virDomainFree(self.raw()) };
    }
}

impl Checkpoint {
    pub(in crate::libvirt) fn xml(&self) -> VirResult<String> {
        // SAFETY: the checkpoint is valid; the string returned is ours.
        take_string(unsafe {
            virt_sys::virDomainCheckpointGetXMLDesc(self.0.as_ptr(), virt_sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        })
    }

    pub(in crate::libvirt) fn delete(&self, flags: c_uint) -> VirResult<()> {
        // SAFETY: the checkpoint is valid.
        check(unsafe { virt_sys::virDomainCheckpointDelete(self.0.as_ptr(), flags) }).map(drop)
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // SAFETY: the reference is ours and not used again.
        unsafe { virt_sys::virDomainCheckpointFree(self.0.as_ptr()) };
    }
}
