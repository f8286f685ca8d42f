//! Storage pools and their volumes.

use std::ffi::{c_int, c_uint};
use std::ptr::{self, NonNull};

use super::{Conn, VirError, VirResult, c_string, check, copy_string, take_string};

/// A reference to a storage pool, given back on drop.
pub(in crate::libvirt) struct StoragePool(NonNull<virt_sys::virStoragePool>);

/// A reference to a storage volume, given back on drop.
pub(in crate::libvirt) struct StorageVolume(NonNull<virt_sys::virStorageVol>);

/// Whether a pool is running, its size and what is free of it, in bytes.
pub(in crate::libvirt) struct PoolInfo {
    pub(in crate::libvirt) running: bool,
    pub(in crate::libvirt) capacity: u64,
    pub(in crate::libvirt) available: u64,
}

/// Where a storage volume lives on the host.
pub(in crate::libvirt) struct VolumePath {
    pub(in crate::libvirt) path: String,
    pub(in crate::libvirt) is_block: bool,
}

impl Conn {
    /// Where a volume of a pool lives on the host.
    pub(in crate::libvirt) fn volume_path(&self, pool: &str, volume: &str) -> VirResult<VolumePath> {
        let volume = self.pool(pool)?.volume(volume)?;
        Ok(VolumePath { path: volume.path()?, is_block: volume.is_block() })
    }

    /// Every pool, active and inactive.
    pub(in crate::libvirt) fn pools(&self) -> VirResult<Vec<StoragePool>> {
        let mut array: *mut virt_sys::virStoragePoolPtr = ptr::null_mut();
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virConnectListAllStoragePools(self.raw(), &mut array, 0) })?;
        let mut pools = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: on success the array holds `count` references that become ours.
            if let Some(ptr) = NonNull::new(unsafe { *array.add(i) }) {
                pools.push(StoragePool(ptr));
            }
        }
        // SAFETY: the array itself is malloc'ed and not used again.
        unsafe { libc::free(array.cast()) };
        Ok(pools)
    }

    pub(in crate::libvirt) fn pool(&self, name: &str) -> VirResult<StoragePool> {
        let name = c_string(name)?;
        // SAFETY: the connection is open, the string is NUL-terminated.
        StoragePool::take(unsafe { virt_sys::virStoragePoolLookupByName(self.raw(), name.as_ptr()) })
    }

    /// Starts a pool that is gone when it is destroyed.
    pub(in crate::libvirt) fn pool_create(&self, xml: &str) -> VirResult<StoragePool> {
        let xml = c_string(xml)?;
        // SAFETY: the connection is open, the string is NUL-terminated.
        StoragePool::take(unsafe { virt_sys::virStoragePoolCreateXML(self.raw(), xml.as_ptr(), 0) })
    }
}

impl StoragePool {
    fn take(ptr: virt_sys::virStoragePoolPtr) -> VirResult<StoragePool> {
        NonNull::new(ptr).map(StoragePool).ok_or_else(VirError::last)
    }

    fn raw(&self) -> virt_sys::virStoragePoolPtr {
        self.0.as_ptr()
    }

    pub(in crate::libvirt) fn name(&self) -> String {
        // SAFETY: the pool is valid; the name belongs to it and is copied.
        copy_string(unsafe { virt_sys::virStoragePoolGetName(self.raw()) })
    }

    pub(in crate::libvirt) fn xml(&self) -> VirResult<String> {
        // SAFETY: the pool is valid; the string returned is ours.
        take_string(unsafe { virt_sys::virStoragePoolGetXMLDesc(self.raw(), 0) })
    }

    pub(in crate::libvirt) fn info(&self) -> VirResult<PoolInfo> {
        // SAFETY: an all-zero info struct is a valid value of its integer fields.
        let mut info: virt_sys::virStoragePoolInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the pool is valid, the pointer is to a local of the right type.
        check(unsafe { virt_sys::virStoragePoolGetInfo(self.raw(), &mut info) })?;
        let running = info.state as c_uint == virt_sys::VIR_STORAGE_POOL_RUNNING;
        Ok(PoolInfo { running, capacity: info.capacity, available: info.available })
    }

    /// Has libvirt look at what is in it now.
    pub(in crate::libvirt) fn refresh(&self) -> VirResult<()> {
        // SAFETY: the pool is valid.
        check(unsafe { virt_sys::virStoragePoolRefresh(self.raw(), 0) }).map(drop)
    }

    /// Stops it; volumes stay.
    pub(in crate::libvirt) fn destroy(&self) -> VirResult<()> {
        // SAFETY: the pool is valid.
        check(unsafe { virt_sys::virStoragePoolDestroy(self.raw()) }).map(drop)
    }

    pub(in crate::libvirt) fn volume(&self, name: &str) -> VirResult<StorageVolume> {
        let name = c_string(name)?;
        // SAFETY: the pool is valid, the string is NUL-terminated.
        StorageVolume::take(unsafe { virt_sys::virStorageVolLookupByName(self.raw(), name.as_ptr()) })
    }

    pub(in crate::libvirt) fn volume_create(&self, xml: &str) -> VirResult<StorageVolume> {
        let xml = c_string(xml)?;
        // SAFETY: the pool is valid, the string is NUL-terminated.
        StorageVolume::take(unsafe { virt_sys::virStorageVolCreateXML(self.raw(), xml.as_ptr(), 0) })
    }
}

impl Drop for StoragePool {
    fn drop(&mut self) {
        // SAFETY: the reference is ours and not used again.
        unsafe { virt_sys::virStoragePoolFree(self.raw()) };
    }
}

impl StorageVolume {
    fn take(ptr: virt_sys::virStorageVolPtr) -> VirResult<StorageVolume> {
        NonNull::new(ptr).map(StorageVolume).ok_or_else(VirError::last)
    }

    fn raw(&self) -> virt_sys::virStorageVolPtr {
        self.0.as_ptr()
    }

    pub(in crate::libvirt) fn xml(&self) -> VirResult<String> {
        // SAFETY: the volume is valid; the string returned is ours.
        take_string(unsafe { virt_sys::virStorageVolGetXMLDesc(self.raw(), 0) })
    }

    pub(in crate::libvirt) fn path(&self) -> VirResult<String> {
        // SAFETY: the volume is valid; the string returned is ours.
        take_string(unsafe { virt_sys::virStorageVolGetPath(self.raw()) })
    }

    pub(in crate::libvirt) fn is_block(&self) -> bool {
        // SAFETY: an all-zero info struct is a valid value of its integer fields.
        let mut info: virt_sys::virStorageVolInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the volume is valid, the pointer is to a local of the right type.
        let rc: c_int = unsafe { virt_sys::virStorageVolGetInfo(self.raw(), &mut info) };
        rc == 0 && info.type_ as c_uint == virt_sys::VIR_STORAGE_VOL_BLOCK
    }

    pub(in crate::libvirt) fn delete(&self) -> VirResult<()> {
        // SAFETY: the volume is valid.
        check(unsafe { virt_sys::virStorageVolDelete(self.raw(), 0) }).map(drop)
    }
}

impl Drop for StorageVolume {
    fn drop(&mut self) {
        // SAFETY: the reference is ours and not used again.
        unsafe { virt_sys::virStorageVolFree(self.raw()) };
    }
}
