//! What a host has and can do: processors, memory, networks, machine types.

use std::ffi::{CString, c_char, c_int};
use std::ptr;

use super::{Conn, VirResult, c_string, check, copy_string, take_string};

/// The kind of machine that a question is about.
pub(in crate::libvirt) struct Kind {
    emulator: Option<CString>,
    arch: Option<CString>,
    machine: Option<CString>,
    virt: Option<CString>,
}

impl Kind {
    /// Of these words; an empty one leaves the choice to libvirt.
    pub(in crate::libvirt) fn new(emulator: Option<&str>, arch: &str, machine: &str, virt: &str) -> VirResult<Kind> {
        let word = |text: &str| if text.is_empty() { Ok(None) } else { c_string(text).map(Some) };
        Ok(Kind {
            emulator: word(emulator.unwrap_or_default())?,
            arch: word(arch)?,
            machine: word(machine)?,
            virt: word(virt)?,
        })
    }

    fn raw(&self) -> [*const c_char; 4] {
        [&self.emulator, &self.arch, &self.machine, &self.virt].map(|w| w.as_ref().map_or(ptr::null(), |w| w.as_ptr()))
    }
}

impl Conn {
    /// CPUs and memory in bytes.
    pub(in crate::libvirt) fn node(&self) -> VirResult<(u32, u64)> {
        // SAFETY: an all-zero info struct is a valid value of its integer and character fields.
        let mut info: virt_sys::virNodeInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        check(unsafe { virt_sys::virNodeGetInfo(self.raw(), &mut info) })?;
        Ok((info.cpus, info.memory.saturating_mul(1024)))
    }

    /// Memory that is free or could be, in bytes.
    pub(in crate::libvirt) fn memory_available(&self) -> VirResult<u64> {
        const FIELDS_MAX: usize = 32;
        let mut count: c_int = 0;
        let all = virt_sys::VIR_NODE_MEMORY_STATS_ALL_CELLS;
        // SAFETY: the connection is open; with no array libvirt only writes the number of fields.
        check(unsafe { virt_sys::virNodeGetMemoryStats(self.raw(), all, ptr::null_mut(), &mut count, 0) })?;
        count = count.clamp(0, FIELDS_MAX as c_int);
        // SAFETY: all-zero structs are valid values of their character and integer fields.
        let mut fields: [virt_sys::virNodeMemoryStats; FIELDS_MAX] = unsafe { std::mem::zeroed() };
        // SAFETY: the connection is open; the array has room for `count` fields.
        check(unsafe { virt_sys::virNodeGetMemoryStats(self.raw(), all, fields.as_mut_ptr(), &mut count, 0) })?;
        let fields = fields.iter().take(usize::try_from(count).unwrap_or(0));
        let kib: u64 = fields
            .filter(|f| matches!(copy_string(f.field.as_ptr()).as_str(), "free" | "buffers" | "cached"))
            .map(|f| f.value)
            .sum();
        Ok(kib.saturating_mul(1024))
    }

    /// Names of active networks.
    pub(in crate::libvirt) fn networks(&self) -> VirResult<Vec<String>> {
        let mut array: *mut virt_sys::virNetworkPtr = ptr::null_mut();
        let flags = virt_sys::VIR_CONNECT_LIST_NETWORKS_ACTIVE;
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virConnectListAllNetworks(self.raw(), &mut array, flags) })?;
        let mut names = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: on success the array holds `count` references that become ours.
            let network = unsafe { *array.add(i) };
            // SAFETY: the network is valid; the name belongs to it and is copied.
            names.push(copy_string(unsafe { virt_sys::virNetworkGetName(network) }));
            // SAFETY: the reference is ours and not used again.
            unsafe { virt_sys::virNetworkFree(network) };
        }
        // SAFETY: the array itself is malloc'ed and not used again.
        unsafe { libc::free(array.cast()) };
        Ok(names)
    }

    /// The XML of every network device of the host.
    pub(in crate::libvirt) fn net_devices(&self) -> VirResult<Vec<String>> {
        let mut array: *mut virt_sys::virNodeDevicePtr = ptr::null_mut();
        let flags = virt_sys::VIR_CONNECT_LIST_NODE_DEVICES_CAP_NET;
        // SAFETY: the connection is open, the pointer is to a local of the right type.
        let count = check(unsafe { virt_sys::virConnectListAllNodeDevices(self.raw(), &mut array, flags) })?;
        let mut list = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: on success the array holds `count` references that become ours.
            let device = unsafe { *array.add(i) };
            // SAFETY: the device is valid; the string returned is ours. One that went away meanwhile is left out.
            list.extend(take_string(unsafe { virt_sys::virNodeDeviceGetXMLDesc(device, 0) }));
            // SAFETY: the reference is ours and not used again.
            unsafe { virt_sys::virNodeDeviceFree(device) };
        }
        // SAFETY: the array itself is malloc'ed and not used again.
        unsafe { libc::free(array.cast()) };
        Ok(list)
    }

    /// What the host's hypervisor offers to machines of a kind.
    pub(in crate::libvirt) fn domain_capabilities(&self, kind: &Kind) -> VirResult<String> {
        let [emulator, arch, machine, virt] = kind.raw();
        // SAFETY: the connection is open; strings are NUL-terminated or null and outlive the call; the answer is ours.
        take_string(unsafe { virt_sys::virConnectGetDomainCapabilities(self.raw(), emulator, arch, machine, virt, 0) })
    }

    /// virCPUCompareResult of a `<cpu>` with what the hypervisor can give to machines of a kind.
    pub(in crate::libvirt) fn cpu_compare(&self, kind: &Kind, cpu: &str) -> VirResult<c_int> {
        let [emulator, arch, machine, virt] = kind.raw();
        let cpu = c_string(cpu)?;
        let flags = virt_sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE;
        // SAFETY: the connection is open; strings are NUL-terminated or null and outlive the call.
        check(unsafe {
            virt_sys::virConnectCompareHypervisorCPU(self.raw(), emulator, arch, machine, virt, cpu.as_ptr(), flags)
        })
    }

    /// The `<cpu>` that these have in common on machines of a kind.
    pub(in crate::libvirt) fn cpu_baseline(&self, kind: &Kind, cpus: &[String]) -> VirResult<String> {
        let [emulator, arch, machine, virt] = kind.raw();
        let cpus = cpus.iter().map(|cpu| c_string(cpu)).collect::<VirResult<Vec<_>>>()?;
        let mut pointers: Vec<*const c_char> = cpus.iter().map(|cpu| cpu.as_ptr()).collect();
        let count = u32::try_from(pointers.len()).unwrap_or(u32::MAX);
        let flags = virt_sys::VIR_CONNECT_BASELINE_CPU_MIGRATABLE;
        // SAFETY: the connection is open; strings are NUL-terminated or null, the array holds `count` of them, all of it
        // outlives the call and is only read; the answer is ours.
        take_string(unsafe {
            virt_sys::virConnectBaselineHypervisorCPU(
                self.raw(),
                emulator,
                arch,
                machine,
                virt,
                pointers.as_mut_ptr(),
                count,
                flags,
            )
        })
    }
}
